"""On CPUs a run keeps what memory it frees."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest

MEMORY = Path(__file__).parents[2] / "hf_specreg/training/memory.py"
PAGES = 2**26 // os.sysconf("SC_PAGE_SIZE")
# Allocates, fills and frees 64 MiB again and again; prints the page faults of the last time.
CODE = f"""
import resource, runpy
runpy.run_path({str(MEMORY)!r})["keep_freed_memory"]()
for _ in range(5):
    b"x" * 2**26
    before, now = locals().get("now", 0), resource.getrusage(resource.RUSAGE_SELF).ru_minflt
print(now - before)
"""


def faults(**settings):
    """The page faults of an allocation, in a process of its own with these variables."""
    others = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}
    run = subprocess.run(
        [sys.executable, "-c", CODE], env={**others, **settings}, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    return int(run.stdout)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="a C library without mallopt")
def test_freed_memory_is_not_faulted_in_again_unless_the_environment_sets_malloc():
    assert faults() < PAGES / 100
    assert faults(MALLOC_ARENA_MAX="2") < PAGES / 100  # of something else
    assert faults(MALLOC_MMAP_THRESHOLD_="131072") >= PAGES
    assert faults(GLIBC_TUNABLES="glibc.malloc.mmap_threshold=131072") >= PAGES
