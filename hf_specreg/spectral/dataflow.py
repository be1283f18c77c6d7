"""What becomes of a network's tensors in one forward pass: whose entries each holds, moved, scaled
by a gain, or as another tensor.

Seen by the functions that are called. One that is not known here makes another tensor of what it is
given, and so does one of two tensors that both depend on the image. Code that torch's functions do
not show (TorchScript, functions with a backward of their own) makes tensors of unknown origin.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from hf_specreg.spectral.sharding import whole

PRODUCTS = frozenset({"mul", "multiply", "__rmul__", "mul_", "__imul__"})
QUOTIENTS = frozenset({"div", "divide", "true_divide", "div_", "__itruediv__"})
# Keep every entry where it is, or add to it what does not depend on the image.
IN_PLACE = frozenset(
    {
        *("to", "float", "half", "bfloat16", "double", "type", "type_as", "contiguous", "clone"),
        *("detach", "add", "add_", "__radd__", "__iadd__", "sub", "sub_", "subtract", "__isub__"),
    }
)
MOVES = frozenset(
    {
        *("view", "reshape", "flatten", "unflatten", "ravel", "squeeze", "unsqueeze", "expand"),
        *("permute", "transpose", "swapaxes", "swapdims", "movedim", "moveaxis", "t", "T", "mT"),
        *("roll", "flip", "rot90", "pad", "repeat", "tile", "broadcast_to", "repeat_interleave"),
        *("__getitem__", "select", "narrow", "index_select", "unbind", "chunk", "split"),
        *("tensor_split", "split_with_sizes", "pixel_shuffle", "pixel_unshuffle"),
        *("channel_shuffle", "native_channel_shuffle", "unfold"),
    }
)
SHAPED_LIKE = frozenset({"view_as", "reshape_as", "expand_as"})  # the second argument
CONVOLUTIONS = frozenset({F.conv1d, F.conv2d, F.conv3d})
NORMS = frozenset({F.batch_norm, F.instance_norm, F.layer_norm, F.rms_norm, F.group_norm})


@dataclass(frozen=True, eq=False)
class Constant:
    """A tensor that does not depend on the image.

    Attributes:
        value: computes it from the parameters and buffers as they are, with its graph.
        names: of these, dotted.
    """

    value: Callable[[], Tensor]
    names: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Gain:
    """What entries are multiplied by.

    Attributes:
        shape: of the gain, as it is broadcast over what it scales.
        weight: the factors; None for 1.
        inverse: factors beside them: 1 / standard deviation, of running statistics.
    """

    shape: tuple[int, ...]
    weight: Constant | None
    inverse: Constant | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The dotted names of the parameters and buffers that it is made of."""
        return tuple(name for c in (self.weight, self.inverse) if c is not None for name in c.names)


@dataclass(eq=False)
class Flow:
    """A tensor that depends on the image.

    Attributes:
        shape: of the tensor.
        device: of the tensor.
        source: the tensor whose entries it holds; None for another tensor altogether.
        move: does to a tensor of the source's shape what was done to the source.
        gain: what was multiplied by, after the move.
        uses: what was made of it.
    """

    shape: tuple[int, ...]
    device: torch.device
    source: "Flow | None" = None
    move: Callable[[Tensor], Tensor] | None = None
    gain: Gain | None = None
    uses: list["Flow"] = field(default_factory=list)


@dataclass(frozen=True)
class Call:
    """One use of a layer: what it was fed, None for what depends on no image, and what it gave."""

    inputs: tuple[Flow | None, ...]
    output: Flow


