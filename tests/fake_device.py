"""An accelerator without one: tensors that have shapes and a device, and no numbers.

Under `FakeTensorMode` an operation on tensors of two devices is an error. So is what needs a
number on the host: `.item()`, `.tolist()`, `bool(tensor)`, a shape that depends on values. What
copies to the host without asking for a number is an error here too, and `reads` counts them all.

The device is torch's "lazy", which is no CPU for this package either: of CUDA's tensors torch's
autograd asks the driver, so they can be had without a GPU, but not be derived.
"""

from collections import Counter
from contextlib import contextmanager
from unittest import mock

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

DEVICE = "lazy"
FAKE = FakeTensorMode()  # one for all: what a library keeps of it is an error under another


class HostRead(AssertionError):
    """The host waited for the device."""


class _OnDevice(TorchDispatchMode):
    def __init__(self, launches):
        super().__init__()
        self.launches = launches

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        found = func(*args, **kwargs)
        source = next((a for a in args if isinstance(a, torch.Tensor)), None)
        to_host = isinstance(found, torch.Tensor) and found.device.type == "cpu"
        if to_host and source is not None and source.device.type == DEVICE:
            raise HostRead(f"{func} copies to the host")
        self.launches[str(func)] += 1
        return found


def place(*modules):
    """Replace the weights and buffers of modules by fake ones on the device."""
    for module in (part for whole in modules for part in whole.modules()):
        for name, p in module._parameters.items():
            if p is not None:
                fake = torch.empty(p.shape, dtype=p.dtype, device=DEVICE)
                module._parameters[name] = nn.Parameter(fake, requires_grad=p.requires_grad)
        for name, b in module._buffers.items():
            if b is not None:
                module._buffers[name] = torch.empty(b.shape, dtype=b.dtype, device=DEVICE)


def warm(penalty, device=DEVICE):
    """Give a penalty, within `fake_device`, the vectors that its first use would find there."""
    shapes = {n: s for stack in penalty._sum.stacks for n, s in stack.vectors.items()}
    vectors = {name: torch.empty(shape, device=device) for name, shape in shapes.items()}
    state = {**penalty.state_dict(), "step": 1, "uses": 1, "vectors": vectors}
    state["pace"] |= {"halvings": 0, "wait": 1000}  # for which the host does wait
    penalty.load_state_dict(state)


@contextmanager
def fake_device():
    """Within, all tensors are fake, and a wait for the device is an error. Yields how often each
    operation was called.
    """
    launches = Counter()
    generator = torch.Generator

    def autocast(*args, **kwargs):  # of which torch has none for this device
        return mock.MagicMock()

    with (
        FAKE,
        _OnDevice(launches),
        mock.patch.object(torch, "autocast", autocast),
        mock.patch.object(torch, "get_autocast_dtype", return_value=torch.bfloat16),
        mock.patch.object(torch, "is_autocast_enabled", return_value=False),
        mock.patch.object(torch, "Generator", side_effect=lambda *_, **__: generator()),
    ):
        yield launches
