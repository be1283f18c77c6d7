"""The penalty on several processes: layers shared out over them, and weights that are sharded.

Where every process holds all weights and gradients are averaged (DistributedDataParallel), each
works its share of the layers and gives their gradient times the number of processes, which the
average undoes. Where weights are sharded by rows (FSDP2's DTensor), each process holds its rows of
the direction D too: sigma = <D, W> is a sum over processes, the gradient needs none, and the whole
weight is put together at a renewal only.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard


def shares(costs: Sequence[float], bins: int, *, rounds: Sequence[int] = ()) -> list[int]:
    """Return which bin each item goes to, a process or a turn, so that all have about as much.

    The most costly items are given away first. Of every round all wait for the slowest, so an item
    goes to the bin that has least to do in its round and, of those, least in all.

    Args:
        costs: of the items.
        bins: how many there are.
        rounds: in which round each item is worked; default: all in one.
    """
    rounds = rounds or [0] * len(costs)
    of_round = {number: [0.0] * bins for number in rounds}
    in_all, places = [0.0] * bins, [0] * len(costs)
    for item in sorted(range(len(costs)), key=lambda i: -costs[i]):
        now = of_round[rounds[item]]
        place = min(range(bins), key=lambda b: (now[b], in_all[b]))
        places[item] = place
        now[place] += costs[item]
        in_all[place] += costs[item]
    return places


def summed(own: Tensor) -> Tensor:
    """Return the sum of all processes' own terms, with the gradient that averages to its own."""
    total, processes = own.detach().clone(), dist.get_world_size()
    dist.all_reduce(total)
    return total + (own - own.detach()) * processes


@dataclass(frozen=True)
class Rows:
    """Which rows of a weight are on this process.

    Attributes:
        first: index of the first.
        total: how many the whole weight has.
        group: the processes that have the others; None where all rows are here.
    """

    first: int
    total: int
    group: dist.ProcessGroup | None = None

    def block_of_each(self, count: int, blocks: int, device: torch.device) -> Tensor:
        """Return the block of each of `count` rows here, of a weight of so many equal blocks."""
        return (self.first + torch.arange(count, device=device)) // (self.total // blocks)


def check_whole(network: nn.Module) -> None:
    """Raise ValueError if weights are sharded already: then no forward pass finds the layers."""
    if any(isinstance(p, DTensor) or hasattr(p, "ds_id") for p in network.parameters()):
        raise ValueError(
            f"the weights of {type(network).__name__} are sharded already: make the penalty "
            "before the model is given to fully_shard or accelerator.prepare"
        )


def check_shape(weight: Tensor, shape: torch.Size, name: str) -> None:
    """Raise ValueError if a layer's weight has not the shape that it was found with."""
    if weight.shape != shape:
        raise ValueError(
            f"the weight of {name!r} was {tuple(shape)} and is {tuple(weight.shape)}, as FSDP1 and "
            "DeepSpeed's ZeRO-3 leave it: shard with FSDP2, or train with DistributedDataParallel"
        )


def local(weight: Tensor) -> tuple[Tensor, Rows]:
    """Return the rows of a weight that are on this process, with its graph, and which they are.

    A DTensor that is not sharded by rows is made whole.
    """
    if not isinstance(weight, DTensor):
        return weight, Rows(0, len(weight))
    mesh, placements = weight.device_mesh, weight.placements
    sharded = [i for i, p in enumerate(placements) if not isinstance(p, Replicate)]
    if len(sharded) != 1 or placements[sharded[0]] != Shard(0):
        return weight.full_tensor(), Rows(0, len(weight))
    most = -(-len(weight) // mesh.size(sharded[0]))  # rows of a process; the last may have fewer
    first = min(most * mesh.get_local_rank(sharded[0]), len(weight))
    return weight.to_local(), Rows(first, len(weight), mesh.get_group(sharded[0]))


def rows_of(tensor: Tensor, rows: Rows, like: Tensor) -> Tensor:
    """Return of a whole tensor what a process has, with the strides of its weight."""
    if len(tensor) == len(like) and tensor.stride() == like.stride():
        return tensor
    here = tensor[rows.first : rows.first + len(like)]
    return torch.empty_like(like).copy_(here)


def is_sharded(weight: Tensor) -> bool:
    """Whether processes hold parts of a weight."""
    return isinstance(weight, DTensor)


def whole(weight: Tensor) -> Tensor:
    """Return a weight with the rows of all processes; collective for a DTensor."""
    return weight.full_tensor() if isinstance(weight, DTensor) else weight


def block_products(direction: Tensor, weight: Tensor, blocks: int, rows: Rows) -> Tensor:
    """Return <D, W> of every block of rows, [blocks]."""
    if blocks == 1:
        # Of a kernel with its channels last the memory is in order too, but not its dimensions.
        if not weight.is_contiguous():
            direction, weight = direction.movedim(1, -1), weight.movedim(1, -1)
        products = torch.dot(direction.reshape(-1), weight.reshape(-1))[None]
    elif rows.group is None:
        products = torch.linalg.vecdot(direction.reshape(blocks, -1), weight.reshape(blocks, -1))
    else:
        by_row = torch.linalg.vecdot(direction.flatten(1), weight.flatten(1))
        index = rows.block_of_each(len(weight), blocks, weight.device)
        products = by_row.new_zeros(blocks).index_add_(0, index, by_row)
    if rows.group is not None:
        dist.all_reduce(products, group=rows.group)
    return products


def scaled(direction: Tensor, factors: Tensor, rows: Rows) -> Tensor:
    """Return D with every block of rows times its factor [blocks]."""
    factors = factors.to(direction)
    blocks = len(factors)
    if blocks > 1 and len(direction) == rows.total:
        of_each = direction.unflatten(0, (blocks, -1))
        return (of_each * factors.reshape(blocks, *[1] * direction.ndim)).flatten(0, 1)
    if blocks > 1:
        index = rows.block_of_each(len(direction), blocks, direction.device)
        factors = factors[index].reshape(-1, *[1] * (direction.ndim - 1))
    return direction * factors
