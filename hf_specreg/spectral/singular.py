"""The top singular value of a linear operator: sigma = max ||W v|| over ||v|| = 1.

While training, the power method follows the slowly moving weights (`power_iteration`), u and v in
turn, one product a use:

    u = W v / ||W v||,   sigma = ||W v||        and the next time
    v = W^T u / ||W^T u||,   sigma = ||W^T u||

For a value to report, restarted Lanczos on W^T W goes on until the residual says that it has
converged (`top_singular_value`). Two exact references need no iteration: the dense SVD of the
explicitly built matrix (any operator, small), and the Fourier transform (circular convolutions, any
stride).

A grouped convolution is block diagonal, one block a group. Here every block has a unit vector of
its own. One vector for all of them would die out exactly to 0 in every block but the leading one,
and when training shrinks that block the iteration could never move to the next.

Sources: Golub, Van Loan, "Matrix Computations", 4th ed., ch. 8 and 10; Sedghi, Gupta, Long, ICLR
2019, for the Fourier form, extended here to strides by folding the frequencies that alias.
"""

import itertools
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from hf_specreg.spectral.operators import Convolution, LinearOperator

LANCZOS_STEPS = 24

Side = Literal["input", "output"]


@dataclass(frozen=True)
class TopSingularValue:
    """A top singular value and how well it is known.

    Attributes:
        sigma: 0-d, the largest over the operator's blocks.
        v: [1, *input_shape], of unit norm in each block.
        residual: ||W^T W v - sigma^2 v|| / sigma^2, the largest over the blocks that may hold the
            top. W has a singular value within about residual / 2 (relative) of sigma.
        converged: whether the residual came below the tolerance.
    """

    sigma: Tensor
    v: Tensor
    residual: float
    converged: bool


def random_vector(operator: LinearOperator, weight: Tensor, generator: torch.Generator) -> Tensor:
    """Draw v, [1, *input_shape], uniform on the unit sphere of each block, on the weight's device.

    The draw is made on the CPU, so that it is the same wherever the weight is.
    """
    v = torch.randn(1, *operator.input_shape, generator=generator)
    rows = v.to(weight).reshape(blocks(operator), -1)
    return (rows / _norm(rows)).reshape(v.shape)


