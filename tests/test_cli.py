import json
import re
import runpy
import subprocess
import sys
from inspect import signature
from unittest.mock import Mock

import pytest

import hf_specreg
from hf_specreg import SpecRegModel
from hf_specreg.cli import COMMANDS, TRAIN, main
from hf_specreg.commands.models import evaluate
from hf_specreg.configs import shipped
from hf_specreg.encoders.checksum import weights_sha256
from hf_specreg.encoders.load import load_model
from hf_specreg.hub.publish import push
from hf_specreg.robustness.attacks import DEFAULT_ATTACKS
from tests.hub.conftest import hub  # noqa: F401  fixture
from tests.pages import ROOT, page

ARGUMENTS = ["digits", "--samples", "12", "--attacks", "{tangent: {iterations: 2}}"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two small models, untrained, in the format that training leaves."""
    saved = []
    for name in ("a", "b"):
        folder = tmp_path_factory.mktemp(name)
        SpecRegModel.from_timm("resnet20_cifar", input_size=(1, 8, 8)).save_pretrained(folder)
        saved.append(str(folder))
    return saved


def test_evaluate_and_compare_leave_reports_and_pages_and_print_80_columns(
    folders, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("FORCE_COLOR", "1")  # as on a terminal
    for name, folder in zip("ab", folders, strict=True):
        main(["evaluate", folder, *ARGUMENTS, "--output", str(tmp_path / name)])
        content = json.loads((tmp_path / name / "robustness.json").read_text())
        assert content["data"]["id"] == "digits"
        assert content["attacks"]["tangent"]["settings"]["iterations"] == 2
        assert (tmp_path / name / "report.html").exists()
        assert "| tangent | L2 |" in (tmp_path / name / "report.md").read_text()
    reports = [str(tmp_path / name) for name in "ab"]
    main(["compare", *reports, "--output", str(tmp_path / "both.html")])
    assert (tmp_path / "both.html").exists()
    assert "| tangent | " in (tmp_path / "both.md").read_text()
    said = re.sub(r"\x1b\[[\d;]*m", "", capsys.readouterr().out)
    assert "that all models classify correctly" in " ".join(said.split())
    assert "| --- |" not in said
    assert max(len(x) for x in said.splitlines() if not x.startswith(str(tmp_path))) <= 80


SILENT = """
import contextlib, io, sys
import hf_specreg
from hf_specreg.cli import main
assert set(hf_specreg.__all__) <= set(dir(hf_specreg))
for arguments in ([], ["evaluate"], ["push"]):
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()) as said:
        main([*arguments, "--help"])
    assert "usage: hf-specreg" in said.getvalue()
