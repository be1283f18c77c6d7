import pytest
import torch
from torch import nn

from hf_specreg import SpecRegModel, SpectralPenalty
from hf_specreg.robustness.attacks import make_attacks
from hf_specreg.robustness.bound import NoBoundError, lipschitz_bound
from hf_specreg.robustness.classifier import Classifier


def bound_of(network, head, size):
    sigmas = SpectralPenalty(network, head=head, input_size=size).sigmas()
    return lipschitz_bound(network.eval(), head, sigmas, pixel_std=torch.ones(1))


def chain():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.GELU(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(64, 4),
    )


def test_no_attack_finds_anything_nearer_than_the_bound():
    network = chain()
    network[1].running_var.uniform_(0.1, 2)
    bound = bound_of(network, ("5",), (1, 8, 8))
    images = torch.rand(20, 1, 8, 8)
    classifier = Classifier(network)
    labels = classifier.predict(images)
    certified = bound.distances(classifier(images).detach(), labels)
    (attack,) = make_attacks(["deepfool-l2"]).values()
    found = attack.run(classifier, images, labels, seeds=range(20), eps=()).distances
    assert (certified > 0).all()
    assert (certified <= found).all()


def test_the_bound_of_a_linear_classifier_on_the_pixels_is_exact():
    network = nn.Sequential(nn.Flatten(), nn.Identity(), nn.Linear(16, 2))
    bound = lipschitz_bound(network, ("2",), {}, pixel_std=torch.tensor([0.5]))
    logits = torch.tensor([[3.0, 1.0], [1.0, 3.0]])
    gap = (network[2].weight[0] - network[2].weight[1]).norm().item()
    expected = torch.tensor([2 / gap / 2, 0.0])  # twice as steep: pixels are divided by 0.5
    torch.testing.assert_close(bound.distances(logits, torch.tensor([0, 0])), expected)


def test_the_papers_network_has_a_bound_with_its_scaled_head():
    model = SpecRegModel.from_timm("mlp_2000").eval()
    sigmas = SpectralPenalty(model).sigmas()
    bound = lipschitz_bound(model.network, model.head, sigmas, pixel_std=model.pixel_std)
    assert bound.factors == {"hidden": sigmas["hidden"], "act": 1.129}
    torch.testing.assert_close(bound.head, model.network.head.weight / 2000**0.5)


@pytest.mark.parametrize(
    ("network", "reason"),
    [
        (SpecRegModel.from_timm("resnet20_cifar").network, "is no chain|no known Lipschitz"),
        (nn.Sequential(nn.Flatten(), nn.LayerNorm(16), nn.Linear(16, 2)), "1 .LayerNorm."),
        (
            nn.Sequential(nn.MaxPool2d(3, stride=1), nn.Flatten(), nn.Linear(4, 2)),
            "0 .MaxPool2d. has no known",
        ),
    ],
    ids=["residual", "layer norm", "overlapping windows"],
)
def test_a_network_that_is_no_product_has_no_bound(network, reason):
    head = ("fc",) if hasattr(network, "num_classes") else ("2",)
    sigmas = {n: 1.0 for n, m in network.named_modules() if isinstance(m, nn.Conv2d)}
    with pytest.raises(NoBoundError, match=reason):
        lipschitz_bound(network.eval(), head, sigmas, pixel_std=torch.ones(1))
