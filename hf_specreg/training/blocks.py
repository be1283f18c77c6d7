"""The modules of a network whose weights are gathered one at a time, where weights are sharded.

FSDP2 gathers a module's weights when it is called, and gives them back when it returns. So such a
module must itself be called (a list of layers is not, nor is what runs by `forward` alone), and its
weights be used within it only, by no other module that holds them too. What is called and used is
seen in one evaluation of a black image. Weights of all else are gathered with the whole network.
"""

import warnings
from collections.abc import Collection, Iterator
from difflib import get_close_matches

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from hf_specreg.encoders.features import FeatureSpace
from hf_specreg.encoders.modules import evaluating, left_as_it_was
from hf_specreg.encoders.trace import call


def blocks(space: FeatureSpace, classes: Collection[str] = ()) -> list[nn.Module]:
    """Return the modules of a network whose weights are gathered together, and no others with them;
    those within others first. Warns if fewer than half of the weights are in the default's.

    Args:
        space: whose network is run, with whole weights.
        classes: names of these modules' classes; default: the entries of the outermost ModuleList
            and Sequential, and in the place of those that cannot gather alone their parts.

    Raises:
        ValueError: the network has no module of one of the classes that gathers for itself.
    """
    network, uses = space.network, _uses(space)
    fit = [module for module in network.modules() if uses.are_within(module, network)]
    if not classes:
        entries = set(_entries(network, fit))
        _warn_of_others(network, entries)
        return [module for module in reversed(fit) if module in entries]
    there = sorted({type(module).__name__ for module in fit})
    for name in classes:
        if name not in there:
            near = get_close_matches(name, there) or there
            raise ValueError(
                f"fsdp_transformer_layer_cls_to_wrap names {name!r}, and {type(network).__name__} "
                "has no module of that class that is called and alone uses its weights: one of "
                f"{', '.join(near)}?"
            )
    return [module for module in reversed(fit) if type(module).__name__ in classes]


class _Uses(TorchFunctionMode):
    """Notes within the calls of which modules each parameter is used."""

    def __init__(self):
        super().__init__()
        self.running: list[nn.Module] = []
        self.called: set[nn.Module] = set()
        self.within: dict[int, set[nn.Module]] = {}  # by the parameter's id

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if any(isinstance(leaf, torch.Tensor) for leaf in tree_leaves(result)):  # not its shape
            for leaf in tree_leaves((args, kwargs)):
                if isinstance(leaf, nn.Parameter):
                    calls = self.within.setdefault(id(leaf), set(self.running))
                    calls.intersection_update(self.running)
        return result

    def enter(self, module: nn.Module, inputs: tuple) -> None:
        """Take note that a module is called."""
        self.running.append(module)
        self.called.add(module)

    def leave(self, module: nn.Module, inputs: tuple, output: object) -> None:
        """Take note that it returns."""
        self.running.pop()

    def are_within(self, module: nn.Module, network: nn.Module) -> bool:
        """Whether a module has parameters, is called, and all uses of these are within."""
        own = {id(parameter) for parameter in module.parameters()}
        if not own or module not in self.called or own & _outside(module, network):
            return False
        return all(module in self.within.get(parameter, {module}) for parameter in own)


@torch.no_grad()
def _uses(space: FeatureSpace) -> _Uses:
    uses, like = _Uses(), next(space.network.parameters())
    image = torch.zeros(1, *space.input_size, device=like.device, dtype=like.dtype)
    hooks = []
    with left_as_it_was(space.network), evaluating(space.model):
        for module in space.network.modules():
            hooks.append(module.register_forward_pre_hook(uses.enter))
            hooks.append(module.register_forward_hook(uses.leave))
        try:
            with uses:
                call(space.model, image)
        finally:
            for hook in hooks:
                hook.remove()
    return uses


def _entries(module: nn.Module, fit: Collection[nn.Module], inside: bool = False) -> Iterator:
    """The entries of the outermost lists; of those that are not fit, the parts."""
    inside = inside or isinstance(module, nn.ModuleList | nn.Sequential)
    for child in module.children():
        if inside and child in fit:
            yield child
        else:
            yield from _entries(child, fit, inside)


def _warn_of_others(network: nn.Module, entries: Collection[nn.Module]) -> None:
    alone = {parameter for entry in entries for parameter in entry.parameters()}
    share = sum(p.numel() for p in alone) / sum(p.numel() for p in network.parameters())
    if share < 0.5:
        warnings.warn(
            f"only {100 * share:.0f} % of the weights of {type(network).__name__} are gathered "
            "block by block, the others all at once, which saves little: name the classes of its "
            "blocks by fsdp_transformer_layer_cls_to_wrap, with fsdp_auto_wrap_policy: "
            "TRANSFORMER_BASED_WRAP",
            stacklevel=4,
        )


def _outside(module: nn.Module, network: nn.Module) -> set[int]:
    """The parameters, by id, that are also held by modules that are reached without this one."""
    seen, found, waiting = {module}, set(), [network]
    while waiting:
        other = waiting.pop()
        if other not in seen:
            seen.add(other)
            found.update(id(parameter) for parameter in other.parameters(recurse=False))
            waiting += other.children()
    return found
