import pytest
import torch

from hf_specreg.robustness.corruptions import CORRUPTIONS, SEVERITIES, corrupt


def smooth(size, channels=3):
    ramp = torch.linspace(0.1, 0.9, size)
    image = (ramp[:, None] + ramp.sin()[None] * 0.5).clamp(0, 1) * torch.ones(channels, 1, 1)
    return torch.stack([image, image.flip(1)])


@pytest.mark.parametrize("size", [32, 96])
@pytest.mark.parametrize("name", CORRUPTIONS)
def test_corruptions_grow_with_severity_and_stay_in_the_box(name, size):
    images = (smooth(size) + 0.2 * torch.rand(2, 3, size, size)).clamp(0, 1)
    changes = []
    for severity in SEVERITIES:
        corrupted = corrupt(images, name, severity, seeds=[0, 1])
        assert corrupted.shape == images.shape
        assert corrupted.min() >= 0
        assert corrupted.max() <= 1
        changes.append((corrupted - images).abs().mean().item())
    assert changes[0] > 0
    assert changes[-1] > changes[0]


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_an_image_is_corrupted_alike_alone_and_in_company(name):
    images = smooth(8, channels=1)
    together = corrupt(images, name, 3, seeds=[5, 6])
    torch.testing.assert_close(corrupt(images[1:], name, 3, seeds=[6]), together[1:])
