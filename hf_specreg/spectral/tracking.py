"""The top singular triplets of many layers, followed while their weights are trained.

Between two renewals a layer's u and v stay, and with them the gradient D of u^T W v in W, which
does not depend on W. So sigma = u^T W v = <D, W> is exact for these u and v, and d sigma^2 / d W =
2 sigma D: W and D are read, the gradient is written, and no product is made. What sigma loses as W
turns away from u and v is of second order in how far it moved, and what it loses to products that
were rounded in the search of u and v is of second order in the rounding.

A renewal takes the top triplet of a few Lanczos steps from v with some noise. The noise has a part
in every direction: the penalty's own steps leave v a singular vector, of a value that may no longer
be the largest, and from v alone another one would never be found.

Layers of equal shape are renewed together: a Lanczos step is a dozen small operations beside its
product, which a batch of layers needs once. Such groups take turns, which spreads the work over the
steps as evenly as groups can be.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from hf_specreg.spectral.operators import LinearOperator
from hf_specreg.spectral.pace import Pace
from hf_specreg.spectral.precision import exact_float32
from hf_specreg.spectral.sharding import Rows, rows_of, shares
from hf_specreg.spectral.singular import (
    LANCZOS_STEPS,
    bidiagonalize,
    random_vector,
    steps_that_fit,
    top_singular_value,
)

NOISE = 0.1  # of the norm of v
# Layers are renewed together as far as their weights and bases are so many numbers: with more they
# leave the cache of a CPU with 32 MiB, which costs more than is saved. Elsewhere launches count.
CACHED, CACHED_ELSEWHERE = 2**22, 2**24


@dataclass(frozen=True)
class Stack:
    """The operators whose weights lie below each other in one layer's weight; mostly one.

    Attributes:
        weight: the layer's weight as it acts, with its graph.
        operators: whose parts are of equal size and make up the weight.
        shape: of the weight.
        output_shape: of each operator's u, which is [1, *output_shape].
    """

    weight: Callable[[], Tensor]
    operators: tuple[LinearOperator, ...]
    shape: torch.Size
    output_shape: torch.Size

    @property
    def blocks(self) -> int:
        """How many blocks of rows have a singular value of their own."""
        return len(self.operators) * self.operators[0].groups

    @property
    def cost(self) -> int:
        """What a product with the weight costs, in multiply-adds; reading a number counts as 16."""
        return self.shape.numel() * (self.output_shape[1:].numel() + 16)

    @property
    def size(self) -> int:
        """How many numbers a Lanczos step adds to the bases."""
        inputs = math.prod(self.operators[0].input_shape)
        return len(self.operators) * (inputs + self.output_shape.numel())

    @property
    def vectors(self) -> dict[str, torch.Size]:
        """The names and shapes of the operators' u and v."""
        u = torch.Size((1, *self.output_shape))
        return {
            f"{operator.name}.{side}": shape
            for operator in self.operators
            for side, shape in (("u", u), ("v", torch.Size((1, *operator.input_shape))))
        }

    @property
    def kind(self) -> tuple:
        """Equal for stacks that can be renewed together: of the same geometry."""
        geometry = replace(self.operators[0].repeated(1), name="", layer_weight=None)
        return geometry, len(self.operators), self.shape


@torch.no_grad()
def stacks(operators: Sequence[LinearOperator]) -> list[Stack]:
    """Put the operators of each layer's weight together, in their order."""
    found: dict[Callable[[], Tensor], list[LinearOperator]] = {}
    for operator in operators:
        found.setdefault(operator.layer_weight, []).append(operator)
    return [_stack(layer_weight, tuple(parts)) for layer_weight, parts in found.items()]


def _stack(layer_weight: Callable[[], Tensor], operators: tuple[LinearOperator, ...]) -> Stack:
    """Measure a stack by shapes alone."""
    one, weight = operators[0], layer_weight()
    v = torch.empty(1, *one.input_shape, dtype=weight.dtype, device="meta")
    u = one.apply(torch.empty_like(one.part(weight), device="meta"), v)
    return Stack(layer_weight, operators, weight.shape, u.shape[1:])


