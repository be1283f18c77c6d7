"""Whether a model is trained at the resolution that its convolutions are measured at."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from hf_specreg.spectral.operators import LinearOperator


class SeenInput:
    """Looks, in training, at the input of the first layer whose singular values depend on it.

    What it sees is only written in the hook, never read: compiled code would be compiled again.
    """

    def __init__(self):
        self.expected: tuple[int, ...] | None = None
        self.as_expected = False
        self.other: tuple[int, ...] | None = None
        self._module: nn.Module | None = None

    def expect(self, owners: Sequence[tuple[nn.Module, LinearOperator]]) -> None:
        """Take the first convolution among the modules as the one to look at, if there is one."""
        self.expected = self.other = self._module = None
        for module, operator in owners:
            if len(operator.input_shape) > 1:
                self.expected, self._module = operator.input_shape, module
                return

    def hooks(self) -> Iterator:
        """Put a hook on it that looks at what it is fed; yield it for removal."""
        if self._module is not None:
            yield self._module.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Look at what the module is fed where a graph is made: in training, in either mode."""
        fed = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)
        if fed is not None and torch.is_grad_enabled():
            size = tuple(fed.shape[-len(self.expected) :])
            if size == self.expected:
                self.as_expected = True
            else:
                self.other = size

    def check(self, input_size: tuple[int, ...]) -> None:
        """Raise ValueError if, since the last time, there were only inputs of another size than
        images of `input_size` give. Of several crops one is enough.
        """
        if self.other is not None and not self.as_expected:
            raise ValueError(
                f"a convolution was trained on inputs of {self.other}, but the penalty measures it "
                f"at {self.expected} (images of {input_size}): call set_input_size((C, H, W)) with "
                "the size of your training images, or pass it as input_size"
            )
        self.as_expected, self.other = False, None
