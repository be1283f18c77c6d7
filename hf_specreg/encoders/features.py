"""Where the feature space is: the head of a classifier, what it is fed, and the layers before it.

A classifier is F(x) = W Phi(x) + b. Its features Phi(x) are, here, exactly the tensor that the head is fed. The
head is found for timm models (by their configuration) and for transformers models (what stands beside the
base model); of any other module the user names it.

A layer stands before the features when its input depends on the image and the features depend on its output.
Both are read off one forward pass on meta tensors, which have shapes and a graph but no values: no compute is
spent, and neither parameters nor batch-norm statistics are touched.
"""

import contextlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

LINEAR_FUNCTIONS = frozenset(
    {
        *(getattr(nn.functional, f"conv{d}d") for d in (1, 2, 3)),
        *(getattr(nn.functional, f"conv_transpose{d}d") for d in (1, 2, 3)),
        *(nn.functional.linear, nn.functional.bilinear),
        *(torch.matmul, torch.mm, torch.bmm, torch.einsum, torch.addmm, torch.baddbmm),
        *(Tensor.matmul, Tensor.__matmul__, Tensor.__rmatmul__, Tensor.mm, Tensor.bmm),
    }
)
HEAD_NAMES = re.compile(r"classifier|head|score|^fc$")


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


def unwrap(model: nn.Module) -> nn.Module:
    """Return the network inside DistributedDataParallel, torch.compile and SpecRegModel."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif isinstance(getattr(model, "network", None), nn.Module) and hasattr(model, "pixel_mean"):
            model = model.network
        else:
            return model


def find_head(model: nn.Module) -> tuple[str, ...]:
    """Return the dotted names of the head's modules; empty for a model without one, which is all encoder.

    Raises:
        ValueError: neither a timm nor a transformers model; the message lists candidates.
    """
    cfg = getattr(model, "pretrained_cfg", None)
    if cfg is not None and hasattr(model, "get_classifier"):
        names = cfg.get("classifier") or ()
        names = (names,) if isinstance(names, str) else tuple(names)
        return tuple(n for n in names if _has_weights(model, n))
    inner = getattr(model, "timm_model", None)
    if inner is not None:
        return tuple(f"timm_model.{n}" for n in find_head(inner))
    if hasattr(model, "base_model_prefix") and hasattr(model, "config"):
        base = model.base_model
        beside = [(n, m) for n, m in model.named_children() if m is not base and _has_matrix(m)]
        if base is model:
            beside = [(n, m) for n, m in beside if HEAD_NAMES.search(n)]
        return tuple(n for n, _ in beside)
    raise ValueError(
        f"cannot find the head of {type(model).__name__}, which is neither a timm nor a transformers model: pass "
        f"head=<dotted name>, or head=() if all of it is encoder; linear layers, last first: {_linear_names(model)}"
    )


def check_head(model: nn.Module, head: str | Sequence[str] | None) -> tuple[str, ...]:
    """Return the head's names, found where none are given.

    Raises:
        ValueError: a name that the model has not.
    """
    if head is None:
        return find_head(model)
    names = (head,) if isinstance(head, str) else tuple(head)
    modules = dict(model.named_modules())
    for name in names:
        if name not in modules or not name:
            raise ValueError(
                f"head {name!r} is no module of {type(model).__name__}; linear layers, last first: {_linear_names(model)}"
            )
    return names


def find_input_size(model: nn.Module) -> tuple[int, int, int]:
    """Return (channels, height, width) of the images that a timm or transformers model is made for.

    Raises:
        ValueError: the model does not say.
    """
    stated = getattr(model, "input_size", None)
    if isinstance(stated, tuple) and len(stated) == 3:
        return stated
    inner = getattr(model, "timm_model", None)
    if inner is not None:
        return find_input_size(inner)
    cfg = getattr(model, "pretrained_cfg", None)
    if cfg and cfg.get("input_size"):
        channels, *size = cfg["input_size"]
        first = getattr(_first_convolution(model, cfg.get("first_conv")), "in_channels", channels)
        channels = first if first < 16 else channels  # a stem that folds space into channels has more
        for owner in (getattr(model, "patch_embed", None), model):
            size = _pair(getattr(owner, "img_size", None)) or size
        return (channels, *size)
    config = getattr(model, "config", None)
    config = getattr(config, "vision_config", None) or config
    size = _pair(getattr(config, "image_size", None))
    channels = getattr(config, "num_channels", 3)
    if size:
        return (channels, *size)
    if hasattr(model, "base_model_prefix"):  # convolutional transformers models leave the size open
        return (channels, 224, 224)
    raise ValueError(f"{type(model).__name__} does not say its input size: pass input_size=(channels, height, width)")


def extract_features(network: nn.Module, images: Tensor, *, head: Sequence[str]) -> Tensor:
    """Run the network and return what its head is fed.

    Args:
        network: the model, without pixel normalisation.
        images: [B, C, H, W], as the network expects them.
        head: dotted names of the head's modules; empty for a model without one.

    Returns:
        [B, D]. Several heads that are fed different vectors (distilled models): these, concatenated. A model
        without a head: its output, of transformers models `pooler_output` or else the first token.
    """
    fed: list[Tensor] = []
    with contextlib.ExitStack() as stack:
        for name in head:
            hook = network.get_submodule(name).register_forward_pre_hook(lambda _, args: fed.append(args[0]))
            stack.callback(hook.remove)
        output = network(images)
    if not head:
        return headless_output(output).flatten(1)
    distinct = [x for i, x in enumerate(fed) if not any(x is y for y in fed[:i])]
    return torch.cat([x.flatten(1) for x in distinct], dim=1)


def headless_output(output) -> Tensor:
    """Return the feature tensor in the output of a model without a head."""
    if isinstance(output, Tensor):
        return output
    pooled = getattr(output, "pooler_output", None)
    if pooled is not None:
        return pooled
    return output.last_hidden_state[:, 0]


def trace_layers(
    model: nn.Module, *, head: Sequence[str], input_size: tuple[int, int, int], up_to_head: bool = True
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
    meta = {n: _as_meta(t) for n, t in _tensors(model)}
    recorder.owners = {id(meta[n]): n for n, _ in model.named_parameters()}
    with contextlib.ExitStack() as stack:
        stack.enter_context(_evaluating(model))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.device("meta"))
        for hook in recorder.hooks():
            stack.callback(hook.remove)
        for name in head:
            module = model.get_submodule(name)
            hook = module.register_forward_pre_hook(lambda _, args: head_inputs.append(args[0]))
            stack.callback(hook.remove)
        stack.enter_context(recorder)
        images = torch.empty(2, *input_size, device="meta", requires_grad=True)
        try:
            output = torch.func.functional_call(model, meta, (images,))
        except (RuntimeError, TypeError, ValueError, AssertionError, IndexError) as error:
            raise RuntimeError(
                f"{type(model).__name__} does not run on meta tensors of shape {tuple(images.shape)} ({error}); "
                "if that is not its input size, pass input_size=(channels, height, width)"
            ) from error
    if head and len(head_inputs) < len(head):
        raise RuntimeError(f"the head {tuple(head)} is not called when {type(model).__name__} is run")
    if not up_to_head:
        targets = tree_leaves(dict(output) if hasattr(output, "keys") else output)
    else:
        targets = head_inputs if head else [headless_output(output)]
    return recorder.layers(_reaching(recorder.outputs, targets))


class _Recorder(TorchFunctionMode):
    """Notes, in the order of use, what each module with weights is fed and gives back.

    Some models never call the module that holds a weight, but hand the weight to a function; so functions that
    are handed a parameter are noted as well.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.owners: dict[int, str] = {}
        self.inputs: dict[str, tuple[int, ...]] = {}
        self.outputs: dict[str, list[Tensor]] = {}
        self.direct: dict[str, set[str]] = {}

    def note(self, name: str, fed: Tensor | None, output) -> None:
        """Take note of one use, unless nothing that depends on the image is fed in."""
        if fed is None:
            return
        self.inputs.setdefault(name, tuple(fed.shape[1:]))
        made = [t for t in tree_leaves(output) if isinstance(t, Tensor) and t.requires_grad]
        self.outputs.setdefault(name, []).extend(made)

    def hooks(self) -> Iterator:
        """Put a hook on every module that has parameters of its own, or computes its weight from others'."""
        for name, module in self.model.named_modules():
            if dict(module.named_parameters(recurse=False)) or _computes_weight(module):
                yield module.register_forward_pre_hook(self._reserve(name), with_kwargs=True)
                yield module.register_forward_hook(self._note_module(name), with_kwargs=True)

    def _reserve(self, name: str):
        def hook(module, args, kwargs):
            fed = _image_dependent((args, kwargs))
            if fed is not None:
                self.inputs.setdefault(name, tuple(fed.shape[1:]))

        return hook

    def _note_module(self, name: str):
        def hook(module, args, kwargs, output):
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


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield parameters and buffers by name; detached, so that only the image carries a graph."""
    for name, parameter in model.named_parameters():
        yield name, parameter.detach()
    yield from model.named_buffers()


def _as_meta(tensor: Tensor) -> Tensor:
    """The tensor's shape on the meta device; floating point in the default dtype, as the image is."""
    dtype = torch.get_default_dtype() if tensor.is_floating_point() else tensor.dtype
    return torch.empty_like(tensor, device="meta", dtype=dtype)


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Put every module in eval mode, and back to its own mode afterwards."""
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _computes_weight(module: nn.Module) -> bool:
    return hasattr(module, "parametrizations") or hasattr(module, "get_delta_weight")


def _has_weights(model: nn.Module, name: str) -> bool:
    module = dict(model.named_modules()).get(name)
    return module is not None and any(True for _ in module.parameters())


def _has_matrix(module: nn.Module) -> bool:
    return any(p.ndim >= 2 for p in module.parameters())


def _linear_names(model: nn.Module) -> list[str]:
    linear = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return [n for n, m in model.named_modules() if isinstance(m, linear)][::-1][:8]


def _first_convolution(model: nn.Module, name) -> nn.Module | None:
    name = name[0] if isinstance(name, tuple | list) and name else name
    return dict(model.named_modules()).get(name) if isinstance(name, str) else None


def _pair(size) -> tuple[int, int] | None:
    if isinstance(size, int):
        return (size, size)
    return tuple(size) if isinstance(size, tuple | list) and len(size) == 2 else None
