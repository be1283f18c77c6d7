import pytest
import torch
from torch import nn

from hf_specreg import SpecRegModel, SpectralPenalty
from hf_specreg.robustness.attacks import make_attacks
from hf_specreg.robustness.bound import SLOPES, NoBoundError, _factor, lipschitz_bound
from hf_specreg.robustness.classifier import Classifier


def bound_of(network, head, size):
    penalty = SpectralPenalty(network, head=head, input_size=size)
    sigmas = penalty.sigmas()
    penalty.remove_hooks()
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
    torch.testing.assert_close(
        bound.distances(logits, torch.tensor([0, 0])), expected, check_dtype=False
    )


def test_the_papers_network_has_a_bound_with_its_scaled_head():
    model = SpecRegModel.from_timm("mlp_2000").eval()
    penalty = SpectralPenalty(model)
    sigmas = penalty.sigmas()
    penalty.remove_hooks()
    bound = lipschitz_bound(model.network, model.head, sigmas, pixel_std=model.pixel_std)
    assert bound.factors == {"hidden": sigmas["hidden"], "act": 1.129}
    torch.testing.assert_close(bound.head, model.network.head.weight / 2000**0.5)


class Reused(nn.Module):
    def __init__(self, times):
        super().__init__()
        self.flat, self.act, self.fc = nn.Flatten(), nn.GELU(), nn.Linear(16, 2)
        self.middle, self.times = nn.Linear(16, 16), times

    def forward(self, x):
        x = self.act(self.act(self.flat(x)))
        for _ in range(self.times):
            x = self.middle(x)
        return self.fc(x)


def test_a_module_counts_as_often_as_it_is_used():
    sigmas = {"middle": 2.0}
    bound = lipschitz_bound(Reused(1), ("fc",), sigmas, pixel_std=torch.ones(1))
    assert bound.lipschitz == pytest.approx(2 * 1.129**2)
    with pytest.raises(NoBoundError, match="middle is used more than once"):
        lipschitz_bound(Reused(2), ("fc",), sigmas, pixel_std=torch.ones(1))


@pytest.mark.parametrize(
    "layer",
    [*SLOPES, lambda: nn.LeakyReLU(3.0), lambda: nn.ELU(alpha=5.0), lambda: nn.LeakyReLU(-2.0)],
)
def test_no_activation_is_steeper_than_its_factor_and_none_much_less(layer):
    made = layer().eval()
    points = torch.linspace(-8, 8, 160_001, dtype=torch.float64, requires_grad=True)
    (slopes,) = torch.autograd.grad(made(points[None]).sum(), points)
    factor = _factor("layer", made)
    assert slopes.abs().max() <= factor
    assert slopes.abs().max() > 0.99 * factor


@pytest.mark.parametrize(
    "layer",
    [nn.AvgPool2d(2), nn.MaxPool2d(2), nn.AvgPool2d(3, padding=1), nn.BatchNorm2d(2)],
)
def test_no_pool_or_norm_stretches_more_than_its_factor(layer):
    torch.manual_seed(0)
    if isinstance(layer, nn.BatchNorm2d):
        layer.running_var.uniform_(0.1, 0.5)
        nn.init.uniform_(layer.weight, -2, 2)
    layer.eval()
    images = torch.randn(200, 2, 6, 6)
    moved = images + 1e-2 * torch.randn(200, 2, 6, 6)
    with torch.no_grad():
        after = (layer(moved) - layer(images)).flatten(1).norm(dim=1)
    assert (after / (moved - images).flatten(1).norm(dim=1)).max() <= _factor("layer", layer)


def test_hooks_are_no_part_of_a_bound():
    network = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
    network[0].register_forward_hook(lambda module, args, output: 100 * output)
    with pytest.raises(NoBoundError, match="has hooks"):
        lipschitz_bound(network, ("1",), {}, pixel_std=torch.ones(1))


@pytest.mark.parametrize(
    ("network", "reason"),
    [
        (SpecRegModel.from_timm("resnet20_cifar").network, "is no chain|no known Lipschitz"),
        (nn.Sequential(nn.Flatten(), nn.LayerNorm(16), nn.Linear(16, 2)), "1 .LayerNorm."),
        (
            nn.Sequential(nn.MaxPool2d(3, stride=1), nn.Flatten(), nn.Linear(4, 2)),
            "0 .MaxPool2d. has no known",
        ),
        (
            nn.Sequential(nn.AvgPool2d(2, divisor_override=1), nn.Flatten(), nn.Linear(4, 2)),
            "0 .AvgPool2d. has no known",
        ),
        (nn.Sequential(nn.Flatten(), nn.Identity(), nn.Linear(16, 2), nn.ReLU()), "after the head"),
    ],
    ids=["residual", "layer norm", "overlapping windows", "summing pool", "activation on logits"],
)
def test_a_network_that_is_no_product_has_no_bound(network, reason):
    head = ("fc",) if hasattr(network, "num_classes") else ("2",)
    sigmas = {n: 1.0 for n, m in network.named_modules() if isinstance(m, nn.Conv2d)}
    with pytest.raises(NoBoundError, match=reason):
        lipschitz_bound(network.eval(), head, sigmas, pixel_std=torch.ones(1))
