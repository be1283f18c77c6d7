"""The recipes as scripts: on one process, and on two."""

import os
import socket
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2"}


def script(recipe, *arguments):
    """The command of a recipe on one process."""
    return [sys.executable, str(ROOT / f"recipes/{recipe}.py"), *arguments]


def launch(recipe, *arguments):
    """The command of a recipe on two processes, which meet at a port that is free."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    return [*command, "--master_port", port, str(ROOT / f"recipes/{recipe}.py"), *arguments]
