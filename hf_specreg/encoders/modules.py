"""Modules as users have them: what wraps a network, and how it is looked at and left as it was."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel


def unwrap(model: nn.Module) -> nn.Module:
    """Return the network inside DistributedDataParallel, torch.compile, peft, an average of weights
    and SpecRegModel.
    """
    while (inner := wrapped(model)) is not None:
        model = inner
    return model


def without_trainers(model: nn.Module) -> nn.Module:
    """Return a model without what is put around it for training; a SpecRegModel stays one."""
    while (inner := _trained(model)) is not None:
        model = inner
    return model


def wrapped(model: nn.Module) -> nn.Module | None:
    """Return what stands in one wrapper; None if it is none.

    A class of this package says by `wraps` which of its attributes is the network.
    """
    for kind in type(model).__mro__:
        if kind.__module__.startswith("hf_specreg.") and "wraps" in vars(kind):
            return getattr(model, vars(kind)["wraps"])
    return _trained(model)


def _trained(model: nn.Module) -> nn.Module | None:
    parallel = nn.parallel.DistributedDataParallel | nn.DataParallel
    averaged = type(model).__module__ == "timm.utils.model_ema"
    if averaged or isinstance(model, parallel | AveragedModel):
        return model.module
    for name in ("_orig_mod", "_checkpoint_wrapped_module"):
        if hasattr(model, name):
            return getattr(model, name)
    if hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
        return model.get_base_model()
    return None


def is_compiled(model: nn.Module) -> bool:
    """Whether torch.compile is around a model, or modules in it, or has compiled them in place."""
    return any(
        hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None
        for module in model.modules()
    )


def check_not_fsdp1(model: nn.Module) -> None:
    """Raise ValueError if FSDP1 is around a model, or modules in it, whose weights it hides."""
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
        raise ValueError(
            "FSDP1 (FullyShardedDataParallel) hides the weights: shard them with FSDP2 "
            "(fully_shard), or train with DistributedDataParallel"
        )


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put every module in evaluation mode, and back into its own afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextlib.contextmanager
def left_as_it_was(model: nn.Module) -> Iterator[None]:
    """Undo afterwards what running the model does to it: attributes that are set or kept in its
    modules (also in dictionaries and lists of theirs), new buffers, and buffers' values.
    """
    modules = list(model.modules())
    attributes = [dict(vars(module)) for module in modules]
    containers = {
        id(value): (value, value.copy())
        for own in attributes
        for value in own.values()
        if isinstance(value, dict | list | set)
    }
    buffers = [(b, b._version, b.detach().clone()) for b in model.buffers() if not b.is_meta]
    try:
        yield
    finally:
        for module, own in zip(modules, attributes, strict=True):
            vars(module).clear()
            vars(module).update(own)
        for value, before in containers.values():
            value.clear()
            value.extend(before) if isinstance(value, list) else value.update(before)
        with torch.no_grad():
            for buffer, version, before in buffers:
                if buffer._version != version:
                    buffer.copy_(before)


@contextlib.contextmanager
def examined(network: nn.Module) -> Iterator[None]:
    """Have a network evaluated as it is, uncompiled, and leave it as it was."""
    devices = {p.device for p in network.parameters() if p.device.type == "cuda"}
    with contextlib.ExitStack() as stack:
        stack.enter_context(left_as_it_was(network))
        stack.enter_context(evaluating(network))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.random.fork_rng(sorted(devices, key=str)))
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


def leaf(tensor: Tensor) -> Tensor:
    """A tensor without its graph, from which one begins where it is of real numbers."""
    tensor = tensor.detach()
    return tensor.requires_grad_() if tensor.is_floating_point() else tensor


def computes_weight(module: nn.Module) -> bool:
    """Whether a module's weight is computed from parameters of its children: parametrizations, and
    the layers that peft wraps.
    """
    return hasattr(module, "parametrizations") or is_adapted(module)


def is_adapted(module: nn.Module, by: str = "BaseTunerLayer") -> bool:
    """Whether it is a layer that peft wraps, by the name of peft's class."""
    return any(base.__name__ == by for base in type(module).__mro__)


def takes_lora(module: nn.Module) -> bool:
    """Whether peft's LoRA on a layer is an addition to its weight: not of convolutions that
    standardise their weight, grouped, dilated, or padded with other than zeros.
    """
    if not isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return True
    plain = any(type(module).forward is kind.forward for kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d))
    return (
        (plain or type(module).__name__ == "Conv2dSame")
        and module.groups == 1
        and set(module.dilation) == {1}
        and module.padding_mode == "zeros"
    )


def check_takes_lora(name: str, module: nn.Module) -> None:
    """Raise ValueError if LoRA on a layer is no addition to its weight, which could be merged."""
    if not takes_lora(module):
        raise ValueError(
            f"LoRA on {name!r} ({type(module).__name__}) is no addition to its weight, which is "
            "standardised, grouped, dilated or padded with other than zeros, so it cannot be "
            "merged: leave this convolution out"
        )
