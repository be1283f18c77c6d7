"""Norms folded into the linear maps beside them: diag(gamma / sqrt(running_var + eps)) W diag(g).

A batch norm after a linear map, with gain gamma, makes the map's own scale free: W -> c W changes
nothing once the running variance has followed. So does the gain g of a norm before it, with
W -> W / c and g -> c g, and layer scale after it. The folded map is what acts, of the batch norm at
evaluation. Which gains stand beside a map is found in `norms.py`.

A step against the gradient of its sigma^2 in W moves the folded map by (gamma / s)^2 as much as the
same step moves a map without a norm, s^2 being the running variance. Weight decay, and the penalty
itself, make W and with it s small, which makes the step longer still: a strong penalty blows up.
So the gradient in W is divided by (gamma / s)^2 where that is above 1, row by row, and the one in
gamma, which goes with 1 / gamma, multiplied by gamma^2 where that is below 1. Both are positive
factors: the direction is still one of descent, and of the same length as without a norm. Gains
without running statistics, and batch norms whose statistics are pinned, feed nothing back, and have
the gradient as it is.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hf_specreg.spectral.norms import Norms, Scale
from hf_specreg.spectral.sharding import whole


def folded(weight: Tensor, norms: Norms, *, bounded: bool = True) -> Tensor:
    """Return the weight [out, in, ...] with the norms' scales of its outputs and inputs.

    Differentiable by the weight and the norms' gains; running statistics are constants.

    Args:
        weight: of a linear layer or a convolution.
        norms: beside it.
        bounded: after a batch norm, the gradient has the factors that the module's head says; else
            it is the value's own.
    """
    weight = whole(weight)
    for scale in norms.after:
        gain, inverse = _factors(scale, weight)
        if inverse is None:
            weight = weight * _column(gain, weight)
        elif bounded:
            weight = _ScaledRows.apply(weight, gain, inverse)
        else:
            weight = weight * _column(gain * inverse, weight)
    for scale in norms.before:
        gain, inverse = _factors(scale, weight)
        weight = weight * _columns(gain if inverse is None else gain * inverse, weight)
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


def _factors(scale: Scale, weight: Tensor) -> tuple[Tensor, Tensor | None]:
    """The gain of each channel, and 1 / standard deviation where it is of running statistics."""
    gain, inverse = (
        None if constant is None else _of_channels(constant.value().to(weight), scale.index)
        for constant in (scale.gain.weight, scale.gain.inverse)
    )
    return torch.ones_like(inverse) if gain is None else gain, inverse


def _of_channels(factors: Tensor, index: Tensor | None) -> Tensor:
    factors = factors.flatten()
    return factors if index is None else factors[index.to(factors.device)]


def _column(values: Tensor, weight: Tensor) -> Tensor:
    return values.reshape(-1, *[1] * (weight.ndim - 1))


def _columns(values: Tensor, weight: Tensor) -> Tensor:
    """Values of the inputs as the weight has them, whose rows are of one group of inputs each."""
    groups = len(values) // weight.shape[1]
    if groups > 1:
        values = values.reshape(groups, -1).repeat_interleave(len(weight) // groups, dim=0)
    return values.reshape(-1, weight.shape[1], *[1] * (weight.ndim - 2))
