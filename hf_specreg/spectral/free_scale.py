"""Which linear maps have a free scale: W -> c W, c > 0, with its bias, changes nothing.

While a network trains, a map's output times c becomes, of what is computed from it, c^n times what
it was, where all functions on the way are homogeneous: the degree n is 1 at the map's output, stays
what it is through what is linear or positively homogeneous (moves, sums of equal degrees, ReLU,
pooling, maps without bias), adds up in products, and is 0 after a norm by statistics of the images
that it is given (but for its eps): batch, layer, group, instance and RMS norms. The scale of W is
free if the degree is 0 wherever anything else is done, and in what the network returns. Then the
sum of sigma^2 falls with c and the function stays (van Laarhoven 2017, arXiv:1706.05350).

Of channels that are concatenated each has the degree of the tensor that it is from, up to a batch
or instance norm, which takes each by itself (DenseNet).

What is found is free, but not all that is free is found. Not seen are: norms that none of torch's
functions computes; a bias, or another tensor, that is added before the norm and taken out by it;
what is changed in place through a view; q or k alone, where one matrix stacks q, k and v; networks
that run code that cannot be followed (`dataflow.py`). A gain that could take over the scale of the
map beside it (layer scale, a norm's before the map) is a parameter of its own, and frees nothing
here.
"""

import heapq
import inspect
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_leaves

from hf_specreg.encoders.features import FeatureSpace
from hf_specreg.encoders.trace import FAILURES
from hf_specreg.spectral.dataflow import Dataflow, follow
from hf_specreg.spectral.flow import (
    CONVOLUTIONS,
    IN_PLACE,
    MOVES,
    NORMS,
    PRODUCTS,
    QUOTIENTS,
    SHAPED_LIKE,
    Constant,
    Flow,
    fills,
    name_of,
)
from hf_specreg.spectral.layers import STANDARDISED_CONVOLUTIONS
from hf_specreg.spectral.sharding import check_whole

