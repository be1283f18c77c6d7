"""From a picture as it is stored to [0, 1] pixels as a model takes them: channels, evaluation,
augmentation.

Pixels leave here in [0, 1]: normalisation is the model's. All that is random but the noise depends
on (seed, epoch, index) alone, so that a resumed run, or one with other workers or ranks, sees the
same images.
"""

import random
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import timm.data
import torch
from PIL import Image
from torch import Tensor

from hf_specreg.ranges import require

VIEWS = ("simclr", "byol", "vicreg")


@dataclass(frozen=True)
class AugmentConfig:
    """How training images are varied.

    Args:
        kind: variation: "none"; "crop_flip", shifts by up to 4 pixels and mirroring; "timm",
            `timm.data.create_transform`; or two views of each image for self-supervision, by
            lightly's transforms "simclr", "byol" or "vicreg".
        options: arguments of timm's or lightly's transform.
        mixup: alpha of timm's mixup; 0: off.
        cutmix: alpha of timm's cutmix; 0: off.
        label_smoothing: part of each label that is shared out over all classes, in [0, 1).
        noise: standard deviation of Gaussian noise on every pixel, in [0, 1] pixels, after the
            variation and before mixup; see `add_noise`; 0: off.
    """

    kind: Literal["none", "crop_flip", "timm", "simclr", "byol", "vicreg"] = "none"
    options: dict[str, Any] = field(default_factory=dict)
    mixup: float = 0.0
    cutmix: float = 0.0
    label_smoothing: float = 0.0
    noise: float = 0.0

    def __post_init__(self):
        require(self, "not negative", "mixup", "cutmix", "noise")
        require(self, "in [0, 1)", "label_smoothing")


def to_channels(image: Image.Image, channels: int) -> Image.Image:
    """Return a picture of any mode as 8-bit grey (1 channel) or RGB (3).

    16-bit grey keeps its upper byte. Wider integers do so too, but for a picture of them in which
    none is above 255: it is of 8 bits. What is transparent stands on white.

    Raises:
        ValueError: a picture of floats or of integers beyond 16 bits, or another number of
            channels.
    """
    if channels not in (1, 3):
        raise ValueError(f"pictures have 1 or 3 channels, not {channels}")
    if image.mode.startswith("I"):
        image = Image.fromarray(_eight_bits(np.asarray(image), stated=image.mode != "I"))
    elif image.mode == "F":
        raise ValueError(
            "a picture of floating-point pixels has no stated range: store it with 8 or 16 bits"
        )
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("L" if channels == 1 else "RGB")


def _eight_bits(pixels: np.ndarray, *, stated: bool) -> np.ndarray:
    """Integer pixels as 8 bits, uint8; `stated`: whether they are stored as 16 bits."""
    low, high = pixels.min(), pixels.max()
    if low < 0 or high >= 2**16:
        raise ValueError(
            f"its pixels go from {low} to {high}, beyond the 0 to 65535 of 16 bits: store it with "
            "8 or 16 bits"
        )
    return (pixels if high < 2**8 and not stated else pixels >> 8).astype(np.uint8)


def evaluation_transform(
    input_size: tuple[int, int, int],
    *,
    crop_pct: float = 1.0,
    crop_mode: str = "center",
    interpolation: str = "bicubic",
) -> Callable[[Image.Image], Tensor]:
    """Return timm's evaluation transform without its normalisation: picture -> uint8 [C, H, W]."""
    return timm.data.create_transform(
        input_size,
        is_training=False,
        crop_pct=crop_pct,
        crop_mode=crop_mode,
        interpolation=interpolation,
        normalize=False,
    )


def training_transform(
    input_size: tuple[int, int, int], *, interpolation: str = "bicubic", **options: Any
) -> Callable[[Image.Image], Tensor]:
    """Return timm's training transform without its normalisation: picture -> uint8 [C, H, W].

    Args:
        input_size: (C, H, W).
        interpolation: of the resizing.
        options: of `timm.data.create_transform`, such as scale, hflip, color_jitter or
            auto_augment. Random erasing (re_prob) works on normalised images and is not possible
            here.

    Raises:
        ValueError: re_prob is set.
    """
    if options.get("re_prob"):
        raise ValueError(
            f"re_prob ({options['re_prob']}) erases with normalised noise, but images are in [0, "
            "1] here"
        )
    return timm.data.create_transform(
        input_size, is_training=True, interpolation=interpolation, normalize=False, **options
    )


