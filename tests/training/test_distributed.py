"""Several processes train to the weights of one that has the whole batch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The weights of one process and of two, after the same 20 batches."""
    folders = []
    for processes in (1, 2):
        folder = tmp_path_factory.mktemp(f"processes_{processes}")
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc_per_node", str(processes), str(HERE / "data_parallel.py"), str(folder)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        output = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert output.returncode == 0, output.stderr[-3000:]
        folders.append(folder)
    return folders


@pytest.mark.parametrize(
    "method", ["supervised", "norm_act", "barlow-twins", "simclr", "vicreg", "byol"]
)
def test_two_processes_train_to_the_weights_of_one(runs, method):
    """With batch norms and the penalty; embeddings and statistics are of the whole batch."""
    one, two = runs
    expected = load_file(one / f"{method}-0.safetensors")
    ranks = [load_file(two / f"{method}-{rank}.safetensors") for rank in (0, 1)]
    assert any(key.startswith("vector.") for key in expected)
    for name, value in expected.items():
        torch.testing.assert_close(ranks[0][name], value, rtol=1e-5, atol=1e-5, msg=name)
        assert torch.equal(ranks[0][name], ranks[1][name]), name
