"""Norms folded into the linear maps beside them: diag(gamma / sqrt(running_var + eps)) W diag(g).

A batch norm after a linear map, with gain gamma, makes the map's own scale free: W -> c W changes
nothing once the running variance has followed. So does the gain g of a layer norm before it, with
W -> W / c and g -> c g. The folded map is what acts, of the batch norm at evaluation.

A step against the gradient of its sigma^2 in W moves the folded map by (gamma / s)^2 as much as the
same step moves a map without a norm, s^2 being the running variance. Weight decay, and the penalty
itself, make W and with it s small, which makes the step longer still: a strong penalty blows up.
So the gradient in W is divided by (gamma / s)^2 where that is above 1, row by row, and the one in
gamma, which goes with 1 / gamma, multiplied by gamma^2 where that is below 1. Both are positive
factors: the direction is still one of descent, and of the same length as without a norm.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from hf_specreg.encoders.modules import evaluating
from hf_specreg.encoders.trace import computes_weight
from hf_specreg.spectral.sharding import whole


@dataclass(frozen=True)
class Norms:
    """The norms beside a linear map.

    Attributes:
        before: a layer norm whose output the map is fed as it is, with a gain of each feature or
            channel.
        after: a batch norm that is fed the map's output as it is.
    """

    before: nn.Module | None = None
    after: _BatchNorm | None = None


@torch.no_grad()
def adjoining_norms(network: nn.Module, input_size: tuple[int, int, int]) -> dict[str, Norms]:
    """Return the norms beside each layer that has one, by the layer's dotted name.

    Found by one evaluation of one black image (C, H, W), where the model is.
    """
    names = {module: name for name, module in network.named_modules()}
    # The tensor is kept, so that its id stays its own; its version tells what is done in place.
    outputs: dict[int, tuple[nn.Module, Tensor, int]] = {}
    found: dict[str, Norms] = {}

    def after(module, args, output):
        if isinstance(output, Tensor):
            outputs[id(output)] = module, output, output._version

    def before(module, args):
        source, _, version = outputs.get(id(args[0]) if args else None, (None, None, None))
        if source is None or args[0]._version != version:
            return
        if isinstance(module, _BatchNorm):
            if module.running_var is not None:
                found[names[source]] = replace(found.get(names[source], Norms()), after=module)
        elif _has_gain(source):
            found[names[module]] = replace(found.get(names[module], Norms()), before=source)

    hooks = []
    for module in network.modules():
        if dict(module.named_parameters(recurse=False)) or computes_weight(module):
            hooks.append(module.register_forward_pre_hook(before))
            if not isinstance(module, _BatchNorm):
                hooks.append(module.register_forward_hook(after))
    first = next(network.parameters())
    try:
        with evaluating(network), torch.compiler.set_stance("force_eager"):
            network(torch.zeros(1, *input_size, dtype=first.dtype, device=first.device))
    finally:
        for hook in hooks:
            hook.remove()
    return found


def foldable(name: str, module: nn.Module, norms: Norms) -> Norms:
    """Return those of the norms beside a module that scale rows and columns of a weight it holds.

    Args:
        name: of the weight's operator.
        module: that holds the weight.
        norms: beside the module.
    """
    if isinstance(module, nn.MultiheadAttention):
        return Norms() if name.endswith(".out_proj") else Norms(before=norms.before)
    base = getattr(module, "base_layer", module)  # of LoRA
    if isinstance(base, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d):
        return Norms()
    convolves = isinstance(base, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    per_channel = type(norms.before).__name__.endswith("2d")  # as timm's LayerNorm2d
    if per_channel != convolves or getattr(base, "groups", 1) > 1:
        return Norms(after=norms.after)
    return norms


def folded(weight: Tensor, norms: Norms) -> Tensor:
    """Return the weight [out, in, ...] with the norms' scales of its outputs and inputs.

    Differentiable by the weight and the norms' gains, after a batch norm with the factors that the
    module's head says; running statistics are constants.

    Args:
        weight: of a linear layer or an ungrouped convolution.
        norms: beside it.
    """
    weight = whole(weight)
    if norms.after is not None:
        inverse = (norms.after.running_var + norms.after.eps).rsqrt().to(weight)
        gain = torch.ones_like(inverse)
        if norms.after.weight is not None:
            gain = whole(norms.after.weight).to(weight)
        weight = _ScaledRows.apply(weight, gain, inverse)
    if norms.before is not None:
        gain = whole(norms.before.weight).to(weight)
        weight = weight * gain.reshape(1, -1, *[1] * (weight.ndim - 2))
    return weight


class _ScaledRows(torch.autograd.Function):
    """diag(gain * inverse) W, with gradients that make steps of bounded length."""

    @staticmethod
    def forward(ctx, weight: Tensor, gain: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(weight, gain, inverse)
        return weight * _column(gain * inverse, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        weight, gain, inverse = ctx.saved_tensors
        scale = gain * inverse
        by_gain = (grad * weight).flatten(1).sum(1) * inverse
        by_weight = grad * _column(scale / scale.square().clamp(min=1), weight)
        return by_weight, by_gain * gain.square().clamp(max=1), None


def _column(values: Tensor, weight: Tensor) -> Tensor:
    return values.reshape(-1, *[1] * (weight.ndim - 1))


def _has_gain(module: nn.Module) -> bool:
    """Whether it is a layer norm over one dimension, or one like it, with a gain."""
    if not isinstance(module, nn.LayerNorm | nn.RMSNorm) or module.weight is None:
        return False
    return module.weight.ndim == 1
