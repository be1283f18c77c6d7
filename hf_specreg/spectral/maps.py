"""Which linear maps a model is made of: the operators of its layers, each weight once."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from hf_specreg.encoders.features import FeatureSpace
from hf_specreg.encoders.trace import Layer
from hf_specreg.spectral.layers import UnsupportedLayerError, is_matrix, linear_operators
from hf_specreg.spectral.operators import LinearOperator
from hf_specreg.spectral.singular import random_vector, top_singular_value


def linear_maps(
    model: nn.Module | FeatureSpace,
    *,
    input_size: tuple[int, int, int] | None = None,
    head: str | Sequence[str] | None = None,
    up_to_head: bool = True,
    skip: Sequence[str] = (),
    split_qkv: bool = True,
) -> list[tuple[nn.Module, LinearOperator]]:
    """Return a model's linear operators, each weight once, with the module each is of, in forward
    order.

    Args:
        model: as for `FeatureSpace.of`, or one.
        input_size: (C, H, W) of the images; default: the model's own configuration.
        head: dotted name or names of the head; default: found for timm and transformers.
        up_to_head: those before the features only; else with the head.
        skip: dotted names of modules to leave out, with all they hold; "", the model itself: only
            the parameters that are its own.
        split_qkv: see `linear_operators`.

    Raises:
        ValueError: the head or the input size is not known, a name in `skip` is wrong, or no linear
            map is left.
        RuntimeError: the model cannot be run on images of this size, or its head is not called.
        UnsupportedLayerError: a layer has weights that cannot be treated.
    """
    space = FeatureSpace.of(model, head=head, input_size=input_size)
    _check_skip(space.network, skip)
    _check_real(space.network, skip)
    found = space.layers if up_to_head else space.layers_with_head
    modules = dict(space.network.named_modules(remove_duplicate=False))
    for layer in found:
        if modules.get(layer.name) is not layer.module:
            raise ValueError(
                f"layer {layer.name!r} was replaced after the feature space was found: make it "
                "anew, by FeatureSpace.of, after adapters, parametrizations and new layers"
            )
    owners = operators_of(found, skip=skip, split_qkv=split_qkv)
    if not owners:
        raise ValueError(
            f"no linear map of {type(space.network).__name__} is left before its head {space.head}"
        )
    return owners


def operators_of(
    found: Sequence[Layer], *, skip: Sequence[str] = (), split_qkv: bool = True
) -> list[tuple[nn.Module, LinearOperator]]:
    """Return the operators of layers, each weight once, with the module each came from.

    A weight that acts in several ways (a layer used at two sizes, two layers that share it) counts
    as the one with the largest sum of sigma^2 now.

    Args:
        found: the layers, in forward order.
        skip: dotted names of modules to leave out, with all they hold.
        split_qkv: see `linear_operators`.
    """
    covered: list[str] = list(skip)
    uses: dict[frozenset[int], list[tuple[nn.Module, list[LinearOperator]]]] = {}
    for layer in found:
        if _within(layer.name, covered):
            continue
        operators = _of_each_shape(layer, split_qkv)
        if not operators:
            continue
        covered.append(layer.name)
        weights = frozenset(id(p) for p in layer.module.parameters() if is_matrix(p))
        key = weights or frozenset({id(layer.module)})
        uses.setdefault(key, []).extend((layer.module, each) for each in operators)
    chosen = [_largest(ways) for ways in uses.values()]
    return [
        (module, operator)
        for module, operators in chosen
        for operator in operators
        if not _within(operator.name, skip)
    ]


def _of_each_shape(layer: Layer, split_qkv: bool) -> list[list[LinearOperator]]:
    """A layer's operators for every shape that it is fed, where they differ."""
    found: dict[tuple, list[LinearOperator]] = {}
    for shape in layer.input_shapes:
        operators = linear_operators(
            layer.name,
            layer.module,
            shape,
            split_qkv=split_qkv,
            parent=layer.parent,
            used_directly=layer.used_directly,
            used_derived=layer.used_derived,
            used_reshaped=layer.used_reshaped,
        )
        if operators:
            found.setdefault(_geometry(operators), operators)
    return list(found.values())


def _geometry(operators: Sequence[LinearOperator]) -> tuple:
    """Equal for operators that do the same with the same weight."""
    return tuple(replace(operator, name="", layer_weight=None) for operator in operators)


def _largest(
    ways: Sequence[tuple[nn.Module, list[LinearOperator]]],
) -> tuple[nn.Module, list[LinearOperator]]:
    """Of the ways in which a weight acts, that with the largest sum of sigma^2; the first, where
    all do the same or there are no values.
    """
    distinct: dict[tuple, tuple[nn.Module, list[LinearOperator]]] = {}
    for module, operators in ways:
        distinct.setdefault(_geometry(operators), (module, operators))
    if len(distinct) == 1 or ways[0][1][0].effective_weight().is_meta:
        return ways[0]
    return max(distinct.values(), key=lambda way: _sum_of_squares(way[1]))


@torch.no_grad()
def _sum_of_squares(operators: Sequence[LinearOperator]) -> float:
    total = 0.0
    for operator in operators:
        weight = operator.effective_weight().float()
        v = random_vector(operator, weight, torch.Generator().manual_seed(0))
        total += top_singular_value(operator, weight, v).sigma.item() ** 2
    return total


def _check_skip(network: nn.Module, skip: Sequence[str]) -> None:
    if isinstance(skip, str):
        raise ValueError(f"skip ({skip!r}) must be a sequence of names, not one string")
    unknown = sorted(set(skip) - {name for name, _ in network.named_modules()})
    if unknown:
        raise ValueError(f"skip names no modules in {type(network).__name__}: {unknown}")


def _check_real(network: nn.Module, skip: Sequence[str]) -> None:
    for name, module in network.named_modules():
        for own, parameter in module.named_parameters(recurse=False):
            if parameter.is_complex() and not _within(name, skip):
                raise UnsupportedLayerError(
                    f"the weight {own!r} of layer {name!r} is complex, and singular values of real "
                    f"ones alone are followed; to leave the layer out, pass skip=[{name!r}]"
                )


def _within(name: str, others: Sequence[str]) -> bool:
    """Whether a module is one of others, or in one."""
    return any(name == other or name.startswith(f"{other}.") for other in others)
