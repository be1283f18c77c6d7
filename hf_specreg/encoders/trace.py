"""Which layers stand before the feature space, in forward order, and what shape each is fed.

A layer stands before the features when its input depends on the image and the features depend on
its output. Both are read off one forward pass on meta tensors, which have shapes and a graph but no
values: no compute is spent, and neither parameters nor batch-norm statistics are touched.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from hf_specreg.encoders.features import evaluating, headless_output

LINEAR_FUNCTIONS = frozenset(
    {
        *(getattr(nn.functional, f"conv{d}d") for d in (1, 2, 3)),
        *(getattr(nn.functional, f"conv_transpose{d}d") for d in (1, 2, 3)),
        *(nn.functional.linear, nn.functional.bilinear),
        nn.functional.multi_head_attention_forward,
        *(torch.matmul, torch.mm, torch.bmm, torch.einsum, torch.addmm, torch.baddbmm),
        *(Tensor.matmul, Tensor.__matmul__, Tensor.__rmatmul__, Tensor.mm, Tensor.bmm),
    }
)


@dataclass(frozen=True)
class Layer:
    """A module with weights that the image passes through on its way.

    Attributes:
        name: dotted name in the model.
        module: the module.
        input_shape: what it is fed, without the batch.
        parent: qualified class name of the module that holds it.
        used_directly: names of its parameters that a matrix product or a convolution was given.
    """

    name: str
    module: nn.Module
    input_shape: tuple[int, ...]
    parent: str
    used_directly: tuple[str, ...]


def trace_layers(
    model: nn.Module,
    *,
    head: Sequence[str],
    input_size: tuple[int, int, int],
    up_to_head: bool = True,
) -> list[Layer]:
    """Return the modules with weights between the image and the features, in forward order.

    Args:
        model: the network, unwrapped.
        head: dotted names of the head's modules; empty for a model without one.
        input_size: (C, H, W) of the images.
        up_to_head: stop at what the head is fed (the features); else go on to the logits.

    Raises:
        RuntimeError: the model cannot run on meta tensors, or its head is not called.
    """
    recorder = _Recorder(model)
    head_inputs: list[Tensor] = []
    meta = _on_meta(model)
    recorder.owners = {id(meta[n]): n for n, _ in model.named_parameters()}
    with contextlib.ExitStack() as stack:
        stack.enter_context(evaluating(model))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.device("meta"))
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(_not_checkpointed(model))
        for hook in recorder.hooks():
            stack.callback(hook.remove)
        for name in head:
            module = model.get_submodule(name)
            hook = module.register_forward_pre_hook(lambda _, args: head_inputs.append(args[0]))
            stack.callback(hook.remove)
        stack.enter_context(recorder)
        images = torch.empty(2, *input_size, device="meta", requires_grad=True)
        try:
            # Not by tied names: what has two names would be put back as it was after the first.
            output = torch.func.functional_call(model, meta, (images,), tie_weights=False)
        except (RuntimeError, TypeError, ValueError, AssertionError, IndexError) as error:
            raise RuntimeError(
                f"{type(model).__name__} does not run on meta tensors of shape "
                f"{tuple(images.shape)} ({error}); "
                "if that is not its input size, pass input_size=(channels, height, width)"
            ) from error
    if head and len(head_inputs) < len(head):
        raise RuntimeError(
            f"the head {tuple(head)} is not called when {type(model).__name__} is run"
        )
    if not up_to_head:
        targets = tree_leaves(dict(output) if hasattr(output, "keys") else output)
    else:
        targets = head_inputs if head else [headless_output(output)]
    return recorder.layers(_reaching(recorder.outputs, targets))


class _Recorder(TorchFunctionMode):
    """Notes, in the order of use, what each module with weights is fed and gives back.

    Some models never call the module that holds a weight, but hand the weight to a function; so
    functions that are handed a parameter are noted as well.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.owners: dict[int, str] = {}
        self.inputs: dict[str, tuple[int, ...]] = {}
        self.outputs: dict[str, list[Tensor]] = {}
        self.direct: dict[str, set[str]] = {}

    def note(self, name: str, fed: Tensor | None, output=()) -> None:
        """Take note of one use, unless nothing that depends on the image is fed in."""
        if fed is None:
            return
        self.inputs.setdefault(name, tuple(fed.shape[1:]))
        made = [t for t in tree_leaves(output) if isinstance(t, Tensor) and t.requires_grad]
        self.outputs.setdefault(name, []).extend(made)

    def hooks(self) -> Iterator:
        """Put a hook on every module that has parameters of its own, or computes its weight from
        others'.
        """
        for name, module in self.model.named_modules():
            if dict(module.named_parameters(recurse=False)) or computes_weight(module):
                hook = self._note_module(name)  # before as well, for the order of use
                yield module.register_forward_pre_hook(hook, with_kwargs=True)
                yield module.register_forward_hook(hook, with_kwargs=True)

    def _note_module(self, name: str):
        def hook(module, args, kwargs, output=()):
            self.note(name, _image_dependent((args, kwargs)), output)

        return hook

    def __torch_function__(self, func, types, args=(), kwargs=None):
        """Run the function; note it where it multiplies by a parameter."""
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if func in LINEAR_FUNCTIONS:
            fed = _image_dependent((args, kwargs))
            for leaf in tree_leaves((args, kwargs)):
                if fed is not None and id(leaf) in self.owners:
                    name, _, parameter = self.owners[id(leaf)].rpartition(".")
                    self.direct.setdefault(name, set()).add(parameter)
                    self.note(name, fed, output)
        return output

    def layers(self, reaching: set[str]) -> list[Layer]:
        """The noted modules among those named, in order of first use."""
        modules = dict(self.model.named_modules())
        found = []
        for name, shape in self.inputs.items():
            if name in reaching:
                parent = type(modules[name.rpartition(".")[0]])
                qualified = f"{parent.__module__}.{parent.__qualname__}"
                direct = tuple(sorted(self.direct.get(name, ())))
                found.append(Layer(name, modules[name], shape, qualified, direct))
        return found


