"""Processes that are forked from one that has imported everything, so that they start at once."""

import multiprocessing
import time

# All that any test forks: a process has one such server, which imports when it is first asked.
PRELOADED = [
    "tests.test_kills",
    "tests.training.data_parallel",
    "tests.training.test_interruption",
    "tests.processes",
]


def forks():
    """Return multiprocessing's context, with its server running."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    first = context.Process(target=time.sleep, args=(0,))
    first.start()
    first.join()
    return context
