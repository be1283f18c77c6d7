"""The sum of sigma^2 = <D, W>^2 over layers, with the closed form of its gradient, 2 sigma D."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hf_specreg.spectral.sharding import Rows, block_products, scaled


class Factor(NamedTuple):
    """What a weight is multiplied by to give sigma = <D, W>: D, or the rows of it that are here, in
    so many blocks of so many operators.
    """

    direction: Tensor
    rows: Rows
    blocks: int
    operators: int


def sum_of_squares(zero: Tensor, factors: Sequence[Factor], weights: Sequence[Tensor]) -> Tensor:
    """Return the sum of sigma^2 over layers, 0-d, as one node of the graph.

    Args:
        zero: 0-d, of the type and on the device of the sum.
        factors: of each layer.
        weights: of each layer, or the rows of it that are here.
    """
    return _SumOfSquares.apply(zero, factors, *weights)


class _SumOfSquares(torch.autograd.Function):
    """The sum of sigma^2 = <D, W>^2 over layers, 0-d; the gradient in W is 2 sigma D.

    One function for several layers: a node of the graph costs more than a small layer's product.
    """

    @staticmethod
    def forward(ctx, zero: Tensor, factors: Sequence[Factor], *weights: Tensor) -> Tensor:
        sigmas = []
        for (direction, rows, blocks, operators), weight in zip(factors, weights, strict=True):
            products = block_products(direction, weight, blocks, rows)
            sigmas.append(_only_largest(products, operators).to(zero))
        sigmas = torch.cat(sigmas)
        ctx.layout = [(factor.blocks, factor.rows) for factor in factors]
        ctx.save_for_backward(sigmas, *(factor.direction for factor in factors))
        return sigmas.square().sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        sigmas, *directions = ctx.saved_tensors
        slopes = (2 * grad * sigmas).split([blocks for blocks, _ in ctx.layout])
        layers = zip(directions, slopes, ctx.layout, ctx.needs_input_grad[2:], strict=True)
        gradients = [scaled(d, s, rows) if used else None for d, s, (_, rows), used in layers]
        return None, None, *gradients


def _only_largest(products: Tensor, operators: int) -> Tensor:
    """Products [blocks] with each operator's largest as it is, negative where the weight has turned
    round, and 0 for its other blocks.
    """
    if len(products) == operators:
        return products
    of_each = products.reshape(operators, -1)
    largest = of_each.abs().argmax(1, keepdim=True)
    only = torch.zeros_like(of_each).scatter_(1, largest, of_each.gather(1, largest))
    return only.flatten()
