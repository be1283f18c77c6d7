"""Which linear maps are scale-invariant: multiplied by c > 0, they leave the function as it is.

Let, while a network trains, all penalised weights W be multiplied by powers of c, W -> c^d W with
d >= 0, and what is added to their outputs (biases, position embeddings, tokens) by the powers that
follow. A tensor then becomes c^n times what it was, if all functions on the way are homogeneous:
the degree n is d plus that of the input at a map's output, stays what it is through what is
positively homogeneous (moves, sums of equal degrees, ReLU, pooling), adds up in products, and is 0
after a norm by statistics of the images that it is given (but for its eps): batch, layer, group,
instance and RMS norms. Wherever anything else is done, and in what the network returns, it must be
0. These are linear equations in the exponents d, and the maps with d > 0 in a solution have a free
scale: the sum of sigma^2 falls with c and the function stays (van Laarhoven 2017,
arXiv:1706.05350). Maps before a norm are, each by itself; those whose outputs are summed before the
norms (the residual stream of a pre-norm transformer) are together. A sum of solutions is one, so
that one solution has all such maps, and a linear program finds it.

Of channels that are concatenated each has the degree of the tensor that it is from, up to a batch
or instance norm, which takes each by itself (DenseNet); so have q, k and v that one matrix stacks.

What is found is free, but not all that is free is found. Not seen are: norms that none of torch's
functions computes; what is changed in place through a view; networks that run code that cannot be
followed (`dataflow.py`). A gain that could take over the scale of the map beside it (layer scale, a
norm's before the map) is a parameter of its own, and frees nothing here.
"""

import inspect
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from hf_specreg.encoders.features import FeatureSpace
from hf_specreg.encoders.trace import FAILURES
from hf_specreg.spectral.dataflow import Dataflow, follow
from hf_specreg.spectral.flow import (
    CONCATENATIONS,
    CONVOLUTIONS,
    HOMOGENEOUS,
    MOVES,
    NORMS,
    OF_EACH_CHANNEL,
    PRODUCTS,
    QUOTIENTS,
    SHAPED_LIKE,
    SUMS,
    Constant,
    Flow,
    fills,
    name_of,
)
from hf_specreg.spectral.layers import STANDARDISED_CONVOLUTIONS
from hf_specreg.spectral.rescalings import Form, Rescalings, plus
from hf_specreg.spectral.sharding import check_whole

