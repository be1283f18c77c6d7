"""A layer as a linear operator: v -> W v, its adjoint u -> W^T u, and the gradient of <u, W v> in
W.

The biases are left aside. Convolutions are the maps that the network computes, at the input size,
stride, padding, dilation and groups that it has; never the kernel reshaped to a matrix, whose norm
differs by up to the kernel size (Sedghi, Gupta, Long, "The singular values of convolutional
layers", ICLR 2019).

Every operator is given its weight explicitly, because the weight that acts is not always the
parameter that is trained: standardised convolutions, torch parametrizations, weight normalisation
and LoRA compute it. `layer_weight()` does that computation with its graph, so that a gradient
reaches the raw parameters, and `part` takes of it what the operator is: q of stacked q, k and v,
or a convolution's kernel as the matrix that every patch is multiplied by, where patches do not
overlap.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_specreg.spectral.precision import multiplies_bfloat16

# On maps with so few positions a product of two thin matrices, so many rows at a time, beats the
# convolution's own gradient: 1.1 ms for 1.6 to 3.6 ms at 512 channels and 4x4, on 2 CPU cores.
FEW_POSITIONS = 64
ROWS = 64
# From so many multiply-adds on, a convolution of one image is faster in bfloat16; smaller ones lose
# more by its conversions than they gain.
LARGE_PRODUCT = 2**22


class LinearOperator(ABC):
    """What singular values are computed from; v is [B, *input_shape], u is [B, *output_shape].

    Attributes:
        name: dotted, of its layer or of a part of it.
        input_shape: of v, without the batch.
        layer_weight: computes the layer's weight, with its graph.
        groups: blocks on the diagonal of its matrix, each of which maps its own channels.
    """

    name: str
    input_shape: tuple[int, ...]
    layer_weight: Callable[[], Tensor]
    groups: int

    @abstractmethod
    def apply(self, weight: Tensor, v: Tensor) -> Tensor:
        """W v."""

    @abstractmethod
    def adjoint(self, weight: Tensor, u: Tensor) -> Tensor:
        """W^T u."""

    @abstractmethod
    def weight_gradient(self, v: Tensor, u: Tensor) -> Tensor:
        """The gradient of <u, W v> in the weight, of the weight's shape."""

    def repeated(self, count: int) -> "LinearOperator":
        """So many operators of this shape as one, block diagonal: their weights below each other,
        the channels of their v and u one after the other.
        """
        channels, *sizes = self.input_shape
        return replace(self, input_shape=(count * channels, *sizes), groups=count * self.groups)

    def part(self, weight: Tensor) -> Tensor:
        """The operator's own weight, as it is in the layer's."""
        return weight

    def effective_weight(self) -> Tensor:
        """The operator's own weight as it acts, with its graph."""
        return self.part(self.layer_weight())

    def rounded(self, weight: Tensor) -> Tensor:
        """The weight, or a copy in bfloat16 to search u and v with, not to take sigma from."""
        return weight


@dataclass(frozen=True)
class Dense(LinearOperator):
    """A matrix [out, in], as in a linear layer: the rows from `rows[0]` to `rows[1]` of the layer's
    weight. With groups, so many matrices of equal size, below each other in the weight.
    """

    name: str
    input_shape: tuple[int, ...]
    layer_weight: Callable[[], Tensor]
    rows: tuple[int | None, int | None] = (None, None)
    groups: int = 1

    def repeated(self, count: int) -> "LinearOperator":
        """So many matrices of this size as one operator, a group each."""
        return replace(super().repeated(count), rows=(None, None))

    def part(self, weight: Tensor) -> Tensor:
        """The operator's own weight, as it is in the layer's."""
        return weight.flatten(1)[slice(*self.rows)]

    def apply(self, weight: Tensor, v: Tensor) -> Tensor:
        """W v."""
        return _joined(self._grouped(v) @ self._matrices(weight).mT)

    def adjoint(self, weight: Tensor, u: Tensor) -> Tensor:
        """W^T u."""
        return _joined(self._grouped(u) @ self._matrices(weight))

    def weight_gradient(self, v: Tensor, u: Tensor) -> Tensor:
        """The outer product u v^T, of every group."""
        return (self._grouped(u).mT @ self._grouped(v)).flatten(0, 1)

    def _matrices(self, weight: Tensor) -> Tensor:
        """[groups, out, in]."""
        return weight.unflatten(0, (self.groups, -1))

    def _grouped(self, rows: Tensor) -> Tensor:
        """[B, groups * n] as [groups, B, n]."""
        return rows.unflatten(1, (self.groups, -1)).transpose(0, 1)


