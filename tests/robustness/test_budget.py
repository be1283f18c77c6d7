import torch
from torch import nn

from hf_specreg.robustness.attacks import budget
from hf_specreg.robustness.attacks.tangent import TangentAttack
from hf_specreg.robustness.classifier import Classifier, frozen
from tests.allocated import Allocated


class Corner(nn.Module):
    """Is a corner bright? It takes next to no memory, and counts the images that it is given."""

    most = 0

    def forward(self, images):
        self.most = max(self.most, len(images))
        bright = images[:, 0, :4, :4].flatten(1).mean(1)
        return torch.stack([bright, 1 - bright], dim=1)


def attacked(count, size, **settings):
    """The network, the bytes at most and those of the result, of an attack on dark images."""
    net = Corner()
    classifier, images = Classifier(net), torch.full((count, 3, size, size), 0.3)
    labels = torch.ones(count, dtype=torch.long)
    attack = TangentAttack(iterations=2, tolerance=0.1, **settings)
    starts = torch.full_like(images, 0.7)
    with frozen(classifier), Allocated() as allocated:
        found = attack.run(classifier, images, labels, seeds=range(count), starts=starts)
    assert found.distances.isfinite().all()
    return net, allocated.peak, found.adversarials.nbytes


def test_the_bytes_counted_are_those_that_live_at_once():
    with Allocated() as allocated:
        first = torch.ones(1000)
        second = first.double() + 1
        del first
        third = second[:10] * 2
    assert allocated.live == 8000 + third.nbytes
    assert allocated.peak == 4000 + 2 * 8000


def test_the_attack_never_takes_more_than_its_budget_nor_much_less(monkeypatch):
    monkeypatch.setattr(budget, "MEMORY", 2**24)
    _, peak, result = attacked(64, 32, initial_probes=8, batch_size=64)
    assert 0.8 * 2**24 < peak - result <= 2**24


def test_64_images_at_224_pixels_are_a_forward_pass_of_64():
    net, peak, _ = attacked(2, 224, initial_probes=64)
    assert net.most == 64
    assert peak < budget.MEMORY
    assert budget.images_at_once(3 * 224 * 224, 64) >= 16
    assert budget.forward_size(3 * 32 * 32) == 1024
