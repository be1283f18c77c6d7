"""What becomes of a network's tensors in one forward pass: whose entries each holds, moved, scaled
by a gain, or as another tensor.

Seen by the functions that are called. One that is not known here makes another tensor of what it is
given, and so does one of two tensors that both depend on the image. Code that torch's functions do
not show (TorchScript, functions with a backward of their own) makes tensors of unknown origin.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from hf_specreg.encoders.features import FeatureSpace
from hf_specreg.encoders.modules import examined
from hf_specreg.encoders.trace import call
from hf_specreg.spectral.flow import (
    CONCATENATIONS,
    CONVOLUTIONS,
    IN_PLACE,
    MOVES,
    NORMS,
    PRODUCTS,
    QUOTIENTS,
    SHAPED_LIKE,
    Call,
    Constant,
    Flow,
    Gain,
    Step,
    fills,
    name_of,
)
from hf_specreg.spectral.sharding import whole
from hf_specreg.spectral.typical import running_inverses


class Dataflow(TorchFunctionMode):
    """Follows the tensors of a network while it runs.

    Args:
        network: the model, in evaluation mode.
        layers: modules of it by name, which are taken as one step each. Their weights are, too,
            where they are handed to a function without the module being called.

    Attributes:
        calls: of each layer, in order.
        flows: all tensors that depend on the image, in the order in which they were made.
        is_whole: whether there was no tensor of unknown origin.
    """

    def __init__(self, network: nn.Module, layers: Mapping[str, nn.Module]):
        super().__init__()
        self.layers = layers
        self.calls: dict[str, list[Call]] = {name: [] for name in layers}
        self.flows: list[Flow] = []
        self.is_whole = True
        self._within = 0
        inverses = running_inverses(network)
        self._inverses = {(f"{inverse.name}.weight",): inverse for inverse in inverses}
        # By id, with the tensor, so that its id stays its own, and with its version.
        self._known: dict[int, tuple[Tensor, int, Flow | Constant]] = {}
        for prefix, module in network.named_modules():
            own = *module._parameters.items(), *module._buffers.items()
            for name, tensor in own:
                if tensor is not None:
                    dotted, value = f"{prefix}.{name}" if prefix else name, _attribute
                    is_moved = name in module._parameters
                    self._know(tensor, Constant(partial(value, module, name), (dotted,), is_moved))
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

    def _note(
        self, name: str, inputs: tuple[Flow | None, ...], output: Tensor, **others: Flow | Constant
    ) -> None:
        flow = self._other(output, inputs, Step(name, inputs, others))
        self.calls[name].append(Call(inputs, flow))

    def __torch_function__(self, func, types, args=(), kwargs=None):
        """Run the function, and note what it made of what it was given."""
        kwargs = kwargs or {}
        is_property = getattr(func, "__name__", "") == "__get__"
        if self._within or (is_property and name_of(func) not in MOVES | {"data"}):
            return func(*args, **kwargs)
        origins = {id(t): self._origin(t) for t in _tensors((args, kwargs))}
        output = func(*args, **kwargs)
        name = name_of(func)
        made = [args[0]] if name == "__setitem__" else _tensors(output)
        made = [tensor for tensor in made if not self._is_known(tensor)]
        if not made:
            return output
        flows = {id(o): o for o in origins.values() if isinstance(o, Flow)}
        given = tree_map(lambda a: origins[id(a)] if isinstance(a, Tensor) else a, (args, kwargs))
        step = Step(func, *given)
        if not flows:
            self._constants(step, origins, args, kwargs, output)
        elif func in CONVOLUTIONS or func is F.linear:
            self._product(args, kwargs, origins, made[0], step)
        else:
            for place, tensor in enumerate(_tensors(output)):
                flow = self._flow(func, name, args, kwargs, origins, tensor, place)
                self._made(tensor, flow, list(flows.values()), step)
            if name == "__setitem__":
                self._other(args[0], flows.values())
        return output

    def _flow(self, func, name, args, kwargs, origins, made: Tensor, place: int) -> Flow | None:
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
            return self._normalized(func, source, made, args, kwargs, origins)
        dropped = func is F.dropout and _drops(*args, **kwargs)
        summed = name in IN_PLACE and (first or ("add" in name and "alpha" not in kwargs))
        if (summed or (func is F.dropout and first)) and not dropped:
            return _moved(source, made, lambda t: t.expand(made.shape))
        if name in MOVES and first and not (name == "pad" and fills(*args, **kwargs)):
            again = Tensor.reshape if name == "view" else func  # whatever the strides

            def move(labels: Tensor) -> Tensor:
                return _tensors(again(labels, *args[1:], **kwargs))[place]

            return _moved(source, made, move)
        return None

    def _normalized(self, func, source: Flow, made: Tensor, args, kwargs, origins) -> Flow | None:
        """What a norm made: its gain times the norm's input over a constant, of running statistics
        or a typical one, or else times another tensor.
        """
        given = inspect.signature(func).bind(*args, **kwargs)
        given.apply_defaults()
        given = given.arguments
        weight = origins.get(id(given["weight"]))
        variance = origins.get(id(given.get("running_var")))
        if isinstance(variance, Constant) and not given.get(
            "training", given.get("use_input_stats")
        ):
            eps = given["eps"]  # alone: what is kept must not hold the norm's input
            inverse = Constant(lambda: (variance.value() + eps).rsqrt(), variance.names)
        else:
            inverse = self._inverses.get(weight.names) if isinstance(weight, Constant) else None
        if inverse is None:
            source = Flow(source.shape, source.device)
        if weight is None and inverse is None:
            return None
        features = given.get("normalized_shape", (made.shape[1], *[1] * (made.ndim - 2)))
        return _scaled(source, made, Gain(tuple(features), weight, inverse))

    def _product(self, args, kwargs, origins, made: Tensor, step: Step) -> None:
        """Note a linear layer's or convolution's function: by its layer, if that was not called."""
        weight = args[1] if len(args) > 1 else kwargs.get("weight")
        fed = origins.get(id(args[0])) if args else None
        name = self._owners.get(id(weight))
        flows = [o for o in origins.values() if isinstance(o, Flow)]
        if name is None or flows != [fed]:
            self._other(made, flows, step)
        else:
            bias = args[2] if len(args) > 2 else kwargs.get("bias")
            others = {} if bias is None else {"bias": origins[id(bias)]}
            self._note(name, (fed,), made, **others)

    def _constants(self, step: Step, origins, args, kwargs, output) -> None:
        """Note what was computed without the image, so that it can be computed again."""
        func, recipe = step.function, (step.args, step.kwargs)
        names = tuple(dict.fromkeys(n for o in origins.values() for n in o.names))
        moves = name_of(func) in MOVES | CONCATENATIONS | {"interpolate", "to", "clone"}
        is_moved = moves and all(origin.is_moved for origin in origins.values())
        for place, tensor in enumerate(_tensors(output)):
            if any(tensor is given for given in _tensors((args, kwargs))):
                self._other(tensor, ())  # in place: not done again
                continue

            def value(place: int = place) -> Tensor:
                again = tree_map(lambda a: a.value() if isinstance(a, Constant) else a, recipe)
                return _tensors(func(*again[0], **again[1]))[place]

            self._know(tensor, Constant(value, names, is_moved))

    def _made(
        self, tensor: Tensor, flow: Flow | None, sources: list[Flow], step: Step | None
    ) -> Flow:
        flow = flow or Flow(tuple(tensor.shape), tensor.device)
        flow.step, flow.place = step, len(self.flows)
        self.flows.append(flow)
        for source in [flow.source] if flow.source in sources else sources:
            source.uses.append(flow)
        self._know(tensor, flow)
        return flow

    def _other(self, tensor: Tensor, sources, step: Step | None = None) -> Flow:
        """Note another tensor altogether."""
        return self._made(tensor, None, [s for s in sources if isinstance(s, Flow)], step)

    def _know(self, tensor: Tensor, origin: Flow | Constant) -> None:
        self._known[id(tensor)] = tensor, tensor._version, origin

    def _is_known(self, tensor: Tensor) -> bool:
        known = self._known.get(id(tensor))
        return known is not None and known[1] == tensor._version

    def _origin(self, tensor: Tensor) -> Flow | Constant:
        if not self._is_known(tensor):
            self.is_whole &= id(tensor) in self._known  # if only changed in place meanwhile
            self._other(tensor, self._in_its_memory(tensor))
        return self._known[id(tensor)][2]

    def _in_its_memory(self, tensor: Tensor) -> list[Flow]:
        """What changed a tensor through a view of it, or what it is a view of; else all of them."""
        with torch._C.DisableTorchFunction():
            place = tensor.untyped_storage()._cdata
            known = [
                (other._version == version, origin)
                for other, version, origin in self._known.values()
                if isinstance(origin, Flow) and other.untyped_storage()._cdata == place
            ]
        return [o for is_current, o in known if is_current] or [origin for _, origin in known]


def follow(space: FeatureSpace, layers: Mapping[str, nn.Module]) -> Dataflow:
    """Run a network in evaluation mode on a black image, or on its example inputs, and return what
    becomes of its tensors. The network is left as it was.

    Args:
        space: whose network is run.
        layers: as for `Dataflow`.
    """
    network, first = space.network, next(space.network.parameters())
    dataflow, inputs = Dataflow(network, layers), space.example_inputs
    if inputs is None:
        inputs = torch.zeros(1, *space.input_size, dtype=first.dtype, device=first.device)
    with contextlib.ExitStack() as stack:
        stack.enter_context(examined(network))
        stack.enter_context(torch.no_grad())
        stack.enter_context(_no_shortcuts())
        for hook in dataflow.hooks():
            stack.callback(hook.remove)
        dataflow.start(inputs)
        stack.enter_context(dataflow)
        dataflow.finish(call(network, inputs))
    return dataflow


@contextlib.contextmanager
def _no_shortcuts() -> Iterator[None]:
    """Have torch's attention modules compute what they say, not a whole block at once."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


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


def _drops(images: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> bool:
    return training


def _attribute(module: nn.Module, name: str) -> Tensor:
    return whole(getattr(module, name))


def _tensors(arguments: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor)]
