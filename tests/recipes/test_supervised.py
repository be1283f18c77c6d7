"""The real scripts: train, resume and report on real digits; every configuration is valid."""

import json
import re
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from safetensors.torch import load_file

from hf_specreg.cli import main as cli
from hf_specreg.encoders.model import SpecRegModel
from hf_specreg.recipes import self_supervised, supervised, transfer
from hf_specreg.recipes.supervised import main, parse
from hf_specreg.training.model import build_model
from tests.pages import page
from tests.processes import run

RECIPES = {"supervised": supervised, "self_supervised": self_supervised, "transfer": transfer}
ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "recipes/configs").glob("*.yaml"))
TINY = [
    *("--config", str(ROOT / "recipes/configs/digits.yaml")),
    *("--penalty.strength", "0.01", "--regularizers.sensitivity.strength", "0"),
    *(
        "--epochs",
        "2",
        "--model.args",
        '{"patch_size": 1, "depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16]}',
    ),
    *("--penalty.burn_in_epochs", "1", "--checkpoint.every_steps", "4", "--log_every", "4"),
]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_configuration_is_valid_and_its_model_can_be_built(path):
    head = path.read_text().split("\noutput_dir")[0]
    recipe = re.search(rf"hf_?-?specreg train (\S+) --config {path.stem}\b", head)[1]
    config, resume = RECIPES[recipe.replace("-", "_")].parse(["--config", path.stem])
    assert not resume
    with torch.device("meta"):
        if not config.model.pretrained and config.model.library != "saved":
            assert build_model(config.model, [str(n) for n in range(10)]).num_classes == 10


@pytest.mark.parametrize("name", ["one_node", "one_node_fsdp2", "two_nodes"])
def test_accelerates_configurations_are_read_and_named_in_the_docs(name):
    path = ROOT / f"recipes/configs/accelerate/{name}.yaml"
    config = load_config_from_file(str(path))
    assert config.num_processes == 8 * config.num_machines
    assert config.distributed_type == ("FSDP" if name.endswith("fsdp2") else "MULTI_GPU")
    assert f"--config_file {path.name}" in path.read_text()
    assert f"hf-specreg configs accelerate/{name} > {path.name}" in page("training")
    assert f"--config_file {path.name}" in page("training")


def test_command_line_overrides_the_file():
    config, _ = parse([*TINY, "--penalty.strength", "0.5", "--data.num_workers", "1"])
    assert config.penalty.strength == 0.5
    assert config.penalty.burn_in_epochs == 1
    assert config.data.num_workers == 1
    assert config.model.args["dims"] == [8, 8, 16, 16]
    assert config.optimizer.opt == "adamw"


def test_two_processes_give_the_weights_of_one(tmp_path):
    """The same global batches, split over two processes; without batch norm, so nothing else "
    "differs."""
    arguments = [*TINY, "--epochs", "1", "--augment.kind", "none", "--optimizer.opt", "momentum"]
    arguments += ["--penalty.burn_in_epochs", "0", "--optimizer.lr", "0.01", "--log_every", "1"]
    one, two = tmp_path / "one", tmp_path / "two"
    for processes, folder in ((1, one), (2, two)):
        output = run(
            "hf_specreg.recipes.supervised",
            *arguments,
            "--output_dir",
            str(folder),
            processes=processes,
        )
        assert json.loads(output)["test_images"] == 360
    expected, found = [load_file(p / "model/model.safetensors") for p in (one, two)]
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-5)
    losses = []
    for folder in (one, two):
        lines = [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]
        losses.append([line["loss"] for line in lines if "loss" in line])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert SpecRegModel.from_pretrained(two / "model").metadata["step"] == 17


def test_parameters_that_are_never_used_do_not_stop_two_processes(tmp_path):
    """DINOv2 has a mask token that classification does not touch."""
    network = {"image_size": 16, "patch_size": 8, "hidden_size": 16, "num_hidden_layers": 1}
    network["num_attention_heads"] = 2
    config = ROOT / "recipes/configs/digits_transformers_vit.yaml"
    arguments = ["--config", str(config), "--epochs", "1", "--data.train_samples", "256"]
    arguments += ["--model.name", "dinov2", "--model.args", json.dumps(network)]
    arguments += ["--optimizer.warmup_epochs", "0", "--penalty.strength", "0.01"]
    for term in ("penalty", "regularizers.sensitivity"):
        arguments += [f"--{term}.burn_in_epochs", "0"]
    arguments += ["--output_dir", str(tmp_path / "run")]
    assert json.loads(run("hf_specreg.recipes.supervised", *arguments))["step"] == 4


def test_the_recipe_prints_its_result_and_spectrum_reads_the_model(tmp_path, capsys):
    arguments = ["--epochs", "1", "--penalty.burn_in_epochs", "0"]
    main([*TINY, *arguments, "--output_dir", str(tmp_path / "run")])
    result = json.loads(capsys.readouterr().out)
    assert result["test_images"] == 360
    assert 0 <= result["test_accuracy"] <= 1
    cli(["spectrum", result["model"], "--scope", "all"])
    output = capsys.readouterr().out
    assert "head.fc" in output
    total = float(output.rsplit(":", 1)[1])
    cli(["spectrum", result["model"]])
    features = float(capsys.readouterr().out.rsplit(":", 1)[1])
    assert features == pytest.approx(result["sum_sigma2"], rel=1e-3)
    assert features < total
