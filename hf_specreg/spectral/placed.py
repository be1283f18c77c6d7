"""Whether the layers that were found are still those of the model."""

from collections.abc import Iterable

from torch import nn

from hf_specreg.encoders.trace import computes_weight

# Parts of names that come with a wrapper around a module, whose weights stay where they are.
WRAPPERS = ("_checkpoint_wrapped_module", "_orig_mod")


class Placed:
    """The modules of a network by name, as they are now, to see later whether they are still there.

    Args:
        network: that holds them.
        modules: the layers.
    """

    def __init__(self, network: nn.Module, modules: Iterable[nn.Module]):
        names = {module: name for name, module in network.named_modules()}
        self.network = network
        self.modules = {names[module]: module for module in modules}
        self.computed = {name: computes_weight(m) for name, m in self.modules.items()}

    def check(self) -> None:
        """Raise ValueError if a layer was replaced, wrapped by an adapter or reparameterised: its
        gradient would go to weights that are not used any more.
        """
        for name, module in self.modules.items():
            if not self._is_there(name, module) or computes_weight(module) != self.computed[name]:
                raise ValueError(
                    f"layer {name!r} was replaced or reparameterised after the penalty was made: "
                    "make the penalty last, after adapters, parametrizations and new layers"
                )

    def _is_there(self, name: str, module: nn.Module) -> bool:
        found = self.network
        for part in name.split(".") if name else ():
            found = getattr(_inside(found), part, None)
        return module in (found, _inside(found))


def _inside(module: nn.Module | None) -> nn.Module | None:
    """What checkpoint wrappers and the like hold."""
    for wrapper in WRAPPERS:
        module = getattr(module, wrapper, module)
    return module
