"""Batch norms where weights are sharded (FSDP2): which statistics are folded in and saved."""

import json

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader

from hf_specreg import SpecRegModel
from hf_specreg.data.datasets import build_splits
from hf_specreg.encoders.pinned import pin_norms
from hf_specreg.recipes.supervised import parse
from hf_specreg.training.distributed import has_own_statistics, synchronize_batch_norms
from hf_specreg.training.images import build_images
from hf_specreg.training.metrics import classification_scores
from tests.processes import run
from tests.recipes.test_supervised import TINY
from tests.training.test_sharded import FSDP2

RESNET = [
    *(*TINY, "--epochs", "1", "--data.train_samples", "256", "--augment.kind", "none"),
    *("--model.name", "resnet20_cifar", "--model.args", '{"channels": [4, 8], "layers": [1, 1]}'),
    *("--penalty.burn_in_epochs", "0", "--optimizer.opt", "momentum", "--optimizer.lr", "0.05"),
]
FOLDED = ["--penalty.fold_norm", "true"]


def train(folder, *more, processes=2, **variables):
    arguments = [*RESNET, *more, "--output_dir", str(folder)]
    run("hf_specreg.recipes.supervised", *arguments, processes=processes, **variables)
    return load_file(folder / "model/model.safetensors")


def test_synchronised_statistics_are_those_of_one_process_and_folded_in(tmp_path):
    folded = [*FOLDED, "--sync_batch_norm", "true"]
    expected = train(tmp_path / "one", *folded, processes=1)
    found = train(tmp_path / "two", *folded, **FSDP2)
    assert any(name.endswith("running_var") for name in expected)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-4, msg=name)


def test_statistics_of_each_process_are_not_folded_in(tmp_path):
    with pytest.raises(AssertionError, match=r"FSDP2.*: set sync_batch_norm to true, or launch"):
        train(tmp_path, *FOLDED, **FSDP2)


def test_all_processes_evaluate_with_the_statistics_that_are_saved(tmp_path):
    train(tmp_path, "--eval_batch_size", "60", **FSDP2)  # batches of both processes
    config, _ = parse([*RESNET, "--output_dir", str(tmp_path)])
    model = SpecRegModel.from_pretrained(tmp_path / "model").eval()
    splits = build_splits(config.data)
    (batch,) = DataLoader(
        build_images(splits, model, config)["test_images"], batch_size=360, collate_fn=tuple
    )
    with torch.no_grad():
        loss = classification_scores(model, [batch], Accelerator(cpu=True))["loss"]
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["test_loss"] == pytest.approx(loss, rel=1e-5)


def test_batch_norms_have_statistics_of_their_own_unless_synchronised_pinned_or_frozen():
    network = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.BatchNorm2d(2, affine=False))
    assert [has_own_statistics(module) for module in network] == [False, True, True]
    network.requires_grad_(False)
    assert [has_own_statistics(module) for module in network] == [False, False, True]
    network.requires_grad_(True)
    pin_norms(network[1])
    synchronize_batch_norms(network)
    assert [has_own_statistics(module) for module in network] == [False] * 3
