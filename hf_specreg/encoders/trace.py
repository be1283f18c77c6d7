"""Which layers stand before the feature space, in forward order, and what shape each is fed.

A layer stands before the features when its input depends on the image and the features depend on
its output. Both are read off one forward pass on meta tensors, which have shapes and a graph but no
values: no compute is spent, and neither parameters nor batch-norm statistics are touched. A network
that cannot run without values (it branches on them, or holds tensors that are no buffers) is run
once on copies of its buffers and two images of noise.
"""

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import checkpoint
from torch.utils._pytree import tree_leaves, tree_map_only

from hf_specreg.encoders.head import fed_to, headless_output
from hf_specreg.encoders.modules import computes_weight, examined, leaf
from hf_specreg.encoders.stand_ins import on_meta, with_values

LINEAR_FUNCTIONS = frozenset(
    {
        *(getattr(nn.functional, f"conv{d}d") for d in (1, 2, 3)),
        *(getattr(nn.functional, f"conv_transpose{d}d") for d in (1, 2, 3)),
        *(nn.functional.linear, nn.functional.bilinear, torch.conv_tbc),
        *(nn.functional.multi_head_attention_forward, nn.functional.scaled_dot_product_attention),
        *(torch.matmul, torch.mm, torch.bmm, torch.mv, torch.einsum, torch.tensordot, torch.inner),
        *(torch.addmm, torch.addmv, torch.addbmm, torch.baddbmm, torch.chain_matmul),
        *(torch.linalg.matmul, torch.linalg.multi_dot, torch.linalg.vecdot),
        *(Tensor.matmul, Tensor.__matmul__, Tensor.__rmatmul__, Tensor.mm, Tensor.bmm, Tensor.mv),
        *(Tensor.inner, Tensor.addmm, Tensor.addmv, Tensor.addbmm, Tensor.baddbmm),
    }
)
# Those whose second argument is a weight, whatever it is made of, where the first is of the image.
BY_A_WEIGHT = frozenset(
    {
        *(nn.functional.linear, nn.functional.conv1d, nn.functional.conv2d, nn.functional.conv3d),
        *(torch.matmul, torch.mm, Tensor.matmul, Tensor.__matmul__, Tensor.mm),
    }
)
FAILURES = (RuntimeError, TypeError, ValueError, AssertionError, IndexError, AttributeError)


@dataclass(frozen=True)
class Layer:
    """A module with weights that the image passes through on its way.

    Attributes:
        name: dotted name in the model.
        module: the module.
        input_shapes: what it is fed, without the batch: once for each shape, in order of use.
        parent: qualified class name of the module that holds it.
        used_directly: names of its parameters that a matrix product or a convolution was given.
        used_derived: names of those that it was given a view or an elementwise function of.
        used_reshaped: names of vectors that it was given as a matrix.
    """

    name: str
    module: nn.Module
    input_shapes: tuple[tuple[int, ...], ...]
    parent: str
    used_directly: tuple[str, ...]
    used_derived: tuple[str, ...] = ()
    used_reshaped: tuple[str, ...] = ()

    @property
    def input_shape(self) -> tuple[int, ...]:
        """What it is fed at its first use."""
        return self.input_shapes[0]


@torch.inference_mode(False)
def trace_layers(
    network: nn.Module,
    *,
    head: Sequence[str],
    input_size: tuple[int, int, int],
    example_inputs: Tensor | Sequence[Any] | Mapping[str, Any] | None = None,
    up_to_head: bool = True,
) -> list[Layer]:
    """Return the modules with weights between the image and the features, in forward order.

    Args:
        network: the model, unwrapped.
        head: dotted names of the head's modules; empty for a model without one.
        input_size: (C, H, W) of the images.
        example_inputs: run the network on these instead, see `FeatureSpace.of`.
        up_to_head: stop at what the head is fed (the features); else go on to the logits.

    Raises:
        RuntimeError: the network cannot be run, or its head is not called.
    """
    reasons = []
    if example_inputs is None:
        try:
            images = torch.empty(2, *input_size, device="meta")
            with torch.device("meta"):
                return _Trace(network, head, up_to_head).run(on_meta(network), images)
        except FAILURES as error:
            reasons.append(f"without values: {error}")
    try:
        copies = with_values(network)
        if example_inputs is None:
            like = next(iter(copies.values()), torch.empty(0))
            noise = torch.rand(2, *input_size, generator=torch.Generator().manual_seed(0))
            example_inputs = noise.to(like.device)
        inputs = tree_map_only(Tensor, torch.Tensor.detach, example_inputs)
        return _Trace(network, head, up_to_head).run(copies, inputs)
    except FAILURES as error:
        reasons.append(f"with values: {error}")
        raise RuntimeError(
            f"{type(network).__name__} does not run on images of {tuple(input_size)} "
            f"({'; '.join(reasons)}); if that is not its input size, pass input_size=(channels, "
            "height, width), and if it takes more than images, FeatureSpace.of(model, "
            "example_inputs=...)"
        ) from error


