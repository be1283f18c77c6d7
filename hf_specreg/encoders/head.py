"""The head of a classifier, and what it is fed.

A classifier is F(x) = W Phi(x) + b. The head is found for timm models (by their configuration) and
for transformers models (what stands beside the base model); of any other module the user names it.
"""

import contextlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

HEADED = re.compile(r"For[A-Z]|WithProjection")  # transformers' classes that have a head
HEAD_NAMES = re.compile(r"classifier|head|score|^fc$")


def find_head(model: nn.Module) -> tuple[str, ...]:
    """Return the dotted names of the head's modules; empty for a model without one, which is all
    encoder.

    Raises:
        ValueError: neither a timm nor a transformers model, or one whose head is not known; the
            message lists candidates.
    """
    cfg = getattr(model, "pretrained_cfg", None)
    if cfg is not None:
        names = cfg.get("classifier") or ()
        names = (names,) if isinstance(names, str) else tuple(names)
        head = tuple(n for n in names if _has_weights(model, n))
        if not head and getattr(model, "num_classes", 0) and hasattr(model, "get_classifier"):
            raise ValueError(
                f"{type(model).__name__} has {model.num_classes} classes, but its classifier "
                f"{names} is not there: pass head=<dotted name>; linear layers, last first: "
                f"{_linear_names(model)}"
            )
        return head
    inner = getattr(model, "timm_model", None)
    if inner is not None:
        return tuple(f"timm_model.{n}" for n in find_head(inner))
    if hasattr(model, "base_model_prefix") and hasattr(model, "config"):
        return _beside_base(model)
    raise ValueError(
        f"cannot find the head of {type(model).__name__}, which is neither a timm nor a "
        "transformers model: pass head=<dotted name>, or head=() if all of it is encoder; linear "
        f"layers, last first: {_linear_names(model)}"
    )


def _beside_base(model: nn.Module) -> tuple[str, ...]:
    """Return what a transformers model has beside its base model."""
    kind = type(model)
    is_own = kind.__module__.startswith("transformers.")
    if is_own and not HEADED.search(kind.__name__):
        return ()  # whatever its children are called: SigLIP's head is its pooling
    base = model.base_model
    beside = [n for n, m in model.named_children() if m is not base and _has_matrix(m)]
    named = [n for n in beside if HEAD_NAMES.search(n)]
    if base is model:
        beside = named
    # Several are a head only where transformers calls all so: the teacher's of a distilled model.
    if len(beside) > 1 and not (is_own and beside == named):
        raise ValueError(
            f"{kind.__name__} has {beside} beside its encoder, and which of them is the head is "
            f"not known: pass head={(named or beside)[-1]!r}, say"
        )
    if not beside and getattr(model.config, "num_labels", 0):
        raise ValueError(
            f"{kind.__name__} has nothing beside its encoder that could be the head: pass "
            "head=<dotted name>, or head=() if all of it is encoder; linear layers, last first: "
            f"{_linear_names(model)}"
        )
    return tuple(beside)


def check_head(model: nn.Module, head: str | Sequence[str] | None) -> tuple[str, ...]:
    """Return the head's names, found where none are given.

    Raises:
        ValueError: a name that the model has not.
    """
    if head is None:
        return find_head(model)
    modules = dict(model.named_modules())
    if isinstance(head, nn.Module):
        name = next((name for name, module in modules.items() if module is head), "fc")
        raise ValueError(f"head is a {type(head).__name__}: give its dotted name, such as {name!r}")
    names = (head,) if isinstance(head, str) else tuple(head)
    for name in names:
        if name not in modules or not name:
            raise ValueError(
                f"head {name!r} is no module of {type(model).__name__}; linear layers, last first: "
                f"{_linear_names(model)}"
            )
    return names


@contextlib.contextmanager
def fed_to(head: Sequence[str], network: nn.Module) -> Iterator[list[Tensor]]:
    """Collect, while the network runs, what its head is fed, in order and each tensor once; as it
    is then, whatever the head does in place.

    Args:
        head: dotted names of the head's modules.
        network: the model that holds them.

    Yields:
        All floating-point tensors among their arguments, also in tuples and by keyword.

    Raises:
        RuntimeError: at the end, if a module of the head was not called.
    """
    fed: list[Tensor] = []
    seen: list[Tensor] = []
    called: set[nn.Module] = set()

    def look(module, args, kwargs):
        called.add(module)
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor) and leaf.is_floating_point():
                if not any(leaf is other for other in seen):
                    seen.append(leaf)
                    fed.append(leaf.clone())

    modules = [network.get_submodule(name) for name in head]
    with contextlib.ExitStack() as stack:
        for module in modules:
            hook = module.register_forward_pre_hook(look, with_kwargs=True)
            stack.callback(hook.remove)
        yield fed
    if not called.issuperset(modules):
        raise RuntimeError(
            f"the head {tuple(head)} is not called when {type(network).__name__} is run"
        )


def headless_output(output: Any) -> Tensor:
    """Return the feature tensor in the output of a model without a head.

    Raises:
        ValueError: it is not known which it is.
    """
    if isinstance(output, Tensor):
        return output
    if isinstance(output, list | tuple) and all(isinstance(x, Tensor) for x in output):
        return flat(output)  # the maps of several stages
    if getattr(output, "logits", None) is not None:  # of an image classifier of no classes
        return output.logits
    if getattr(output, "feature_maps", None) is not None:
        return flat(output.feature_maps)
    for name in ("pooler_output", "image_embeds"):
        if getattr(output, name, None) is not None:
            return getattr(output, name)
    tokens = getattr(output, "last_hidden_state", None)
    if tokens is None:
        raise ValueError(
            f"a {type(output).__name__} has neither pooler_output nor last_hidden_state, so its "
            "features are not known: name the head of the model"
        )
    return tokens[:, 0]


def flat(tensors: Sequence[Tensor]) -> Tensor:
    """Return tensors [B, ...] as one of vectors, [B, D]."""
    vectors = [tensor.flatten(1) for tensor in tensors]
    return torch.cat(vectors, dim=1) if len(vectors) > 1 else vectors[0]


def _has_weights(model: nn.Module, name: str) -> bool:
    module = dict(model.named_modules()).get(name)
    return module is not None and any(True for _ in module.parameters())


def _has_matrix(module: nn.Module) -> bool:
    return any(p.ndim >= 2 for p in module.parameters())


def _linear_names(model: nn.Module) -> list[str]:
    linear = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return [n for n, m in model.named_modules() if isinstance(m, linear)][::-1][:8]
