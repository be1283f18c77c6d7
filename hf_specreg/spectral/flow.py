"""What a tensor of a network is made of: another's entries, moved, scaled by a gain, or else.

The names are those of torch's functions and methods, as a `TorchFunctionMode` is given them.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_specreg.spectral.typical import RunningInverse

PRODUCTS = frozenset({"mul", "multiply", "__rmul__", "mul_", "__imul__"})
QUOTIENTS = frozenset({"div", "divide", "true_divide", "div_", "__itruediv__"})
# Keep every entry where it is, or add to it what does not depend on the image.
IN_PLACE = frozenset(
    {
        *("to", "float", "half", "bfloat16", "double", "type", "type_as", "contiguous", "clone"),
        *("detach", "add", "add_", "__radd__", "__iadd__", "sub", "sub_", "subtract", "__isub__"),
    }
)
MOVES = frozenset(
    {
        *("view", "reshape", "flatten", "unflatten", "ravel", "squeeze", "unsqueeze", "expand"),
        *("permute", "transpose", "swapaxes", "swapdims", "movedim", "moveaxis", "t", "T", "mT"),
        *("roll", "flip", "rot90", "pad", "repeat", "tile", "broadcast_to", "repeat_interleave"),
        *("__getitem__", "select", "narrow", "index_select", "unbind", "chunk", "split"),
        *("tensor_split", "split_with_sizes", "pixel_shuffle", "pixel_unshuffle"),
        *("channel_shuffle", "native_channel_shuffle", "unfold"),
    }
)
SHAPED_LIKE = frozenset({"view_as", "reshape_as", "expand_as"})  # the second argument
CONVOLUTIONS = frozenset({F.conv1d, F.conv2d, F.conv3d})
CONCATENATIONS = frozenset({"cat", "concat", "concatenate"})
# Of functions that are positively homogeneous, f(c x) = c f(x) for c > 0: sums; those that take
# each channel by itself; all.
SUMS = frozenset(name for name in IN_PLACE if "add" in name or "sub" in name)
OF_EACH_CHANNEL = frozenset(
    {
        *("relu", "relu_", "leaky_relu", "leaky_relu_", "dropout", "neg", "abs", "interpolate"),
        *("max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "contiguous", "clone"),
        *("avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d"),
    }
)
HOMOGENEOUS = (
    OF_EACH_CHANNEL | MOVES | IN_PLACE | CONCATENATIONS | {"mean", "sum", "amax", "amin", "stack"}
)
NORMS = frozenset({F.batch_norm, F.instance_norm, F.layer_norm, F.rms_norm, F.group_norm})


@dataclass(frozen=True, eq=False)
class Constant:
    """A tensor that does not depend on the image.

    Attributes:
        value: computes it from the parameters and buffers as they are, with its graph.
        names: of these, dotted.
        is_moved: whether it is parameters' entries, moved: c times them makes c times it.
    """

    value: Callable[[], Tensor]
    names: tuple[str, ...] = ()
    is_moved: bool = False


@dataclass(frozen=True, eq=False)
class Gain:
    """What entries are multiplied by.

    Attributes:
        shape: of the gain, as it is broadcast over what it scales.
        weight: the factors; None for 1.
        inverse: factors beside them: 1 / standard deviation, of running statistics or typical.
    """

    shape: tuple[int, ...]
    weight: Constant | None
    inverse: Constant | RunningInverse | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The dotted names of the parameters and buffers that it is made of."""
        return tuple(name for c in (self.weight, self.inverse) if c is not None for name in c.names)


@dataclass(eq=False)
class Flow:
    """A tensor that depends on the image.

    Attributes:
        shape: of the tensor.
        device: of the tensor.
        source: the tensor whose entries it holds; None for another tensor altogether.
        move: does to a tensor of the source's shape what was done to the source.
        gain: what was multiplied by, after the move.
        step: what made it; None for the network's inputs and outputs, and what is not known.
        place: in the order of what was made.
        uses: what was made of it.
    """

    shape: tuple[int, ...]
    device: torch.device
    source: "Flow | None" = None
    move: Callable[[Tensor], Tensor] | None = None
    gain: Gain | None = None
    step: "Step | None" = None
    place: int = -1
    uses: list["Flow"] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class Step:
    """A function's call.

    Attributes:
        function: that was called, or the name of a layer.
        args: its arguments, with what they are in place of tensors.
        kwargs: likewise.
    """

    function: Callable | str
    args: tuple
    kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Call:
    """One use of a layer: what it was fed, None for what depends on no image, and what it gave."""

    inputs: tuple[Flow | None, ...]
    output: Flow


def name_of(function: Callable) -> str:
    """What a function of torch is called, or the property that it gets."""
    name = getattr(function, "__name__", "")
    return function.__self__.__name__ if name == "__get__" else name


def fills(images: Any, pad: Any, mode: str = "constant", value: float | None = None) -> bool:
    """Whether these arguments have `F.pad` put something other than 0 around an image."""
    return bool(value)
