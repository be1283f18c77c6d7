"""Derivatives per [0, 1] pixel, whatever normalised images a model takes."""

import warnings

import numpy as np
import pytest
import timm
import torch
from torch import nn
from transformers import (
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    ViTForImageClassification,
)

from hf_specreg import InputGradientPenalty, SensitivityPenalty
from hf_specreg.encoders.pixels import PixelModel, find_pixel_std
from hf_specreg.spectral.regularizers import InputGradientConfig, RegularizersConfig
from hf_specreg.training.terms import Terms
from tests.host_reads import host_reads
from tests.tiny import images, tiny, vit_config
from tests.unchanged import unchanged

STD = (0.25,)
LABELS = torch.tensor([0, 1, 2, 0, 1])


def pixel_model(name="mlp_2000"):
    """A SpecRegModel that normalises by STD, with a network that says another one."""
    encoder = tiny(name, pixel_mean=(0.1,), pixel_std=STD).eval()
    encoder.network.pretrained_cfg["std"] = (0.5,) * 3
    return encoder


@pytest.mark.parametrize("by", ["double_backprop", "finite_difference"])
@pytest.mark.parametrize("kind", [InputGradientPenalty, SensitivityPenalty])
def test_of_a_network_on_normalised_images_it_is_that_of_the_whole_model_on_pixels(kind, by):
    encoder = pixel_model()
    labels = [LABELS] if kind is InputGradientPenalty else []
    expected = kind(encoder, strength=1, by=by)(images(), *labels)
    penalty = kind(encoder.network, strength=1, by=by, pixel_std=STD)
    found = penalty(encoder.normalize(images()), *labels)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)
    assert penalty.space.model is encoder.network


def test_timm_says_by_what_images_were_divided_and_an_argument_overrides_it():
    network = pixel_model().network
    norms = {
        std: InputGradientPenalty(network, strength=1, pixel_std=std)(images() - 0.5, LABELS)
        for std in (None, 0.5, 1)
    }
    torch.testing.assert_close(norms[None], norms[0.5])
    torch.testing.assert_close(norms[None], 2 * norms[1])
    colour = timm.create_model("test_vit", img_size=32)
    assert find_pixel_std(colour, 3) == tuple(colour.pretrained_cfg["std"])
    assert find_pixel_std(colour, 3, np.array([0.1, 0.2, 0.3])) == (0.1, 0.2, 0.3)


def test_a_timm_network_in_transformers_says_it_too():
    config = {"architecture": "resnet18", "num_classes": 3, "pretrained_cfg": {"std": [0.2] * 3}}
    model = TimmWrapperForImageClassification(TimmWrapperConfig.from_dict(config))
    assert find_pixel_std(model, 3) == pytest.approx((0.2,) * 3)


@pytest.mark.parametrize("kind", [InputGradientPenalty, SensitivityPenalty])
def test_images_in_0_1_are_warned_of_once_where_timm_says_that_they_are_normalised(kind):
    network = pixel_model().network
    labels = [LABELS] if kind is InputGradientPenalty else []
    penalty = kind(network, strength=1, burn_in=100)
    with pytest.warns(UserWarning, match=r"OneHiddenLayer.*divided by \[0\.5\].*pixel_std=1"):
        penalty(images(), *labels)
    normalised = (images() - 0.5) / 0.5
    asked = kind(network, strength=1)
    with warnings.catch_warnings(), host_reads() as reads:
        warnings.simplefilter("error")
        penalty(images(), *labels)
        for _ in range(2):
            asked(normalised, *labels)
            kind(network, strength=1, pixel_std=1)(images(), *labels)
            kind(pixel_model(), strength=1)(images(), *labels)
    assert reads["PixelModel.check"] == 1 + 2 * 2  # and of each penalty on images in [0, 1]


@pytest.mark.parametrize("kind", [InputGradientPenalty, SensitivityPenalty])
def test_images_in_0_1_are_warned_of_where_a_std_is_stated_too(kind):
    labels = [LABELS] if kind is InputGradientPenalty else []
    known = {"strength": 1, "head": "2", "input_size": (1, 8, 8), "burn_in": 9}
    with pytest.warns(UserWarning, match=r"but pixel_std says .* \[0\.25\].*pass pixel_std=1"):
        kind(own(), **known, pixel_std=STD)(images(), *labels)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kind(own(), **known, pixel_std=STD)((images() - 0.1) / 0.25, *labels)
        kind(own(), **known, pixel_std=1)(images(), *labels)


