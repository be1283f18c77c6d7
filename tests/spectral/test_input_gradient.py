"""The norm of the loss's gradient by the image: closed forms, both ways to it, its schedule."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hf_specreg.spectral.regularizers import RegularizersConfig, build_regularizers
from hf_specreg.spectral.regularizers.input_gradient import (
    InputGradientConfig,
    input_gradient_norm,
)
from tests.tiny import images, tiny

LABELS = torch.tensor([0, 2, 1, 1, 0])
NORMS = pytest.mark.parametrize("norm", ["l2", "l1"])
WAYS = pytest.mark.parametrize("by", ["double_backprop", "finite_difference"])


@pytest.fixture
def smooth():
    """A smooth network in float64, and images and labels of three classes."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(8, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    return net, torch.rand(5, 2, 2, 2, dtype=torch.float64)


def built(encoder, **settings):
    config = RegularizersConfig(input_gradient=InputGradientConfig(**settings))
    (regularizer,) = build_regularizers(encoder, config, steps_per_epoch=10, epochs=4)
    return regularizer


@NORMS
@WAYS
def test_of_a_linear_classifier_it_is_the_norm_of_the_weights_times_the_residuals(norm, by):
    """grad_x = W^T (softmax(W x) - e_y)."""
    torch.manual_seed(0)
    weight = torch.randn(3, 8, dtype=torch.float64)
    x = torch.rand(5, 2, 2, 2, dtype=torch.float64)
    gradients = (torch.softmax(x.flatten(1) @ weight.T, 1) - F.one_hot(LABELS, 3)) @ weight
    expected = gradients.norm(p=int(norm[1]), dim=1).mean()
    found = input_gradient_norm(
        lambda x: x.flatten(1) @ weight.T, x, LABELS, norm=norm, by=by, step=1e-7
    )
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


@NORMS
@WAYS
def test_its_gradient_by_the_weights_is_right(smooth, norm, by):
    """Of the finite difference too, to the order of its step: its direction is where the loss
    rises most, so that its own change has no part in it.
    """
    net, x = smooth
    names = [name for name, _ in net.named_parameters()]

    def of(*values):
        weights = dict(zip(names, values, strict=True))

        def function(x):
            return torch.func.functional_call(net, weights, (x,))

        return input_gradient_norm(function, x, LABELS, norm=norm, by=by, step=1e-5)

    inputs = [p.detach().clone().requires_grad_(True) for p in net.parameters()]
    assert torch.autograd.gradcheck(of, inputs, eps=1e-5, atol=2e-5)


@NORMS
def test_the_finite_difference_is_off_by_the_order_of_its_step(smooth, norm):
    net, x = smooth
    exact = input_gradient_norm(net, x, LABELS, norm=norm)
    errors = [
        input_gradient_norm(net, x, LABELS, norm=norm, by="finite_difference", step=step) - exact
        for step in (1e-2, 1e-3, 1e-4)
    ]
    assert errors[0] != 0
    for larger, smaller in pairwise(errors):
        assert (larger / smaller).item() == pytest.approx(10, rel=0.1)


@NORMS
@WAYS
def test_an_image_whose_loss_is_flat_counts_as_zero(norm, by):
    bias = torch.zeros(3, requires_grad=True)
    value = input_gradient_norm(
        lambda x: x.flatten(1)[:, :3] * 0 + bias, images(), LABELS, norm=norm, by=by
    )
    value.backward()
    assert value == 0
    assert bias.grad is None or torch.equal(bias.grad, torch.zeros(3))


@pytest.mark.parametrize("step", [1e-3, 0.1])
def test_the_second_loss_is_a_step_away_in_either_norm(smooth, step):
    net, x = smooth
    for norm in ("l2", "l1"):
        seen = []

        def function(x, seen=seen):
            seen.append(x.detach())
            return net(x)

        input_gradient_norm(function, x, LABELS, norm=norm, by="finite_difference", step=step)
        first, second = seen
        distances = (second - first).flatten(1).norm(dim=1)
        torch.testing.assert_close(distances, torch.full_like(distances, step))


@WAYS
def test_by_its_name_it_is_of_the_first_images_and_their_labels(by):
    encoder = tiny()
    regularizer = built(encoder, strength=2.0, images=3, by=by, step=0.01)
    value = regularizer(images(), LABELS, [])
    expected = 2 * input_gradient_norm(encoder, images()[:3], LABELS[:3], by=by)
    torch.testing.assert_close(value, expected)
    value.backward()
    assert encoder.network.hidden.weight.grad.norm() > 0
    assert regularizer(images(), LABELS.roll(1), []) != value


@WAYS
@pytest.mark.parametrize("name", ["resnet20_cifar", "vit_tiny_patch16_224"])
def test_the_network_is_in_evaluation_mode_for_it_and_then_as_it_was(name, by):
    encoder = tiny(name, drop_rate=0.5).train()
    regularizer = built(encoder, strength=1.0, by=by)
    statistics = {n: b.clone() for n, b in encoder.named_buffers()}
    value = regularizer(images(), LABELS, [])
    value.backward()
    assert all(module.training for module in encoder.modules())
    assert all(torch.equal(statistics[n], b) for n, b in encoder.named_buffers())
    assert all(p.grad.isfinite().all() for p in encoder.parameters() if p.grad is not None)
    torch.testing.assert_close(value, input_gradient_norm(encoder.eval(), images(), LABELS, by=by))


def test_its_strength_rises_linearly_after_the_burn_in():
    regularizer = built(tiny(), strength=2.0, burn_in_epochs=1, ramp_epochs=0.4, every=2)
    found = [regularizer.strength_at(step) for step in (9, 10, 11, 12, 14, 15, 40)]
    assert found == [0.0, 0.0, 0.5, 1.0, 2.0, 2.0, 2.0]
    assert [step for step in range(16) if regularizer.due(step)] == [12, 14]
    whole = regularizer(images(), LABELS, [])
    torch.testing.assert_close(regularizer(images(), LABELS, [], step=11), whole / 4)
    assert built(tiny(), strength=2.0).strength_at(0) == 2.0


def test_an_encoder_without_a_head_has_no_labels_to_tell():
    with pytest.raises(ValueError, match=r"input_gradient is of the labels.*has no head"):
        built(tiny(num_classes=0), strength=1.0)
