"""The top singular value of a linear operator: sigma = max ||W v|| over ||v|| = 1.

Found by Golub-Kahan-Lanczos bidiagonalisation: k products with W and k - 1 with W^T build
orthonormal bases U and V with W V = U B, B upper bidiagonal and small, and the top triplet of B
gives that of W. While training, a few steps from the vector of last time follow the weights
(`bidiagonalize`, see `tracking.py`). For a value to report, it is restarted until the residual says
that it has converged (`top_singular_value`). On large maps the bases outweigh everything else:
there they are kept short, and restarted more often.

A grouped convolution is block diagonal, one block a group, as are operators of equal shape that are
worked together. Here every block has unit vectors and a small matrix of its own. One vector for all
of them would die out exactly to 0 in every block but the leading one, and when training shrinks
that block the iteration could never move to the next.

Source: Golub, Van Loan, "Matrix Computations", 4th ed., ch. 8 and 10.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_specreg.spectral.operators import LinearOperator

LANCZOS_STEPS = 24
# A search's two bases are so many numbers at most, 64 MiB in float32, or of 4 steps. At 16 channels
# and 128 px 24 steps at a time converge in 168 products, 8 in 216, 4 in 344, 2 in more than 600.
BASES, LEAST_STEPS = 2**24, 4
FEW_BLOCKS = 64  # svd takes matrices one by one: 22 ms for 3456 of 8x8, by squaring 4 ms


@dataclass(frozen=True)
class TopSingularValue:
    """A top singular value and how well it is known.

    Attributes:
        sigma: 0-d, the largest over the operator's blocks.
        u: [1, *output_shape], of unit norm in each block, or 0 where the block is.
        v: [1, *input_shape], of unit norm in each block.
        residual: ||W^T W v - sigma^2 v|| / sigma^2, the largest over the blocks that may hold the
            top. W has a singular value within about residual / 2 (relative) of sigma.
        converged: whether the residual came below the tolerance.
    """

    sigma: Tensor
    u: Tensor
    v: Tensor
    residual: float
    converged: bool


def random_vector(operator: LinearOperator, weight: Tensor, generator: torch.Generator) -> Tensor:
    """Draw v, [1, *input_shape], uniform on the unit sphere of each block, on the weight's device.

    The draw is made on the CPU, so that it is the same wherever the weight is.
    """
    v = torch.randn(1, *operator.input_shape, generator=generator)
    rows = v.to(weight).reshape(operator.groups, -1)
    return _unit(rows)[0].reshape(v.shape)


@torch.no_grad()
def top_singular_value(
    operator: LinearOperator,
    weight: Tensor,
    v: Tensor,
    *,
    tolerance: float = 1e-3,
    max_products: int = 50 * LANCZOS_STEPS,
) -> TopSingularValue:
    """Return sigma, converged, by restarted bidiagonalisation.

    Args:
        operator: the map.
        weight: its effective weight.
        v: [1, *input_shape], where to start: a warm vector or a random one.
        tolerance: of the relative residual, see `TopSingularValue`.
        max_products: with W, and as many with W^T; what is reached by then is returned with
            `converged=False`.
    """
    if not weight.isfinite().all():
        nan, u = weight.new_tensor(torch.nan), operator.apply(weight, v)
        return TopSingularValue(nan, u, v, torch.nan, converged=False)
    v = v.nan_to_num(0, 0, 0)  # of a weight that was not finite once
    v = v + 0.1 * random_vector(operator, weight, torch.Generator().manual_seed(0))
    image = operator.apply(weight.to("meta"), v.to("meta", weight.dtype))
    steps = steps_that_fit(v.numel() + image.numel(), most=LANCZOS_STEPS)
    for _ in range(math.ceil(max_products / steps)):
        sigmas, u, v, residuals = bidiagonalize(operator, weight, v, steps=steps, exact=True)
        top = sigmas.max()
        if top <= 0:  # a weight of zeros: any v will do
            return TopSingularValue(top, u, v, residual=0.0, converged=True)
        # Of the other blocks, only those may hold the largest whose residual reaches up to it.
        contenders = sigmas**2 + sigmas * residuals >= top**2
        residual = (torch.where(contenders, sigmas * residuals, 0).max() / top**2).item()
        if residual <= tolerance:
            break
    return TopSingularValue(top, u, v, residual, residual <= tolerance)


def steps_that_fit(size: int, *, most: int) -> int:
    """Return how many Lanczos steps to take, of at most so many, where each adds `size` numbers to
    the bases.
    """
    return min(most, max(LEAST_STEPS, BASES // size))


@torch.no_grad()
def bidiagonalize(
    operator: LinearOperator, weight: Tensor, v: Tensor, *, steps: int, exact: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the top singular triplet in the Krylov spaces of v, of every block.

    Args:
        operator: the map.
        weight: its effective weight, whose type the products are made in.
        v: [1, *input_shape], where to start; not 0 in any block. All else is done in its type.
        steps: dimension of the spaces; each is a product with W and, but for the last, with W^T.
        exact: keep the bases orthonormal to rounding, by making every new vector orthogonal to all
            before it twice, which is enough (Parlett). A few steps need it once, if products may
            be rounded to less than v's type (TF32, too), else not at all.

    Returns:
        sigma = u^T W v [blocks], u [1, *output_shape] and v [1, *input_shape], of unit norm in each
        block, and, if `exact`, ||W^T u - sigma v|| [blocks], else NaN. A block in which W v is 0
        has sigma 0 and u = 0, and keeps its v.
    """
    count, may_round = operator.groups, weight.dtype != v.dtype or weight.device.type != "cpu"
    passes = 2 if exact else int(may_round)
    rows, norm = _unit(v.reshape(count, -1))
    image = operator.apply(weight, rows.reshape(v.shape).to(weight.dtype))
    inputs, outputs = rows.shape[1], image.numel() // count
    steps = min(steps, inputs, outputs + 1)  # 1 more: v may have a part that W takes to 0
    rights, lefts = rows.new_empty(count, steps, inputs), rows.new_empty(count, steps, outputs)
    diagonal, beside, floor = [], [], None
    rights[:, 0] = rows
    for step in range(steps):
        if step:
            image = operator.apply(weight, rows.reshape(v.shape).to(weight.dtype))
        rows = _orthogonal(image.reshape(count, -1).to(v), lefts[:, :step], norm, passes)
        rows, norm = _unit(rows, floor, out=lefts[:, step])
        floor = 1e-6 * norm if floor is None else floor
        diagonal.append(norm)
        if exact or step + 1 < steps:
            back = operator.adjoint(weight, rows.reshape(image.shape).to(weight.dtype))
            rows = _orthogonal(back.reshape(count, -1).to(v), rights[:, : step + 1], norm, passes)
            following = rights[:, step + 1] if step + 1 < steps else None
            rows, norm = _unit(rows, floor, out=following)
            beside.append(norm)
    beyond = beside.pop() if exact else torch.full_like(norm, torch.nan)
    small = torch.diag_embed(torch.cat(diagonal, 1))
    if beside:
        small += torch.diag_embed(torch.cat(beside, 1), offset=1)
    by_svd = exact or (small.device.type == "cpu" and count <= FEW_BLOCKS)
    sigma, left, right = _top_by_svd(small) if by_svd else _top_by_squaring(small)
    u, _ = _unit((left[:, None] @ lefts)[:, 0])
    v_rows, _ = _unit((right[:, None] @ rights)[:, 0])
    residuals = beyond[:, 0] * left[:, -1].abs()
    return sigma, u.reshape(image.shape), v_rows.reshape(v.shape), residuals


