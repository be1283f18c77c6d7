"""Several processes train to the weights of one that has the whole batch."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from hf_specreg.encoders.pinned import pin_norms
from hf_specreg.training.distributed import CpuSyncBatchNorm, synchronize_batch_norms
from tests.forks import forks
from tests.processes import run
from tests.training import data_parallel


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The weights of one, two and four processes, after the same batches."""
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


@pytest.fixture(scope="module")
def images_seen(tmp_path_factory):
    """What each of two processes got of 103 images."""
    folder = tmp_path_factory.mktemp("images")
    run("tests.training.sharded_data", str(folder))
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


@pytest.mark.parametrize("device", ["cpu", "meta"])  # and as on a GPU
def test_pinned_batch_norms_have_nothing_to_synchronize(device):
    pinned = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    pin_norms(pinned)
    model = nn.Sequential(pinned, nn.BatchNorm2d(2)).to(device)
    synchronize_batch_norms(model)
    assert type(model[0][1]) is nn.BatchNorm2d
    assert type(model[1]) is (CpuSyncBatchNorm if device == "cpu" else nn.SyncBatchNorm)
    assert not model.train()[0][1].training
    assert model[1].training