def _image_dependent(arguments) -> Tensor | None:
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


def _on_meta(model: nn.Module) -> dict[str, Tensor]:
    """The shape of every parameter and buffer on the meta device, each once, by the first of the
    module's names; floating point in the default dtype, as the image is, and without a graph. One
    tensor in two modules is one.
    """
    default, shapes, found = torch.get_default_dtype(), {}, {}
    for prefix, module in model.named_modules():
        own = {**dict(module._parameters), **dict(module._buffers)}
        for name, tensor in own.items():
            if tensor is None:
                continue
            if id(tensor) not in shapes:
                dtype = default if tensor.is_floating_point() else tensor.dtype
                shapes[id(tensor)] = torch.empty_like(
                    tensor, device="meta", dtype=dtype, requires_grad=False
                )
            found[f"{prefix}.{name}" if prefix else name] = shapes[id(tensor)]
    return found


@contextlib.contextmanager
def _not_checkpointed(model: nn.Module) -> Iterator[None]:
    """Switch off timm's gradient checkpointing, which would run layers again, outside the trace."""
    switched = [m for m in model.modules() if getattr(m, "grad_checkpointing", False) is True]
    for module in switched:
        module.grad_checkpointing = False
    try:
        yield
    finally:
        for module in switched:
            module.grad_checkpointing = True


def computes_weight(module: nn.Module) -> bool:
    """Whether a module's weight is computed from parameters of its children: parametrizations, and
    the layers that peft wraps.
    """
    return hasattr(module, "parametrizations") or is_adapted(module)


def is_adapted(module: nn.Module, by: str = "BaseTunerLayer") -> bool:
    """Whether it is a layer that peft wraps, by the name of peft's class."""
    return any(base.__name__ == by for base in type(module).__mro__)
