"""The sum of sigma^2 of many layers while they are trained, as each process has its part of it.

Layers are followed by their warm triplets (`tracking.py`), and their terms put into a few nodes of
the graph (`squares.py`). Where they are shared out, each process follows its own, and the sum is
that of all.
"""

import math
import statistics
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hf_specreg.spectral.operators import LinearOperator
from hf_specreg.spectral.pace import Pace
from hf_specreg.spectral.precision import exact_float32
from hf_specreg.spectral.sharding import is_sharded, local, shares, summed, whole
from hf_specreg.spectral.singular import TopSingularValue, random_vector, top_singular_value
from hf_specreg.spectral.squares import Factor, sum_of_squares
from hf_specreg.spectral.tracking import Stack, Triplets, stacks

# Vectors are of other weights if in most layers less of ||W v||^2 lies along u. The median was 0.76
# at least up to 8 steps after a renewal (small ViT and ConvNeXt, their first 40 steps with Adam at
# 3e-3, which is fast), and of other weights 0.12 at most.
FITS = 0.25
# Layers of so many weights share a node of the graph: with more, their gradients would leave the
# cache of a CPU with 32 MiB before they are added to the loss's. Elsewhere a node costs launches.
ONE_NODE, ONE_NODE_ELSEWHERE = 2**21, 2**25


