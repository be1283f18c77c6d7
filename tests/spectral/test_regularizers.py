"""Each regularizer against closed forms and the explicit Jacobian; and by its name and settings."""

import pytest
import timm
import torch
from torch import nn

from hf_specreg.encoders.features import FeatureSpace
from hf_specreg.spectral.regularizers import RegularizersConfig, build_regularizers
from hf_specreg.spectral.regularizers.bss import BSSConfig, batch_spectral_shrinkage
from hf_specreg.spectral.regularizers.cross_lipschitz import CrossLipschitzConfig, cross_lipschitz
from hf_specreg.spectral.regularizers.jacobian import JacobianConfig, jacobian_norm
from hf_specreg.spectral.regularizers.l2_sp import L2SPConfig, l2_sp
from hf_specreg.spectral.regularizers.metric_eigenvalue import (
    MetricEigenvalueConfig,
    top_metric_eigenvalue,
)
from hf_specreg.spectral.regularizers.orthogonality import OrthogonalityConfig, orthogonality
from hf_specreg.spectral.regularizers.spectral_norm import normalize_spectra
from hf_specreg.spectral.regularizers.term import Regularizer
from hf_specreg.spectral.regularizers.volume_element import VolumeElementConfig, volume_element
from tests.tiny import images, tiny


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


def test_a_volume_of_features_that_lie_in_a_plane_is_not_of_rounding():
    """As after a layer norm: the smallest eigenvalue is the damping's."""
    weight = 30 * torch.randn(12, 64, generator=seeded())
    weight = (weight - weight.mean(0)).requires_grad_()
    images = torch.rand(2, 64, generator=seeded())
    volume = volume_element(lambda x: x @ weight.T, images)
    (gradient,) = torch.autograd.grad(volume, weight)
    exact = weight.detach().double().requires_grad_()
    expected = volume_element(lambda x: x @ exact.T, images.double())
    (other,) = torch.autograd.grad(expected, exact)
    torch.testing.assert_close(volume, expected.float())
    assert volume.dtype == torch.float32
    assert (gradient - other).norm() < 1e-3 * other.norm()


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
    normalize_spectra(FeatureSpace.of(model, input_size=(3, 32, 32)))
    model.train()
    for _ in range(300):
        weight = model.layer1[0].conv1.weight
    assert torch.linalg.matrix_norm(weight.flatten(1), 2).item() == pytest.approx(1, abs=1e-3)
    torch.testing.assert_close(model.fc.weight, head)


def built(encoder, **settings):
    config = RegularizersConfig(**settings)
    return build_regularizers(encoder, config, steps_per_epoch=10, epochs=4)


