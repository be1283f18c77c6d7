"""Whether the layers that were found are still those of the model, with the weights they had."""

import weakref
from collections.abc import Iterable, Iterator

from torch import nn
from torch.utils.hooks import RemovableHandle

from hf_specreg.encoders.modules import check_not_fsdp1, computes_weight, without_trainers


class Placed:
    """The modules of a network by name, as they are now, to see later whether they are still there.

    Args:
        network: that holds them.
        modules: the layers.

    Attributes:
        loads: notes whether weights are loaded into one of them.
    """

    def __init__(self, network: nn.Module, modules: Iterable[nn.Module]):
        names = {module: name for name, module in network.named_modules()}
        self.network = network
        self.modules = {names[module]: module for module in modules}
        self.computed = {name: computes_weight(m) for name, m in self.modules.items()}
        self.loads = Loads()
        self._parts = {
            (name, own): part
            for name, module in self.modules.items()
            for own, part in module.named_children()
        }
        self._holders = [part for m in self.modules.values() for part in m.modules()]
        self._parameters = self._now()

    def _now(self) -> list[weakref.ref | None]:
        """References to the layers' parameters."""
        found = (p for holder in self._holders for p in holder._parameters.values())
        return [None if p is None else weakref.ref(p) for p in found]

    def changed(self) -> bool:
        """Return whether weights were loaded, or other parameters put into their places, since this
        was asked last: they are then other ones, not those a step further on.
        """
        loaded, self.loads.seen = self.loads.seen, False
        before, self._parameters = self._parameters, self._now()
        return loaded or any(a is not b for a, b in zip(before, self._parameters, strict=False))

    def check(self) -> None:
        """Raise ValueError if a layer was replaced, wrapped by an adapter or FSDP1, or
        reparameterised: its gradient would go to weights that are not used any more.
        """
        found: dict[str, nn.Module | None] = {"": self.network}
        for name, module in self.modules.items():
            there = self._at(name, found)
            is_there = there is module or without_trainers(there) is module
            if not is_there or computes_weight(module) != self.computed[name]:
                raise self._replaced(name)
        for (name, own), part in self._parts.items():  # such as nn.MultiheadAttention.out_proj
            if self.modules[name]._modules.get(own) is not part:
                raise self._replaced(f"{name}.{own}")

    def _replaced(self, name: str) -> ValueError:
        check_not_fsdp1(self.network)
        return ValueError(
            f"layer {name!r} was replaced or reparameterised after the penalty was made: make the "
            "penalty last, after adapters, parametrizations and new layers"
        )

    def _at(self, name: str, found: dict[str, nn.Module | None]) -> nn.Module | None:
        """The module of that name, whatever is wrapped around those that hold it.

        Args:
            name: dotted.
            found: modules by name, to which it is added.
        """
        if name not in found:
            parent, _, own = name.rpartition(".")
            holder = self._at(parent, found)
            there = getattr(holder, "_modules", {}).get(own)
            if there is None:  # within a wrapper; asked last, since the search for one takes time
                there = getattr(without_trainers(holder), own, None)
            found[name] = there
        return found[name]

    def hooks(self) -> Iterator:
        """Put hooks on the layers that note whether weights are loaded; yield them for removal."""
        for module in self.modules.values():
            yield module.register_load_state_dict_post_hook(self.loads)


def remove(hooks: list[RemovableHandle]) -> None:
    """Take hooks off their modules, and out of the list."""
    while hooks:
        hooks.pop().remove()


class Loads:
    """A hook that notes that weights were loaded. It holds nothing else, since a module that is
    copied or pickled takes its hooks along.

    Attributes:
        seen: whether a state dictionary was loaded since this was set to False.
    """

    def __init__(self):
        self.seen = False

    def __call__(self, module: nn.Module, incompatible_keys: object) -> None:
        """Note that weights were loaded."""
        self.seen = True
