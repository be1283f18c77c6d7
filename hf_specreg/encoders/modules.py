"""Modules as users have them: what wraps a network, and the mode that each module is in."""

import contextlib
from collections.abc import Iterator

from torch import nn
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
    wraps = getattr(model, "wraps", None)
    if wraps and type(model).__module__.startswith("hf_specreg."):
        return getattr(model, wraps)
    return _trained(model)


def _trained(model: nn.Module) -> nn.Module | None:
    parallel = nn.parallel.DistributedDataParallel | nn.DataParallel
    averaged = type(model).__module__ == "timm.utils.model_ema"
    if averaged or isinstance(model, parallel | AveragedModel):
        return model.module
    if hasattr(model, "_orig_mod"):
        return model._orig_mod
    if hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
        return model.get_base_model()
    return None


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
