"""The real script: from one set of digits to another, what it trains, and before against after."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hf_specreg import RobustnessReport, SpecRegModel
from hf_specreg.recipes import supervised, transfer
from hf_specreg.recipes.transfer import main, parse, train
from hf_specreg.training.checkpoints import CheckpointError
from tests import tiny
from tests.interrupted import Interrupted, interrupted_at
from tests.processes import run

ROOT = Path(__file__).parents[2]
ARGS = json.dumps(tiny.ARGS["resnet20_cifar"])
PROBE = ["--transfer.train", "head", "--penalty.strength", "0"]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A small ResNet, trained on the digits 0 to 4."""
    folder = tmp_path_factory.mktemp("source")
    arguments = ["--config", str(ROOT / "recipes/configs/digits.yaml"), "--epochs", "2"]
    arguments += ["--model.name", "resnet20_cifar", "--model.args", ARGS]
    arguments += ["--regularizers.sensitivity.strength", "0"]
    arguments += ["--model.input_size", "[1, 8, 8]", "--data.classes", "['0', '1', '2', '3', '4']"]
    config, _ = supervised.parse([*arguments, "--output_dir", str(folder)])
    return supervised.train(config).model_folder


def arguments(source, folder, *more):
    return [
        *("--config", str(ROOT / "recipes/configs/digits_transfer.yaml")),
        *("--model.name", str(source), "--data.classes", "['5', '6', '7', '8', '9']"),
        *("--epochs", "2", "--batch_size", "64", "--penalty.burn_in_epochs", "1"),
        *("--report.samples", "0", "--output_dir", str(folder)),
        *more,
    ]


def test_before_and_after_are_compared_on_the_same_images(source, tmp_path, capsys):
    attack = ["--report.samples", "8", "--report.attacks", '{"tangent": {"iterations": 2}}']
    main(arguments(source, tmp_path, *attack))
    result = json.loads(capsys.readouterr().out)
    assert result["before_logistic_accuracy"] > 0.5
    before, after = (RobustnessReport.load(tmp_path / f"{n}_report") for n in ("before", "model"))
    assert before.content["model"]["id"] == "before (probe)"
    assert after.content["model"]["id"] == "after"
    assert before.content["data"] == after.content["data"]
    assert before.content["data"]["split"] == "test"
    assert before.content["data"]["splits"]["classes"] == list("56789")
    assert "against before (probe)" in RobustnessReport.compare([before, after]).to_markdown()
    assert (tmp_path / "report.html").stat().st_size > 1000
    assert SpecRegModel.from_pretrained(tmp_path / "model").label_names == list("56789")
    metadata = SpecRegModel.from_pretrained(tmp_path / "model").metadata
    assert metadata["before"]["config"]["data"]["classes"] == list("01234")


def test_frozen_stages_and_kept_statistics_are_the_pretrained_ones_bit_for_bit(source, tmp_path):
    more = ["--transfer.frozen_stages", "2", "--model.norms", "pinned"]
    trained = train(parse(arguments(source, tmp_path, *more))[0]).model_folder
    before, after = (load_file(f / "model.safetensors") for f in (source, trained))
    frozen = {n for n in before if n.startswith(("conv1", "bn1", "stages.0"))}
    statistics = {n for n in before if "running" in n}
    assert all(torch.equal(before[n], after[n]) for n in frozen | statistics)
    assert not torch.equal(before["stages.1.0.conv1.weight"], after["stages.1.0.conv1.weight"])


@pytest.mark.parametrize("mode", ["head", "lora"])
def test_a_linear_probe_and_lora_leave_plain_models_that_can_be_loaded(source, tmp_path, mode):
    more = PROBE if mode == "head" else ["--transfer.train", mode]
    config, _ = parse(arguments(source, tmp_path, *more))
    trained = train(config).model_folder
    before, after = (load_file(f / "model.safetensors") for f in (source, trained))
    assert before.keys() == after.keys()
    changed = {n for n in before if not torch.equal(before[n], after[n])}
    if mode == "head":
        assert changed == {"fc.weight", "fc.bias"}
    else:
        assert any(n.startswith("stages") for n in changed)
        assert "bn1.weight" not in changed


def test_the_probes_head_is_where_the_training_starts(source, tmp_path):
    more = ["--transfer.head", "probe", "--optimizer.lr", "0", "--penalty.strength", "0"]
    trained = train(parse(arguments(source, tmp_path, *more))[0]).model_folder
    before, after = (load_file(f / "model.safetensors") for f in (tmp_path / "before", trained))
    assert torch.equal(before["fc.weight"], after["fc.weight"])
    fresh, _ = parse(arguments(source, tmp_path / "fresh", *more, "--transfer.head", "fresh"))
    other = load_file(train(fresh).model_folder / "model.safetensors")
    assert not torch.equal(before["fc.weight"], other["fc.weight"])


def test_all_trainings_of_an_encoder_are_kept(source, tmp_path):
    more = ["--epochs", "1", "--penalty.burn_in_epochs", "0"]
    once = train(parse(arguments(source, tmp_path / "once", *more))[0]).model_folder
    twice = train(parse(arguments(once, tmp_path / "twice", *more))[0]).model_folder
    metadata = SpecRegModel.from_pretrained(twice).metadata
    assert metadata["before"]["before"]["config"]["data"]["classes"] == list("01234")


