"""On CPUs, have glibc keep what memory a training step frees for the next one."""

import ctypes
import os

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h
MALLOC_SETTINGS = ("TRIM_THRESHOLD", "TOP_PAD", "MMAP_THRESHOLD", "MMAP_MAX")


def keep_freed_memory() -> None:
    """Have glibc keep for the next step what this one frees, in all of this process.

    By default it gives the activations of a step back to the system as soon as the top of the heap
    is free, to fault them in again, page by page, in the next: a tenth of a small network's step.
    The price is that the process stays as large as it ever was. Does nothing with another C
    library, or where the environment sets such a threshold of malloc already.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    said = any(f"MALLOC_{name}_" in os.environ for name in MALLOC_SETTINGS)
    said |= "glibc.malloc." in os.environ.get("GLIBC_TUNABLES", "")
    if mallopt is not None and not said and mallopt(M_MMAP_MAX, 0):  # all from the heap,
        mallopt(M_TRIM_THRESHOLD, -1)  # which never shrinks
