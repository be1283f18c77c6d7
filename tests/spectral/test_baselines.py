import pytest
import timm
import torch
from torch import nn

from hf_specreg import SpectralPenalty
from hf_specreg.spectral.baselines import (
    batch_spectral_shrinkage,
    cross_lipschitz,
    jacobian_norm,
    l2_sp,
    normalize_spectra,
    orthogonality,
    top_metric_eigenvalue,
    volume_element,
)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def linear():
    """A linear map of known singular values, and images."""
    u, _ = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64, generator=seeded(1)))
    v, _ = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64, generator=seeded(2)))
    sigma = torch.tensor([3.0, 2.0, 1.0, 0.5], dtype=torch.float64)
    weight = u @ torch.diag(sigma) @ v[:4]
    images = torch.rand(5, 6, dtype=torch.float64, generator=seeded(3))
    return weight, sigma, images


@pytest.fixture
def curved():
    """A small smooth network, and images of two dimensions of space."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(8, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    return net, torch.rand(4, 2, 2, 2, dtype=torch.float64)


def jacobians(net, images):
    return torch.func.vmap(torch.func.jacrev(lambda x: net(x[None])[0]))(images).flatten(2)


def test_the_closed_forms_of_a_linear_map(linear):
    weight, sigma, images = linear

    def function(x):
        return x @ weight.T

    total = sigma.square().sum()
    torch.testing.assert_close(jacobian_norm(function, images, projections=None), total)
    top = top_metric_eigenvalue(function, images, iterations=60, generator=seeded())
    torch.testing.assert_close(top, sigma[0].square())
    torch.testing.assert_close(volume_element(function, images, damping=0.0), sigma.log().sum())
    differences = weight[:, None] - weight
    torch.testing.assert_close(cross_lipschitz(function, images), differences.square().sum() / 16)


def test_they_agree_with_the_explicit_jacobian(curved):
    net, images = curved
    jacobian = jacobians(net, images)
    singular = torch.linalg.svdvals(jacobian)
    squares = singular.square()
    exact = jacobian_norm(net, images, projections=None)
    torch.testing.assert_close(exact, squares.sum(1).mean())
    top = top_metric_eigenvalue(net, images, iterations=200, generator=seeded())
    torch.testing.assert_close(top, squares[:, 0].mean())
    volume = volume_element(net, images, damping=0.0)
    torch.testing.assert_close(volume, singular.log().sum(1).mean())
    gaps = (jacobian[:, :, None] - jacobian[:, None]).square().sum((1, 2, 3))
    torch.testing.assert_close(cross_lipschitz(net, images), gaps.mean() / 9)


def test_random_projections_are_right_on_average(curved):
    net, images = curved
    exact = jacobian_norm(net, images, projections=None)
    estimate = jacobian_norm(net, images, projections=3000, generator=seeded())
    torch.testing.assert_close(estimate, exact, rtol=0.03, atol=0)


def test_a_volume_with_more_features_than_pixels(linear):
    weight, sigma, _ = linear
    images = torch.rand(2, 4, dtype=torch.float64)
    volume = volume_element(lambda x: x @ weight, images, damping=0.0)
    torch.testing.assert_close(volume, sigma.log().sum())


@pytest.mark.parametrize(
    "penalty",
    [
        lambda f, x: jacobian_norm(f, x, projections=None),
        lambda f, x: jacobian_norm(f, x, projections=2, generator=seeded()),
        lambda f, x: top_metric_eigenvalue(f, x, iterations=100, generator=seeded()),
        cross_lipschitz,
        volume_element,
    ],
    ids=["jacobian", "projected", "eigenvalue", "cross-lipschitz", "volume"],
)
def test_their_gradients_by_the_weights_are_right(curved, penalty):
    net, images = curved
    names = [name for name, _ in net.named_parameters()]

    def of(*values):
        weights = dict(zip(names, values, strict=True))
        return penalty(lambda x: torch.func.functional_call(net, weights, (x,)), images)

    inputs = [p.detach().clone().requires_grad_(True) for p in net.parameters()]
    assert torch.autograd.gradcheck(of, inputs, eps=1e-6, atol=1e-5)


def test_orthogonality_is_the_largest_eigenvalue_of_the_excess():
    for shape in ((4, 9), (9, 4), (4, 3, 3, 3)):
        weight = torch.randn(*shape, dtype=torch.float64, generator=seeded())
        singular = torch.linalg.svdvals(weight.flatten(1))
        expected = (singular.square() - 1).abs().max()
        found = orthogonality([weight, weight], iterations=500, generator=seeded())
        torch.testing.assert_close(found, 2 * expected)
    rotation, _ = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64))
    assert orthogonality([rotation]).abs() < 1e-12


def test_the_gradient_of_orthogonality():
    weight = torch.randn(4, 6, dtype=torch.float64, generator=seeded()).requires_grad_(True)

    def of(w):
        return orthogonality([w], iterations=1000, generator=seeded())

    assert torch.autograd.gradcheck(of, [weight], eps=1e-6, atol=1e-5)


def test_l2_sp_pulls_to_the_start_and_the_head_to_zero():
    names = {"a": torch.tensor([1.0, 2.0]), "head": torch.tensor([3.0])}
    parameters = {k: v.clone().requires_grad_(True) for k, v in names.items()}
    penalty = l2_sp(parameters, {"a": torch.tensor([0.0, 0.0])}, alpha=0.1, beta=0.01)
    assert penalty.item() == pytest.approx(0.05 * 5 + 0.005 * 9)
    penalty.backward()
    torch.testing.assert_close(parameters["a"].grad, 0.1 * names["a"])
    torch.testing.assert_close(parameters["head"].grad, 0.01 * names["head"])
    with pytest.raises(ValueError, match="no parameter b"):
        l2_sp(parameters, {"b": torch.zeros(2)})


def test_batch_spectral_shrinkage_is_of_the_smallest():
    features = torch.randn(8, 5, dtype=torch.float64, generator=seeded()).requires_grad_(True)
    singular = torch.linalg.svdvals(features.detach())
    found = batch_spectral_shrinkage(features, k=2)
    torch.testing.assert_close(found, singular[-2:].square().sum())
    found.backward()
    u, s, v = torch.linalg.svd(features.detach(), full_matrices=False)
    expected = 2 * (u[:, -2:] * s[-2:]) @ v[-2:]
    torch.testing.assert_close(features.grad, expected)
    assert batch_spectral_shrinkage(features.half(), k=2).dtype == torch.float32
    with pytest.raises(ValueError, match="do not have 6"):
        batch_spectral_shrinkage(features, k=6)


def test_normalised_weights_have_norm_one():
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=3).eval()
    head = model.fc.weight.detach().clone()
    names = [layer.name for layer in SpectralPenalty(model, input_size=(3, 32, 32)).layers]
    normalize_spectra(model, names)
    model.train()
    for _ in range(300):
        weight = model.layer1[0].conv1.weight
    assert torch.linalg.matrix_norm(weight.flatten(1), 2).item() == pytest.approx(1, abs=1e-3)
    torch.testing.assert_close(model.fc.weight, head)