def _joined(rows: Tensor) -> Tensor:
    """[groups, B, n] as [B, groups * n]."""
    return rows.transpose(0, 1).flatten(1)


@dataclass(frozen=True)
class Convolution(LinearOperator):
    """A convolution in 1 to 3 dimensions; padding is (before, after) per dimension, first
    dimension first.
    """

    name: str
    input_shape: tuple[int, ...]
    layer_weight: Callable[[], Tensor]
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    padding_mode: str
    dilation: tuple[int, ...]
    groups: int

    def as_matrix(self) -> Dense | None:
        """The matrix that acts on every patch by itself, where no two patches share an input: a
        1x1 convolution, or one whose stride is its kernel size. All singular values of the
        convolution are the matrix's (or those of its columns, for a patch that is partly
        padding). None where patches overlap, or none is whole.
        """
        zeros = self.padding_mode == "zeros" or not any(map(any, self.padding))
        spans = [(k - 1) * d + 1 for k, d in zip(self.kernel_size, self.dilation, strict=True)]
        apart = all(span <= s for span, s in zip(spans, self.stride, strict=True))
        sizes = zip(self.input_shape[1:], spans, self.stride, self.padding, strict=True)
        whole = all(-(-a // s) * s - a + span <= n for n, span, s, (a, _) in sizes)
        if self.groups > 1 or not (zeros and apart and whole):
            return None
        columns = self.input_shape[0] * math.prod(self.kernel_size)
        return Dense(self.name, (columns,), self.layer_weight)

    @property
    def _pads_itself(self) -> bool:
        """Whether torch's convolution can do the padding: zeros, as many before as after."""
        return self.padding_mode == "zeros" and all(a == b for a, b in self.padding)

    @property
    def _arguments(self) -> tuple:
        zeros = (0,) * len(self.padding)
        padding = tuple(a for a, _ in self.padding) if self._pads_itself else zeros
        return self.stride, padding, self.dilation, self.groups

    def apply(self, weight: Tensor, v: Tensor) -> Tensor:
        """W v."""
        stride, padding, dilation, groups = self._arguments
        convolve = (F.conv1d, F.conv2d, F.conv3d)[len(stride) - 1]
        return convolve(self._pad(v), weight, None, stride, padding, dilation, groups)

    def adjoint(self, weight: Tensor, u: Tensor) -> Tensor:
        """W^T u."""
        functions = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
        transpose = functions[len(self.stride) - 1]
        stride, padding, dilation, groups = self._arguments
        sizes = self.input_shape[1:]
        if not self._pads_itself:
            sizes = [n + a + b for n, (a, b) in zip(sizes, self.padding, strict=True)]
        spans = [d * (k - 1) + 1 for k, d in zip(self.kernel_size, dilation, strict=True)]
        # Of the padded input, what the last position does not reach.
        unread = [
            n + 2 * p - span - s * (positions - 1)
            for n, p, span, s, positions in zip(
                sizes, padding, spans, stride, u.shape[2:], strict=True
            )
        ]
        v = transpose(u, weight, None, stride, padding, unread, groups, dilation)
        return self._pad_adjoint(v)

    def weight_gradient(self, v: Tensor, u: Tensor) -> Tensor:
        """The gradient of <u, W v> in the kernel."""
        shape = (u.shape[1], self.input_shape[0] // self.groups, *self.kernel_size)
        stride, padding, dilation, groups = self._arguments
        if groups > 1 and shape[1] == 1 and len(u) == 1 and u.device.type == "cpu":
            # Of a depthwise one: v convolved with u, stride and dilation having changed places. On
            # large maps ten times faster than torch's own: 0.5 ms for 6.7 at 7x7 on 56x56.
            convolve = (F.conv1d, F.conv2d, F.conv3d)[len(stride) - 1]
            v = self._pad(v).repeat_interleave(len(u[0]) // groups, dim=1)
            taps = convolve(v, u.transpose(0, 1), None, dilation, padding, stride, len(u[0]))
            return taps[(..., *(slice(k) for k in self.kernel_size))].transpose(0, 1)
        if len(stride) == 2 and groups == 1 and u.shape[2:].numel() <= FEW_POSITIONS:
            patches = F.unfold(self._pad(v), self.kernel_size, dilation, padding, stride)
            rows, columns = (t.transpose(0, 1).flatten(1) for t in (u.flatten(2), patches))
            count = len(rows) // ROWS if len(rows) % ROWS == 0 else 1
            stacked = rows.reshape(count, -1, rows.shape[1])
            return torch.bmm(stacked, columns.T.expand(count, -1, -1)).reshape(shape)
        gradients = (nn.grad.conv1d_weight, nn.grad.conv2d_weight, nn.grad.conv3d_weight)
        return gradients[len(stride) - 1](self._pad(v), shape, u, *self._arguments)

    def rounded(self, weight: Tensor) -> Tensor:
        """A copy in bfloat16 where the processor multiplies in it and the product is large."""
        positions = math.prod(self.input_shape[1:]) / math.prod(self.stride)
        large = self.groups == 1 and weight.numel() * positions >= LARGE_PRODUCT
        quick = large and weight.device.type == "cpu" and multiplies_bfloat16()
        return weight.bfloat16() if quick and weight.dtype == torch.float32 else weight

    def _pad(self, v: Tensor) -> Tensor:
        if self._pads_itself:
            return v
        if self.padding_mode == "zeros":
            return F.pad(v, list(chain.from_iterable(reversed(self.padding))))
        for dim, index in self._sources(v.device):
            v = v.index_select(dim, index)
        return v

    def _pad_adjoint(self, u: Tensor) -> Tensor:
        if self._pads_itself:
            return u
        if self.padding_mode == "zeros":
            return F.pad(u, [-n for n in chain.from_iterable(reversed(self.padding))])
        for dim, index in self._sources(u.device):
            shape = list(u.shape)
            shape[dim] = self.input_shape[dim - 1]
            u = u.new_zeros(shape).index_add_(dim, index, u)
        return u

    def _sources(self, device: torch.device):
        """Yield a dimension and, for each of its padded positions, the position that is copied
        there.
        """
        for dim, (size, pad) in enumerate(zip(self.input_shape[1:], self.padding, strict=True), 2):
            positions = torch.arange(size, dtype=torch.float32, device=device)
            yield dim, F.pad(positions[None, None], pad, mode=self.padding_mode).flatten().long()


@dataclass(frozen=True)
class TransposedConvolution(LinearOperator):
    """A transposed convolution: the adjoint of a convolution from its output to its input."""

    name: str
    input_shape: tuple[int, ...]
    layer_weight: Callable[[], Tensor]
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    output_padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def apply(self, weight: Tensor, v: Tensor) -> Tensor:
        """W v."""
        functions = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
        transpose = functions[len(self.stride) - 1]
        extra, groups, dilation = self.output_padding, self.groups, self.dilation
        return transpose(v, weight, None, self.stride, self.padding, extra, groups, dilation)

    def adjoint(self, weight: Tensor, u: Tensor) -> Tensor:
        """W^T u."""
        convolve = (F.conv1d, F.conv2d, F.conv3d)[len(self.stride) - 1]
        v = convolve(u, weight, None, self.stride, self.padding, self.dilation, self.groups)
        return v[(..., *(slice(n) for n in self.input_shape[1:]))]

    def weight_gradient(self, v: Tensor, u: Tensor) -> Tensor:
        """The gradient of <u, W v> in the kernel: that of the convolution <W^T u, v>."""
        gradients = (nn.grad.conv1d_weight, nn.grad.conv2d_weight, nn.grad.conv3d_weight)
        shape = (self.input_shape[0], u.shape[1] // self.groups, *self.kernel_size)
        arguments = self.stride, self.padding, self.dilation, self.groups
        beyond = [self._positions(dim, n) - v.shape[dim] for dim, n in enumerate(u.shape[2:], 2)]
        v = F.pad(v, [n for extra in reversed(beyond) for n in (0, extra)])
        return gradients[len(self.stride) - 1](u, shape, v, *arguments)

    def _positions(self, dim: int, size: int) -> int:
        """How many positions the convolution has on u; more than the input where output_padding
        is a dilation's.
        """
        i = dim - 2
        span = self.dilation[i] * (self.kernel_size[i] - 1) + 1
        return (size + 2 * self.padding[i] - span) // self.stride[i] + 1
