"""Runs with sharded weights (FSDP2) on two processes of a CPU, as accelerate is told to."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import FullyShardedDataParallelPlugin
from safetensors.torch import load_file

from hf_specreg.spectral.regularizers import RegularizersConfig
from hf_specreg.spectral.regularizers.bss import BSSConfig
from hf_specreg.spectral.regularizers.sensitivity import SensitivityConfig
from hf_specreg.training.adversarial import AdversarialConfig
from hf_specreg.training.checkpoints import CheckpointError, all_checkpoints
from hf_specreg.training.config import RunConfig, SelfSupervisedRunConfig, TransferRunConfig
from hf_specreg.training.model import ModelConfig
from hf_specreg.training.optimizer import OptimizerConfig
from hf_specreg.training.self_supervision import SelfSupervisedConfig
from hf_specreg.training.sharded import check_settings
from hf_specreg.training.state import RunState
from hf_specreg.training.transfer import TransferConfig
from tests.processes import run
from tests.recipes.test_supervised import TINY

FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
TRAINING = [
    *(*TINY, "--epochs", "2", "--data.train_samples", "256", "--augment.kind", "none"),
    *("--penalty.burn_in_epochs", "0", "--accumulation", "2", "--optimizer.clip_grad", "1"),
    *("--optimizer.opt", "momentum", "--optimizer.lr", "0.05"),
    *("--checkpoint.every_steps", "3", "--checkpoint.keep", "9", "--log_every", "1"),
]
SENSITIVITY = SensitivityConfig(strength=0.1)


def train(folder, *more, script="hf_specreg.recipes.supervised", **options):
    return run(script, *TRAINING, "--output_dir", str(folder), *more, **options)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A run of one process; one of sharded weights; and that one from its first checkpoint on, with
    accelerate in its own state of FSDP2.
    """
    root = tmp_path_factory.mktemp("sharded")
    whole, sharded, resumed = (root / name for name in ("whole", "sharded", "resumed"))
    train(whole, processes=1)
    train(sharded, **FSDP2)
    shutil.copytree(sharded, resumed)
    shutil.rmtree(resumed / "model")
    first, *later = all_checkpoints(resumed / "checkpoints")
    assert first.name == "step_00000003"  # within an epoch
    for checkpoint in later:
        shutil.rmtree(checkpoint)
    train(resumed, "--resume", script="tests.training.as_fsdp", **FSDP2)
    return whole, sharded, resumed


def test_a_run_of_sharded_weights_gives_those_of_whole_ones(folders):
    whole, sharded, _ = folders
    expected, found = (load_file(folder / "model/model.safetensors") for folder in (whole, sharded))
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=0, atol=1e-5, msg=name)
    early = load_file(all_checkpoints(sharded / "checkpoints")[0] / "model/model.safetensors")
    assert max((early[name] - weight).abs().max() for name, weight in found.items()) > 1e-3


def test_a_run_of_sharded_weights_goes_on_to_the_same_bits(folders):
    _, sharded, resumed = folders
    expected, found = (
        load_file(folder / "model/model.safetensors") for folder in (sharded, resumed)
    )
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())
    assert (resumed / "metrics.jsonl").read_text().count('"penalty"') == 8


def test_a_run_of_sharded_weights_clips_by_the_norm_of_the_whole_gradient(folders):
    clipped = []
    for folder in folders[:2]:
        lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        clipped.append([line["clipped_to"] for line in lines if "clipped_to" in line])
    assert min(clipped[0]) < 0.9
    assert clipped[1] == pytest.approx(clipped[0], rel=1e-4)


def test_a_run_goes_on_with_weights_as_they_were_launched(folders):
    whole, sharded, _ = folders
    for folder, shards, there in ((whole, "some", "whole"), (sharded, None, "sharded")):
        checkpoint = all_checkpoints(folder / "checkpoints")[0]
        with pytest.raises(CheckpointError, match=f"with {there} weights: go on with it as it was"):
            RunState._load_weights(SimpleNamespace(shards=shards), checkpoint)


@pytest.mark.parametrize(
    ("settings", "config", "says"),
    [
        ({"fsdp_version": 1}, RunConfig(), "fsdp_version to 2"),
        ({"cpu_offload": True}, RunConfig(), "fsdp_offload_params"),
        ({"activation_checkpointing": True}, RunConfig(), "fsdp_activation_checkpointing"),
        ({"cpu_ram_efficient_loading": True}, RunConfig(), "fsdp_cpu_ram_efficient_loading"),
        ({}, RunConfig(compile=True, channels_last=True), "compile, channels_last: switch it off"),
        ({}, RunConfig(optimizer=OptimizerConfig(ema_decay=0.9)), "optimizer.ema_decay"),
        ({}, RunConfig(adversarial=AdversarialConfig(method="fgsm")), "adversarial"),
        ({}, RunConfig(regularizers=RegularizersConfig(spectral_norm=True)), r"\.spectral_norm"),
        ({}, RunConfig(regularizers=RegularizersConfig(sensitivity=SENSITIVITY)), r"\.sensitivity"),
        ({"auto_wrap_policy": "SIZE_BASED_WRAP"}, RunConfig(), "SIZE_BASED_WRAP"),
        ({}, SelfSupervisedRunConfig(ssl=SelfSupervisedConfig(method="byol")), "ssl.method byol"),
        (
            {},
            TransferRunConfig(
                model=ModelConfig(pretrained=True), transfer=TransferConfig(train="lora")
            ),
            "transfer.train lora",
        ),
    ],
)
def test_what_does_not_go_with_shards_is_an_error_that_says_what_does(
    settings, config, says, monkeypatch
):
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "false")  # which the plugin sets
    monkeypatch.setenv("FSDP_VERSION", "2")
    with pytest.raises(ValueError, match=says):
        check_settings(FullyShardedDataParallelPlugin(**settings), config, mixed_precision="no")
    plain = FullyShardedDataParallelPlugin(cpu_ram_efficient_loading=False)
    bss = RegularizersConfig(bss=BSSConfig(strength=0.1))
    check_settings(plain, RunConfig(regularizers=bss), mixed_precision="no")
    with pytest.raises(ValueError, match=r"fp16: switch it off.*DistributedDataParallel"):
        check_settings(plain, RunConfig(), mixed_precision="fp16")
    monkeypatch.setenv("FSDP_TRANSFORMER_CLS_TO_WRAP", "Block")
    with pytest.raises(ValueError, match="TRANSFORMER_BASED_WRAP only"):
        check_settings(plain, RunConfig(), mixed_precision="no")
    named = FullyShardedDataParallelPlugin(auto_wrap_policy="TRANSFORMER_BASED_WRAP")
    check_settings(named, RunConfig(), mixed_precision="no")