def two_view_transform(
    kind: str, input_size: tuple[int, int, int], **options: Any
) -> Callable[[Image.Image], Tensor]:
    """Return lightly's transform without its normalisation: picture -> two views [2, C, H, W].

    Args:
        kind: "simclr", "byol" or "vicreg".
        input_size: (C, H, W), square.
        options: of lightly's transform; those of "byol" are for both views.

    Raises:
        ImportError: lightly is not installed.
        ValueError: the images are not square.
    """
    try:
        from lightly import transforms
        from lightly.transforms.multi_view_transform import MultiViewTransform
    except ModuleNotFoundError as error:
        raise ImportError("two views need lightly: install the extra ssl") from error
    _, height, width = input_size
    if height != width:
        raise ValueError(f"two views need square images, not {height} x {width}")
    options = {"input_size": height, "normalize": None, **options}
    if kind == "byol":
        # Solarization is of the second view alone (Grill et al. 2020, table 6).
        solarization = options.pop("solarization_prob", 0.2)
        blur = options.pop("gaussian_blur", None)
        views = MultiViewTransform(
            [
                transforms.BYOLView1Transform(
                    **options, gaussian_blur=1.0 if blur is None else blur
                ),
                transforms.BYOLView2Transform(
                    **options,
                    gaussian_blur=0.1 if blur is None else blur,
                    solarization_prob=solarization,
                ),
            ]
        )
    else:
        views = {"simclr": transforms.SimCLRTransform, "vicreg": transforms.VICRegTransform}[kind](
            **options
        )

    def transform(picture: Image.Image) -> Tensor:
        pixels = torch.stack(views(picture))  # [0, 1], of 8-bit pictures
        return (pixels * 255).round().clamp(0, 255).to(torch.uint8)

    return transform


def crop_and_flip(images: Tensor, draws: Tensor, *, padding: int = 4) -> Tensor:
    """Shift images by up to `padding` pixels, with zeros from outside, and mirror half of them.

    Args:
        images: [B, C, H, W].
        draws: [B, 3] uniform in [0, 1): vertical shift, horizontal shift, mirror.
        padding: in pixels.
    """
    _, _, height, width = images.shape
    shifts = (draws[:, :2] * (2 * padding + 1)).long()
    rows = shifts[:, :1] + torch.arange(height)
    columns = shifts[:, 1:] + torch.arange(width)
    columns = torch.where(draws[:, 2:] < 0.5, columns, columns.flip(1))
    padded = torch.nn.functional.pad(images, [padding] * 4)
    which = torch.arange(len(images))[:, None, None]
    moved = padded[which, :, rows[:, :, None], columns[:, None, :]]
    return moved.permute(0, 3, 1, 2).contiguous()


def add_noise(images: Tensor, std: float) -> Tensor:
    """Return images with Gaussian noise on every pixel, from torch's global random numbers.

    They are not clipped, so that they leave [0, 1]: the noise keeps its mean and variance near
    black and white too, as the theory has it.

    Args:
        images: [..., C, H, W] in [0, 1].
        std: in [0, 1] pixels; 0 draws nothing.

    Source: Bishop, "Training with Noise is Equivalent to Tikhonov Regularization", Neural
    Computation 7, 1995; for images Rusak et al., "A Simple Way to Make Neural Networks Robust
    Against Diverse Image Corruptions", ECCV 2020.
    """
    return images + std * torch.randn_like(images) if std else images


def derived_seed(*key: int) -> int:
    """Return a seed that depends on all of a key, such as (seed, epoch, index), and on nothing
    else.
    """
    return np.random.SeedSequence(key).generate_state(1)[0].item()


@contextmanager
def seeded(*key: int):
    """Seed python's, numpy's and torch's CPU random numbers by a key, and put them back after."""
    before = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    seed = derived_seed(*key)
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.default_generator.set_state(before[2])