class _Trace(nn.Module):
    """One forward pass of a network, and which of its layers lie between image and features.

    It is a module that holds the network, so that also the pass back over the graph sees the same
    tensors in place of the parameters: checkpointed parts are run again then.
    """

    def __init__(self, network: nn.Module, head: Sequence[str], up_to_head: bool):
        super().__init__()
        self.network = network
        self.head = head
        self.up_to_head = up_to_head
        self.recorder = _Recorder(network)

    def run(self, tensors: Mapping[str, Tensor], inputs: Any) -> list[Layer]:
        """Run the network with other tensors in place of its parameters and buffers."""
        inputs = tree_map_only(Tensor, leaf, inputs)
        self.recorder.watch(tensors)
        held = {f"network.{name}": tensor for name, tensor in tensors.items()}
        with contextlib.ExitStack() as stack:
            stack.enter_context(examined(self.network))
            stack.enter_context(torch.enable_grad())
            stack.enter_context(_one_pass())
            for hook in self.recorder.hooks():
                stack.callback(hook.remove)
            # Not by tied names: what has two names would be put back as it was after the first.
            reaching = torch.func.functional_call(self, held, (inputs,), tie_weights=False)
        return self.recorder.layers(reaching)

    def forward(self, inputs: Any) -> set[str]:
        """Return the names of the layers that the features depend on."""
        with self.recorder, fed_to(self.head, self.network) as fed:
            output = call(self.network, inputs)
        if not self.up_to_head:
            targets = tree_leaves(dict(output) if hasattr(output, "keys") else output)
        else:
            targets = fed if self.head else [headless_output(output)]
        return _reaching(self.recorder.outputs, targets)


class _Recorder(TorchFunctionMode):
    """Notes, in the order of use, what each module with weights is fed and gives back.

    Some models never call the module that holds a weight, but hand the weight to a function, or
    what they make of it without the image: its transpose, a multiple. So functions that are handed
    such a tensor are noted as well.
    """

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network
        self.inputs: dict[str, dict[tuple[int, ...], None]] = {}
        self.running: list[str] = []  # the modules that were fed the image, and are not done
        self.outputs: dict[str, list[Tensor]] = {}
        self.direct: dict[str, set[str]] = {}
        self.derived: dict[str, set[str]] = {}
        self.reshaped: dict[str, set[str]] = {}
        self.parameters: dict[str, int] = {}
        # By id: a tensor, kept so that its id stays its own, and the parameters that it is made of.
        self.made_of: dict[int, tuple[Tensor, frozenset[str]]] = {}
        # Likewise, what products of parameters are made of: mostly tokens, and no weights.
        self.produced: dict[int, tuple[Tensor, frozenset[str]]] = {}

    def watch(self, tensors: Mapping[str, Tensor]) -> None:
        """Say which tensors stand in the parameters' places."""
        for name, _ in self.network.named_parameters():
            self.parameters[name] = id(tensors[name])
            self.made_of[id(tensors[name])] = tensors[name], frozenset({name})

    def note(self, name: str, fed: Tensor | None, output=()) -> None:
        """Take note of one use, unless nothing that depends on the image is fed in. What a module
        makes of it before it multiplies, such as a padded image, is not what it is fed.
        """
        if fed is None:
            return
        if name not in self.running:
            self.inputs.setdefault(name, {})[tuple(fed.shape[1:])] = None
        made = [t for t in tree_leaves(output) if isinstance(t, Tensor) and t.requires_grad]
        self.outputs.setdefault(name, []).extend(made)

    def hooks(self) -> Iterator:
        """Put a hook on every module that has parameters of its own, or computes its weight from
        others'.
        """
        for name, module in self.network.named_modules():
            if dict(module.named_parameters(recurse=False)) or computes_weight(module):
                before, after = self._note_module(name)
                yield module.register_forward_pre_hook(before, with_kwargs=True)
                yield module.register_forward_hook(after, with_kwargs=True)

    def _note_module(self, name: str):
        def before(module, args, kwargs):  # for the order of use
            if (fed := _image_dependent((args, kwargs))) is not None:
                self.note(name, fed)
                self.running.append(name)

        def after(module, args, kwargs, output):
            if (fed := _image_dependent((args, kwargs))) is not None:
                self.running.remove(name)
                self.note(name, fed, output)

        return before, after

    def __torch_function__(self, func, types, args=(), kwargs=None):
        """Run the function; note it where it multiplies the image by a parameter."""
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if any(id(t) in self.made_of or id(t) in self.produced for t in tensors):
            fed = _image_dependent(tensors)
            if fed is None:
                self._note_making(func, tensors, output)
            elif func in LINEAR_FUNCTIONS:
                adds = func is nn.functional.scaled_dot_product_attention  # a mask, if any
                for tensor in args[:3] if adds else tensors:
                    self._note_use(tensor, fed, output)
                weight = _weight(func, args, kwargs)
                for name in sorted(_names_of(self.produced, weight)):  # of a hypernetwork
                    self._note_parameter(self.derived, name, fed, output)
        return output

    def _note_making(self, func, tensors: Sequence[Tensor], output) -> None:
        """Note what parameters a function's output is made of, without the image."""
        owned = [_names_of(self.made_of, t) for t in tensors if id(t) in self.made_of]
        produced = [_names_of(self.produced, t) for t in tensors if id(t) in self.produced]
        names = frozenset().union(*owned)
        # A product of coordinates, or of a learned token by another module's weight, is no weight.
        activations = len(owned) < len(tensors) or len(_holders(names)) > 1
        is_product = bool(produced) or (func in LINEAR_FUNCTIONS and activations)
        kept = self.produced if is_product else self.made_of
        for made in tree_leaves(output):
            if isinstance(made, Tensor) and id(made) not in self.made_of:
                kept[id(made)] = made, names.union(*produced)

    def _note_use(self, tensor: Tensor, fed: Tensor, output) -> None:
        """Note the parameters that a tensor is made of, which the image is multiplied by."""
        for name in sorted(_names_of(self.made_of, tensor)):
            parameter = self.made_of[self.parameters[name]][0]
            if parameter is tensor:
                uses = self.direct
            elif parameter.ndim == 1 and tensor.ndim > 1 and tensor.numel() == parameter.numel():
                uses = self.reshaped
            else:
                uses = self.derived
            self._note_parameter(uses, name, fed, output)

    def _note_parameter(self, uses: dict[str, set[str]], name: str, fed: Tensor, output) -> None:
        module, _, parameter = name.rpartition(".")
        uses.setdefault(module, set()).add(parameter)
        self.note(module, fed, output)

    def layers(self, reaching: set[str]) -> list[Layer]:
        """The noted modules among those named, in order of first use."""
        modules = dict(self.network.named_modules())
        found = []
        for name, shapes in self.inputs.items():
            if name in reaching:
                parent = type(modules[name.rpartition(".")[0]])
                kind = f"{parent.__module__}.{parent.__qualname__}"
                uses = (self.direct, self.derived, self.reshaped)
                used = (tuple(sorted(of.get(name, ()))) for of in uses)
                found.append(Layer(name, modules[name], tuple(shapes), kind, *used))
        return found


