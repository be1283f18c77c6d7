"""Whether a model is trained at the resolution that its convolutions are measured at."""

from collections.abc import Sequence

from torch import nn

from hf_specreg.spectral.operators import LinearOperator


class SeenInput:
    """Looks, in training, at the input of the first layer whose singular values depend on it.

    What it sees is only written in the hook, never read: compiled code would be compiled again.
    """

    def __init__(self):
        self.expected: tuple[int, ...] | None = None
        self.as_expected = False
        self.other: tuple[int, ...] | None = None
        self._hook = None

    def watch(self, owners: Sequence[tuple[nn.Module, LinearOperator]]) -> None:
        """Look at the first convolution among the modules; at none, if there is none."""
        if self._hook is not None:
            self._hook.remove()
        self.expected = self.other = None
        for module, operator in owners:
            if len(operator.input_shape) > 1:
                self.expected = operator.input_shape
                self._hook = module.register_forward_pre_hook(self)
                return

    def __call__(self, module: nn.Module, args: tuple) -> None:
        """Look at what the module is fed."""
        if module.training:
            size = tuple(args[0].shape[-len(self.expected) :])
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