class FollowedSum:
    """sum of sigma^2 over linear operators, from warm singular vectors that move on with each use.

    Args:
        operators: in forward order, the same on all processes.
        weight: a stack's weight as it acts, with its graph, in full precision.
        every: optimizer steps from one use to the next.
        renew_every: uses between two renewals of a layer's vectors at most.
        lanczos_steps: of a renewal at most.
        shared: share the layers out over the processes of torch.distributed.
        seed: of the vectors' first draw.
        device: where the weights are, until a use finds them on another.

    Attributes:
        stacks: of the operators, by their layers' weights.
        pace: how often vectors are renewed.
        triplets: the singular vectors.
        groups: the stacks of this process that are renewed together, by index.
        nodes: those whose terms are one node of the graph.
        uses: how many there were.
        vectors_loaded: whether vectors were loaded since the last use.
    """

    def __init__(
        self,
        operators: Sequence[LinearOperator],
        weight: Callable[[Stack], Tensor],
        *,
        every: int,
        renew_every: int,
        lanczos_steps: int,
        shared: bool,
        seed: int,
        device: torch.device,
    ):
        self.weight = weight
        self.every = every
        self.shared = shared
        self.uses = 0
        self.stacks = stacks(operators)
        self.pace = Pace(renew_every * every, lanczos_steps, every=every)
        self.triplets = Triplets(self.stacks, pace=self.pace, seed=seed, device=device)
        self._device, self._sharded, self.vectors_loaded = device, False, False
        self._is_frozen_said = False
        self._arrange()

    def _arrange(self) -> None:
        """Part the layers into groups and nodes, for the device that they are on."""
        if not self.triplets.vectors:  # else each process has those of its own layers
            self._owners = self._share_out() if self.shared else [0] * len(self.stacks)
        rank = dist.get_rank() if self.shared else 0
        self._own = [index for index, owner in enumerate(self._owners) if owner == rank]
        groups = [[i for i in group if i in self._own] for group in self.triplets.groups]
        self.groups = [group for group in groups if group]
        sizes = [stack.shape.numel() for stack in self.stacks]
        most = ONE_NODE if self._device.type == "cpu" else ONE_NODE_ELSEWHERE
        self.nodes = _in_parts(self._own, sizes, most)

    def _follow_model(self, device: torch.device) -> None:
        """Go where the model was moved to."""
        if device != self._device:
            self._device = device
            self.triplets.place(device)
            self._arrange()

    def _share_out(self) -> list[int]:
        """The process that works on each stack."""
        all_at_once = self.every >= self.pace.slowest
        turns = [] if all_at_once else self.triplets.turns
        costs = [stack.cost for stack in self.stacks]
        return shares(costs, dist.get_world_size(), rounds=turns)

    def value(self, zero: Tensor, *, changed: bool = False) -> Tensor:
        """Return the sum, 0-d and differentiable; the vectors move on.

        Args:
            zero: 0, of the sum's type and where it is.
            changed: the weights may be other ones, not a few steps ahead: renew all vectors
                now, unless they were just loaded, and fit.
        """
        self._follow_model(zero.device)
        resumed, self.vectors_loaded = self.vectors_loaded, False
        weights = self._follow(changed and not (resumed and self._fit()))
        squares = sum((self._squares(node, weights, zero) for node in self.nodes), zero)
        self.uses += 1
        if not self.shared and torch.is_grad_enabled() and not squares.requires_grad:
            self._warn_of_frozen()
        return summed(squares) if self.shared else squares

    def _warn_of_frozen(self) -> None:
        if not self._is_frozen_said:
            warnings.warn(
                "no weight that the spectral penalty is of requires a gradient, so that it costs "
                "time and changes nothing: leave it out while they are frozen, or set its strength "
                "to 0",
                stacklevel=4,
            )
        self._is_frozen_said = True

    @torch.no_grad()
    def _fit(self) -> bool:
        """Whether the vectors of this process's layers may be of the weights that are there: in
        most layers W v is not all but orthogonal to u. In fast training it is so in some.
        """
        known = [index for index in self._own if self.triplets.has(index)]
        with exact_float32():
            wholes = ((index, whole(self.weight(self.stacks[index]))) for index in known)
            parts = [part for at in wholes for part in self.triplets.parts_along(*at)]
        parts = [part for part in parts if not math.isnan(part)]  # of zeros
        return not parts or statistics.median(parts) >= FITS

    def _follow(self, all_due: bool) -> dict[int, Tensor]:
        """Start the vectors of this process's layers, or renew them where it is their turn, or all
        are due. Return the weights that it took, with their graph: some are costly to compute.
        """
        step, taken = self.uses * self.every, {}
        together = self.shared or self._sharded
        self.pace.adapt(device=self._device, together=together)
        for group in self.groups:
            started = self.triplets.has(group[0])
            due = all_due or self.triplets.is_due(group[0], step, since=self.every)
            if started and not due:
                continue
            weights = {index: self.weight(self.stacks[index]) for index in group}
            taken |= weights
            self._sharded |= any(map(is_sharded, weights.values()))
            if started and not all_due:  # else they are what they were
                weights = {i: weight for i, weight in weights.items() if weight.requires_grad}
            with torch.no_grad():
                wholes = {index: whole(weight.detach()) for index, weight in weights.items()}
                if started:
                    self.triplets.renew(wholes, strayed=all_due)
                else:
                    self.triplets.start(wholes)
        return taken

    def _squares(
        self, indices: Sequence[int], weights: Mapping[int, Tensor], zero: Tensor
    ) -> Tensor:
        """The sum of sigma^2 of some layers, of which some weights are there already."""
        parts, factors = [], []
        for index in indices:
            stack = self.stacks[index]
            part, rows = local(weights[index] if index in weights else self.weight(stack))
            direction = self.triplets.direction(index, part, rows)
            parts.append(part)
            factors.append(Factor(direction, rows, stack.blocks, len(stack.operators)))
        return sum_of_squares(zero, factors, parts)

    def converged(
        self, weight: Callable[[Stack], Tensor], names: Collection[str], *, tolerance: float
    ) -> dict[str, TopSingularValue]:
        """Return layers' top singular values, iterated until converged from the warm vectors, which
        stay as they are. Where weights are sharded, all processes must call it.

        Args:
            weight: as for the sum.
            names: of the layers.
            tolerance: of the relative residual.
        """
        generator, values = torch.Generator().manual_seed(self.triplets.seed), {}
        with torch.no_grad(), exact_float32():
            for stack in self.stacks:
                matrix = whole(weight(stack))
                for layer in stack.operators:
                    if layer.name not in names:
                        continue
                    part = layer.part(matrix)
                    v = self.triplets.vectors.get(f"{layer.name}.v")
                    v = random_vector(layer, part, generator) if v is None else v.to(part)
                    values[layer.name] = top_singular_value(layer, part, v, tolerance=tolerance)
        return values

    def _vectors(self, like: Tensor) -> dict[str, Tensor]:
        found = dict(self.triplets.vectors)
        if self.shared and self.uses:
            for stack, owner in zip(self.stacks, self._owners, strict=True):
                for name, shape in stack.vectors.items():
                    vector = found.get(name, torch.empty(shape))
                    found[name] = vector.to(like).contiguous()
                    dist.broadcast(found[name], src=owner)
        return found

    def state(self, like: Tensor) -> dict[str, Any]:
        """Return the count of uses, the pace and the vectors of all layers, of which there are none
        before the first use. Where layers are shared out, all processes must call it.

        Args:
            like: has the type and the device that vectors of other processes are received in.
        """
        together = self.shared and self.uses > 0  # before, the model may be on another device
        pace = self.pace.state(device=self._device, together=together)
        return {"uses": self.uses, "pace": pace, "vectors": self._vectors(like)}

    def load(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Take over a state.

        Raises:
            ValueError: they are those of other layers.
        """
        vectors = state["vectors"]
        expected = {name: shape for stack in self.stacks for name, shape in stack.vectors.items()}
        unknown = vectors and set(vectors) ^ set(expected)
        if unknown:
            raise ValueError(f"the vectors {sorted(unknown)} are in one of state and model only")
        for name, vector in vectors.items():
            if vector.shape != expected[name]:
                raise ValueError(
                    f"the vector {name!r} is {tuple(vector.shape)}, but here it is "
                    f"{tuple(expected[name])}"
                )
        self._follow_model(device)
        own = {name for index in self._own for name in self.stacks[index].vectors}
        kept = {n: torch.empty_like(v, device=device) for n, v in vectors.items() if n in own}
        self.uses, self.vectors_loaded = state["uses"], True
        self.pace.load(state["pace"], mine=not self.shared or dist.get_rank() == 0)
        self.triplets.load({name: vector.copy_(vectors[name]) for name, vector in kept.items()})


def _in_parts(indices: Sequence[int], sizes: Sequence[int], most: int) -> list[list[int]]:
    """Part consecutive layers: each part has so many weights at most, or is one layer."""
    parts: list[list[int]] = []
    for index in indices:
        if parts and sum(sizes[i] for i in (*parts[-1], index)) <= most:
            parts[-1].append(index)
        else:
            parts.append([index])
    return parts
