import json

import pytest

from hf_specreg import SpecRegModel
from hf_specreg.cli import main
from recipes import evaluate as recipe

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


def test_evaluate_and_compare_leave_reports_and_pages(folders, tmp_path, capsys):
    for name, folder in zip("ab", folders, strict=True):
        main(["evaluate", folder, *ARGUMENTS, "--output", str(tmp_path / name)])
        content = json.loads((tmp_path / name / "robustness.json").read_text())
        assert content["data"]["id"] == "digits"
        assert content["attacks"]["tangent"]["settings"]["iterations"] == 2
        assert (tmp_path / name / "report.html").exists()
    reports = [str(tmp_path / name) for name in "ab"]
    main(["compare", *reports, "--output", str(tmp_path / "both.html")])
    assert (tmp_path / "both.html").exists()
    assert "that all models classify correctly" in capsys.readouterr().out


def test_the_recipe_is_the_same_evaluation(folders, tmp_path):
    main(["evaluate", folders[0], *ARGUMENTS, "--output", str(tmp_path / "command")])
    report = recipe.main(
        ["--model", folders[0], "--data", *ARGUMENTS, "--output", str(tmp_path / "recipe")]
    )
    by_command = json.loads((tmp_path / "command/robustness.json").read_text())
    assert (
        report.content["attacks"]["tangent"]["distance"]
        == (by_command["attacks"]["tangent"]["distance"])
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluate", "no_such", "digits"], "neither a folder"),
        (["evaluate", "FOLDER", "digits", "--attacks", "[fgsm]"], "no attack 'fgsm'"),
        (["compare", "/no/such/report", "/nor/this"], "cannot be read as a report"),
    ],
)
def test_failures_are_one_line(folders, arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = [folders[0] if a == "FOLDER" else a for a in arguments]
    with pytest.raises(SystemExit, match=f"hf-specreg: .*{message}"):
        main(arguments)