def power_iteration(
    operator: LinearOperator, weight: Tensor, vector: Tensor, side: Side, *, iterations: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """Return sigma [blocks], u [1, *output_shape] and v [1, *input_shape] after some products.

    Args:
        operator: the map.
        weight: its effective weight.
        vector: of unit norm in each block: v where `side` is "input", u where it is "output".
        side: where `vector` lives. Every iteration is one product, with W or W^T, that ends on the
            other side.
        iterations: how many.

    Returns:
        sigma = u^T W v, and the last two vectors, of unit norm in each block. A block in which the
        product is 0 gives sigma 0 and a constant vector, so that a layer that starts at zero is
        seen once it grows.
    """
    for _ in range(iterations):
        before = vector
        product = operator.apply if side == "input" else operator.adjoint
        image = product(weight, before)
        rows = image.reshape(blocks(operator), -1)
        sigma = _norm(rows)
        vector = torch.where(sigma > 0, rows / sigma, rows.shape[1] ** -0.5).reshape(image.shape)
        side = other_side(side)
    u, v = (vector, before) if side == "output" else (before, vector)
    return sigma[:, 0], u, v


def other_side(side: Side) -> Side:
    """Return where a product with W or W^T leads from `side`."""
    return "output" if side == "input" else "input"


def blocks(operator: LinearOperator) -> int:
    """How many blocks the operator's matrix has on its diagonal: the groups of a convolution,
    else 1.
    """
    return getattr(operator, "groups", 1)


@torch.no_grad()
def top_singular_value(
    operator: LinearOperator,
    weight: Tensor,
    v: Tensor,
    *,
    tolerance: float = 1e-3,
    max_restarts: int = 50,
) -> TopSingularValue:
    """Return sigma, converged, by restarted Lanczos on W^T W with full reorthogonalisation.

    Args:
        operator: the map.
        weight: its effective weight.
        v: [1, *input_shape], where to start: a warm vector or a random one.
        tolerance: of the relative residual, see `TopSingularValue`.
        max_restarts: Krylov spaces of 24 dimensions to build at most; what is reached by then is
            returned with `converged=False`.
    """
    if not weight.isfinite().all():
        return TopSingularValue(weight.new_tensor(torch.nan), v, torch.nan, converged=False)
    count = blocks(operator)
    # A warm vector may be orthogonal to what is the top now: the penalty's own step leaves it a
    # singular vector, of a value that may no longer be the largest. Noise has a part in every
    # direction.
    noise = random_vector(operator, weight, torch.Generator().manual_seed(0))
    best = (v + 0.1 * noise).reshape(count, -1)
    for _ in range(max_restarts):
        best, theta = _lanczos(operator, weight, best / _norm(best))
        best = best / _norm(best)
        top = theta.max()
        if top <= 0:  # a weight of zeros: any v will do
            return TopSingularValue(top.new_zeros(()), v, residual=0.0, converged=True)
        image = _gram(operator, weight, best)
        residuals = torch.linalg.vector_norm(image - theta[:, None] * best, dim=1)
        contenders = theta + residuals >= top  # the other blocks cannot hold the largest
        residual = (torch.where(contenders, residuals, 0) / top).max().item()
        if residual <= tolerance:
            break
    return TopSingularValue(top.sqrt(), best.reshape(v.shape), residual, residual <= tolerance)


def _lanczos(operator: LinearOperator, weight: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Return the top Ritz vector [blocks, n] and value [blocks] of W^T W, from unit v."""
    count, n = v.shape
    steps = min(LANCZOS_STEPS, n)
    basis = v.new_zeros(count, steps, n)
    diagonal, off_diagonal = [], []
    for j in range(steps):
        basis[:, j] = v
        z = _gram(operator, weight, v)
        diagonal.append((z * v).sum(1))
        for _ in range(2):  # twice is enough (Parlett)
            known = basis[:, : j + 1]
            z = z - torch.einsum("bjn,bj->bn", known, torch.einsum("bjn,bn->bj", known, z))
        norm = _norm(z)
        # Where the Krylov space is invariant, or the block is zero, nothing is left but noise.
        floor = torch.finfo(z.dtype).tiny / torch.finfo(z.dtype).eps
        spent = norm <= (1e-6 * diagonal[0].abs()[:, None]).clamp(min=floor)
        v = torch.where(spent, 0, z / norm)
        off_diagonal.append(torch.where(spent, 0, norm)[:, 0])
    inner = torch.stack(off_diagonal[:-1], 1) if steps > 1 else v.new_zeros(count, 0)
    tridiagonal = torch.diag_embed(torch.stack(diagonal, 1))
    tridiagonal = tridiagonal + torch.diag_embed(inner, 1) + torch.diag_embed(inner, -1)
    values, vectors = torch.linalg.eigh(tridiagonal)
    ritz = torch.einsum("bjn,bj->bn", basis, vectors[..., -1])
    zero = _norm(ritz) < 0.5  # of a block of zeros any vector is an eigenvector
    return torch.where(zero, basis[:, 0], ritz), values[:, -1]


def _gram(operator: LinearOperator, weight: Tensor, rows: Tensor) -> Tensor:
    """W^T W v, with v and the result as one row a block, [blocks, n]."""
    u = operator.apply(weight, rows.reshape(1, *operator.input_shape))
    return operator.adjoint(weight, u).reshape(rows.shape)


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
    """Return sigma, 0-d, of a circular convolution, by SVD of its blocks in the Fourier domain:
    exact.

    With stride s, output frequency k mixes the s aliases k + j n / s of each dimension, so its
    block is their transfer matrices side by side, [out, in * s^d], times s^(-d/2).

    Raises:
        ValueError: the convolution is not circular, does not keep the size at stride 1, or its
            stride does not divide the input.
    """
    sizes = operator.input_shape[1:]
    spans = [(k - 1) * d for k, d in zip(operator.kernel_size, operator.dilation, strict=True)]
    if operator.padding_mode != "circular" or [sum(p) for p in operator.padding] != spans:
        raise ValueError(
            f"{operator.name}: padding ({operator.padding_mode}, {operator.padding}) must be "
            "circular and keep the size"
        )
    if any(n % s for n, s in zip(sizes, operator.stride, strict=True)):
        raise ValueError(
            f"{operator.name}: stride {operator.stride} must divide the input size {tuple(sizes)}"
        )
    wrapped = weight.new_zeros(*weight.shape[:2], *sizes)
    for tap in itertools.product(*map(range, operator.kernel_size)):
        place = [t * d % n for t, d, n in zip(tap, operator.dilation, sizes, strict=True)]
        wrapped[(..., *place)] += weight[(..., *tap)]
    transfer = torch.fft.fftn(wrapped, dim=tuple(range(2, wrapped.ndim)))
    for dim, s in enumerate(operator.stride, 2):  # frequency f = alias * (n / s) + k
        transfer = transfer.unflatten(dim, (s, -1)).movedim(dim, 2).flatten(1, 2) / s**0.5
    matrices = transfer.unflatten(0, (operator.groups, -1)).flatten(3).movedim(3, 1)
    return torch.linalg.matrix_norm(matrices, ord=2).max()


def _norm(rows: Tensor) -> Tensor:
    return torch.linalg.vector_norm(rows, dim=1, keepdim=True)