@pytest.mark.parametrize("mode", ["l2_sp and bss", "lora and average", "spectral_norm", "fused"])
def test_a_stopped_transfer_goes_on_to_the_weights_of_the_whole_one(
    source, tmp_path, monkeypatch, mode
):
    near = ["--regularizers.l2_sp.strength", "0.1", "--regularizers.bss.strength", "0.001"]
    more = {
        "l2_sp and bss": near,
        "lora and average": ["--transfer.train", "lora", "--optimizer.ema_decay", "0.9"],
        "fused": ["--model.norms", "fused", "--optimizer.clip_grad", "1"],
        "spectral_norm": ["--regularizers.spectral_norm", "true", "--transfer.head", "fresh"],
    }[mode]
    more += ["--checkpoint.every_steps", "2", "--log_every", "1"]
    whole, _ = parse(arguments(source, tmp_path / "whole", *more))
    expected = load_file(train(whole).model_folder / "model.safetensors")
    lines = [json.loads(x) for x in (tmp_path / "whole/metrics.jsonl").read_text().splitlines()]
    last = [line for line in lines if "loss" in line][-1]
    assert last["penalty"] > 0
    if mode == "l2_sp and bss":
        assert last["l2_sp"] > 0
        assert last["bss"] > 0

    broken, _ = parse(arguments(source, tmp_path / "broken", *more))
    with monkeypatch.context() as patch:
        patch.setattr(transfer, "Supervised", interrupted_at(12))
        with pytest.raises(Interrupted):
            train(broken)
    again = load_file(train(broken, resume=True).model_folder / "model.safetensors")
    assert expected.keys() == again.keys()
    assert all(torch.equal(expected[n], again[n]) for n in expected)


def test_a_run_is_refused_before_anything_of_it_is_overwritten(source, tmp_path):
    config, _ = parse(arguments(source, tmp_path, "--transfer.head", "probe"))
    train(config)
    before = (tmp_path / "before/model.safetensors").read_bytes()
    other = SpecRegModel.from_pretrained(source)
    with torch.no_grad():
        other.network.conv1.weight.mul_(2)
    other.save_pretrained(tmp_path / "other")
    again, _ = parse(arguments(tmp_path / "other", tmp_path, "--transfer.head", "probe"))
    with pytest.raises(CheckpointError, match="already holds a run"):
        train(again)
    with pytest.raises(CheckpointError, match=r"model.name"):
        train(again, resume=True)
    assert (tmp_path / "before/model.safetensors").read_bytes() == before


def test_another_start_is_refused_where_weights_are_kept_near_it(source, tmp_path):
    folder = shutil.copytree(source, tmp_path / "encoder")
    more = ["--regularizers.l2_sp.strength", "0.1"]
    config, _ = parse(arguments(folder, tmp_path / "run", *more))
    train(config)
    other = SpecRegModel.from_pretrained(folder)
    with torch.no_grad():
        other.network.conv1.weight.mul_(2)
    other.save_pretrained(folder)
    with pytest.raises(CheckpointError, match="no longer the encoder that the run"):
        train(config, resume=True)


def test_a_wrong_report_is_an_error_before_training(source, tmp_path):
    more = ["--report.samples", "4", "--report.attacks", '{"tangnet": {}}']
    with pytest.raises(ValueError, match="no attack 'tangnet'"):
        train(parse(arguments(source, tmp_path, *more))[0])
    assert not (tmp_path / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--transfer.train", "head", "--transfer.frozen_stages", "1"], "frozen_stages is for"),
        (["--transfer.train", "head"], "all that ['penalty'] are of: set their"),
        (
            [*PROBE, "--regularizers.sensitivity.strength", "0.1"],
            "all that ['regularizers.sensitivity'] are of: set their strength to 0",
        ),
        (["--transfer.train", "lora", "--regularizers.l2_sp.strength", "1"], "LoRA's begin at 0"),
        (["--transfer.train", "head", "--regularizers.spectral_norm", "true"], "with a fresh head"),
        (["--model.library", "timm", "--model.name", "resnet18_cifar"], "nothing to transfer"),
    ],
)
def test_settings_that_do_not_fit_are_named(more, message, tmp_path, capsys):
    with pytest.raises((ValueError, SystemExit)) as error:
        parse(arguments("anything", tmp_path, *more))
    assert message in f"{error.value}{capsys.readouterr().err}"


def test_two_processes_transfer_and_report(source, tmp_path):
    attack = ["--report.samples", "8", "--report.attacks", '{"tangent": {"iterations": 2}}']
    more = [*attack, "--transfer.head", "probe"]
    result = json.loads(run("hf_specreg.recipes.transfer", *arguments(source, tmp_path, *more)))
    assert result["before_logistic_accuracy"] > 0.5
    assert RobustnessReport.load(tmp_path / "model_report").content["n"] == 8
    assert (tmp_path / "report.html").is_file()
