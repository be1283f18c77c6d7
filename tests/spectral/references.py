"""Singular values without iteration, exactly: by the SVD of the explicitly built matrix (any
operator, small), and by the Fourier transform (circular convolutions, any stride).

Source: Sedghi, Gupta, Long, ICLR 2019, for the Fourier form, extended here to strides by folding
the frequencies that alias.
"""

import itertools

import torch
from torch import Tensor

from hf_specreg.spectral.operators import Convolution, LinearOperator


def dense_matrix(operator: LinearOperator, weight: Tensor) -> Tensor:
    """Build the operator's matrix, [outputs, inputs]: column i is W applied to the i-th unit
    vector.
    """
    n = torch.Size(operator.input_shape).numel()
    columns = operator.apply(weight, torch.eye(n).to(weight).reshape(n, *operator.input_shape))
    return columns.reshape(n, -1).T


def top_singular_value_dense(operator: LinearOperator, weight: Tensor) -> Tensor:
    """Return sigma, 0-d, by SVD of the explicitly built matrix: exact, for small operators."""
    return torch.linalg.matrix_norm(dense_matrix(operator, weight), ord=2)


def top_singular_value_fft(operator: Convolution, weight: Tensor) -> Tensor:
    """Return sigma, 0-d, of a circular convolution that keeps the size at stride 1 and whose stride
    divides the input, by SVD of its blocks in the Fourier domain: exact.

    With stride s, output frequency k mixes the s aliases k + j n / s of each dimension, so its
    block is their transfer matrices side by side, [out, in * s^d], times s^(-d/2).
    """
    sizes = operator.input_shape[1:]
    wrapped = weight.new_zeros(*weight.shape[:2], *sizes)
    for tap in itertools.product(*map(range, operator.kernel_size)):
        place = [t * d % n for t, d, n in zip(tap, operator.dilation, sizes, strict=True)]
        wrapped[(..., *place)] += weight[(..., *tap)]
    transfer = torch.fft.fftn(wrapped, dim=tuple(range(2, wrapped.ndim)))
    for dim, s in enumerate(operator.stride, 2):  # frequency f = alias * (n / s) + k
        transfer = transfer.unflatten(dim, (s, -1)).movedim(dim, 2).flatten(1, 2) / s**0.5
    matrices = transfer.unflatten(0, (operator.groups, -1)).flatten(3).movedim(3, 1)
    return torch.linalg.matrix_norm(matrices, ord=2).max()
