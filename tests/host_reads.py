"""Where code waits for the device to learn a number: with real numbers, on the CPU.

A read is `.item()`, `.tolist()`, `.cpu()` or `.numpy()`, `bool(tensor)` and the like, or an
operation whose shape depends on values: `nonzero`, and an index of booleans.
"""

import sys
from collections import Counter
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

OTHERS = ("foolbox", "eagerpy", "timm", "accelerate")
BY_METHOD = ("tolist", "cpu", "numpy")
aten = torch.ops.aten
READS = {aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default}
INDEXED = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default}


@contextmanager
def host_reads():
    """Yields how often each function of this package, or each library, read within."""
    reads = Counter()
    with ExitStack() as stack:
        stack.enter_context(_Watch(reads))
        for name in BY_METHOD:
            stack.enter_context(mock.patch.object(torch.Tensor, name, _counted(name, reads)))
        yield reads


class _Watch(TorchDispatchMode):
    def __init__(self, reads):
        super().__init__()
        self.reads = reads

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        indices = args[1] if func in INDEXED else ()
        if func in READS or any(i is not None and i.dtype == torch.bool for i in indices):
            self.reads[_reader()] += 1
        return func(*args, **(kwargs or {}))


def _counted(name, reads):
    own = getattr(torch.Tensor, name)

    def read(self, *args, **kwargs):
        reads[_reader()] += 1
        return own(self, *args, **kwargs)

    return read


def _reader():
    """The innermost function of this package or library that is on the stack."""
    frame = sys._getframe(2)
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if name.startswith("hf_specreg."):
            return _qualified(frame)
        if name.partition(".")[0] in OTHERS:
            return name.partition(".")[0]
        frame = frame.f_back
    return "elsewhere"


def _qualified(frame):
    """A method's name with its class, of Python 3.10 too; of what is inside a method, that of the
    method.
    """
    owner = frame.f_locals.get("self")
    code = frame.f_code
    if owner is None and code.co_name.startswith("<") and frame.f_back is not None:
        return _qualified(frame.f_back)
    return f"{type(owner).__name__}.{code.co_name}" if owner is not None else code.co_name
