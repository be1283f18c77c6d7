"""The input gradient's norm as a penalty for a loop of one's own."""

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn

from hf_specreg import InputGradientPenalty
from hf_specreg.spectral.regularizers.input_gradient import input_gradient_norm
from tests.tiny import images, tiny

LABELS = torch.tensor([0, 1, 2, 0, 1])


def gradient_norm(model, x, y):
    x = x.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(F.cross_entropy(model(x), y, reduction="sum"), x)
    return gradient.flatten(1).norm(dim=1).mean()


def test_it_is_the_mean_norm_of_the_losss_gradient_on_the_first_images():
    model = tiny().eval()
    penalty = InputGradientPenalty(model, strength=0.5, images=3)
    value = penalty(images(), LABELS)
    torch.testing.assert_close(value, 0.5 * gradient_norm(model, images()[:3], LABELS[:3]))
    value.backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in model.parameters())


def test_it_acts_through_hardsigmoid_which_torch_does_not_differentiate_twice():
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Hardsigmoid(), nn.Linear(8, 3))
    by_hand = nn.Sequential(net[0], net[1], nn.ReLU6(), net[3])

    def plain(x):  # relu6(x + 3) / 6
        return by_hand[3](by_hand[2](by_hand[1](by_hand[0](x)) + 3) / 6)

    options = {"strength": 1.0, "head": "3", "input_size": (1, 8, 8), "pixel_std": 1}
    value = InputGradientPenalty(net, **options)(images(), LABELS)
    expected = gradient_norm(plain, images(), LABELS)
    torch.testing.assert_close(value, expected)
    (own,) = torch.autograd.grad(value, net[1].weight)
    x = images().clone().requires_grad_(True)
    loss = F.cross_entropy(plain(x), LABELS, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
    (other,) = torch.autograd.grad(gradient.flatten(1).norm(dim=1).mean(), net[1].weight)
    assert own.any()
    torch.testing.assert_close(own, other)


def test_it_enters_after_the_burn_in_rises_and_is_due_in_its_cadence():
    model = tiny().eval()
    penalty = InputGradientPenalty(model, strength=1.0, burn_in=2, ramp=4, every=2)
    whole = gradient_norm(model, images(), LABELS)
    found = torch.stack([penalty(images(), LABELS).detach() for _ in range(8)]) / whole
    torch.testing.assert_close(found, torch.tensor([0, 0, 0, 0, 0.5, 0, 1, 0]))
    again = InputGradientPenalty(model, strength=1.0, burn_in=2, ramp=4, every=2)
    again.load_state_dict({"step": 4})
    torch.testing.assert_close(again(images(), LABELS), 0.5 * whole)


def test_a_strength_that_is_set_later_acts_and_is_checked():
    penalty = InputGradientPenalty(tiny().eval(), strength=1.0)
    before = penalty(images(), LABELS)
    penalty.strength = 10.0
    torch.testing.assert_close(penalty(images(), LABELS), 10 * before)
    assert penalty.strength == penalty.settings.strength == 10
    for wrong in (-1.0, float("nan")):
        with pytest.raises(ValueError, match="strength"):
            penalty.strength = wrong
    torch.testing.assert_close(penalty(images(), LABELS), 10 * before)


@pytest.mark.parametrize("options", [{"strength": 0.0}, {"strength": 0.5, "ramp": 4}])
def test_where_its_strength_is_0_it_computes_nothing(options, monkeypatch):
    model = tiny()
    penalty = InputGradientPenalty(model, images=3, **options)
    monkeypatch.setattr(model, "forward", None)
    value = penalty(images(), LABELS)
    assert value.item() == 0
    assert not value.requires_grad


def test_it_takes_a_step_that_lowers_what_it_is_of_and_leaves_the_model_as_it_was():
    model = tiny("resnet20_cifar", drop_rate=0.5).train()
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    penalty = InputGradientPenalty(model, strength=1.0)
    penalty(images(), LABELS).backward()
    assert model.training
    assert all(torch.equal(buffers[name], buffer) for name, buffer in model.named_buffers())
    model.eval()
    before = gradient_norm(model, images(), LABELS)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 1e-3 * parameter.grad
    assert gradient_norm(model, images(), LABELS) < before


def test_autocast_does_not_round_it():
    model = tiny().eval()
    with torch.autocast("cpu", torch.bfloat16):
        value = InputGradientPenalty(model, strength=1.0)(images(), LABELS)
    expected = input_gradient_norm(model, images(), LABELS)
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("x", "labels", "says"),
    [
        (images(), None, "is of the labels: pass"),
        (images(), LABELS.float(), r"\(5,\) of torch.float32: convert them with .long\(\)"),
        (images(), torch.eye(3)[LABELS], r"\(5, 3\) of torch.float32.* from before mixup"),
        (images(), LABELS[:4], r"5 labels of int64, and these are \(4,\)"),
        (images().mul(255).byte(), LABELS, "these are torch.uint8: divide pixels of 0 to 255"),
        (images(2), LABELS[:2], "is of 3 images, and the first batch has 2: .* images=2"),
    ],
)
def test_what_a_batch_lacks_is_said_even_in_the_burn_in(x, labels, says):
    penalty = InputGradientPenalty(tiny(), strength=1, images=3, burn_in=5)
    with pytest.raises(ValueError, match=says):
        penalty(x, labels)
    assert penalty.step == 0


