"""The top singular triplets of many layers, followed while their weights are trained.

Between two renewals a layer's u and v stay, and with them the gradient D of u^T W v in W, which
does not depend on W. So sigma = u^T W v = <D, W> is exact for these u and v, and d sigma^2 / d W =
2 sigma D: W and D are read, the gradient is written, and no product is made. What sigma loses as W
turns away from u and v is of second order in how far it moved, and what it loses to products that
were rounded in the search of u and v is of second order in the rounding.

A renewal takes the top triplet of a few Lanczos steps from v with some noise. The noise has a part
in every direction: the penalty's own steps leave v a singular vector, of a value that may no longer
be the largest, and from v alone another one would never be found. The layers take turns, so that
the work is spread over the steps.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_specreg.spectral.operators import LinearOperator
from hf_specreg.spectral.sharding import Rows, rows_of
from hf_specreg.spectral.singular import (
    bidiagonalize,
    blocks,
    random_vector,
    top_singular_value,
)

NOISE = 0.1  # of the norm of v


@dataclass(frozen=True)
class Stack:
    """The operators whose weights lie below each other in one layer's weight; mostly one.

    Attributes:
        weight: the layer's weight as it acts, with its graph.
        operators: whose parts are of equal size and make up the weight.
    """

    weight: Callable[[], Tensor]
    operators: tuple[LinearOperator, ...]

    @property
    def blocks(self) -> int:
        """How many blocks of rows have a singular value of their own."""
        return len(self.operators) * blocks(self.operators[0])

    @property
    def cost(self) -> int:
        """What a product with the weight costs, in multiply-adds; reading a number counts as 16."""
        positions = output_shape(self.operators[0])[1:].numel()
        return self.weight().numel() * (positions + 16)


def stacks(operators: Sequence[LinearOperator]) -> list[Stack]:
    """Put the operators of each layer's weight together, in their order."""
    found: dict[Callable[[], Tensor], list[LinearOperator]] = {}
    for operator in operators:
        found.setdefault(operator.layer_weight, []).append(operator)
    return [Stack(weight, tuple(parts)) for weight, parts in found.items()]


@torch.no_grad()
def output_shape(operator: LinearOperator) -> torch.Size:
    """Return the shape of u without its first dimension; no compute is spent."""
    weight = operator.effective_weight()
    v = torch.empty(1, *operator.input_shape, dtype=weight.dtype, device="meta")
    return operator.apply(torch.empty_like(weight, device="meta"), v).shape[1:]


class Triplets:
    """The warm triplets (u, v) of stacked operators and the directions D that they give.

    Args:
        stacks: of the operators, in an order that is the same on all processes.
        renew_every: steps between two renewals of a layer.
        lanczos_steps: of a renewal.
        seed: of the first vectors and of the noise.

    Attributes:
        vectors: "<name>.u" and "<name>.v" of every operator that was used.
    """

    def __init__(self, stacks: Sequence[Stack], *, renew_every: int, lanczos_steps: int, seed: int):
        self.stacks = stacks
        self.renew_every = renew_every
        self.lanczos_steps = lanczos_steps
        self.seed = seed
        self.vectors: dict[str, Tensor] = {}
        self._directions: dict[int, Tensor] = {}
        self._noise: Tensor | None = None

    def is_due(self, index: int, step: int, since: int) -> bool:
        """Whether a stack's turn fell on the step or the `since` - 1 before it."""
        return since >= self.renew_every or (step - index) % self.renew_every < since

    def has(self, index: int) -> bool:
        """Whether a stack has vectors yet."""
        return f"{self.stacks[index].operators[0].name}.v" in self.vectors

    def load(self, vectors: dict[str, Tensor]) -> None:
        """Take over vectors."""
        self.vectors, self._directions = vectors, {}

    def start(self, index: int, weight: Tensor) -> None:
        """Take the best of one Krylov space from random vectors."""
        for place, operator in enumerate(self.stacks[index].operators):
            generator = torch.Generator().manual_seed(self.seed + 1000 * index + place)
            part = operator.part(weight)
            v = random_vector(operator, part, generator)
            found = top_singular_value(operator, part, v, max_restarts=1)
            self._keep(operator, found.u, found.v)
        self._directions.pop(index, None)

    def renew(self, index: int, weight: Tensor) -> None:
        """Bring the vectors of one stack closer to the top ones of the weight, which is whole."""
        for operator in self.stacks[index].operators:
            part = operator.part(weight)
            v = self.vectors[f"{operator.name}.v"].to(part)
            rows = v.nan_to_num(0, 0, 0).reshape(blocks(operator), -1)  # anew, after a NaN
            noise = self._noise_like(rows) * NOISE * rows.shape[1] ** -0.5
            start = (rows + noise).reshape(v.shape)
            searched = operator.rounded(part)
            _, u, v, _ = bidiagonalize(operator, searched, start, steps=self.lanczos_steps)
            self._keep(operator, u, v)
        self._directions.pop(index, None)

    def direction(self, index: int, weight: Tensor, rows: Rows) -> Tensor:
        """Return of a stack's D the rows of the weight that are on this process."""
        direction = self._directions.get(index)
        alike = ("shape", "device", "dtype")  # not so once the model was moved or sharded
        if direction is None or any(getattr(direction, a) != getattr(weight, a) for a in alike):
            parts = []
            for operator in self.stacks[index].operators:
                u, v = (self.vectors[f"{operator.name}.{side}"].to(weight) for side in "uv")
                parts.append(operator.weight_gradient(v, u))
            direction = torch.cat(parts) if len(parts) > 1 else parts[0]
            direction = rows_of(direction.reshape(-1, *weight.shape[1:]), rows, like=weight)
            self._directions[index] = direction
        return direction

    def _keep(self, operator: LinearOperator, u: Tensor, v: Tensor) -> None:
        self.vectors |= {f"{operator.name}.u": u, f"{operator.name}.v": v}

    def _noise_like(self, rows: Tensor) -> Tensor:
        """Standard normal numbers; the same ones each time, since only v must not be special."""
        if self._noise is None:
            sizes = [torch.Size(o.input_shape).numel() for s in self.stacks for o in s.operators]
            generator = torch.Generator().manual_seed(self.seed)
            self._noise = torch.randn(max(sizes), generator=generator)
        self._noise = self._noise.to(rows)
        return self._noise[: rows.numel()].reshape(rows.shape)
