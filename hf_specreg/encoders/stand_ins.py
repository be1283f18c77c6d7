"""Tensors that stand in for a network's parameters and buffers while it is traced."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn


def _tensors(network: nn.Module) -> Iterator[tuple[str, Tensor, bool]]:
    """Yield a module's own parameters and buffers, each module once, by the first of its names, and
    whether it is a buffer.
    """
    for prefix, module in network.named_modules():
        for own in (module._parameters, module._buffers):
            for name, tensor in own.items():
                if tensor is not None:
                    yield f"{prefix}.{name}" if prefix else name, tensor, own is module._buffers


def on_meta(network: nn.Module) -> dict[str, Tensor]:
    """Every parameter's and buffer's shape on the meta device, without a graph; floating point in
    the default dtype, as the image is. One tensor in two modules is one.
    """
    default, shapes, found = torch.get_default_dtype(), {}, {}
    for name, tensor, _ in _tensors(network):
        if id(tensor) not in shapes:
            dtype = default if tensor.is_floating_point() else tensor.dtype
            shapes[id(tensor)] = torch.empty_like(tensor, device="meta", dtype=dtype)
        found[name] = shapes[id(tensor)]
    return found


def with_values(network: nn.Module) -> dict[str, Tensor]:
    """Every parameter without its graph, and a copy of every buffer; floating point in the default
    dtype. One tensor in two modules is one.
    """
    default, values, found = torch.get_default_dtype(), {}, {}
    for name, tensor, is_buffer in _tensors(network):
        if id(tensor) not in values:
            value = tensor.detach().clone() if is_buffer else tensor.detach()
            values[id(tensor)] = value.to(default) if value.is_floating_point() else value
        found[name] = values[id(tensor)]
    return found
