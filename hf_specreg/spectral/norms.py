"""Which gains stand beside a network's linear maps, with nothing between but moves of entries.

After a map W stand those that scale its output by diag(g): a batch norm with its running
statistics, a layer or RMS norm of one of torch's classes with its typical ones (`typical.py`),
layer scale, a frozen norm. They are the map's own only if everything that is made of
its output is made of them: an output that also goes past the norm keeps its scale. Before W stand
those whose output the map is fed: the gain of a norm, W diag(g). The way back leads through a tanh,
whose slope is 1 at 0 and less elsewhere: of dynamic tanh, gamma * tanh(alpha x) + beta, both gains
stand there, gamma alpha, its steepest slope, unless alpha is the gain of a map before it. Each is
found by what is computed, not by a class or by a name. No gain stands for what depends on the
image: the statistics of group norms and of norms of other classes after a map, global response
normalisation, the norm of a sum.
"""

import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from hf_specreg.encoders.features import FeatureSpace
from hf_specreg.encoders.pinned import is_pinned
from hf_specreg.spectral.dataflow import follow
from hf_specreg.spectral.flow import Call, Constant, Flow, Gain, name_of
from hf_specreg.spectral.typical import RunningInverse

NAMED = 8  # layers in a warning


@dataclass(frozen=True, eq=False)
class Scale:
    """A gain, as the channels beside a map have it.

    Attributes:
        gain: the factors.
        index: which of them each channel is multiplied by; None: each by its own.
    """

    gain: Gain
    index: Tensor | None = None

    @property
    def key(self) -> tuple:
        """Equal for scales that are alike."""
        return self.gain.names, None if self.index is None else tuple(self.index.tolist())