@pytest.mark.parametrize(
    ("make", "given", "says"),
    [
        (tiny, {}, "SpecRegModel.*give it pixels divided by 255"),
        (lambda: tiny().network, {"pixel_std": 1}, "OneHiddenLayer.*as pixel_std, which is 1 now"),
    ],
)
def test_images_far_from_0_1_are_warned_of_where_these_are_taken_and_noisy_ones_are_not(
    make, given, says
):
    torch.manual_seed(0)
    noisy = torch.randint(2, (64, 1, 8, 8)) + 0.7 * torch.randn(64, 1, 8, 8)
    normalised = (images(64) - images(64).mean()) / images(64).std()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SensitivityPenalty(make(), strength=1, burn_in=9, **given)(noisy)
    for far in (normalised, 255 * images(64), 2 * torch.randn(64, 1, 8, 8)):
        penalty = SensitivityPenalty(make(), strength=1, burn_in=9, **given)
        with pytest.warns(UserWarning, match=says):
            penalty(far)


def test_images_far_from_normalised_ones_are_warned_of_where_these_are_taken():
    torch.manual_seed(0)
    network = pixel_model().network
    white = torch.full((8, 1, 8, 8), (1 - 0.1) / 0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for usual in (white, (images(64) - 0.5) / 0.5, torch.randn(64, 1, 8, 8)):
            SensitivityPenalty(network, strength=1, burn_in=9)(usual)
    with pytest.warns(
        UserWarning, match=r"OneHiddenLayer says, .* divided by \[0\.5\].* normalise"
    ):
        SensitivityPenalty(network, strength=1, burn_in=9)(255 * images())


def test_a_training_warns_of_images_in_0_1_too():
    config = RegularizersConfig(input_gradient=InputGradientConfig(strength=1, burn_in_steps=100))
    terms = Terms(pixel_model().network, config)
    with pytest.warns(UserWarning, match="pass pixel_std=1"):
        terms(images(), LABELS, step=0, device=torch.device("cpu"))


def own():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 5), nn.Linear(5, 3))


def of_transformers():
    return ViTForImageClassification(vit_config(num_labels=3))


@pytest.mark.parametrize(("make", "head"), [(own, "2"), (of_transformers, None)])
@pytest.mark.parametrize("kind", [InputGradientPenalty, SensitivityPenalty])
def test_models_that_do_not_say_it_must_be_told(make, head, kind):
    known = {"strength": 1, "head": head, "input_size": (1, 8, 8)}
    with pytest.raises(ValueError, match=r"how its images are normalised.*processor\.image_std"):
        kind(make(), **known)
    assert kind(make(), **known, pixel_std=[0.5])


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (58.4, r"pixel_std \(58.4\) must be a number in \(0, 1\]"),
        (0, r"pixel_std \(0\) must be"),
        ((0.2, 0.3), r"one of each of the 1 channels"),
    ],
)
def test_a_deviation_that_cannot_be_is_named(given, says):
    with pytest.raises(ValueError, match=says):
        find_pixel_std(own(), 1, given)


def test_a_model_that_normalises_itself_is_not_told():
    with pytest.raises(ValueError, match=r"SpecRegModel takes images in \[0, 1\].*leave pixel_std"):
        InputGradientPenalty(tiny(), strength=1, pixel_std=0.5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("make", [tiny, of_transformers])
def test_of_weights_in_half_precision_it_is_computed_in_float32(make, dtype):
    """Against the same weights, as rounded, in float32."""
    torch.manual_seed(0)
    model = make().to(dtype)
    given = {} if make is tiny else {"pixel_std": 0.5}
    found = InputGradientPenalty(model, strength=1, **given)(images().to(dtype), LABELS)
    found.backward()
    weights = dict(model.named_parameters())
    assert any(p.grad is not None and p.grad.norm() > 0 for p in weights.values())
    assert all(p.dtype == dtype for p in weights.values())
    gradients = {name: p.grad for name, p in weights.items() if p.grad is not None}
    model.zero_grad()
    model.float()
    expected = InputGradientPenalty(model, strength=1, **given)(images().to(dtype).float(), LABELS)
    expected.backward()
    torch.testing.assert_close(found, expected)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, model.get_parameter(name).grad.to(dtype), msg=name)


class Shared(nn.Module):
    """Of its layers one has two names, and one tensor belongs to two layers."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(16, 16)
        self.again = self.first
        self.tied = nn.Linear(16, 16)
        self.tied.weight = self.first.weight
        self.head = nn.Linear(16, 3)

    def forward(self, images):
        return self.head(self.tied(self.again(self.first(images.flatten(1))).relu()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_layers_of_two_names_and_tied_ones_in_half_precision_stay_as_they_are(dtype):
    torch.manual_seed(0)
    model = Shared().to(dtype)
    pictures = torch.rand(4, 1, 4, 4)
    with unchanged(model, pictures.to(dtype)):
        found = PixelModel(model, (1.0,))(pictures)
    torch.testing.assert_close(found, model.float()(pictures))
