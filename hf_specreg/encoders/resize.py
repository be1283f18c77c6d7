"""A loaded model for images of another size than it was saved with."""

from typing import TYPE_CHECKING

import torch

from hf_specreg.encoders.modules import evaluating

if TYPE_CHECKING:
    from hf_specreg.encoders.model import SpecRegModel


def resize(model: "SpecRegModel", input_size: tuple[int, int, int]) -> None:
    """Have a model take images of another size from now on, in place.

    Convolutional networks take any size; position embeddings are resampled where timm does so.

    Args:
        model: loaded.
        input_size: (C, H, W).

    Raises:
        ValueError: it has other channels, or takes images of one size only.
    """
    if tuple(input_size) == model.input_size:
        return
    channels, *size = input_size
    if channels != model.input_size[0]:
        raise ValueError(
            f"input_size {tuple(input_size)}: the model takes images of {model.input_size[0]} "
            "channels"
        )
    if hasattr(model.network, "set_input_size"):
        model.network.set_input_size(img_size=tuple(size))
        model.model_args["img_size"] = list(size)
    try:
        with evaluating(model), torch.no_grad():
            model(torch.zeros(1, *input_size))
    except Exception as error:  # whatever a library raises at a size that it does not take
        raise ValueError(
            f"input_size {tuple(input_size)}: {type(model.network).__name__} takes images of "
            f"{model.input_size} ({error})"
        ) from error
    model.input_size = tuple(input_size)
    model.preprocessing["crop_pct"] = 1.0  # it is of the size that the weights were made at