@dataclass(frozen=True, eq=False)
class Norms:
    """The gains beside a linear map.

    Attributes:
        before: of what the map is fed, the nearest first.
        after: of what it gives, the nearest first.
    """

    before: tuple[Scale, ...] = ()
    after: tuple[Scale, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """The dotted names of the parameters and buffers that are in the gains."""
        return tuple(name for scale in (*self.before, *self.after) for name in scale.gain.names)

    @property
    def statistics(self) -> tuple[RunningInverse, ...]:
        """The typical 1 / std that are in the gains."""
        inverses = (scale.gain.inverse for scale in (*self.before, *self.after))
        return tuple(inverse for inverse in inverses if isinstance(inverse, RunningInverse))

    @property
    def key(self) -> tuple:
        """Equal for norms that are alike."""
        return tuple(s.key for s in self.before), tuple(s.key for s in self.after)


@torch.no_grad()
def adjoining_norms(space: FeatureSpace, modules: Mapping[str, nn.Module]) -> dict[str, Norms]:
    """Return the gains beside each operator that has one, by the operator's name.

    Found by one evaluation of a black image, or of the example inputs. There are none where the
    network runs code that cannot be followed, which may use any output. The statistics of a batch
    norm that is pinned are in its gain: they do not run after a map.

    Args:
        space: whose network is run.
        modules: that the operators are of, by the operators' names.
    """
    dotted = {module: name for name, module in space.network.named_modules()}
    pinned = {f"{name}.running_var" for module, name in dotted.items() if is_pinned(module)}
    layers = {dotted[module]: module for module in modules.values()}
    dataflow = follow(space, layers)
    calls = dataflow.calls if dataflow.is_whole else {name: [] for name in layers}
    after = {n: [_after(each, _channels(layers[n])) for each in calls[n]] for n in layers}
    taken = {id(flow) for chains in after.values() for chain in chains for flow, _ in chain}
    found = {}
    for name, module in modules.items():
        of_layer = zip(calls[dotted[module]], after[dotted[module]], strict=True)
        norms = [_of_map(name, module, *use, taken) for use in of_layer]
        if norms and norms[0].names and all(each.key == norms[0].key for each in norms):
            sides = norms[0].before, norms[0].after
            found[name] = Norms(*(tuple(_constant(s, pinned) for s in side) for side in sides))
    return found


def warn_of_unfolded(layers: Sequence[str], folded: Collection[str]) -> None:
    """Warn if fewer than half of the layers have a gain beside them that is folded in."""
    if 2 * len(folded) >= len(layers):
        return
    others = [name for name in layers if name not in folded]
    more = f" and {len(others) - NAMED} more" if len(others) > NAMED else ""
    warnings.warn(
        f"fold_norm folds norms into {len(folded)} of {len(layers)} layers; the others are "
        f"penalised as they are: {', '.join(others[:NAMED])}{more}. No norm or gain stands beside "
        "them alone, or it depends on the image (group norm, the norm of a sum), or the network "
        "runs code that cannot be followed (TorchScript)",
        stacklevel=3,
    )


def _of_map(
    name: str, module: nn.Module, use: Call, after: list[tuple[Flow, Scale]], taken: Collection[int]
) -> Norms:
    """The gains beside an operator in one use of its module.

    Args:
        name: of the operator.
        module: that it is of.
        use: of the module.
        after: the gains after the module.
        taken: those after some module, by id, which are not before another one as well.
    """
    base = _base(module)
    if isinstance(base, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d):
        return Norms()
    scales, fed = tuple(scale for _, scale in after), use.inputs[0]
    if isinstance(base, nn.MultiheadAttention):
        if name.endswith(".out_proj"):
            return Norms(after=scales)
        # One weight is for queries, keys and values: one gain is, where they are the same.
        same = len(use.inputs) >= 3 and all(each is fed for each in use.inputs[:3])
        fed, scales = fed if same else None, ()
    before = () if fed is None else tuple(_before(fed, _channels(module), taken))
    return Norms(before, scales)


def _after(use: Call, dim: int) -> list[tuple[Flow, Scale]]:
    """The gains that all of a layer's output goes to, one after the other."""
    flow, channels, found = use.output, use.output.shape[dim], []
    positions = [1] * len(flow.shape)
    positions[dim] = channels
    labels = torch.arange(1.0, channels + 1, device=flow.device).reshape(positions)
    labels = labels.expand(flow.shape)
    while True:
        ways = _ways(flow)
        if len(ways) != 1 or ways[0][-1].gain is None or ways[0][-1].source is not ways[0][-2]:
            return found
        for step in ways[0][1:]:
            labels = step.move(labels)
        flow = ways[0][-1]
        index = _index(labels, flow.gain, channels)
        if index is None:
            return found
        found.append((flow, _scale(flow.gain, index)))


def _ways(flow: Flow) -> list[list[Flow]]:
    """From a tensor over moves of all its entries to each use that is none; moved entries that are
    not used end nowhere.
    """
    ways = []
    for use in flow.uses:
        if use.source is flow and use.gain is None:
            ways += [[flow, *way] for way in _ways(use)]
        else:
            ways.append([flow, use])
    return ways


def _index(labels: Tensor, gain: Gain, channels: int) -> Tensor | None:
    """Which factor each channel is multiplied by; None if not all by one factor each.

    Args:
        labels: the channel, from 1, that each entry is of; 0 for padding.
        gain: that scales a tensor of the labels' shape.
        channels: how many there are.
    """
    factors = _numbered(gain, labels).flatten().long()
    labels = labels.flatten().long()
    index = factors.new_zeros(channels + 1).index_copy_(0, labels, factors)
    alike = (index[labels] == factors) | (labels == 0)
    return index[1:] - 1 if alike.all() and index[1:].all() else None


def _before(fed: Flow, dim: int, taken: Collection[int]) -> Iterator[Scale]:
    """The gains that a layer's input was multiplied by last, the nearest first."""
    path: list[Flow] = []
    while id(fed) not in taken:
        if _is_tanh(fed):
            fed = fed.step.args[0]
            continue
        if fed.source is None:
            return
        if fed.gain is not None:
            labels = _numbered(fed.gain, torch.empty(fed.shape, device=fed.device))
            for step in reversed(path):
                labels = step.move(labels)
            rows = labels.movedim(dim, -1).flatten(0, -2)
            index = rows.amax(0)
            if not ((rows == index) | (rows == 0)).all():
                return
            yield _scale(fed.gain, index.long().clamp(min=1) - 1)
        path.append(fed)
        fed = fed.source


def _is_tanh(flow: Flow) -> bool:
    return flow.step is not None and name_of(flow.step.function) in ("tanh", "tanh_")


def _numbered(gain: Gain, like: Tensor) -> Tensor:
    """The number, from 1, of the factor that each entry of a tensor is multiplied by."""
    count = torch.Size(gain.shape).numel()
    numbers = torch.arange(1.0, count + 1, device=like.device).reshape(gain.shape)
    return numbers.expand(like.shape)


def _constant(scale: Scale, pinned: Collection[str]) -> Scale:
    """The scale with its statistics in the gain, where these are pinned."""
    weight, inverse = scale.gain.weight, scale.gain.inverse
    if inverse is None or not pinned.issuperset(inverse.names):
        return scale
    if weight is not None:
        names = (*weight.names, *inverse.names)
        inverse = Constant(lambda: weight.value() * scale.gain.inverse.value(), names)
    return replace(scale, gain=replace(scale.gain, weight=inverse, inverse=None))


def _scale(gain: Gain, index: Tensor) -> Scale:
    own = index.equal(torch.arange(torch.Size(gain.shape).numel(), device=index.device))
    return Scale(gain, None if own else index)


def _channels(module: nn.Module) -> int:
    """Which dimension of a layer's input and output has the channels."""
    return -len(getattr(_base(module), "kernel_size", ())) - 1


def _base(module: nn.Module) -> nn.Module:
    """The layer in LoRA's wrapper, or the layer itself."""
    return getattr(module, "base_layer", module)
