"""The command line of the recipes: what it says of mistakes, in one line."""

import re

import pytest

from hf_specreg.training.command import parse_run, run_recipe
from hf_specreg.training.config import RunConfig
from recipes.supervised import parse, train


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--penalty.strenght", "1"], "no key 'penalty.strenght': did you mean penalty.strength?"),
        (["--lr=0.1"], "no key 'lr': did you mean optimizer.lr?"),
        (["--config", "FILE"], "no key 'penalty.strenght': did you mean penalty.strength?"),
        (["--config", "missing.yaml"], "File does not exist: .*missing.yaml"),
        (["--penalty.scope", "head"], r"penalty.scope \(head\) must be one of 'features', 'all'"),
        (["--penalty.burn_in_epochs", "x"], r"burn_in_epochs \(x\) must be float or null"),
        (["--epochs", "many"], r"epochs \(many\) must be int"),
        (["--epochs", "0"], r"epochs \(0\) must be at least 1"),
        (["--regularizers.bss.k", "0"], r"regularizers.bss.k \(0\) must be at least 1"),
        (["--data.streaming", "true"], "steps_per_epoch is needed for a stream"),
        (["extra"], "unrecognized arguments: extra"),
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
        run_recipe(parse, train, [*arguments, "--output_dir", str(tmp_path)])
    said = capsys.readouterr().err
    assert stopped.value.code == 2
    assert message in said
    assert said.count("\n") == 1


def test_an_error_from_deeper_keeps_its_traceback():
    def train(config, *, resume):
        int("no number")

    with pytest.raises(ValueError, match="invalid literal"):
        run_recipe(parse, train, [])


def test_the_usage_is_one_line_and_every_key_is_in_the_help(capsys):
    with pytest.raises(SystemExit):
        parse_run(RunConfig, "Train.", ["--help"])
    (
        usage,
        *_,
    ) = said = capsys.readouterr().out.splitlines()
    assert usage.endswith("[--config FILE] [--resume] [--KEY VALUE ...]")
    for key in ("--epochs int", "--optimizer.betas", "--regularizers.bss.k int", "--data.source"):
        assert any(line.strip().startswith(key) for line in said), key
