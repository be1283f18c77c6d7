"""Norms folded into the linear maps beside them: diag(gamma / s) W diag(g / s').

A norm after a linear map, with gain gamma, makes the map's own scale free: W -> c W changes nothing
once its s has followed, the running standard deviation of a batch norm, sqrt(running_var + eps), or
the typical one of a layer or RMS norm (`typical.py`). So does the gain g of a norm before it,
with W -> W / c and g -> c g, and layer scale after it. The folded map is what acts, of the batch
norm at evaluation, and of the layer norm on a typical image, but for the mean and the radial part
that it takes out of its input: with the normalised x, its Jacobian and the map's is diag(gamma) / s
(I - 1 1^T / C - x x^T / C) W, and of an RMS norm without 1 1^T. Which gains stand beside a map is
found in `norms.py`.

A step against the gradient of its sigma^2 in W moves the folded map by (gamma / s)^2 as much as the
same step moves a map without a norm. Weight decay, and the penalty itself, make W and with it s
small, which makes the step longer still: a strong penalty blows up. So the gradient in W is divided
by (gamma / s)^2 where that is above 1, row by row, and the one in gamma, which goes with 1 / gamma,
multiplied by gamma^2 where that is below 1. Both are positive factors: the direction is still one
of descent, and of the same length as without a norm. After a layer norm, whose s goes with all of
W, the part along W is left out: it would shrink W, and the norm would undo it. Gains without
running statistics, and batch norms whose statistics are pinned, feed nothing back, and have the
gradient as it is.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hf_specreg.spectral.norms import Norms, Scale
from hf_specreg.spectral.precision import full_precision
from hf_specreg.spectral.sharding import check_shape, whole
from hf_specreg.spectral.tracking import Stack
from hf_specreg.spectral.typical import RunningInverse


def acting(stack: Stack, norms: Mapping[str, Norms], *, bounded: bool) -> Tensor:
    """Return a layer's weight as it acts, in full precision, with the norms beside it.

    Args:
        stack: the layer.
        norms: beside layers, by the name of their first operator.
        bounded: as for `folded`.
    """
    name = stack.operators[0].name
    weight = full_precision(stack.weight())
    check_shape(weight, stack.shape, name)
    return folded(weight, norms[name], bounded=bounded) if name in norms else weight


def folded(weight: Tensor, norms: Norms, *, bounded: bool = True) -> Tensor:
    """Return the weight [out, in, ...] with the norms' scales of its outputs and inputs.

    Differentiable by the weight and the norms' gains; statistics are constants.

    Args:
        weight: of a linear layer or a convolution.
        norms: beside it.
        bounded: after a norm with statistics, the gradient is the one that the module's head says;
            else it is the value's own.
    """
    weight = whole(weight)
    for scale in norms.after:
        gain, inverse = _factors(scale, weight)
        if inverse is None:
            weight = weight * _column(gain, weight)
        elif bounded:
            undone = isinstance(scale.gain.inverse, RunningInverse)
            weight = _ScaledRows.apply(weight, gain, inverse, undone)
        else:
            weight = weight * _column(gain * inverse, weight)
    for scale in norms.before:
        gain, inverse = _factors(scale, weight)
        weight = weight * _columns(gain if inverse is None else gain * inverse, weight)
    return weight


class _ScaledRows(torch.autograd.Function):
    """diag(gain * inverse) W, with gradients that make steps of bounded length; with none along W
    where the norm would undo it.
    """

    @staticmethod
    def forward(ctx, weight: Tensor, gain: Tensor, inverse: Tensor, undone: bool) -> Tensor:
        ctx.save_for_backward(weight, gain, inverse)
        ctx.undone = undone
        return weight * _column(gain * inverse, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        weight, gain, inverse = ctx.saved_tensors
        scale = gain * inverse
        by_gain = (grad * weight).flatten(1).sum(1) * inverse
        by_weight = grad * _column(scale / scale.square().clamp(min=1), weight)
        if ctx.undone:
            squares = weight.square().sum().clamp(min=torch.finfo(weight.dtype).tiny)
            by_weight = by_weight - (by_weight * weight).sum() / squares * weight
        return by_weight, by_gain * gain.square().clamp(max=1), None, None


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
