"""How many bytes of tensors are there at once."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Allocated(TorchDispatchMode):
    """Counts the bytes of what operations within make: those that live, and the most that did."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self._known = weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        given = {id(s) for s in map(_storage, tree_leaves((args, kwargs))) if s is not None}
        for storage in filter(None, map(_storage, tree_leaves(found))):
            if id(storage) not in given and storage not in self._known:
                self._known.add(storage)
                self.live += storage.nbytes()
                weakref.finalize(storage, self._freed, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return found

    def _freed(self, count):
        self.live -= count


def _storage(value):
    return value.untyped_storage() if isinstance(value, torch.Tensor) else None