def call(model: nn.Module, inputs: Any) -> Any:
    """Run a model on a tensor, a sequence of positional or a mapping of keyword arguments."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(inputs) if isinstance(inputs, Tensor) else model(*inputs)


def _weight(function, args: tuple, kwargs: Mapping[str, Any]) -> Tensor | None:
    """What a function multiplies the image by: of a product, a matrix that is the same for all."""
    if function not in BY_A_WEIGHT or not args or _image_dependent(args[:1]) is None:
        return None
    weight = args[1] if len(args) > 1 else kwargs.get("weight")
    is_function = function.__name__ not in ("matmul", "__matmul__", "mm")
    return weight if is_function or (isinstance(weight, Tensor) and weight.ndim == 2) else None


def _names_of(
    kept: Mapping[int, tuple[Tensor, frozenset[str]]], tensor: Tensor | None
) -> frozenset[str]:
    """The parameters that a tensor is made of, as noted by id."""
    return kept[id(tensor)][1] if id(tensor) in kept else frozenset()


def _holders(names: Iterable[str]) -> set[str]:
    """The modules that parameters are of."""
    return {name.rpartition(".")[0] for name in names}


def _image_dependent(arguments: Any) -> Tensor | None:
    """The first tensor among the arguments that depends on the image; only those carry a graph."""
    leaves = (t for t in tree_leaves(arguments) if isinstance(t, Tensor) and t.requires_grad)
    return next(leaves, None)


def _reaching(outputs: dict[str, list[Tensor]], targets: list) -> set[str]:
    """The names of those outputs that the targets depend on."""
    targets = [t for t in targets if isinstance(t, Tensor) and t.requires_grad]
    named = [(name, tensor) for name, tensors in outputs.items() for tensor in tensors]
    if not targets or not named:
        return set()
    ones = [torch.ones_like(t) for t in targets]
    gradients = torch.autograd.grad(targets, [t for _, t in named], ones, allow_unused=True)
    return {name for (name, _), g in zip(named, gradients, strict=True) if g is not None}


@contextlib.contextmanager
def _one_pass() -> Iterator[None]:
    """Have reentrant checkpointing run its function as it is: it would hide the graph inside."""
    original = checkpoint.CheckpointFunction
    checkpoint.CheckpointFunction = _AsItIs
    try:
        yield
    finally:
        checkpoint.CheckpointFunction = original


class _AsItIs:
    @staticmethod
    def apply(function, preserve_rng_state, *args):
        return function(*args)