class Dataflow(TorchFunctionMode):
    """Follows the tensors of a network while it runs.

    Args:
        network: the model, in evaluation mode.
        layers: modules of it by name, which are taken as one step each. Their weights are, too,
            where they are handed to a function without the module being called.

    Attributes:
        calls: of each layer, in order.
        is_whole: whether there was no tensor of unknown origin.
    """

    def __init__(self, network: nn.Module, layers: Mapping[str, nn.Module]):
        super().__init__()
        self.layers = layers
        self.calls: dict[str, list[Call]] = {name: [] for name in layers}
        self.is_whole = True
        self._within = 0
        # By id, with the tensor, so that its id stays its own, and with its version.
        self._known: dict[int, tuple[Tensor, int, Flow | Constant]] = {}
        for prefix, module in network.named_modules():
            own = *module._parameters.items(), *module._buffers.items()
            for name, tensor in own:
                if tensor is not None:
                    dotted = f"{prefix}.{name}" if prefix else name
                    self._know(tensor, Constant(partial(_attribute, module, name), (dotted,)))
        self._owners = {id(m._parameters.get("weight")): name for name, m in layers.items()}

    def hooks(self) -> Iterator:
        """Put hooks on the layers, and yield them for removal."""
        for name, module in self.layers.items():
            fed: list[tuple[Flow | None, ...]] = []
            yield module.register_forward_pre_hook(self._enter(fed), with_kwargs=True)
            yield module.register_forward_hook(self._leave(name, fed), prepend=True)

    def start(self, inputs: Any) -> None:
        """Take the network's inputs as what depends on the image."""
        for tensor in _tensors(inputs):
            self._other(tensor, ())

    def finish(self, output: Any) -> None:
        """Count what the network returns as used."""
        for tensor in _tensors(dict(output) if hasattr(output, "keys") else output):
            self._other(tensor, [self._origin(tensor)])

    def _enter(self, fed: list):
        def hook(module, args, kwargs):
            origins = [self._origin(tensor) for tensor in _tensors((args, kwargs))]
            fed.append(tuple(o if isinstance(o, Flow) else None for o in origins))
            self._within += 1

        return hook

    def _leave(self, name: str, fed: list):
        def hook(module, args, output):
            self._within -= 1
            self._note(name, fed.pop(), _tensors(output)[0])

        return hook

    def _note(self, name: str, inputs: tuple[Flow | None, ...], output: Tensor) -> None:
        self.calls[name].append(Call(inputs, self._other(output, inputs)))

    def __torch_function__(self, func, types, args=(), kwargs=None):
        """Run the function, and note what it made of what it was given."""
        kwargs = kwargs or {}
        is_property = getattr(func, "__name__", "") == "__get__"
        if self._within or (is_property and _name(func) not in MOVES | {"data"}):
            return func(*args, **kwargs)
        origins = {id(t): self._origin(t) for t in _tensors((args, kwargs))}
        output = func(*args, **kwargs)
        name = _name(func)
        made = [args[0]] if name == "__setitem__" else _tensors(output)
        made = [tensor for tensor in made if not self._is_known(tensor)]
        if not made:
            return output
        flows = {id(o): o for o in origins.values() if isinstance(o, Flow)}
        if not flows:
            self._constants(func, args, kwargs, origins, output, made)
        elif func in CONVOLUTIONS or func is F.linear:
            self._product(args, kwargs, origins, made[0])
        else:
            for place, tensor in enumerate(_tensors(output)):
                flow = self._step(func, name, args, kwargs, origins, tensor, place)
                self._made(tensor, flow, list(flows.values()))
            if name == "__setitem__":
                self._other(args[0], flows.values())
        return output

    def _step(self, func, name, args, kwargs, origins, made: Tensor, place: int) -> Flow | None:
        """What a function made, if it is the entries of one tensor."""
        one = [t for t in _tensors((args, kwargs)) if isinstance(origins[id(t)], Flow)]
        first, source = one[0] is args[0] if args else False, origins[id(one[0])]
        if name in SHAPED_LIKE and first:
            method = getattr(Tensor, name.removesuffix("_as"))
            return _moved(source, made, lambda t: method(t, made.shape))
        if len(one) != 1:
            return None
        if name in PRODUCTS or name in QUOTIENTS or func is torch.addcmul:
            gain = _factor(name, args, kwargs, origins)
            return _scaled(source, made, gain) if gain is not None else None
        if func in NORMS and first:
            return _normalized(func, source, made, args, kwargs, origins)
        dropped = func is F.dropout and _drops(*args, **kwargs)
        summed = name in IN_PLACE and (first or ("add" in name and "alpha" not in kwargs))
        if (summed or (func is F.dropout and first)) and not dropped:
            return _moved(source, made, lambda t: t.expand(made.shape))
        if name in MOVES and first and not (name == "pad" and _fills(*args, **kwargs)):
            again = Tensor.reshape if name == "view" else func  # whatever the strides

            def move(labels: Tensor) -> Tensor:
                return _tensors(again(labels, *args[1:], **kwargs))[place]

            return _moved(source, made, move)
        return None

    def _product(self, args, kwargs, origins, made: Tensor) -> None:
        """Note a linear layer's or convolution's function: by its layer, if that was not called."""
        weight = args[1] if len(args) > 1 else kwargs.get("weight")
        fed = origins.get(id(args[0])) if args else None
        name = self._owners.get(id(weight))
        flows = [o for o in origins.values() if isinstance(o, Flow)]
        if name is None or flows != [fed]:
            self._other(made, flows)
        else:
            self._note(name, (fed,), made)

    def _constants(self, func, args, kwargs, origins, output, made) -> None:
        """Note what was computed without the image, so that it can be computed again."""
        recipe = tree_map(lambda a: origins[id(a)] if isinstance(a, Tensor) else a, (args, kwargs))
        names = tuple(dict.fromkeys(n for o in origins.values() for n in o.names))
        for place, tensor in enumerate(_tensors(output)):
            if any(tensor is given for given in _tensors((args, kwargs))):
                self._other(tensor, ())  # in place: not done again
                continue

            def value(place: int = place) -> Tensor:
                again = tree_map(lambda a: a.value() if isinstance(a, Constant) else a, recipe)
                return _tensors(func(*again[0], **again[1]))[place]

            self._know(tensor, Constant(value, names))

    def _made(self, tensor: Tensor, flow: Flow | None, sources: list[Flow]) -> Flow:
        flow = flow or Flow(tuple(tensor.shape), tensor.device)
        for source in [flow.source] if flow.source in sources else sources:
            source.uses.append(flow)
        self._know(tensor, flow)
        return flow

    def _other(self, tensor: Tensor, sources) -> Flow:
        """Note another tensor altogether."""
        return self._made(tensor, None, [s for s in sources if isinstance(s, Flow)])

    def _know(self, tensor: Tensor, origin: Flow | Constant) -> None:
        self._known[id(tensor)] = tensor, tensor._version, origin

    def _is_known(self, tensor: Tensor) -> bool:
        known = self._known.get(id(tensor))
        return known is not None and known[1] == tensor._version

    def _origin(self, tensor: Tensor) -> Flow | Constant:
        if not self._is_known(tensor):
            self.is_whole &= id(tensor) in self._known  # if only changed in place meanwhile
            self._other(tensor, ())
        return self._known[id(tensor)][2]


