"""Batch norm folded into the linear map before it: diag(gamma / sqrt(running_var + eps)) W.

A batch norm after a convolution makes the convolution's own scale free: W -> c W changes nothing
once the running variance has followed. The folded map is what acts at evaluation.
"""

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


@torch.no_grad()
def following_norms(network: nn.Module, input_size: tuple[int, int, int]) -> dict[str, _BatchNorm]:
    """Return the batch norms that are fed a layer's output as it is, by the layer's dotted name.

    Found by one evaluation of one black image (C, H, W), where the model is.
    """
    names = {module: name for name, module in network.named_modules()}
    # The tensor is kept, so that its id stays its own; its version tells what is done in place.
    outputs: dict[int, tuple[str, Tensor, int]] = {}
    found: dict[str, _BatchNorm] = {}

    def after(module, args, output):
        if isinstance(output, Tensor):
            outputs[id(output)] = names[module], output, output._version

    def before(module, args):
        name, _, version = outputs.get(id(args[0]) if args else None, (None, None, None))
        if name is not None and args[0]._version == version:
            found[name] = module

    modes = {module: module.training for module in network.modules()}
    hooks = []
    for module in network.modules():
        if isinstance(module, _BatchNorm):
            hooks.append(module.register_forward_pre_hook(before))
        elif dict(module.named_parameters(recurse=False)):
            hooks.append(module.register_forward_hook(after))
    first = next(network.parameters())
    try:
        network.eval()
        network(torch.zeros(1, *input_size, dtype=first.dtype, device=first.device))
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in modes.items():
            module.training = mode
    return {name: norm for name, norm in found.items() if norm.running_var is not None}


def folded(weight: Tensor, norm: _BatchNorm) -> Tensor:
    """Return the weight [out, ...] with the norm's scale of each output channel."""
    scale = (norm.running_var + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight
    return weight * scale.to(weight).reshape(-1, *[1] * (weight.ndim - 1))
