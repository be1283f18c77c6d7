"""Several processes train to the weights of one that has the whole batch."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from safetensors.torch import load_file

from hf_specreg.training.accelerator import check_processes
from tests.forks import forks
from tests.training import data_parallel

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The weights of one, two and four processes, after the same 20 batches."""
    context, folders = forks(), {}
    for processes in (1, 2, 4):
        folder = folders[processes] = tmp_path_factory.mktemp(f"processes_{processes}")
        ranks = [
            context.Process(target=data_parallel.main, args=(folder, rank, processes), daemon=True)
            for rank in range(processes)
        ]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join(timeout=200)
        assert [rank.exitcode for rank in ranks] == [0] * processes
    return folders


def launch(name, folder, *, processes):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", str(processes), str(HERE / name), str(folder)]
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    output = subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert output.returncode == 0, output.stderr[-3000:]


@pytest.fixture(scope="module")
def images_seen(tmp_path_factory):
    """What each of two processes got of 103 images."""
    folder = tmp_path_factory.mktemp("images")
    launch("sharded_data.py", folder, processes=2)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("kind", ["map", "stream"])
def test_no_image_is_lost_or_seen_twice(images_seen, kind):
    """In training, whole batches only; in evaluation, the uneven last ones are counted once."""
    first, second = images_seen
    for epoch in (0, 1):
        parts = first[f"{kind}, epoch {epoch}"], second[f"{kind}, epoch {epoch}"]
        assert [len(part) for part in parts] == [48, 48]
        assert len(set(parts[0]) | set(parts[1])) == 96
    assert first[f"{kind}, epoch 0"] != first[f"{kind}, epoch 1"]
    for seen in (first, second):
        assert sorted(seen[f"{kind}, evaluation"]) == list(range(103))


@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize(
    "method",
    ["supervised", "norm_act", "transfer", "barlow-twins", "simclr", "vicreg", "byol"],
)
def test_several_processes_train_to_the_weights_of_one(runs, method, processes):
    """With batch norms, and the penalty's layers shared out over the processes; embeddings and
    statistics are of the whole batch. Weights and warm vectors are the same on all processes."""
    expected = load_file(runs[1] / f"{method}-0.safetensors")
    ranks = [
        load_file(runs[processes] / f"{method}-{rank}.safetensors") for rank in range(processes)
    ]
    assert any(key.startswith("vector.") for key in expected)
    for name, value in expected.items():
        torch.testing.assert_close(ranks[0][name], value, rtol=1e-5, atol=1e-5, msg=name)
        assert all(torch.equal(ranks[0][name], other[name]) for other in ranks[1:]), name


@pytest.mark.parametrize(
    ("kind", "processes", "launched", "says"),
    [
        ("FSDP", 2, 2, "DistributedDataParallel, not with FSDP.*FSDP2 add SpectralPenalty"),
        ("DEEPSPEED", 2, 2, "not with DEEPSPEED"),
        ("NO", 1, 2, "2 processes were launched.*ACCELERATE_USE_CPU=true"),
    ],
)
def test_a_launch_that_cannot_work_is_an_error_that_says_which_can(kind, processes, launched, says):
    state = SimpleNamespace(distributed_type=DistributedType(kind), num_processes=processes)
    with pytest.raises(ValueError, match=says):
        check_processes(state, launched=launched)
    fine = SimpleNamespace(distributed_type=DistributedType.MULTI_GPU, num_processes=2)
    check_processes(fine, launched=2)
