import json
import re
import shutil

import pytest

from hf_specreg.cli import main
from hf_specreg.connection import HubError
from hf_specreg.hub.card import write_card
from hf_specreg.hub.collection import collect, sort_rows
from hf_specreg.hub.encoder import Encoder
from hf_specreg.hub.publish import push
from tests.hub.conftest import make_model


def test_a_namespace_lists_what_its_cards_say(hub, encoder, tmp_path):
    push(encoder, "org/with-report", license="mit")
    make_model().push_to_hub("org/without", license="mit")
    make_model().push_to_hub("me/elsewhere", license="mit")
    rows = {row["encoder"]: row for row in collect("org")}
    assert set(rows) == {"org/with-report", "org/without"}
    row = rows["org/with-report"]
    assert row["data"] == "org/pictures"
    assert row["n"] == 12
    assert row["accuracy"] == pytest.approx(11 / 12, abs=1e-6)
    assert row["L2 distance, tangent"] > 0
    near, far = (row[f"robust at L2 {eps} by tangent"] for eps in (0.1, 0.5))
    assert 0 <= far <= near <= row["accuracy"]
    assert rows["org/without"]["accuracy"] is None


def test_a_folder_lists_the_same(encoder, tmp_path, capsys, monkeypatch):
    for name in ("a", "b"):
        folder = shutil.copytree(encoder, tmp_path / name)
        write_card(Encoder.open(folder, license="mit"), f"me/{name}", folder)
    (tmp_path / "c").mkdir()
    (tmp_path / "c/README.md").write_text("---\ntags: [other]\n---\n")
    (tmp_path / "d").mkdir()
    (tmp_path / "d/README.md").write_text("---\n: [\n---\n")
    assert [row["encoder"] for row in collect(str(tmp_path))] == ["a", "b"]
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("FORCE_COLOR", "1")  # as on a terminal
    main(["list", str(tmp_path), "--sort", "robust at L2 0.5 by tangent"])
    said = re.sub(r"\x1b\[[\d;]*m", "", capsys.readouterr().out)
    lines = [line for line in said.splitlines() if str(tmp_path) not in line]  # as long as it is
    assert max(map(len, lines)) <= 80
    assert "91.7%" in said
    assert re.search(r"by\s+tangent", said)
    assert "same attack only" in said


def test_an_attack_of_several_strengths_is_not_one_column(tmp_path):
    for steps in (5, 50):
        how = f"{{norm: l2, eps: 0.5, attack: pgd-l2, settings: {{steps: {steps}}}}}"
        metric = f"{{type: robust_accuracy, value: 0.{steps}, args: {how}}}"
        index = f"model-index: [{{results: [{{metrics: [{metric}]}}]}}]"
        (tmp_path / f"{steps}").mkdir()
        (tmp_path / f"{steps}/README.md").write_text(f"---\ntags: [hf-specreg]\n{index}\n---\n")
    found = {name: value for row in collect(str(tmp_path)) for name, value in row.items()}
    robust = {name: value for name, value in found.items() if "robust" in name}
    assert robust == {
        "robust at L2 0.5 by pgd-l2 (steps 5)": 0.5,
        "robust at L2 0.5 by pgd-l2 (steps 50)": 0.5,
    }


def test_an_encoder_without_a_card_is_a_row_of_what_its_run_recorded(tmp_path, capsys):
    run = {
        "config": {
            "penalty": {"strength": 0.1, "scope": "features"},
            "data": {"classes": ["1", "2"], "configuration": None},
        },
        **{"data": {"source": "/home/me/digits"}, "images_per_second": 500},
        "metrics": {"test_accuracy": 0.5, "test_images": 12},
    }
    for place in ("a/model", "a/best", "a/checkpoints/step_1/model"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "specreg.json").write_text(json.dumps(run))
    (tmp_path / "b").mkdir()
    (tmp_path / "b/specreg.json").write_text("[]")
    known, damaged = collect(str(tmp_path))
    assert known == {
        **{"encoder": "a/model", "method": "supervised, rep-spectral 0.1"},
        **{"data": "digits (classes 1, 2)", "n": 12, "accuracy": 0.5, "ms an image": 2.0},
    }
    assert damaged["encoder"] == "b"
    assert damaged["accuracy"] is None
    (tmp_path / "b/specreg.json").unlink()
    main(["list", str(tmp_path)])
    said = capsys.readouterr().out
    assert f"{tmp_path}: 1 encoder\n" in said
    assert "No card yet, hence no robustness: a/model." in said


