"""Batch norms fused into the linear maps before them, exactly, and pinned as what is left of them.

    gamma (W x + b - mean) / sqrt(var + eps) + beta = W' x + b' + beta'
    W' = s W,  b' = s b,  beta' = beta - s mean,  s = gamma / sqrt(var + eps)

The norms stay in the network, with mean 0, variance 1 - eps and gain 1, so that they only add
their bias beta': the architecture is unchanged, and whatever loads it loads this. The gains are
frozen, so that no scale is free: what a penalty says of W' it says of the function.
"""

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_specreg.encoders.features import FeatureSpace
from hf_specreg.encoders.graph import (
    OperationGraph,
    example,
    is_batch_norm,
    outputs_of,
)
from hf_specreg.encoders.modules import examined
from hf_specreg.encoders.pinned import BatchNorm, batch_norms, is_pinned, pin, pinnable

TOLERANCE = 1e-3  # of the largest output: float32 on the CPU is far below, TF32 below
NAMED = 8  # norms in a warning


def fuse_norms(model: nn.Module | FeatureSpace) -> tuple[str, ...]:
    """Fuse a model's batch norms into the linear maps before them, and pin all, in place.

    A norm is fused where a convolution or a linear layer on vectors is all that it is fed, and it
    all that becomes of that. Others are pinned with the statistics that they have: those before a
    map (pre-activation), after transposed convolutions, without a bias, and where a weight or a
    norm is used twice or a weight is computed.

    Args:
        model: pretrained, in float32; fused before an optimizer or a `SpectralPenalty` is made.

    Returns:
        The dotted names of the norms that were fused; a warning names the others.

    Raises:
        ValueError: one cannot be pinned (see `pin_norms`), or none can be fused, or the outputs are
            not the same as before: the model is then as it was.
    """
    space = FeatureSpace.of(model)
    network = space.network
    norms = pinnable(network)
    found = _fusible(space, norms)
    if not found:
        raise ValueError(
            f"no batch norm of {type(network).__name__} can be fused: none stands alone after a "
            "convolution or a linear layer. Pin them instead"
        )
    inputs = example(space, noise=True)
    touched = [t for name, linear in found.items() for t in _tensors(norms[name], linear)]
    kept = [tensor.detach().clone() for tensor in touched]
    before = _outputs(network, inputs)
    for name, (weight, bias) in found.items():
        _fuse(norms[name], weight, bias)
    difference = _difference(before, _outputs(network, inputs))
    if not difference <= TOLERANCE:
        with torch.no_grad():
            for tensor, value in zip(touched, kept, strict=True):
                tensor.copy_(value)
        raise ValueError(
            f"with its batch norms fused {type(network).__name__} gives other outputs, by "
            f"{difference:.1e} of the largest: it is left as it was. Pin them instead"
        )
    pin(norms.values())
    for name in found:
        norms[name].weight.requires_grad_(False)
    _warn_of_others([name for name in norms if name not in found], len(norms))
    return tuple(found)


def with_pins(metadata: Mapping[str, Any], network: nn.Module) -> dict[str, Any]:
    """Return what specreg.json says, with which of a network's batch norms are pinned."""
    metadata = {key: metadata[key] for key in metadata if key not in ("norms", "pinned")}
    norms = _named_without_prefix(network)
    pinned = [name for name, norm in norms.items() if is_pinned(norm)]
    if len(pinned) == len(norms):
        return metadata | ({"norms": "pinned"} if pinned else {})
    return metadata | ({"norms": "partly pinned", "pinned": pinned} if pinned else {})


def pin_again(network: nn.Module, metadata: Mapping[str, Any]) -> None:
    """Pin a loaded network's batch norms as its specreg.json says, and freeze the gains of those
    that were fused, which their values tell.

    Raises:
        ValueError: it has no batch norm of that name, or none at all.
    """
    if metadata.get("norms") not in ("pinned", "partly pinned"):
        return
    pinnable(network)
    norms = _named_without_prefix(network)
    names = metadata["pinned"] if metadata["norms"] == "partly pinned" else list(norms)
    if unknown := [name for name in names if name not in norms]:
        raise ValueError(f"specreg.json has batch norms pinned that are not there: {unknown[:4]}")
    pin(norms[name] for name in names)
    for name in names:
        if _is_fused(norms[name]):
            norms[name].weight.requires_grad_(False)


def _named_without_prefix(network: nn.Module) -> dict[str, BatchNorm]:
    """The batch norms by names that those of transformers have with a head and without."""
    prefix = f"{getattr(network, 'base_model_prefix', '')}."
    return {name.removeprefix(prefix): norm for name, norm in batch_norms(network).items()}


def _is_fused(norm: BatchNorm) -> bool:
    if norm.weight is None or norm.running_mean.any() or not (norm.weight == 1).all():
        return False
    return torch.equal(norm.running_var, torch.full_like(norm.running_var, 1 - norm.eps))


def _fusible(space: FeatureSpace, norms: dict[str, BatchNorm]) -> dict[str, tuple]:
    """The weight and the bias that each norm can be fused into, by the norm's name."""
    graph, found = OperationGraph(space), {}
    names = {n.weight: name for name, n in norms.items() if n.affine and n.running_var is not None}
    for node in filter(is_batch_norm, graph.inputs):
        name, fed = names.get(graph.parameter(node, 1)), graph.inputs[node]
        if name is None or len(fed) != 1 or graph.uses[fed[0]] != 1:
            continue
        linear = graph.linear_map(fed[0])
        if linear is not None and len(linear[0]) == norms[name].num_features:
            found[name] = linear
    return found


def _tensors(norm: BatchNorm, linear: tuple[Tensor, Tensor | None]) -> list[Tensor]:
    of_both = (*linear, norm.weight, norm.bias, norm.running_mean, norm.running_var)
    return [tensor for tensor in of_both if tensor is not None]


@torch.no_grad()
def _fuse(norm: BatchNorm, weight: Tensor, bias: Tensor | None) -> None:
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    weight.mul_(scale.reshape(-1, *[1] * (weight.ndim - 1)))
    if bias is not None:
        bias.mul_(scale)
    norm.bias.sub_(scale * norm.running_mean)
    norm.weight.fill_(1)
    norm.running_mean.zero_()
    norm.running_var.fill_(1 - norm.eps)


@torch.no_grad()
def _outputs(network: nn.Module, inputs) -> list[Tensor]:
    with examined(network):
        return [output.clone() for output in outputs_of(network, inputs)]


def _difference(before: list[Tensor], after: list[Tensor]) -> float:
    """The largest over the outputs, as a part of each one's largest value; may be NaN."""
    parts = [
        ((b - a).abs().max() / a.abs().max().clamp(min=torch.finfo(a.dtype).tiny)).item()
        for a, b in zip(before, after, strict=True)
    ]
    return max(parts, default=0.0)


def _warn_of_others(others: list[str], count: int) -> None:
    if others:
        more = f" and {len(others) - NAMED} more" if len(others) > NAMED else ""
        warnings.warn(
            f"{len(others)} of {count} batch norms are pinned, not fused, for no linear map alone "
            f"stands before them: {', '.join(others[:NAMED])}{more}",
            stacklevel=3,
        )
