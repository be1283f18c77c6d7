"""Images as [0, 1] pixels, which strengths and distances are in, however a model takes them.

A network is fed z = (x - mean) / std of images x in [0, 1]. Of the function x' -> f(x' / std) at
x' = std z, which is x but for a constant, every derivative and difference is per [0, 1] pixel.
"""

import warnings
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.func import functional_call

from hf_specreg.encoders.features import FeatureSpace
from hf_specreg.encoders.stand_ins import HALF, widened
from hf_specreg.encoders.trace import call

# Mean of (x - 1/2)^2. Of [0, 1] it is 1/4 at most, with Gaussian noise of a deviation of 0.7 added
# 0.74; of images normalised to mean 0 and deviation 1 it is 1.25.
FAR = 1.0


def in_pixels(space: FeatureSpace, pixel_std: float | Sequence[float] | None) -> FeatureSpace:
    """Return the feature space of the same network, whose model takes a `PixelModel`'s pixels.

    Args:
        space: of a model on images as it takes them.
        pixel_std: as for `find_pixel_std`.

    Raises:
        ValueError: as for `find_pixel_std`.
    """
    std = find_pixel_std(space.model, space.input_size[0], pixel_std)
    return replace(space, model=PixelModel(space.model, std, said=pixel_std is not None))


def find_pixel_std(
    model: nn.Module, channels: int, pixel_std: float | Sequence[float] | None = None
) -> tuple[float, ...] | None:
    """Return by what a model's images were divided, per channel; None: they are in [0, 1].

    Args:
        model: without what is put around it for training.
        channels: of its images.
        pixel_std: what it was, in [0, 1] pixels: a number, or one of each channel. Default: of a
            timm model, in transformers too, what its `pretrained_cfg` says, of a `SpecRegModel`
            nothing. That the first images do not look like it is a warning (`PixelModel.check`).

    Raises:
        ValueError: it is not known and not given, out of range, of another number of channels, or
            given for a model that divides by it itself.
    """
    name = type(model).__name__
    inside = getattr(type(model), "takes_pixels", False)
    if pixel_std is None:
        own = model.config if hasattr(model, "timm_model") else model  # timm's, in transformers
        stated = (getattr(own, "pretrained_cfg", None) or {}).get("std")
        if not inside and not stated:
            raise ValueError(
                f"{name} does not say how its images are normalised, and this term is per [0, 1] "
                "pixel: pass pixel_std=processor.image_std, or pixel_std=1 for images in [0, 1]"
            )
        return None if inside else for_channels(stated, channels)
    if inside:
        raise ValueError(
            f"{name} takes images in [0, 1] and normalises them itself: leave pixel_std out"
        )
    values = tuple(pixel_std) if hasattr(pixel_std, "__len__") else (pixel_std,) * channels
    if len(values) != channels or not all(0 < value <= 1 for value in values):
        raise ValueError(
            f"pixel_std ({pixel_std}) must be a number in (0, 1], or one of each of the {channels} "
            "channels: that of images in [0, 1]"
        )
    return values


def for_channels(values: Sequence[float], channels: int) -> tuple[float, ...]:
    """The values; or their mean for each channel, where the number of channels is another."""
    values = tuple(values)
    return values if len(values) == channels else (sum(values) / len(values),) * channels


class PixelModel(nn.Module):
    """A model on images in [0, 1] pixels, but for a constant, and in float32 at the least.

    Args:
        model: any.
        std: by what its images were divided, per channel; None: they are in [0, 1].
        said: whether the user said so, and not the model's configuration.

    Attributes:
        wraps: the attribute that holds the model; see `encoders/modules.py`.
    """

    wraps = "model"

    def __init__(self, model: nn.Module, std: Sequence[float] | None, *, said: bool = False):
        super().__init__()
        self.model = model
        self.std = None if std is None else torch.tensor(std).reshape(-1, 1, 1)
        self._takes_pixels = std is None or min(std) == 1
        self._said_by = "pixel_std"
        if not said:
            self._said_by = f"the pretrained_cfg of {type(model).__name__}"
        self._to_check = True

    def check(self, images: Tensor) -> None:
        """Warn, of the first images only, if they are in [0, 1] though the user or the model's
        configuration says that they are divided by less: then what is per pixel would be too
        much; or if they are `FAR` from what it takes, [0, 1] or normalised. Images in [-1, 1] are
        as near to [0, 1] as noisy ones, and pass. Asks the device once.

        Args:
            images: [B, C, H, W], as the model takes them.
        """
        if not self._to_check:
            return
        self._to_check = False
        from_middle = images - 0.5 if self._takes_pixels else self.pixels(images)
        far, inside = torch.stack(
            [from_middle.square().mean() > FAR, ((images >= 0) & (images <= 1)).all()]
        ).tolist()
        if self._takes_pixels and far:
            remedy = "give it pixels divided by 255, which it normalises itself"
            if self.std is not None:
                remedy = "pass by what they were divided as pixel_std, which is 1 now"
            warnings.warn(
                f"the images are far from [0, 1], in which {type(self.model).__name__} is said "
                f"to take them, and the strength is per [0, 1] pixel: {remedy}",
                stacklevel=2,
            )
        elif far:
            warnings.warn(
                f"the images are far from what {self._said_by} says, which is that they are "
                f"normalised, divided by {self._shown()}, and the strength counts on that: "
                "normalise them, or pass by what they were divided as pixel_std",
                stacklevel=2,
            )
        elif inside and not self._takes_pixels:
            warnings.warn(
                f"the images lie in [0, 1], but {self._said_by} says that they are normalised, "
                f"divided by {self._shown()}, and the strength counts on that: pass pixel_std=1 "
                "for images in [0, 1], or the std that they were divided by",
                stacklevel=2,
            )

    def _shown(self) -> list[float]:
        return [round(value, 4) for value in self.std.flatten().tolist()]

    def pixels(self, images: Tensor) -> Tensor:
        """Return images [B, C, H, W], as the model takes them, in pixels."""
        images = images.float() if images.dtype in HALF else images
        if self.std is None:
            return images
        self.std = self.std.to(images)  # copied to the device once
        return images * self.std

    def as_taken(self, pixels: Tensor) -> Tensor:
        """Return pixels [B, C, H, W] as the model takes images."""
        return pixels if self.std is None else pixels / self.std

    def forward(self, pixels: Tensor) -> Tensor:
        """Run the model on [B, C, H, W] of `pixels`; on weights of half precision as float32."""
        images = self.as_taken(pixels)
        wide = widened(self.model)
        if not wide:
            return call(self.model, images)
        return functional_call(self.model, wide, (images,), tie_weights=False)