NAMED = 4  # layers in the warning
BILINEAR = PRODUCTS | {"matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "einsum"}
NONE: Form = {}  # the degree 0


class FreeScales:
    """The maps of a network whose scale is free.

    Args:
        space: whose network is run once, in evaluation mode.
        modules: that the maps are of, by the maps' names.
        at_once: run it now, while weights are whole; else when it is first asked about.
    """

    def __init__(
        self, space: FeatureSpace, modules: Mapping[str, nn.Module], *, at_once: bool = False
    ):
        self._space, self._modules = space, modules
        self._found = rescalings(space, modules) if at_once else None
        self._asked: set[bool] = set()

    @property
    def names(self) -> tuple[str, ...]:
        """Of these maps, as the network is now. A batch norm in evaluation mode, as those that are
        pinned always are, has fixed statistics and frees nothing.
        """
        if self._found is None:
            self._found = rescalings(self._space, self._modules)
        exponents = self._found.solution()
        return tuple(name for name in self._modules if exponents.get(("map", name), 0) > 0)

    def warn_once(self) -> None:
        """Warn, once, if these are more than half of the maps: as the network is at the first use
        in evaluation mode, and at the first in training mode.
        """
        training = self._space.network.training
        if training in self._asked:
            return
        self._asked.add(training)
        names = self.names
        if 2 * len(names) <= len(self._modules):
            return
        self._asked = {True, False}
        more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
        warnings.warn(
            f"norms make {len(names)} of the {len(self._modules)} maps that are penalised scale-"
            "invariant: the sum of sigma^2 can fall while the function stays as it is "
            f"({', '.join(names[:NAMED])}{more}). Train on AdversarialImages instead (in recipes "
            "adversarial.images), or penalise the derivative, by InputGradientPenalty "
            "(regularizers.input_gradient) or without labels SensitivityPenalty "
            "(regularizers.sensitivity), or take an encoder without norms; batch norms can be "
            "folded in by fold_norm=True, or pinned",
            stacklevel=4,  # past torch.compiler.disable
        )


def rescalings(space: FeatureSpace, modules: Mapping[str, nn.Module]) -> Rescalings:
    """Return the powers of c by which maps can be multiplied together; none of a network that
    cannot be followed, as one whose weights are sharded.
    """
    dotted = {module: name for name, module in space.network.named_modules()}
    layers = {dotted[module]: module for module in modules.values()}
    try:
        check_whole(space.network)
        dataflow = follow(space, layers)
    except FAILURES:  # of the network's own code, on one image in evaluation mode
        return Rescalings()
    if not dataflow.is_whole:
        return Rescalings()
    maps: dict[str, list[str]] = {}
    for name, module in modules.items():
        maps.setdefault(dotted[module], []).append(name)
    return _Degrees(space.network, dataflow, maps).equations


class _Degrees:
    """The degrees of a network's tensors, as forms in the exponents, and the equations that hold.

    Args:
        network: that was followed.
        dataflow: what became of its tensors.
        maps: the names of the maps of each layer.
    """

    def __init__(self, network: nn.Module, dataflow: Dataflow, maps: Mapping[str, Sequence[str]]):
        self.equations = Rescalings(("map", name) for names in maps.values() for name in names)
        self._network, self._dataflow, self._maps = network, dataflow, maps
        # One tensor may have several names.
        first: dict[int, str] = {}
        named = network.named_parameters(remove_duplicate=False)
        self._names = {name: first.setdefault(id(p), name) for name, p in named}
        self._owners: dict[str, list[Form]] = {}  # the exponents of maps, by their parameters
        for layer, module in dataflow.layers.items():
            self._own(layer, module)
        self._parts: dict[int, list[Form]] = {}  # by place; several where channels differ
        self._labels: dict[int, Tensor] = {}  # whose each entry is, from 1, of stacked ones
        for flow in dataflow.flows:
            self._parts[flow.place] = self._of_flow(flow)
        for flow in dataflow.flows:
            if any(use.step is None for use in flow.uses):  # returned, or not known what for
                self.equations.vanish(self._of(flow))

    def _own(self, layer: str, module: nn.Module) -> None:
        """Note whose the parameters of a layer are; layers that share one are scaled alike."""
        forms = [{("map", name): 1.0} for name in self._maps[layer]]
        for name, parameter in module.named_parameters(remove_duplicate=False):
            if parameter.ndim > 1 or name.rpartition(".")[2] not in ("bias", "in_proj_bias"):
                owners = self._owners.setdefault(self._names[f"{layer}.{name}"], [])
                for one, other in zip(owners, forms, strict=False):
                    self.equations.equate(one, other)
                owners += forms

    def _of_flow(self, flow: Flow) -> list[Form]:
        """The degrees of a tensor, by the function that made it."""
        if flow.step is None:
            return [NONE]
        function, args, kwargs = flow.step.function, flow.step.args, flow.step.kwargs
        if isinstance(function, str):
            return self._of_layer(function, args, flow, **kwargs)
        name = name_of(function)
        first = self._parts[args[0].place] if args and isinstance(args[0], Flow) else []
        if name in CONCATENATIONS and _dimension(*args, **kwargs) in (1, 1 - len(flow.shape)):
            tensors = [a for a in tree_leaves(args[0]) if isinstance(a, Flow | Constant)]
            parts = [form for tensor in tensors for form in self._each(tensor)]
            return parts[:1] if all(part == parts[0] for part in parts) else parts
        if len(first) > 1 and name in OF_EACH_CHANNEL and args[0].place not in self._labels:
            return first
        if len(first) > 1 and name in MOVES | {"contiguous", "clone"} and flow.move is not None:
            return self._moved(flow, args[0])
        return [self._degree(flow, function, name, args, kwargs)]

    def _moved(self, flow: Flow, source: Flow) -> list[Form]:
        """Of entries of stacked maps, that were moved, the degrees of those that are there."""
        if source.place not in self._labels:
            return [self._of(source)]
        parts, labels = self._parts[source.place], flow.move(self._labels[source.place])
        there = [int(label) for label in labels.unique() if label]
        if len(there) == 1:
            return [parts[there[0] - 1]]
        self._labels[flow.place] = labels
        return parts

    def _degree(self, flow: Flow, function, name: str, args, kwargs) -> Form:
        if function in CONVOLUTIONS or function is F.linear:
            given = dict(zip(("input", "weight", "bias"), args, strict=False)) | kwargs
            product = plus(self._of(given["input"]), self._of(given["weight"]))
            bias = given.get("bias")
            return product if bias is None else self._same([product, self._of(bias, added=True)])
        if function in NORMS:
            return self._of_norm(function, args, kwargs)
        if function is F.scaled_dot_product_attention:
            given = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
            query, key, value = (self._of(given[name]) for name in ("query", "key", "value"))
            self.equations.vanish(plus(query, key))
            return value
        if name in SUMS:
            terms = [a for k, a in (*enumerate(args), *kwargs.items()) if k != "alpha"]
            return self._same([self._of(term, added=True) for term in terms])
        leaves = [a for a in tree_leaves((args, kwargs)) if isinstance(a, Flow | Constant)]
        if name in BILINEAR:
            return plus(*map(self._of, leaves))
        if name in QUOTIENTS and len(args) == 2 and not kwargs:
            return plus(self._of(args[0]), self._of(args[1]), factor=-1)
        if name in SHAPED_LIKE:
            return self._of(args[0])
        if name in HOMOGENEOUS and not (name == "pad" and fills(*args, **kwargs)):
            return self._same([self._of(leaf, added=True) for leaf in leaves])
        for leaf in leaves:
            self.equations.vanish(self._of(leaf))
        return NONE

    def _each(self, tensor: Flow | Constant) -> list[Form]:
        """The degrees of a tensor's channels, where these are not stacked maps."""
        is_by_channel = isinstance(tensor, Flow) and tensor.place not in self._labels
        return self._parts[tensor.place] if is_by_channel else [self._of(tensor, added=True)]

    def _of(self, argument: Flow | Constant | float | None, *, added: bool = False) -> Form:
        """The degree of an argument of a function, which all of it has.

        Args:
            argument: a number has none.
            added: a parameter may follow what it is added to; else it stays as it is.
        """
        if isinstance(argument, Flow):
            return self._same(self._parts[argument.place])
        if not isinstance(argument, Constant):
            return NONE
        names = [self._names[name] for name in argument.names if name in self._names]
        followed = [{("added", name): 1.0} for name in names]
        for form in (form for name in names for form in self._owners.get(name, ())):
            self.equations.vanish(form)
        if added and argument.is_moved and len(names) == len(argument.names) and names:
            return self._same(followed)
        for form in followed:
            self.equations.vanish(form)
        return NONE

    def _same(self, degrees: Sequence[Form]) -> Form:
        """The degree that all have."""
        for degree in degrees[1:]:
            self.equations.equate(degrees[0], degree)
        return degrees[0] if degrees else NONE

    def _of_layer(
        self, name: str, fed: Sequence[Flow | None], flow: Flow, bias: Constant | None = None
    ) -> list[Form]:
        """The degrees of what a layer's maps give.

        Args:
            name: of the layer.
            fed: to it.
            flow: what it gave.
            bias: that was handed to a function with its weight.
        """
        layer = self._dataflow.layers[name]
        maps = [m for m in self._maps[name] if _has_scale(m, layer)]
        for unscaled in set(self._maps[name]) - set(maps):
            self.equations.vanish({("map", unscaled): 1.0})
        degree = self._same([self._of(each) for each in fed])
        layer = getattr(layer, "base_layer", layer)
        own = f"{name}.bias"
        if isinstance(layer, nn.MultiheadAttention):
            self.equations.vanish(degree)
            layer, own = layer.out_proj, f"{name}.out_proj.bias"
        parts = [plus(degree, {("map", each): 1.0}) for each in maps] or [degree]
        if bias is not None:
            self._same([self._of(bias, added=True), *parts])
        elif getattr(layer, "bias", None) is not None:
            own = self._names.get(own, own)
            for place, part in enumerate(parts):
                follows = ("added", own) if len(parts) == 1 else ("added", own, str(place))
                self.equations.equate({follows: 1.0}, part)
        if len(parts) > 1:
            width, device = flow.shape[-1], "cpu" if flow.device.type == "meta" else flow.device
            labels = torch.arange(width, device=device) // (width // len(parts)) + 1
            self._labels[flow.place] = labels.expand(flow.shape)
        return parts

    def _of_norm(self, function, args, kwargs) -> Form:
        given = inspect.signature(function).bind(*args, **kwargs)
        given.apply_defaults()
        given = given.arguments
        for gain in ("weight", "bias"):
            self.equations.vanish(self._of(given.get(gain)))
        by_channel = function in (F.batch_norm, F.instance_norm)
        parts = self._each(given["input"]) if by_channel else [self._of(given["input"])]
        variance = given.get("running_var")
        if isinstance(variance, Constant) and not given.get(
            "training", given.get("use_input_stats")
        ):
            name = "".join(variance.names[:1]).rpartition(".")[0]
            norm = self._network.get_submodule(name)
            is_batch_norm = isinstance(norm, nn.modules.batchnorm._NormBase)
            for part in parts:  # of a frozen norm, of a class of its own, always
                self.equations.vanish(part, while_fixed=norm if is_batch_norm else None)
        return NONE


def _has_scale(name: str, module: nn.Module) -> bool:
    """Whether a map is multiplied by what its weight, or its gain, is multiplied by, and its
    module's output with it.
    """
    if type(module).__name__ in STANDARDISED_CONVOLUTIONS and not hasattr(module, "gain"):
        return False
    return not isinstance(module, nn.MultiheadAttention) or name.endswith(".out_proj")


def _dimension(tensors: Any, dim: int = 0, **options: Any) -> int:
    """Along which these arguments have tensors concatenated."""
    return options.get("axis", dim)