def test_a_mean_distance_says_where_it_is_of_some_images_only(tmp_path):
    how = "{norm: l2, attack: fmn-l2, n: 9, not_found: 3, of: 12}"
    metric = f"{{type: adversarial_distance, value: 0.2, args: {how}}}"
    index = f"model-index: [{{results: [{{metrics: [{metric}]}}]}}]"
    (tmp_path / "README.md").write_text(f"---\ntags: [hf-specreg]\n{index}\n---\n")
    assert collect(str(tmp_path))[0]["L2 distance, fmn-l2"] == "0.200 for 9 of 12 images"


def test_a_card_with_nonsense_in_it_is_a_row_without_numbers(tmp_path):
    lines = [
        "tags: [hf-specreg]",
        "model-index: [{results: [{metrics: [{type: accuracy}, 7]}]}, x]",
    ]
    (tmp_path / "README.md").write_text("---\n" + "\n".join(lines) + "\n---\n")
    nothing = dict.fromkeys(("method", "data", "n", "accuracy"))
    assert collect(str(tmp_path)) == [{"encoder": ".", **nothing}]


def test_a_hostile_card_is_shown_as_text(tmp_path, capsys):
    metrics = "[{type: accuracy, value: 0.5, args: {n: [1]}}]"
    result = f'{{dataset: {{name: "[/red]\\e[2J\\n"}}, metrics: {metrics}}}'
    front = f"tags: [hf-specreg]\nmodel-index: [{{results: [{result}]}}]"
    (tmp_path / "README.md").write_text(f"---\n{front}\n---\n")
    main(["list", str(tmp_path)])
    said = capsys.readouterr().out
    assert "[/red][2J" in said
    assert "\x1b" not in said


def test_rows_are_sorted_and_the_empty_ones_come_last():
    rows = [{"encoder": "a", "x": 1}, {"encoder": "b"}, {"encoder": "c", "x": 2}]
    assert [row["encoder"] for row in sort_rows(rows, "x")] == ["c", "a", "b"]
    with pytest.raises(ValueError, match="no column 'y'; there are encoder, x"):
        sort_rows(rows, "y")


@pytest.mark.parametrize("fault", ["500", "503", "429", "drop", "truncate", "garbage"])
def test_a_list_survives_one_of_what_passes(hub, fault):
    make_model().push_to_hub("org/name", license="mit")
    hub.requests.clear()
    hub.faults = lambda method, path: None if hub.injected else fault
    assert [row["encoder"] for row in collect("org")] == ["org/name"]
    assert len(hub.requests) == 2


def test_a_hub_that_does_not_answer_is_an_error(hub):
    hub.faults = lambda method, path: "403"
    with pytest.raises(HubError, match="listing org"):
        collect("org")


def test_a_card_that_would_unfold_without_end_is_shown_without_it(tmp_path):
    bomb = ["a: &a [lol, lol, lol, lol, lol, lol, lol, lol, lol]"]
    for level, last in zip("bcdefghij", "abcdefghi", strict=True):
        bomb.append(f"{level}: &{level} [{', '.join([f'*{last}'] * 9)}]")
    index = (
        "model-index: [{results: [{dataset: {name: *j}, metrics: [{type: accuracy, value: 1}]}]}]"
    )
    (tmp_path / "README.md").write_text(
        "\n".join(["---", "tags: [hf-specreg]", *bomb, index, "---", ""])
    )
    (row,) = collect(str(tmp_path))
    assert row["data"] is None
    assert row["accuracy"] == 1


def test_a_mistyped_folder_is_not_looked_up_on_the_hub():
    with pytest.raises(ValueError, match="there is no folder runs/demoo"):
        collect("runs/demoo")
