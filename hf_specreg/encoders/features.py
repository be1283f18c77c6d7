"""Where the feature space is: the head of a classifier, what it is fed, and the layers before it.

A classifier is F(x) = W Phi(x) + b. Its features Phi(x) are, here, exactly the tensor that the head
is fed. The head is found for timm models (by their configuration) and for transformers models (what
stands beside the base model); of any other module the user names it.
"""

import contextlib
import re
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

HEADED = re.compile(r"For[A-Z]|WithProjection")  # transformers' classes that have a head
HEAD_NAMES = re.compile(r"classifier|head|score|^fc$")


def unwrap(model: nn.Module) -> nn.Module:
    """Return the network inside DistributedDataParallel, torch.compile, peft and SpecRegModel."""
    while (inner := _wrapped(model)) is not None:
        model = inner
    return model


def _wrapped(model: nn.Module) -> nn.Module | None:
    """What stands in one wrapper; None if it is none."""
    if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
        return model.module
    if hasattr(model, "_orig_mod"):
        return model._orig_mod
    if hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
        return model.get_base_model()
    if isinstance(getattr(model, "network", None), nn.Module) and hasattr(model, "pixel_mean"):
        return model.network
    return None


def find_head(model: nn.Module) -> tuple[str, ...]:
    """Return the dotted names of the head's modules; empty for a model without one, which is all
    encoder.

    Raises:
        ValueError: neither a timm nor a transformers model; the message lists candidates.
    """
    cfg = getattr(model, "pretrained_cfg", None)
    if cfg is not None and hasattr(model, "get_classifier"):
        names = cfg.get("classifier") or ()
        names = (names,) if isinstance(names, str) else tuple(names)
        head = tuple(n for n in names if _has_weights(model, n))
        if not head and getattr(model, "num_classes", 0):
            raise ValueError(
                f"{type(model).__name__} has {model.num_classes} classes, but its classifier "
                f"{names} "
                f"is not there: pass head=<dotted name>; linear layers, last first: "
                f"{_linear_names(model)}"
            )
        return head
    inner = getattr(model, "timm_model", None)
    if inner is not None:
        return tuple(f"timm_model.{n}" for n in find_head(inner))
    if hasattr(model, "base_model_prefix") and hasattr(model, "config"):
        kind = type(model)
        if kind.__module__.startswith("transformers.") and not HEADED.search(kind.__name__):
            return ()  # whatever its children are called: SigLIP's head is its pooling
        base = model.base_model
        beside = [(n, m) for n, m in model.named_children() if m is not base and _has_matrix(m)]
        if base is model:
            beside = [(n, m) for n, m in beside if HEAD_NAMES.search(n)]
        return tuple(n for n, _ in beside)
    raise ValueError(
        f"cannot find the head of {type(model).__name__}, which is neither a timm nor a "
        "transformers model: pass "
        "head=<dotted name>, or head=() if all of it is encoder; linear layers, last first: "
        f"{_linear_names(model)}"
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
                f"head {name!r} is no module of {type(model).__name__}; linear layers, last first: "
                f"{_linear_names(model)}"
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
    if (wrapped := _wrapped(model)) is not None:
        return find_input_size(wrapped)
    inner = getattr(model, "timm_model", None)
    cfg = getattr(model, "pretrained_cfg", None)
    if inner is not None:  # what was saved, not the default of the architecture
        saved = getattr(model.config, "pretrained_cfg", None) or {}
        size = saved.get("input_size") or inner.pretrained_cfg.get("input_size")
        model, cfg = inner, {**inner.pretrained_cfg, "input_size": size}
    if cfg and cfg.get("input_size"):
        channels, *size = cfg["input_size"]
        first = getattr(_first_convolution(model, cfg.get("first_conv")), "in_channels", channels)
        if first < 16:  # a stem that folds space into channels has more
            channels = first
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
    raise ValueError(
        f"{type(model).__name__} does not say its input size: pass input_size=(channels, height, "
        "width)"
    )


def extract_features(network: nn.Module, images: Tensor, *, head: Sequence[str]) -> Tensor:
    """Run the network and return what its head is fed.

    Args:
        network: the model, without pixel normalisation.
        images: [B, C, H, W], as the network expects them.
        head: dotted names of the head's modules; empty for a model without one.

    Returns:
        [B, D]. Several heads that are fed different vectors (distilled models): concatenated.
        A model without a head: its output, of transformers models `pooler_output` or else the first
        token.
    """
    fed: list[Tensor] = []
    with contextlib.ExitStack() as stack:
        for name in head:
            hook = network.get_submodule(name).register_forward_pre_hook(
                lambda _, args: fed.append(args[0])
            )
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
    if getattr(output, "logits", None) is not None:  # of an image classifier of no classes
        return output.logits
    pooled = getattr(output, "pooler_output", None)
    if pooled is not None:
        return pooled
    tokens = getattr(output, "last_hidden_state", None)
    if tokens is None:
        raise ValueError(
            f"a {type(output).__name__} has neither pooler_output nor last_hidden_state, so its "
            "features are not known: name the head of the model"
        )
    return tokens[:, 0]


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