CASES = {
    "jacobian": (
        JacobianConfig(2.0, projections=None),
        lambda m: jacobian_norm(m, images(), projections=None),
    ),
    "cross_lipschitz": (
        CrossLipschitzConfig(2.0),
        lambda m: cross_lipschitz(m, images()),
    ),
    "volume_element": (
        VolumeElementConfig(2.0, images=3),
        lambda m: volume_element(m.features, images()[:3]),
    ),
    "metric_eigenvalue": (
        MetricEigenvalueConfig(2.0, iterations=200),
        lambda m: top_metric_eigenvalue(m.features, images(), iterations=200),
    ),
    "bss": (
        BSSConfig(2.0, k=2),
        lambda m: batch_spectral_shrinkage(m.features(images()), k=2),
    ),
    "orthogonality": (
        OrthogonalityConfig(2.0, iterations=300),
        lambda m: orthogonality([m.network.hidden.weight], iterations=300),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_each_name_gives_its_function_times_its_strength_with_a_gradient(name):
    settings, function = CASES[name]
    encoder = tiny()
    (regularizer,) = built(encoder, **{name: settings})
    value = regularizer(images(), None, [encoder.features(images())])
    torch.testing.assert_close(value, 2 * function(encoder), rtol=1e-3, atol=1e-5)
    value.backward()
    assert encoder.network.hidden.weight.grad.norm() > 0


def test_l2_sp_is_alpha_half_the_distance_and_a_part_of_it_for_the_head():
    encoder = tiny()
    (regularizer,) = built(encoder, l2_sp=L2SPConfig(0.5, head=0.1))
    head = encoder.network.head
    norm = sum(p.square().sum() for p in head.parameters())
    torch.testing.assert_close(regularizer(images(), None, []), 0.5 * 0.1 / 2 * norm)
    with torch.no_grad():
        encoder.network.hidden.weight.add_(0.1)
    moved = 0.01 * encoder.network.hidden.weight.numel()
    torch.testing.assert_close(regularizer(images(), None, []), 0.25 * (moved + 0.1 * norm))


def test_bss_is_the_mean_over_the_views():
    (regularizer,) = built(tiny(), bss=BSSConfig(1.0))
    a, b = torch.randn(2, 6, 4)
    expected = sum(batch_spectral_shrinkage(f) for f in (a, b)) / 2
    torch.testing.assert_close(regularizer(images(), None, [a, b]), expected)


def test_images_are_by_themselves_where_there_is_batch_norm_and_the_modes_are_put_back():
    encoder = tiny("resnet20_cifar").train()
    encoder.network.bn1.eval()
    (regularizer,) = built(encoder, jacobian=JacobianConfig(1.0, projections=None))
    statistics = {n: b.clone() for n, b in encoder.named_buffers()}
    whole = regularizer(images(4), None, [])
    parts = [regularizer(part, None, []) for part in images(4).split(1)]
    torch.testing.assert_close(whole, torch.stack(parts).mean())
    assert encoder.training
    assert encoder.network.stages.training
    assert not encoder.network.bn1.training
    assert all(torch.equal(statistics[n], b) for n, b in encoder.named_buffers())


def test_attention_can_be_derived_twice():
    encoder = tiny("vit_tiny_patch16_224")
    (regularizer,) = built(encoder, jacobian=JacobianConfig(1.0))
    regularizer(images(), None, []).backward()
    assert encoder.network.blocks[0].attn.qkv.weight.grad.norm() > 0


def test_each_has_its_own_burn_in_and_cadence():
    first, second = built(
        tiny(),
        jacobian=JacobianConfig(1.0, every=3, burn_in_epochs=0.2),
        l2_sp=L2SPConfig(1.0, burn_in_fraction=0.5),
    )
    assert [step for step in range(12) if first.due(step)] == [2, 5, 8, 11]
    assert [step for step in range(22) if second.due(step)] == [20, 21]


def test_off_is_the_default_and_logits_need_a_head():
    assert built(tiny()) == []
    headless = tiny(num_classes=0)
    with pytest.raises(ValueError, match=r"jacobian.of to features"):
        built(headless, jacobian=JacobianConfig(1.0))


@pytest.mark.parametrize("value", [{"strength": 0.05, "images": 8}, 0.05, L2SPConfig(0.05)])
def test_settings_of_another_class_are_refused_and_not_taken_for_off(value):
    with pytest.raises(ValueError, match=r"input_gradient \(.*must be of InputGradientConfig"):
        RegularizersConfig(input_gradient=value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"strength": -1}, r"strength \(-1\)"),
        ({"every": 0}, r"every \(0\)"),
        ({"burn_in_steps": 1, "burn_in_fraction": 0.5}, "not several"),
        ({"burn_in_fraction": 1.5}, r"\[0, 1\]"),
        ({"burn_in_steps": 11.7}, r"burn_in_steps \(11\.7\) must be a whole number: round it"),
        ({"every": 1.5}, r"every \(1\.5\) must be a whole number"),
        ({"of": "feature"}, r"of \(feature\) must be one of \['features', 'logits'\]"),
    ],
)
def test_values_out_of_range_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        JacobianConfig(**settings)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (torch.ones(3), r"mine gave torch.float32 of shape \(3,\).*take the mean"),
        (torch.tensor(1), r"mine gave torch.int64 of shape \(\)"),
        (0.5, "mine gave float"),
    ],
)
def test_what_is_no_loss_is_refused_by_name(value, said):
    term = Regularizer("mine", 0.1, 1, 0, False, lambda *_: value)
    with pytest.raises(ValueError, match=said):
        term(images(2), None, ())
