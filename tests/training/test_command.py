"""The command line of the recipes: what it says of mistakes, in one line."""

import re
from dataclasses import fields, is_dataclass

import pytest

from hf_specreg.recipes.supervised import parse, train
from hf_specreg.training.command import parse_run, run_recipe
from hf_specreg.training.config import RunConfig


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--penalty.strenght", "1"], "no key 'penalty.strenght': did you mean penalty.strength?"),
        (["--lr=0.1"], "no key 'lr': did you mean optimizer.lr?"),
        (["--config", "FILE"], "no key 'penalty.strenght': did you mean penalty.strength?"),
        (["--config", "missing.yaml"], "there is no file or name 'missing.yaml'"),
        (["--config", "digts"], "'digts': did you mean digits?"),
        (["--help=penlty"], "there is no 'penlty': did you mean penalty?"),
        (["--penalty.scope", "head"], r"penalty.scope \(head\) must be one of 'features', 'all'"),
        (["--penalty.burn_in_epochs", "x"], r"burn_in_epochs \(x\) must be float or null"),
        (["--epochs", "many"], r"epochs \(many\) must be int"),
        (["--epochs", "0"], r"epochs \(0\) must be at least 1"),
        (["--regularizers.bss.k", "0"], r"regularizers.bss.k \(0\) must be at least 1"),
        (["--data.streaming", "true"], "steps_per_epoch is needed for a stream"),
        (["digits"], "no place for 'digits': did you mean --config digits?"),
        (["--config"], "--config NAME is missing: hf-specreg configs lists names"),
        (["--config", "studies/digits"], "is of a study: hf-specreg study --config digits"),
        ([], r"what is trained on what\? Name a configuration, such as --config digits"),
        (["--resume", "--epochs", "3"], "or --data.source and --model.name"),
    ],
)
def test_a_mistake_is_one_line_that_names_it_and_what_may_have_been_meant(
    arguments, message, tmp_path, capsys
):
    file = tmp_path / "run.yaml"
    file.write_text("penalty:\n  strenght: 1\n")
    with pytest.raises(SystemExit) as stopped:
        parse([str(file) if a == "FILE" else a for a in arguments])
    said = capsys.readouterr().err
    assert stopped.value.code == 2
    assert said.count("\n") == 1
    assert re.search(f"error: .*{message}", said)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data.source", "/no/such"], "there is no folder /no/such"),
        (["--batch_size", "5000"], r"batch_size (5000) exceeds the 1455 training images"),
        (["--model.name", "resnet18_cifr"], "did you mean resnet18_cifar"),
    ],
)
def test_what_a_run_cannot_begin_with_is_one_line_too(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        run_recipe(parse, train, ["--data.source=digits", *arguments, f"--output_dir={tmp_path}"])
    said = capsys.readouterr().err
    assert stopped.value.code == 2
    assert message in said
    assert said.count("\n") == 1


def test_an_error_from_deeper_keeps_its_traceback():
    def train(config, *, resume):
        int("no number")

    with pytest.raises(ValueError, match="invalid literal"):
        run_recipe(parse, train, ["--data.source", "digits"])


def said_by(argument, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse_run(RunConfig, "train", "Train.", [argument])
    assert stopped.value.code == 0
    return capsys.readouterr().out.splitlines()


def test_the_help_names_every_group_and_fits_a_screen(capsys):
    said = said_by("--help", capsys)
    assert said[0].endswith("[--config NAME] [--resume] [--KEY VALUE ...]")
    assert len(said) < 60
    assert max(map(len, said)) <= 80
    for field in fields(RunConfig):
        shown = f"  {field.name}: " if is_dataclass(field.type) else field.name
        assert any(shown in line for line in said), field.name


def test_all_of_the_help_has_every_key_and_a_group_has_its_own(capsys):
    every = said_by("--help=all", capsys)
    for key in ("--epochs int", "--optimizer.betas", "--regularizers.bss.k int", "--data.source"):
        assert any(line.strip().startswith(key) for line in every), key
    group = [line for line in said_by("--help=penalty", capsys) if line.startswith("  --")]
    assert {line.split()[0].partition(".")[0] for line in group} == {"--penalty"}
    assert set(group) <= set(every)


def test_a_configuration_is_found_by_its_name_and_by_its_place_in_a_checkout(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    named, _ = parse(["--config", "digits", "--seed", "3"])
    placed, _ = parse(["--config", "recipes/configs/digits.yaml", "--seed", "3"])
    assert named == placed
    (tmp_path / "digits").write_text("epochs: 7")
    assert parse(["--config", "digits"])[0].epochs == 7