def renewed_together(
    stacks: Sequence[Stack], *, steps: int, on_cpu: bool = True
) -> list[list[int]]:
    """Return which stacks, by index, are renewed together: alike, and small enough for a cache in
    so many Lanczos steps.
    """
    kinds: dict[tuple, list[int]] = {}
    for index, stack in enumerate(stacks):
        kinds.setdefault(stack.kind, []).append(index)
    numbers = CACHED if on_cpu else CACHED_ELSEWHERE
    groups = []
    for alike in kinds.values():
        one = stacks[alike[0]]
        most = max(1, numbers // (one.shape.numel() + steps * one.size))
        parts = math.ceil(len(alike) / most)
        groups += [alike[i::parts] for i in range(parts)]
    return groups


class Triplets:
    """The warm triplets (u, v) of stacked operators and the directions D that they give.

    Args:
        stacks: of the operators, in an order that is the same on all processes.
        pace: how often layers are renewed.
        seed: of the first vectors and of the noise.
        device: that they are used on.

    Attributes:
        vectors: "<name>.u" and "<name>.v" of every operator that was used.
        groups: the stacks that are renewed together, by index.
        turns: of a stack, which of the steps of the slowest round is its turn.
    """

    def __init__(
        self,
        stacks: Sequence[Stack],
        *,
        pace: Pace,
        seed: int,
        device: torch.device,
    ):
        self.stacks = stacks
        self.pace = pace
        self.seed = seed
        self.vectors: dict[str, Tensor] = {}
        self._directions: dict[int, Tensor] = {}
        self._not_finite: set[int] = set()
        self._noise: Tensor | None = None
        self.place(device)

    def place(self, device: torch.device) -> None:
        """Group the stacks as is best on a device, and bring the vectors there."""
        self.vectors = {name: vector.to(device) for name, vector in self.vectors.items()}
        self.groups = renewed_together(
            self.stacks, steps=self.pace.most_lanczos_steps, on_cpu=device.type == "cpu"
        )
        costs = [sum(self.stacks[index].cost for index in group) for group in self.groups]
        self.turns = [0] * len(self.stacks)
        turns = shares(costs, min(self.pace.slowest, len(costs)))
        for group, turn in zip(self.groups, turns, strict=True):
            for index in group:
                self.turns[index] = turn

    def is_due(self, index: int, step: int, since: int) -> bool:
        """Whether a stack's turn fell on the step or the `since` - 1 before it."""
        renew_every = self.pace.renew_every
        return since >= renew_every or (step - self.turns[index]) % renew_every < since

    def has(self, index: int) -> bool:
        """Whether a stack has vectors yet, of a weight that was finite."""
        known = f"{self.stacks[index].operators[0].name}.v" in self.vectors
        return known and index not in self._not_finite

    @property
    def memory(self) -> int:
        """Bytes kept between uses: u, v and D of the layers that were used, and the noise."""
        noise = [] if self._noise is None else [self._noise]
        kept = (*self.vectors.values(), *self._directions.values(), *noise)
        return sum(tensor.numel() * tensor.element_size() for tensor in kept)

    def load(self, vectors: dict[str, Tensor]) -> None:
        """Take over vectors."""
        self.vectors, self._directions, self._not_finite = vectors, {}, set()

    def parts_along(self, index: int, weight: Tensor) -> list[float]:
        """Return what part of ||W v||^2 lies along u, of each operator of a stack.

        It is 1 after a renewal, however near v is to the top, but for rounding; in the steps until
        the next one W v turns away. Of another W it is about 1 in as many as u has entries.

        Args:
            index: of the stack.
            weight: its, whole.
        """
        found = []
        for operator in self.stacks[index].operators:
            u, v = (self.vectors[f"{operator.name}.{side}"].to(weight) for side in "uv")
            image = operator.apply(operator.part(weight), v).reshape(operator.groups, -1)
            sigmas = (image * u.reshape(operator.groups, -1)).sum(1)
            found.append((sigmas.square().sum() / image.square().sum()).item())
        return found

    def start(self, weights: Mapping[int, Tensor]) -> None:
        """Take the best of a few Lanczos steps from random vectors, of whole weights by index. Of
        one that is not finite they are NaN, and started anew at the next use.
        """
        self._not_finite -= set(weights)
        for index, weight in weights.items():
            for place, operator in enumerate(self.stacks[index].operators):
                generator = torch.Generator().manual_seed(self.seed + 1000 * index + place)
                part = operator.part(weight)
                v = random_vector(operator, part, generator)
                found = top_singular_value(operator, part, v, max_products=LANCZOS_STEPS)
                self._keep(operator, found.u, found.v)
                if math.isnan(found.residual):
                    self._not_finite.add(index)
            self._directions.pop(index, None)

    def renew(self, weights: Mapping[int, Tensor], *, strayed: bool = False) -> None:
        """Bring the vectors of stacks of one kind closer to the top ones of their weights, by
        index, which are whole.

        Args:
            weights: the stacks', by index.
            strayed: these are not what training made of those that the vectors were of.
        """
        places: dict[tuple, list[int]] = {}
        for index, weight in weights.items():
            places.setdefault((weight.device, weight.dtype), []).append(index)
        for indices in places.values():
            most = self.pace.most_lanczos_steps if strayed else self.pace.lanczos_steps
            whole = [weights[index] for index in indices]
            followed, found = self._renew_together(indices, whole, most)
            if not strayed:
                self.pace.note(followed, found)

    def _renew_together(
        self, indices: Sequence[int], weights: Sequence[Tensor], most: int
    ) -> tuple[Tensor, Tensor]:
        """Renew by at most so many Lanczos steps; return the sums of sigma^2 before and after."""
        operators = [operator for index in indices for operator in self.stacks[index].operators]
        one, together = operators[0], operators[0].repeated(len(operators))
        u, v = (
            torch.cat([self.vectors[f"{o.name}.{side}"] for o in operators]).to(weights[0])
            for side in "uv"
        )
        noise = self._noise_like(v[:1]) * NOISE * (v[0].numel() / one.groups) ** -0.5
        searched = [one.rounded(weight) for weight in weights]
        weight = together.part(torch.cat(searched) if len(searched) > 1 else searched[0])
        image = together.apply(weight, v.reshape(1, *together.input_shape).to(weight.dtype))
        followed = (image.reshape(u.shape).to(u) * u).reshape(together.groups, -1).sum(1)
        v = v.nan_to_num(0, 0, 0)  # anew, after a NaN
        v = (v + noise).reshape(1, *together.input_shape)
        steps = steps_that_fit(len(indices) * self.stacks[indices[0]].size, most=most)
        for _ in range(math.ceil(most / steps)):
            found, u, v, _ = bidiagonalize(together, weight, v, steps=steps)
        count = len(operators)
        of_each = u.reshape(count, 1, -1, *u.shape[2:]), v.reshape(count, 1, *one.input_shape)
        # Of weights that are not finite they stay, or these could not be put back without a trace.
        finite = (u.sum() + v.sum()).isfinite()
        for operator, *vectors in zip(operators, *of_each, strict=True):
            before = [self.vectors[f"{operator.name}.{side}"].to(v) for side in "uv"]
            self._keep(operator, *map(partial(torch.where, finite), vectors, before))
        for index in indices:
            self._directions.pop(index, None)
        tops = (s.abs().reshape(count, -1).amax(1).square().sum() for s in (followed, found))
        return tuple(tops)

    def direction(self, index: int, weight: Tensor, rows: Rows) -> Tensor:
        """Return of a stack's D the rows of the weight that are on this process."""
        direction = self._directions.get(index)
        alike = ("shape", "device", "dtype")  # not so once the model was moved or sharded
        if direction is None or any(getattr(direction, a) != getattr(weight, a) for a in alike):
            parts = []
            with exact_float32():
                for operator in self.stacks[index].operators:
                    u, v = (self.vectors[f"{operator.name}.{side}"].to(weight) for side in "uv")
                    parts.append(operator.weight_gradient(v, u))
            direction = torch.cat(parts) if len(parts) > 1 else parts[0]
            direction = rows_of(direction.reshape(-1, *weight.shape[1:]), rows, like=weight)
            self._directions[index] = direction
        return direction

    def _keep(self, operator: LinearOperator, u: Tensor, v: Tensor) -> None:
        """Keep tensors of their own, no views of what was renewed together: as after a resume."""
        self.vectors |= {f"{operator.name}.u": u, f"{operator.name}.v": v}

    def _noise_like(self, v: Tensor) -> Tensor:
        """Standard normal numbers; the same ones each time, since only v must not be special."""
        if self._noise is None:
            sizes = [torch.Size(o.input_shape).numel() for s in self.stacks for o in s.operators]
            generator = torch.Generator().manual_seed(self.seed)
            self._noise = torch.randn(max(sizes), generator=generator)
        self._noise = self._noise.to(v)
        return self._noise[: v.numel()].reshape(v.shape)
