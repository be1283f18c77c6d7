"""What an image processor of transformers makes of images: what it says, held to what it does."""

from typing import Any

import numpy as np
import torch

from hf_specreg.encoders.blueprint import FolderError

RESAMPLING = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3}  # as in PIL
EDGE = 64  # of the images that it is asked about
CLOSE = 1e-3  # of a mean or std


def processor_data(processor: Any, name: Any) -> dict[str, Any]:
    """Return what an image processor does, as far as it is known: mean and std, per channel in
    [0, 1] pixels; size (height, width); crop_pct, crop_mode ("squash" where height and width are
    brought to those stated, whatever they were) and interpolation.

    Args:
        processor: an image processor of transformers.
        name: of what it belongs to.

    Raises:
        FolderError: it does to RGB images what no mean and std do.
    """
    data = _of_timm(processor) if hasattr(processor, "data_config") else _stated(processor)
    if len(data.get("mean", (0,) * 3)) != 3:
        return data
    done = _measured(processor, name)
    for key, values in done.items():
        if key not in data or not np.allclose(data[key], values, atol=CLOSE):
            data[key] = tuple(round(float(value), 6) for value in values)
    return data


def _of_timm(processor: Any) -> dict[str, Any]:
    """What the processor of a timm network in transformers says."""
    stated = processor.data_config
    kept = ("crop_pct", "crop_mode", "interpolation")
    data = {key: stated[key] for key in kept if key in stated}
    mean, std = tuple(stated["mean"]), tuple(stated["std"])
    return {**data, "mean": mean, "std": std, "size": tuple(stated["input_size"][1:])}


def _stated(processor: Any) -> dict[str, Any]:
    names = {number: name for name, number in RESAMPLING.items()}
    resample = getattr(processor, "resample", None)
    data = {"interpolation": names.get(int(3 if resample is None else resample), "bicubic")}
    for key in ("mean", "std"):
        if getattr(processor, f"image_{key}", None):
            data[key] = tuple(getattr(processor, f"image_{key}"))
    size, crop = (dict(getattr(processor, k, None) or {}) for k in ("size", "crop_size"))
    edge, squashed = size.get("shortest_edge"), bool(size.get("height") and size.get("width"))
    resized = getattr(processor, "do_resize", True)
    cut = getattr(processor, "do_center_crop", False) and crop.get("height")
    if cut and edge and type(processor).__name__.startswith("Levit"):
        edge = int(256 / 224 * edge)  # as its class does
    whole = min(size["height"], size["width"]) if squashed else edge
    # A part that is larger than the whole is cut before.
    larger = cut and whole and whole < min(crop["height"], crop["width"])
    kept = crop if cut and not larger else size
    height, width = kept.get("height") or edge, kept.get("width") or edge
    if resized and whole and height:
        data["crop_pct"] = min(height, width) / whole
    if resized and squashed:
        data["crop_mode"] = "squash"
    if getattr(processor, "crop_pct", None):
        data["crop_pct"] = processor.crop_pct
        if (edge or 0) >= 384:  # of ConvNeXt: not cut
            data |= {"crop_pct": 1.0, "crop_mode": "squash"}
    if height and width:
        data["size"] = (height, width)
    return data


def _measured(processor: Any, name: Any) -> dict[str, np.ndarray]:
    """The mean and std, [3] each, that it applies to RGB images: classes divide by a std twice, or
    have one that they do not use.
    """
    images = np.zeros((4, EDGE, EDGE, 3), np.uint8)  # black, red, green, blue
    for channel in range(3):
        images[1 + channel, ..., channel] = 255
    done = processor([*images], return_tensors="pt").get("pixel_values")
    if not isinstance(done, torch.Tensor) or done.ndim != 4 or done.shape[1] != 3:
        raise FolderError(
            f"the image processor of {name} ({type(processor).__name__}) makes no images "
            "[B, 3, H, W] of RGB images, which this package trains on"
        )
    middle = done[..., done.shape[-2] // 2, done.shape[-1] // 2].double().numpy()
    slopes = middle[1:] - middle[0]  # of what each channel adds to each, in [0, 1] pixels
    scale = slopes.diagonal()
    if not (scale > 0).all() or np.abs(slopes - np.diag(scale)).max() > CLOSE * scale.max():
        raise FolderError(
            f"the image processor of {name} reorders or mixes the channels of images "
            f"({type(processor).__name__}), which no pixel mean and std do: load it with "
            "transformers, swap the input channels of its first layer, and save it with a plain "
            "processor"
        )
    return {"mean": -middle[0] / scale, "std": 1 / scale}
