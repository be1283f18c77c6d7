"""Tensors that stand in for a network's parameters and buffers while it is traced or widened.

They are for `torch.func.functional_call(..., tie_weights=False)`: each module's own tensors by the
first of its names alone, since one that is swapped twice would keep what stands in for it.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

HALF = (torch.float16, torch.bfloat16)


def on_meta(network: nn.Module) -> dict[str, Tensor]:
    """Every parameter's and buffer's shape on the meta device, without a graph; floating point in
    the default dtype, as the image is.
    """

    def shape(tensor: Tensor, is_buffer: bool) -> Tensor:
        dtype = torch.get_default_dtype() if tensor.is_floating_point() else tensor.dtype
        return torch.empty_like(tensor, device="meta", dtype=dtype)

    return _replaced(network, shape)


def with_values(network: nn.Module) -> dict[str, Tensor]:
    """Every parameter without its graph, and a copy of every buffer; floating point in the default
    dtype.
    """

    def value(tensor: Tensor, is_buffer: bool) -> Tensor:
        tensor = tensor.detach().clone() if is_buffer else tensor.detach()
        return tensor.to(torch.get_default_dtype()) if tensor.is_floating_point() else tensor

    return _replaced(network, value)


def widened(network: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer of half precision in float32, with its graph."""

    def wide(tensor: Tensor, is_buffer: bool) -> Tensor | None:
        return tensor.float() if tensor.dtype in HALF else None

    return _replaced(network, wide)


def _replaced(
    network: nn.Module, stand_in: Callable[[Tensor, bool], Tensor | None]
) -> dict[str, Tensor]:
    """Return what stands in for each tensor, by its name, where something does; of a tensor in two
    modules the same. `stand_in` is given the tensor and whether it is a buffer.
    """
    found, made = {}, {}
    for prefix, module in network.named_modules():
        for own in (module._parameters, module._buffers):
            for name, tensor in own.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    made[id(tensor)] = stand_in(tensor, own is module._buffers)
                if made[id(tensor)] is not None:
                    found[f"{prefix}.{name}" if prefix else name] = made[id(tensor)]
    return found
