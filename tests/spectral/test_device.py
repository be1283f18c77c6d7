"""The penalty and the regularizers on an accelerator: one device, and no wait for it."""

import pytest
import torch

from hf_specreg import SensitivityPenalty, SpectralPenalty
from hf_specreg.spectral import followed, tracking
from tests.fake_device import DEVICE, HostRead, fake_device, place, warm
from tests.tiny import SIZE, images, tiny


def test_a_read_and_a_tensor_of_another_device_are_errors_here():
    with fake_device():
        x = torch.ones(3, device=DEVICE)
        for read in (lambda: x.sum().item(), x.tolist, lambda: bool(x.sum()), x.nonzero, x.cpu):
            with pytest.raises((RuntimeError, HostRead)):
                read()
        with pytest.raises(RuntimeError, match="same device"):
            x + torch.ones(3)


@pytest.mark.filterwarnings("ignore:norms make")
@pytest.mark.parametrize(
    ("name", "fold_norm"), [("resnet20_cifar", True), ("vit_tiny_patch16_224", False)]
)
def test_a_use_of_the_penalty_that_renews_every_layer_waits_for_nothing(name, fold_norm):
    model = tiny(name)
    penalty = SpectralPenalty(model, fold_norm=fold_norm, renew_every=1, lanczos_steps=2)
    with fake_device():
        place(model)
        warm(penalty)
        value = penalty()  # in which every layer is renewed
        value.backward()
        assert value.device.type == DEVICE
        for layer in penalty.layers:
            assert layer.layer_weight().device.type == DEVICE
        assert model.network.get_parameter(f"{penalty.layers[0].name}.weight").grad is not None


@pytest.mark.parametrize("warmed", ["there", "before"])
def test_a_penalty_that_was_made_on_the_cpu_goes_where_its_model_goes(warmed, monkeypatch):
    """Groups and nodes are those of the device of use, and all that is kept is there."""
    monkeypatch.setattr(tracking, "CACHED", 1)
    monkeypatch.setattr(followed, "ONE_NODE", 1)
    model = tiny("vit_tiny_patch16_224", depth=2)
    penalty = SpectralPenalty(model, renew_every=2, lanczos_steps=2)
    apart = len(penalty._sum.stacks)
    assert len(penalty._sum.groups) == len(penalty._sum.nodes) == apart
    with fake_device():
        if warmed == "before":
            warm(penalty, device="cpu")
            assert len(penalty._sum.groups) == apart
        place(model)
        penalty._placed.changed()  # a real move leaves the parameters in their places
        if warmed == "there":
            warm(penalty)
        for _ in range(2):
            penalty().backward()
        triplets = penalty._sum.triplets
        kept = [*triplets.vectors.values(), *triplets._directions.values(), triplets._noise]
        assert {tensor.device.type for tensor in kept} == {DEVICE}
        assert len(penalty._sum.nodes) == 1
        assert len(penalty._sum.groups) < apart


def test_only_the_first_use_reads_whether_a_search_has_converged():
    model = tiny()
    penalty = SpectralPenalty(model)
    with fake_device():
        place(model)
        with pytest.raises(Exception, match="_local_scalar_dense") as error:
            penalty()
    assert error.traceback.filter(lambda entry: entry.name == "top_singular_value")


@pytest.mark.parametrize(
    ("direction", "by"),
    [("top", "double_backprop"), ("neighbour", "finite_difference"), ("margin", "double_backprop")],
)
def test_a_use_of_the_sensitivity_penalty_waits_for_nothing(direction, by):
    model = tiny()
    penalty = SensitivityPenalty(model, strength=0.1, direction=direction, by=by)
    penalty(images(4))  # the first, which are looked at
    with fake_device():
        place(model)
        value = penalty(torch.empty(4, *SIZE, device=DEVICE))
        value.backward()
        assert value.device.type == DEVICE
