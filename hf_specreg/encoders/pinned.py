"""Batch norms that are pinned: constant statistics, gain and bias trained, in both modes.

    y = gamma (x - mean) / sqrt(var + eps) + beta,    mean and var fixed

So nothing is normalised any more: the network in training is the one of evaluation, the scale of
the maps acts on the function, and a penalty with norms folded in is exact and constant but for the
weights. A pinned network differs from others in training only, so every library loads what is
saved of it; trained on elsewhere in training mode, its norms would take the batch's statistics,
which is another network.

Without normalisation a fresh network needs another start, Fixup's: He's normal weights, in each
residual branch scaled so that all L branches together move the output as much as one alone, and
every branch 0 at first. Where the paper has the last convolution 0, it is here the gain after it
(if one is), and the bias of each norm is the paper's scalar bias, for each channel.

Source: Zhang, Dauphin, Ma, "Fixup initialization: residual learning without normalization",
ICLR 2019, section 3.
"""

import warnings
from collections.abc import Iterable
from functools import partial

import torch
from torch import nn
from torch.autograd.graph import Node

from hf_specreg.encoders.features import FeatureSpace
from hf_specreg.encoders.graph import OperationGraph, is_batch_norm, is_linear

BatchNorm = nn.modules.batchnorm._BatchNorm
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def batch_norms(model: nn.Module) -> dict[str, BatchNorm]:
    """Return a model's batch norms by their dotted names, each once."""
    return {name: m for name, m in model.named_modules() if isinstance(m, BatchNorm)}


def is_pinned(module: nn.Module) -> bool:
    """Whether it is a batch norm that `pin_norms` has pinned."""
    return isinstance(module, BatchNorm) and "train" in vars(module)


def pin_norms(model: nn.Module) -> None:
    """Keep a model's batch norms in evaluation mode, with the statistics that they have, in place.

    `model.train()` leaves them there from now on, also in copies of the model. What puts other
    modules in their place, as torch's and timm's convert_sync_batchnorm do, unpins them: convert
    first. The recipes leave those that are pinned.

    Args:
        model: any module; to be pinned before a `SpectralPenalty` is made of it.

    Raises:
        ValueError: it has no batch norm, or one without running statistics; none is pinned then.
    """
    pin(pinnable(model).values())


def pinnable(model: nn.Module) -> dict[str, BatchNorm]:
    """Return a model's batch norms by their dotted names.

    Raises:
        ValueError: see `pin_norms`.
    """
    norms = batch_norms(model)
    if not norms:
        raise ValueError(f"{type(model).__name__} has no batch norm to pin")
    for name, norm in norms.items():
        if norm.running_var is None:
            raise ValueError(f"the batch norm {name!r} has no running statistics to be pinned at")
    return norms


def pin(norms: Iterable[BatchNorm]) -> None:
    """Pin these batch norms, which have running statistics."""
    for norm in norms:
        norm.eval()
        norm.train = partial(_stay, norm)  # a partial, which can be pickled and copied


def _stay(norm: BatchNorm, mode: bool = True) -> BatchNorm:
    norm.training = False
    return norm


@torch.no_grad()
def initialize_pinned(model: nn.Module | FeatureSpace) -> None:
    """Draw a network's convolutions by Fixup and pin its batch norms at mean 0 and variance 1.

    Residual branches are found by what is computed: of two tensors that are added, the branch is
    the one with more linear maps on its way. Where a branch ends in a norm its gain is 0 at first,
    where it ends in a map, that map; a warning says how many end in neither (a ReLU, say), and do
    not start at 0. Linear layers and heads are left as they are, unless a branch ends in one.
    Nothing holds down what grows by sums of equal branches (RepVGG's).

    Args:
        model: a fresh one, or its `FeatureSpace`; changed in place. Draws from torch's global
            random numbers.

    Raises:
        ValueError: see `pin_norms` and `FeatureSpace.of`.
    """
    space = FeatureSpace.of(model)
    pin_norms(space.network)
    for name, module in space.network.named_modules():
        if isinstance(module, BatchNorm):
            module.reset_parameters()  # and the statistics
        elif isinstance(module, CONVOLUTIONS) and not space.of_head(f"{name}.weight"):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    graph = OperationGraph(space)
    branches = _residual_branches(graph)
    drawn: set[Node] = set()
    ends = []  # what branches end in that do not start at 0
    for branch in sorted(branches, key=len):  # of nested ones the innermost counts
        count = max(branch.values())
        for node in branch.keys() - drawn:
            found = graph.linear_map(node) if branch[node] < count else None
            if found is not None:
                found[0].mul_(len(branches) ** (-1 / (2 * count - 2)))
        drawn |= branch.keys()
        end = _end_in_zero(graph, branch)
        ends += [end.name()] if end is not None else []
    if ends:
        warnings.warn(
            f"{len(ends)} of {len(branches)} residual branches end in neither a norm nor a linear "
            f"map ({', '.join(sorted(set(ends)))}) and do not start at 0, as Fixup has it: warm "
            "the learning rate up, or take blocks without a function after their last norm",
            stacklevel=3,  # past torch.no_grad
        )


def _residual_branches(graph: OperationGraph) -> list[dict[Node, int]]:
    """The operations of each residual branch in order, and which of its linear maps, counted from
    1, each is or comes after.
    """
    branches = []
    for node, fed in graph.inputs.items():
        if node.name() == "AddBackward0" and len(fed) == 2:
            ways = [_way(graph, *fed), _way(graph, *reversed(fed))]
            shortcut, branch = sorted(ways, key=_maps)
            if _maps(branch) > _maps(shortcut):
                branches.append(branch)
    return branches


def _maps(way: dict[Node, int]) -> int:
    return max(way.values(), default=0)


def _way(graph: OperationGraph, end: Node, other: Node) -> dict[Node, int]:
    """What leads up to the end and not to the other, but for what makes gates."""
    kept, ahead = set(), [end]
    while ahead:
        node = ahead.pop()
        if node not in kept and not graph.leads_to(node, other):
            kept.add(node)
            ahead += _ungated(graph, node)
    way: dict[Node, int] = {}
    for node in graph.inputs:
        if node in kept:
            before = max((way.get(given, 0) for given in _ungated(graph, node)), default=0)
            way[node] = before + is_linear(node)
    return way


def _ungated(graph: OperationGraph, node: Node) -> list[Node]:
    """What an operation is fed, without the gate that is made of the other factor of a product."""
    fed = graph.inputs[node]
    if node.name() == "MulBackward0" and len(fed) == 2:
        return [one for one, other in (fed, fed[::-1]) if not graph.leads_to(other, one)] or fed
    return fed


def _end_in_zero(graph: OperationGraph, branch: dict[Node, int]) -> Node | None:
    """Set what a branch is multiplied by last to 0, the gain of a norm or a linear map; return what
    it ends in where that is neither.
    """
    *_, node = branch
    while node.name() == "MulBackward0" and len(fed := _ungated(graph, node)) == 1:
        node = fed[0]
    if is_batch_norm(node):
        zero = (graph.parameter(node, 1),)
    else:
        zero = graph.linear_map(node) or ()
    zero = [parameter for parameter in zero if parameter is not None]
    for parameter in zero:
        nn.init.zeros_(parameter)
    return None if zero else node
