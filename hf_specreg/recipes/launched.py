"""The processes of a command, where a launcher started several."""

from datetime import timedelta

from accelerate import PartialState
from accelerate.utils import parse_flag_from_env


def launched() -> PartialState:
    """Return the processes that `accelerate launch` or `torchrun` started, or this one alone; the
    fast wait for the slow, for as long as it takes.
    """
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU")
    return PartialState(cpu=on_cpu, timeout=timedelta(days=7))
