"""Common corruptions at five severities, on [0, 1] pixels.

Six after Hendrycks, Dietterich, "Benchmarking Neural Network Robustness to Common
Corruptions and Perturbations", ICLR 2019, with that paper's severities: those of CIFAR-10-C up to
64 pixels, those of ImageNet-C above. They are made anew by torchvision's operations (brightness is
added to every channel, pixels are averaged by antialiased resizing), so the numbers are not those
of CIFAR-10-C or ImageNet-C.
"""

from collections.abc import Callable, Sequence

import torch
import torchvision.transforms.v2.functional as F
from torch import Tensor

SEVERITIES = (1, 2, 3, 4, 5)
SMALL = 64
_SMALL_SETTINGS = {
    "gaussian noise": (0.04, 0.06, 0.08, 0.09, 0.10),
    "gaussian blur": (0.4, 0.6, 0.7, 0.8, 1.0),
    "brightness": (0.05, 0.1, 0.15, 0.2, 0.3),
    "contrast": (0.75, 0.5, 0.4, 0.3, 0.15),
    "pixelate": (0.95, 0.9, 0.85, 0.75, 0.65),
    "jpeg": (80, 65, 58, 50, 40),
}
_LARGE_SETTINGS = {
    "gaussian noise": (0.08, 0.12, 0.18, 0.26, 0.38),
    "gaussian blur": (1, 2, 3, 4, 6),
    "brightness": (0.1, 0.2, 0.3, 0.4, 0.5),
    "contrast": (0.4, 0.3, 0.2, 0.1, 0.05),
    "pixelate": (0.6, 0.5, 0.4, 0.3, 0.25),
    "jpeg": (25, 18, 15, 10, 7),
}
CORRUPTIONS = tuple(_SMALL_SETTINGS)


def corrupt(images: Tensor, name: str, severity: int, *, seeds: Sequence[int]) -> Tensor:
    """Return images [B, C, H, W] in [0, 1] with a corruption of severity 1 to 5.

    Args:
        images: the images, on the CPU.
        name: one of `CORRUPTIONS`.
        severity: 1 to 5.
        seeds: one an image, of what is random.
    """
    settings = _SMALL_SETTINGS if max(images.shape[-2:]) <= SMALL else _LARGE_SETTINGS
    amount = settings[name][severity - 1]
    return _FUNCTIONS[name](images, amount, seeds).clamp(0, 1)


def _noise(images: Tensor, amount: float, seeds: Sequence[int]) -> Tensor:
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    noise = torch.stack([torch.randn(images.shape[1:], generator=g) for g in generators])
    return images + amount * noise


def _blur(images: Tensor, amount: float, seeds: Sequence[int]) -> Tensor:
    size = min(2 * int(4 * amount + 0.5) + 1, 2 * min(images.shape[-2:]) - 1)
    return F.gaussian_blur(images, [size, size], [amount, amount])


def _brightness(images: Tensor, amount: float, seeds: Sequence[int]) -> Tensor:
    return images + amount


def _contrast(images: Tensor, amount: float, seeds: Sequence[int]) -> Tensor:
    gray = images.mean(dim=(2, 3), keepdim=True)
    return (images - gray) * amount + gray


def _pixelate(images: Tensor, amount: float, seeds: Sequence[int]) -> Tensor:
    height, width = images.shape[-2:]
    small = [max(1, int(height * amount)), max(1, int(width * amount))]
    coarse = F.resize(images, small, F.InterpolationMode.BILINEAR, antialias=True)
    return F.resize(coarse, [height, width], F.InterpolationMode.NEAREST)


def _jpeg(images: Tensor, amount: int, seeds: Sequence[int]) -> Tensor:
    if images.shape[1] not in (1, 3):
        raise ValueError(f"JPEG has 1 or 3 channels, not {images.shape[1]}")
    pixels = (255 * images).round().to(torch.uint8)
    return torch.stack([F.jpeg(image, amount) for image in pixels]).float() / 255


_FUNCTIONS: dict[str, Callable] = {
    "gaussian noise": _noise,
    "gaussian blur": _blur,
    "brightness": _brightness,
    "contrast": _contrast,
    "pixelate": _pixelate,
    "jpeg": _jpeg,
}