NAMED = 4  # layers in the warning
UNKNOWN = math.nan  # a degree that is none: equal to nothing, and so is what is reckoned with it
BY_CHANNEL = math.inf  # the degree is each channel's own
SUMS = frozenset(name for name in IN_PLACE if "add" in name or "sub" in name)
OF_EACH_CHANNEL = frozenset(
    {
        *("relu", "relu_", "leaky_relu", "leaky_relu_", "dropout", "neg", "abs", "interpolate"),
        *("max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "contiguous", "clone"),
        *("avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d"),
    }
)
CONCATENATIONS = frozenset({"cat", "concat", "concatenate"})
HOMOGENEOUS = (
    OF_EACH_CHANNEL | MOVES | IN_PLACE | CONCATENATIONS | {"mean", "sum", "amax", "amin", "stack"}
)
BILINEAR = PRODUCTS | {"matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "einsum"}


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
        self._found = _freed(space, modules) if at_once else None
        self._asked: set[bool] = set()

    @property
    def names(self) -> tuple[str, ...]:
        """Of these maps, as the network is now. A batch norm in evaluation mode, as those that are
        pinned always are, has fixed statistics and frees nothing.
        """
        if self._found is None:
            self._found = _freed(self._space, self._modules)
        norms = {norm for by in self._found.values() for norm in by}
        fixed = {norm for norm in norms if not norm.training}
        return tuple(name for name, by in self._found.items() if not by & fixed)

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
            f"a norm after them makes the scale free of {len(names)} of the {len(self._modules)} "
            "maps that are penalised: the sum of sigma^2 can fall while the function stays as it "
            f"is ({', '.join(names[:NAMED])}{more}). Penalise the derivative instead, by "
            "InputGradientPenalty or without labels SensitivityPenalty, or take an encoder without "
            "norms; batch norms can be folded in by fold_norm=True, or pinned",
            stacklevel=4,  # past torch.compiler.disable
        )


def _freed(
    space: FeatureSpace, modules: Mapping[str, nn.Module]
) -> dict[str, frozenset[nn.Module]]:
    """The maps with a free scale by name, and the batch norms that make it so; none of a network
    that cannot be followed, as one whose weights are sharded.
    """
    dotted = {module: name for name, module in space.network.named_modules()}
    layers = {dotted[module]: module for module in modules.values()}
    try:
        check_whole(space.network)
        dataflow = follow(space, layers)
    except FAILURES:  # of the network's own code, on one image in evaluation mode
        return {}
    if not dataflow.is_whole:
        return {}
    by = {name: _Scaling(space.network, dataflow, name).by for name in layers}
    found = {
        name: by[dotted[module]] for name, module in modules.items() if _has_scale(name, module)
    }
    return {name: norms for name, norms in found.items() if norms is not None}


def _has_scale(name: str, module: nn.Module) -> bool:
    """Whether a map is multiplied by what its weight, or its gain, is multiplied by, and its
    module's output with it.
    """
    if type(module).__name__ in STANDARDISED_CONVOLUTIONS and not hasattr(module, "gain"):
        return False
    return not isinstance(module, nn.MultiheadAttention) or name.endswith(".out_proj")


class _Scaling:
    """What becomes of a network's tensors when the weight and bias of one layer are multiplied.

    Attributes:
        by: the batch norms that undo it; None where something does not.
    """

    def __init__(self, network: nn.Module, dataflow: Dataflow, name: str):
        self._network, self._dataflow, self._name = network, dataflow, name
        own = {id(p) for p in dataflow.layers[name].parameters()}
        named = network.named_parameters(remove_duplicate=False)
        self._own = {n for n, parameter in named if id(parameter) in own}
        self._norms: set[nn.Module] = set()
        self._degrees: dict[int, float] = {}  # by place; 0 where there is none
        self.by = frozenset(self._norms) if self._is_undone() else None

    def _is_undone(self) -> bool:
        """Go through all that is made of the layer's output, in order, until the degree is 0."""
        pending = [call.output.place for call in self._dataflow.calls[self._name]]
        if not pending:
            return False
        heapq.heapify(pending)
        while pending:
            flow = self._dataflow.flows[heapq.heappop(pending)]
            if flow.place in self._degrees:
                continue
            degree = self._degree(flow)
            if math.isnan(degree):
                return False
            self._degrees[flow.place] = degree
            if degree:
                for use in flow.uses:
                    heapq.heappush(pending, use.place)
        return True

    def _of(self, argument: Flow | Constant | float | None) -> float:
        """The degree of an argument of a function."""
        if isinstance(argument, Flow):
            return self._degrees.get(argument.place, 0)
        own = isinstance(argument, Constant) and not self._own.isdisjoint(argument.names)
        return UNKNOWN if own else 0

    def _degree(self, flow: Flow) -> float:
        """The degree of a tensor, by the function that made it; those of what is made before are
        known.
        """
        if flow.step is None:  # what the network returns, or has not been seen
            return UNKNOWN
        function, args, kwargs = flow.step.function, flow.step.args, flow.step.kwargs
        name = name_of(function)
        leaves = [a for a in tree_leaves((args, kwargs)) if isinstance(a, Flow | Constant)]
        degrees = [self._of(leaf) for leaf in leaves]
        channels = 1, 1 - len(flow.shape)
        together = name in CONCATENATIONS and _dimension(*args, **kwargs) in channels
        if BY_CHANNEL in degrees and not (
            together or name in OF_EACH_CHANNEL or function in (F.batch_norm, F.instance_norm)
        ):
            return UNKNOWN
        if isinstance(function, str):
            return self._of_layer(function, args)
        if function in CONVOLUTIONS or function is F.linear:
            given = dict(zip(("input", "weight", "bias"), args, strict=False)) | kwargs
            product = self._of(given["input"]) + self._of(given["weight"])
            return product if given.get("bias") is None else _none([product])
        if function in NORMS:
            return self._of_norm(function, args, kwargs)
        if function is F.scaled_dot_product_attention:
            given = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
            query, key, value = (given[name] for name in ("query", "key", "value"))
            return self._of(value) + _none([self._of(query), self._of(key)])
        if together and len(set(degrees)) > 1 and not any(map(math.isnan, degrees)):
            return BY_CHANNEL
        if name in SUMS:
            terms = [a for k, a in (*enumerate(args), *kwargs.items()) if k != "alpha"]
            return _same([self._of(term) for term in terms])
        if name in BILINEAR:
            return sum(degrees)
        if name in QUOTIENTS and len(args) == 2 and not kwargs:
            return self._of(args[0]) - self._of(args[1])
        if name in SHAPED_LIKE:
            return self._of(args[0])
        if name in HOMOGENEOUS and not (name == "pad" and fills(*args, **kwargs)):
            return _same(degrees)
        return _none(degrees)

    def _of_layer(self, name: str, fed: tuple[Flow | None, ...]) -> float:
        layer = self._dataflow.layers[name]
        layer = getattr(layer, "base_layer", layer)
        degree = _same([self._of(flow) for flow in fed])
        if getattr(layer, "bias", None) is not None or isinstance(layer, nn.MultiheadAttention):
            degree = _none([degree])
        return degree + (name == self._name)

    def _of_norm(self, function, args, kwargs) -> float:
        given = inspect.signature(function).bind(*args, **kwargs)
        given.apply_defaults()
        given = given.arguments
        gains = [self._of(given.get(name)) for name in ("weight", "bias")]
        if self._of(given["input"]) == 0 or any(gains):
            return _none([self._of(given["input"]), *gains])
        variance = given.get("running_var")
        if isinstance(variance, Constant) and not given.get(
            "training", given.get("use_input_stats")
        ):
            name = "".join(variance.names[:1]).rpartition(".")[0]
            norm = self._network.get_submodule(name)
            if not isinstance(norm, nn.modules.batchnorm._NormBase):
                return UNKNOWN  # a frozen one, of a class of its own
            self._norms.add(norm)
        return 0


def _dimension(tensors: Any, dim: int = 0, **options: Any) -> int:
    """Along which these arguments have tensors concatenated."""
    return options.get("axis", dim)


def _same(degrees: Sequence[float]) -> float:
    """The degree that all have."""
    return degrees[0] if all(degree == degrees[0] for degree in degrees) else UNKNOWN


def _none(degrees: Sequence[float]) -> float:
    """0 if all are."""
    return UNKNOWN if any(degrees) else 0
