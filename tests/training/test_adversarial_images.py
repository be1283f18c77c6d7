"""Adversarial images for a loop of one's own: those of the recipes, per [0, 1] pixel."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from hf_specreg import AdversarialImages
from hf_specreg.training.adversarial import AdversarialConfig, crafting, perturbed
from tests.tiny import images, tiny

LABELS = torch.tensor([0, 1, 2, 0, 1])


def test_the_first_images_are_moved_as_in_recipes_and_the_others_stay():
    model, config = tiny().train(), AdversarialConfig("pgd", eps=0.3, steps=2)
    before = copy.deepcopy(model.state_dict())
    adversarial = AdversarialImages(model, eps=0.3, steps=2, images=3)
    torch.manual_seed(0)
    moved = adversarial(images(), LABELS)
    torch.manual_seed(0)
    with crafting(model, config):
        expected = perturbed(lambda x: F.cross_entropy(model(x), LABELS[:3]), images()[:3], config)
    assert torch.equal(moved[:3], expected)
    assert torch.equal(moved[3:], images()[3:])
    assert not moved.requires_grad
    assert model.training
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_eps_is_in_pixels_of_what_was_normalised(norm):
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=5).eval()
    mean, std = (
        torch.tensor(model.pretrained_cfg[key]).reshape(-1, 1, 1) for key in ("mean", "std")
    )
    x, y = (torch.rand(4, 3, 32, 32) - mean) / std, torch.arange(4)
    moved = AdversarialImages(model, eps=0.1, norm=norm)(x, y)
    order = 2 if norm == "l2" else torch.inf
    far = torch.linalg.vector_norm(((moved - x) * std).flatten(1), ord=order, dim=1)
    assert far.max() < 0.1001
    assert far.min() > 0.09
    assert F.cross_entropy(model(moved), y) > F.cross_entropy(model(x), y)


def test_a_loop_trains_on_them_where_no_gradient_is_recorded_too():
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 3))
    compiled = torch.compile(model, backend="eager")
    where = {"head": "3", "input_size": (1, 8, 8), "pixel_std": 1}
    adversarial = AdversarialImages(compiled, eps=0.5, **where)
    with torch.no_grad():
        moved = adversarial(images(), LABELS)
    assert not torch.equal(moved, images())
    F.cross_entropy(compiled(moved), LABELS).backward()
    assert all(p.grad.any() for p in model.parameters())


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"eps": 0.0}, r"eps \(0.0\) must be positive"),
        ({"eps": 1, "images": 0}, r"images \(0\) must be at least 1"),
        ({"eps": 1, "steps": 0}, r"steps \(0\) must be at least 1"),
        ({"eps": 2, "norm": "linf"}, r"eps \(2\) must be in \[0, 1\]"),
        ({"eps": 1, "pixel_std": 0.5}, "takes images in .0, 1. and normalises them itself"),
    ],
)
def test_settings_out_of_range_are_named(settings, says):
    with pytest.raises(ValueError, match=says):
        AdversarialImages(tiny(), **settings)


def test_what_a_batch_lacks_and_an_encoder_without_a_head_are_named():
    adversarial = AdversarialImages(tiny(), eps=0.1)
    with pytest.raises(ValueError, match="AdversarialImages is of one class an image"):
        adversarial(images(), LABELS[:4])
    with pytest.raises(ValueError, match="divide pixels of 0 to 255 by 255"):
        adversarial(images().long(), LABELS)
    encoder = timm.create_model("test_resnet", num_classes=0)
    with pytest.raises(ValueError, match="this encoder has no head for them"):
        AdversarialImages(encoder, eps=0.1)
