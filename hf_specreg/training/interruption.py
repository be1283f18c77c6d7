"""A scheduler's SIGTERM: the run saves a checkpoint and exits with code 75.

One process does so at its next step, several when they next ask each other, every ten steps.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType

from torch.utils.data import DataLoader

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: try again
CHECK_EVERY = 10  # steps, on which several processes agree that one of them was told to stop


class RunStopped(SystemExit):
    """The run was told to stop, and has left a checkpoint to go on from."""

    def __init__(self):
        super().__init__(EXIT_CODE)


def ignore_sigterm(worker: int) -> None:
    """Let a data loader's worker outlive a SIGTERM to its whole group: its process ends it."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


@contextmanager
def ending_workers(*loaders: DataLoader) -> Iterator[None]:
    """End the workers that loaders keep between epochs, however the context is left.

    At its exit python would end them by SIGTERM, which they ignore, and wait for ever.
    """
    try:
        yield
    finally:
        for loader in loaders:
            loader = getattr(loader, "base_dataloader", loader)  # within accelerate's
            iterator = getattr(loader, "_iterator", None)
            if iterator is not None:
                iterator._shutdown_workers()
                loader._iterator = None


class StopSignal:
    """Remembers, within the context, that SIGTERM came; outside, what it did before is restored.

    In a thread that is not the main one, signals cannot be handled, and nothing is remembered.
    """

    def __init__(self):
        self.came = False
        self._before = signal.SIG_DFL

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._remember)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._before or signal.SIG_DFL)  # None: not Python's

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.came = True
