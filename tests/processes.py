"""A script on one process or several, as a launcher starts them, but forked from a warm one."""

import io
import os
import socket
import sys
import traceback
from importlib import import_module

import lightly.loss
import lightly.transforms
import lightly.utils.benchmarking  # noqa: F401
import torch

import hf_specreg.cli
import hf_specreg.recipes.evaluate  # noqa: F401
from hf_specreg.recipes import self_supervised, supervised, transfer  # noqa: F401
from tests.forks import forks
from tests.training import sharded_data, stock_trainers  # noqa: F401


def run(script, *arguments, processes=2, **variables):
    """Run a module's main on processes that meet at a free port, with variables of environment;
    return what they print.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    shared |= {"ACCELERATE_USE_CPU": "true", **variables}
    context, said = forks(), []
    for rank in range(processes):
        own = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}
        receive, send = context.Pipe(duplex=False)
        process = context.Process(target=main, args=(script, arguments, own, send))
        process.start()
        send.close()
        said.append((process, receive))
    printed = ""
    for process, receive in said:
        output, failure = receive.recv()
        process.join()
        assert not failure, failure
        printed += output
    return printed


def main(script, arguments, variables, send):
    """Run a module's main in this process, and send what it printed, or how it failed."""
    os.environ |= {**variables, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    torch.set_num_threads(1)
    sys.stdout = io.StringIO()
    failure = ""
    try:
        import_module(script).main(list(arguments))
    except BaseException:
        failure = traceback.format_exc()
        raise
    finally:
        send.send((sys.stdout.getvalue(), failure))