def test_the_rest_of_an_epoch_may_be_smaller():
    penalty = InputGradientPenalty(tiny().eval(), strength=1, images=3)
    penalty(images(), LABELS)
    expected = gradient_norm(tiny().eval(), images(2), LABELS[:2])
    torch.testing.assert_close(penalty(images(2), LABELS[:2]), expected)
    with pytest.raises(ValueError, match="this batch has none: leave empty batches out"):
        penalty(images(0), LABELS[:0])


@pytest.mark.parametrize("without", [torch.no_grad, torch.inference_mode])
def test_where_no_gradient_is_recorded_it_is_no_term(without):
    penalty = InputGradientPenalty(tiny(), strength=1)
    with without(), pytest.raises(RuntimeError, match=r"without a gradient.*in training only"):
        penalty(images(), LABELS)


def test_labels_of_a_byte_are_classes_too_and_an_evaluating_model_gives_the_same():
    model = tiny("resnet20_cifar", drop_rate=0.5)
    penalty = InputGradientPenalty(model, strength=1)
    expected = penalty(images(), LABELS)
    assert model.training
    model.eval()
    torch.testing.assert_close(penalty(images(), LABELS.byte()), expected, rtol=0, atol=0)
    assert not model.training


def test_autocast_in_a_models_own_forward_does_not_round_it(monkeypatch):
    """accelerate puts it there, and with it transformers' Trainer."""
    monkeypatch.setattr(AcceleratorState, "_shared_state", {})  # not that of other tests
    model = tiny()
    expected = InputGradientPenalty(model, strength=1)(images(), LABELS)
    Accelerator(cpu=True, mixed_precision="bf16").prepare_model(model, evaluation_mode=True)
    patched = model.forward
    found = InputGradientPenalty(model, strength=1)(images(), LABELS)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert model.forward is patched


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"strength": -1}, "strength"),
        ({"strength": 1, "ramp": -1}, "ramp"),
        ({"strength": 1, "ramp": 2.5}, r"ramp \(2\.5\) must be a whole number: round it"),
        ({"strength": 1, "burn_in": 11.7}, r"burn_in_steps \(11\.7\) must be a whole number"),
        ({"strength": 1, "by": "doublebackprop"}, "one of .'double_backprop', 'finite_difference'"),
        ({"strength": 1, "norm": "linf"}, r"norm \(linf\) must be one of \['l2', 'l1'\]"),
        ({"strength": 1, "norm": "x1"}, "norm"),
        ({"strength": 1, "images": 0}, "images"),
        ({"strength": 1, "images": 2.5}, r"images \(2\.5\) must be a whole number"),
        ({"strength": 1, "burn_in_steps": 3}, "burn_in_steps is of recipes: pass burn_in"),
        ({"strength": "1e-2"}, r"strength \('1e-2'\) must be a number, not a str"),
        ({"strength": float("inf")}, r"strength \(inf\) must be finite"),
    ],
)
def test_settings_out_of_range_are_named(settings, says):
    with pytest.raises(ValueError, match=says):
        InputGradientPenalty(tiny(), **settings)


def test_a_head_of_one_output_has_no_cross_entropy():
    """Said when it is made, or, where the head does not say it, at the first batch."""
    says = r"2 classes or more, and this head has 1 output: take SensitivityPenalty"
    with pytest.raises(ValueError, match=says):
        InputGradientPenalty(tiny(num_classes=1), strength=1)
    for rest in ([], [nn.Flatten(0)]):
        head = nn.Sequential(nn.Linear(4, 1), *rest)
        net = nn.Sequential(nn.Flatten(), nn.Linear(64, 4), head)
        known = {"head": "2", "input_size": (1, 8, 8), "pixel_std": 1}
        penalty = InputGradientPenalty(net, strength=1, **known)
        with pytest.raises(ValueError, match=says):
            penalty(images(), LABELS.clamp(max=0))


def test_heads_whose_logits_come_as_a_tuple_are_told_apart():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
            self.a, self.b = nn.Linear(4, 3), nn.Linear(4, 2)

        def forward(self, x):
            x = self.body(x)
            return self.a(x), self.b(x)

    known = {"input_size": (1, 8, 8), "pixel_std": 1}
    penalty = InputGradientPenalty(Two(), strength=1, head=["a", "b"], **known)
    with pytest.raises(ValueError, match=r"Two must return logits.*not a tuple: wrap it"):
        penalty(images(), LABELS)


def test_an_encoder_without_a_head_has_no_classes_to_be_of():
    with pytest.raises(ValueError, match="no head to tell them"):
        InputGradientPenalty(tiny(num_classes=0), strength=1)
