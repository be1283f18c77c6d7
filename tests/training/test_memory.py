"""On CPUs a run keeps what memory it frees."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from hf_specreg.training.build import M_MMAP_MAX, M_TRIM_THRESHOLD, keep_freed_memory

ROOT = Path(__file__).parents[2]


@pytest.fixture
def calls(monkeypatch):
    """What is asked of the C library, which grants it."""
    asked = []
    library = SimpleNamespace(mallopt=lambda option, value: asked.append((option, value)) or 1)
    monkeypatch.setattr(ctypes, "CDLL", lambda _: library)
    for name in [*os.environ]:
        if name.startswith(("MALLOC_", "GLIBC_")):
            monkeypatch.delenv(name)
    return asked


def test_all_memory_comes_from_a_heap_that_never_shrinks(calls):
    keep_freed_memory()
    assert calls == [(M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1)]


def test_what_the_environment_says_of_it_is_left(calls, monkeypatch):
    monkeypatch.setenv("MALLOC_ARENA_MAX", "2")  # of something else
    keep_freed_memory()
    assert len(calls) == 2
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1000000")
    keep_freed_memory()
    monkeypatch.delenv("MALLOC_TRIM_THRESHOLD_")
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.mmap_threshold=4096")
    keep_freed_memory()
    assert len(calls) == 2


def test_a_library_that_refuses_or_has_no_mallopt_is_left_as_it_is(calls, monkeypatch):
    refusing = SimpleNamespace(mallopt=lambda *asked: calls.append(asked) or 0)
    monkeypatch.setattr(ctypes, "CDLL", lambda _: refusing)
    keep_freed_memory()
    assert calls == [(M_MMAP_MAX, 0)]
    monkeypatch.setattr(ctypes, "CDLL", lambda _: SimpleNamespace())
    keep_freed_memory()


def test_freed_tensors_are_not_faulted_in_again():
    code = """
import ctypes, resource, torch
from hf_specreg.training.build import keep_freed_memory
if not getattr(ctypes.CDLL(None), "mallopt", None):
    raise SystemExit(3)
keep_freed_memory()
for _ in range(5):
    torch.ones(2**24)  # 64 MiB
    before, now = locals().get("now", 0), resource.getrusage(resource.RUSAGE_SELF).ru_minflt
print(now - before)
"""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**kept, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    if run.returncode == 3:
        pytest.skip("the C library has no mallopt")
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) < 100  # of 16,384 pages