assert not {"torch", "timm", "transformers", "huggingface_hub", "numpy"} & set(sys.modules)
"""


def test_the_import_and_the_help_need_no_torch_and_every_name_is_there():
    subprocess.run([sys.executable, "-c", SILENT], check=True, cwd=ROOT)
    for name in hf_specreg.__all__:
        assert getattr(hf_specreg, name).__name__ == name


def test_the_attacks_that_the_help_states_are_those_of_the_evaluation():
    assert signature(evaluate).parameters["attacks"].default == list(DEFAULT_ATTACKS)


@pytest.mark.parametrize(("script", "command"), [("evaluate", "evaluate"), ("publish", "push")])
def test_a_script_is_its_command(script, command, monkeypatch):
    monkeypatch.setattr("sys.argv", [script, "a", "b"])
    monkeypatch.setattr("hf_specreg.cli.main", asked := Mock())
    runpy.run_path(str(ROOT / f"recipes/{script}.py"), run_name="__main__")
    asked.assert_called_once_with([command, "a", "b"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluate", "no_such", "digits"], "'no_such' is neither a folder"),
        (["spectrum", "resnet18_cifr"], "did you mean resnet18_cifar"),
        (["evaluate", "FOLDER", "digits", "--attacks", "[fgsm]"], "no attack 'fgsm'"),
        (["evaluate", "FOLDER", *ARGUMENTS, "--output", "FILE/x"], "Not a directory: .*FILE/x"),
        (["compare", "/no/such/report", "/nor/this"], "cannot be read as a report"),
        (["push", "/no/such", "me/name"], "loading /no/such: neither a local folder"),
        (["list", "runs/demoo"], "there is no folder runs/demoo"),
        (["train", "superviced"], "there is no 'superviced': did you mean supervised?"),
        (["study"], "--config NAME is missing, which has base, methods: hf-specreg configs"),
        (["train"], "name one of {supervised,self-supervised,transfer}"),
        (["train", "supervised", "--config", "configs/digits.yaml"], "did you mean digits?"),
        (["study", "--config", "digits.yaml"], "file or name 'digits.yaml': did you mean digits?"),
        (["configs", "studies/digts"], "no file or name 'studies/digts': did you mean"),
        (["evalute", "a", "digits"], "there is no 'evalute': did you mean evaluate?"),
        (["evaluate", "a", "digits", "--sampels", "3"], "'sampels': did you mean samples?"),
        (["evaluate", "a", "digits", "--samples", "x"], r"samples \(x\) must be int or null"),
    ],
)
def test_a_mistake_is_one_line_that_names_it_and_the_exit_code_2(
    folders, arguments, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FILE").touch()
    with pytest.raises(SystemExit) as stopped:
        main([folders[0] if a == "FOLDER" else a for a in arguments])
    said = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2
    assert re.search(f"error: .*{message}", said[-1])
    assert [line for line in said if "error" in line or "Traceback" in line] == said[-1:]


def test_who_interrupts_a_command_is_shown_no_traceback(monkeypatch, capsys):
    monkeypatch.setattr("hf_specreg.recipes.evaluate.evaluate", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(SystemExit) as stopped:
        main(["evaluate", "model", "digits"])
    assert stopped.value.code == 130
    assert capsys.readouterr().err == "\nhf-specreg: interrupted\n"


def test_a_dry_run_is_asked_for_by_a_flag(monkeypatch):
    monkeypatch.setattr("hf_specreg.recipes.evaluate.evaluate", asked := Mock())
    for flags in ([], ["--dry_run"]):
        main(["evaluate", "model", "digits", *flags])
        assert asked.call_args.kwargs["dry_run"] is bool(flags)


def test_the_help_names_every_command_and_the_version_is_the_package_s(capsys):
    for argument in ("--help", "--version"):
        with pytest.raises(SystemExit) as stopped:
            main([argument])
        assert stopped.value.code == 0
    said = capsys.readouterr().out
    assert all(f"    {name} " in said for name in COMMANDS)
    on_the_page = re.findall(r"^\| (`.*?) \|", page("command-line"), re.MULTILINE)
    named = re.findall(r"[\w-]+(?=`)", " ".join(on_the_page))
    assert set(named) == {*COMMANDS, *TRAIN, "study"}
    assert said.endswith(f"hf-specreg {hf_specreg.__version__}\n")


def test_the_configurations_are_listed_in_80_columns_with_commands_and_printed(capsys):
    main(["configs"])
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines())) <= 80
    pasted = said.replace(" \\\n      ", " ")
    for name, one in shipped().items():
        assert f"\n{name}\n    {one.says}\n" in f"\n{said}"
        assert re.search(r"[.?]$", one.says), f"the head of {name} begins with no sentence"
        assert one.command.split()[0] in {"hf-specreg", "accelerate"}
        assert f"\n    {one.command}\n" in pasted
    assert "    hf-specreg train supervised --config digits\n" in said
    assert (  # continued in its head
        "    hf-specreg train self-supervised --config mnist_simclr "
        "--report.samples 300 --report.eps '[0.5, 1, 2]'\n"
    ) in pasted
    main(["configs", "studies/digits"])
    assert capsys.readouterr().out == (ROOT / "recipes/studies/digits.yaml").read_text()


def test_train_and_study_hand_over_to_the_recipes(monkeypatch):
    for place in ("recipes.supervised", "recipes.self_supervised", "study.command"):
        monkeypatch.setattr(f"hf_specreg.{place}.main", asked := Mock())
        command = {"recipes.supervised": ["train", "supervised"], "study.command": ["study"]}
        main([*command.get(place, ["train", "self-supervised"]), "--config", "digits"])
        asked.assert_called_once_with(["--config", "digits"])


def test_a_model_of_the_hub_is_loaded_at_the_revision_that_its_name_has(hub, folders):  # noqa: F811
    push(folders[0], "me/name", license="mit")
    push(folders[1], "me/name", license="mit")
    first = hub.repos["me/name"].branches["main"][1].oid
    latest = weights_sha256(load_model("me/name"))
    assert weights_sha256(load_model(f"me/name@{first}")) != latest
    assert latest == weights_sha256(load_model(folders[1]))
    with pytest.raises(FileNotFoundError, match="no such revision"):
        load_model("me/name@v9")
