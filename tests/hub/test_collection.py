import shutil

import pytest

from hf_specreg.cli import main
from hf_specreg.encoders.connection import HubError
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
    assert 0 <= row["robust at L2 0.5"] <= row["robust at L2 0.1"] <= row["accuracy"]
    assert rows["org/without"]["accuracy"] is None


def test_a_folder_lists_the_same(encoder, tmp_path, capsys):
    for name in ("a", "b"):
        folder = shutil.copytree(encoder, tmp_path / name)
        write_card(Encoder.open(folder, license="mit"), f"me/{name}", folder)
    (tmp_path / "c").mkdir()
    (tmp_path / "c/README.md").write_text("---\ntags: [other]\n---\n")
    (tmp_path / "d").mkdir()
    (tmp_path / "d/README.md").write_text("---\n: [\n---\n")
    assert [row["encoder"] for row in collect(str(tmp_path))] == ["a", "b"]
    main(["list", str(tmp_path), "--sort", "robust at L2 0.5"])
    said = capsys.readouterr().out
    assert "91.7%" in said
    assert "same attack only" in said


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
    result = f"{{dataset: {{name: '[/red]'}}, metrics: {metrics}}}"
    front = f"tags: [hf-specreg]\nmodel-index: [{{results: [{result}]}}]"
    (tmp_path / "README.md").write_text(f"---\n{front}\n---\n")
    main(["list", str(tmp_path)])
    assert "[/red]" in capsys.readouterr().out


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