def _moved(source: Flow, made: Tensor, move: Callable[[Tensor], Tensor]) -> Flow:
    return Flow(tuple(made.shape), made.device, source, move)


def _scaled(source: Flow, made: Tensor, gain: Gain) -> Flow:
    shape = tuple(made.shape)
    return Flow(shape, made.device, source, lambda t: t.expand(shape), gain)


def _factor(name: str, args, kwargs, origins: Mapping[int, Flow | Constant]) -> Gain | None:
    """The parameters that a tensor is multiplied by, or divided by; not a number, nor a tensor that
    has no parameter in it.
    """
    if name == "addcmul":
        added, *factors = args
        if kwargs or isinstance(origins[id(added)], Flow):
            return None
    else:
        factors = (*args, *kwargs.values())
    if len(factors) != 2 or (name in QUOTIENTS and not isinstance(origins[id(factors[0])], Flow)):
        return None
    constants = [(f, origins.get(id(f))) for f in factors]
    constants = [(f, c) for f, c in constants if isinstance(c, Constant) and c.names]
    if not constants:
        return None
    [(factor, constant)] = constants
    if name in QUOTIENTS:
        divisor = constant
        constant = Constant(lambda: 1 / divisor.value(), divisor.names)
    return Gain(tuple(factor.shape), constant)


def _normalized(func, source: Flow, made: Tensor, args, kwargs, origins) -> Flow | None:
    """What a norm made: its gain times what is normalised, which with running statistics is the
    norm's input over a constant, and else another tensor.
    """
    given = inspect.signature(func).bind(*args, **kwargs)
    given.apply_defaults()
    given = given.arguments
    weight = origins.get(id(given["weight"]))
    variance = origins.get(id(given.get("running_var")))
    inverse = None
    if isinstance(variance, Constant) and not given.get("training", given.get("use_input_stats")):
        eps = given["eps"]  # alone: what is kept must not hold the norm's input
        inverse = Constant(lambda: (variance.value() + eps).rsqrt(), variance.names)
    else:
        source = Flow(source.shape, source.device)
    if weight is None and inverse is None:
        return None
    features = given.get("normalized_shape", (made.shape[1], *[1] * (made.ndim - 2)))
    return _scaled(source, made, Gain(tuple(features), weight, inverse))


def _drops(images: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> bool:
    return training


def _fills(images: Tensor, pad, mode: str = "constant", value: float | None = None) -> bool:
    return bool(value)


def _attribute(module: nn.Module, name: str) -> Tensor:
    return whole(getattr(module, name))


def _tensors(arguments: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor)]


def _name(func: Callable) -> str:
    """What a function is called, or the property that it gets."""
    name = getattr(func, "__name__", "")
    return func.__self__.__name__ if name == "__get__" else name