def _top_by_svd(small: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The top triplets of matrices [blocks, k, k]."""
    # svd refuses what is not finite; u and v, sums of rows that are not, say so.
    left, sigmas, right = torch.linalg.svd(small.nan_to_num(0, 0, 0))
    return sigmas[:, 0], left[..., 0], right[:, 0]


def _top_by_squaring(small: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same by (B^T B)^4096, which is v v^T but for a factor. All matrices at once, and a GPU
    need not be waited for, as it is by svd. Where the two largest are within 1e-4 of each other, v
    is a mixture, whose sigma is as near.
    """
    power = small.mT @ small
    for squaring in range(12):
        if squaring % 4 == 0:  # its largest entry is k^-16 at least when it is divided again
            power = power / power.diagonal(dim1=1, dim2=2).sum(1).clamp(min=1e-30)[:, None, None]
        power = power @ power
    largest = power.diagonal(dim1=1, dim2=2).argmax(1)
    right = power[torch.arange(len(power), device=power.device), :, largest]
    right, _ = _unit(right)
    right = torch.where(right.any(1, keepdim=True), right, torch.eye(1, len(right[0])).to(right))
    left, sigma = _unit((small @ right[..., None])[..., 0])
    return sigma[:, 0], left, right


def _orthogonal(rows: Tensor, basis: Tensor, last: Tensor, passes: int) -> Tensor:
    """Take what lies along the basis [blocks, k, n] away from rows [blocks, n], in so many passes.

    In none, if products are exact: then only the last vector is in the rows, `last` [blocks, 1] of
    it. Rounded ones leave a part of the others, which grows until they are found a second time.
    """
    if basis.shape[1] and not passes:
        return rows.addcmul(last, basis[:, -1], value=-1)
    for _ in range(passes if basis.shape[1] else 0):
        along = rows[:, None] @ basis.mT  # the row first: a column last is far slower
        rows = torch.baddbmm(rows[:, None], along, basis, alpha=-1)[:, 0]
    return rows


def _unit(
    rows: Tensor, floor: Tensor | None = None, out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Rows [blocks, n] with unit norm, and their norms [blocks, 1]; rows of 0 where the norm is not
    above the floor [blocks, 1]: there only rounding is left. Written to `out` if it is given.
    """
    norm = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    least = torch.finfo(rows.dtype).tiny / torch.finfo(rows.dtype).eps
    spent = norm <= (least if floor is None else floor)
    return torch.div(rows, norm.masked_fill(spent, torch.inf), out=out), norm
