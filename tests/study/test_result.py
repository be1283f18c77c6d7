import copy
import json
import os

import numpy as np
import pyarrow.parquet as pq
import pytest

from hf_specreg.study.result import Study, StudyError


def test_a_study_comes_back_as_it_was_saved(without_page, large, tmp_path):
    large.save(tmp_path / "a")
    for path in (tmp_path / "a", tmp_path / "a/study.json"):
        loaded = Study.load(path)
        assert loaded.content == large.content
        assert loaded.images.keys() == large.images.keys()
        for name, values in large.images.items():
            assert np.array_equal(loaded.images[name], values, equal_nan=name == "strength")
    Study.load(tmp_path / "a").save(tmp_path / "b")
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name


def test_what_attacks_found_is_read_by_seed_and_image(large):
    distances, correct = large.attacked("jacobian", 0.01)
    assert distances.shape == correct.shape == (3, 40)
    images = large.images
    own = (images["method"] == "jacobian") & (images["strength"] == 0.01) & (images["seed"] == 2)
    assert np.array_equal(distances[2], images["distance"][own])
    assert np.array_equal(correct[2], images["correct"][own])
    assert large.attacked("none", None)[0].shape == (3, 40)
    unlike = {name: values.copy() for name, values in images.items()}
    unlike["row"][np.flatnonzero(own)[0]] = 77
    for method, strength, study in (
        ("jacobian", 7.0, large),
        ("jacobian", 0.01, Study(large.content, unlike)),
        ("jacobian", 0.01, Study(large.content)),
    ):
        with pytest.raises(StudyError, match=f"jacobian, {strength}: no per-image results, or of"):
            study.attacked(method, strength)


def test_cells_are_a_table_of_their_scalars(without_page, large, tmp_path):
    large.save(tmp_path)
    rows = pq.read_table(tmp_path / "cells.parquet").to_pylist()
    assert len(rows) == len(large.content["cells"])
    for row, cell in zip(rows, large.content["cells"], strict=True):
        assert (row["method"], row["strength"], row["seed"]) == (
            cell["method"],
            cell["strength"],
            cell["seed"],
        )
        stated = cell.get("test", {}).get("robust_accuracy", [{"value": None}])[0]["value"]
        assert row["test.robust_accuracy.l2.0.5"] == stated
        assert row["status"] == cell["status"]
    assert rows[0]["validation.calibrated.ece"] == pytest.approx(
        large.content["cells"][0]["validation"]["calibrated"]["ece"]
    )


def first(content, method="rep-spectral"):
    return next(r for r in content["table"] if r["method"] == method)


VIOLATIONS = {
    "version": (lambda c: c.update(schema=2), "has format 2, this version of hf_specreg reads 1"),
    "missing": (lambda c: c.pop("frontier"), "'frontier' is a required property"),
    "unknown": (lambda c: c.update(extra=1), "'extra' was unexpected"),
    "type": (lambda c: c.update(comparisons="24"), "comparisons: '24' is not of type 'integer'"),
    "name": (lambda c: c.update(name="a|b"), "name: 'a|b' does not match"),
    "fraction": (
        lambda c: c["cells"][0]["test"].update(accuracy=91.7),
        "cells/0/test/accuracy: 91.7 is greater than the maximum",
    ),
    "huge": (lambda c: c["cells"][0].update(sum_sigma2=10**400), "cells/0/sum_sigma2: 1000"),
    "status": (lambda c: c["cells"][0].update(status="good"), "cells/0/status: 'good' is not one"),
    "done without results": (lambda c: c["cells"][0].pop("test"), "'test' is a required property"),
    "diverged with results": (
        lambda c: c["cells"][0].update(status="diverged"),
        "none, strength None, seed 0 is diverged, but has results",
    ),
    "hash": (lambda c: c["cells"][0].update(weights_sha256="ab"), "weights_sha256: 'ab' does not"),
    "estimate": (lambda c: first(c)["accuracy"].pop("ci"), "accuracy: 'ci' is a required"),
    "optional estimate": (lambda c: first(c)["ratio"].pop("ci"), "'ci' is a required|not valid"),
    "interval": (
        lambda c: first(c)["ratio"].update(ci=[1.2, 1.1]),
        "table/1/ratio: 1.2 to 1.1 is no interval",
    ),
    "half an interval": (
        lambda c: c["frontier"][0]["test"]["distance"].update(ci=[1.2, None]),
        "frontier/0/test/distance: 1.2 to None is no interval",
    ),
    "plain": (lambda c: c.update(plain="x"), "plain .x. is none of the methods"),
    "method": (lambda c: c["cells"][3].update(method="x"), "cells: x is none of the methods"),
    "strength": (
        lambda c: c["frontier"][-1].update(strength=7),
        "frontier: 7 is no strength of orthogonality",
    ),
    "seed": (lambda c: c["cells"][0].update(seed=9), r"the seed is none of \[0, 1, 2\]"),
    "seeds twice": (lambda c: c.update(seeds=[0, 1, 1]), "seeds: .* has non-unique elements"),
    "cell twice": (lambda c: c["cells"].append(c["cells"][0]), "cells: none None 0 is there twice"),
    "row twice": (lambda c: c["table"].append(c["table"][1]), "table: rep-spectral is there twice"),
    "order": (lambda c: c["table"].pop(0), "table: begins with rep-spectral, not with none"),
    "signs": (lambda c: first(c).update(signs=[1, 1, 1, 1]), "rep-spectral: 4 signs of 3 seeds"),
    "sign": (lambda c: first(c)["signs"].append(2), "signs/3: 2 is not one of"),
    "seeds of a row": (lambda c: first(c).update(seeds=4), "rep-spectral: 4 seeds, of 3"),
    "pair of none": (
        lambda c: c["pairs"][0].update(methods=["x", "none"]),
        "pairs: x is none of the methods",
    ),
    "pair at no strength": (
        lambda c: c["pairs"][0].update(strengths=[7, 7]),
        "pairs: 7 is no strength of rep-spectral",
    ),
    "signs of a pair": (
        lambda c: c["pairs"][0].update(signs=[1, 1, 1, 1]),
        "pairs: 4 signs of 3 seeds",
    ),
    "plain compared": (
        lambda c: c["table"][0].update(ratio={"value": 1, "ci": [1, 1]}),
        "table: none is compared with itself",
    ),
}


@pytest.mark.parametrize(("change", "message"), VIOLATIONS.values(), ids=VIOLATIONS)
def test_what_is_no_study_is_refused_in_one_sentence(content, tmp_path, change, message):
    change(content)
    (tmp_path / "study.json").write_text(json.dumps(content))
    with pytest.raises(StudyError, match=message) as caught:
        Study.load(tmp_path)
    said = str(caught.value)
    assert said.startswith(f"{tmp_path / 'study.json'}: ")
    assert "\n" not in said
    assert len(said) < 500


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e999"])
def test_numbers_that_are_none_are_refused(content, tmp_path, number):
    content["cells"][0]["sum_sigma2"] = "PLACE"
    text = json.dumps(content).replace('"PLACE"', number)
    (tmp_path / "study.json").write_text(text)
    with pytest.raises(StudyError, match=r"study.json: the study is not valid JSON: Out of range"):
        Study.load(tmp_path)
    content["cells"][0]["sum_sigma2"] = float(number)
    with pytest.raises(StudyError, match="Out of range"):
        Study(content)


@pytest.mark.parametrize(
    ("written", "message"),
    [
        (None, "cannot be read as a study: .* No such file"),
        (b"{", "cannot be read as a study: Expecting property name"),
        (b"[1]", "is no study"),
        (b"\xff", "cannot be read as a study: 'utf-8' codec"),
        (b"[" * 100_000, "cannot be read as a study: maximum recursion|cannot be read as a study"),
        (b" " * (64 * 2**20 + 1), "cannot be read as a study: it has more than 64 MiB"),
    ],
    ids=["none", "cut", "list", "bytes", "nested", "large"],
)
def test_unreadable_files_are_named(tmp_path, written, message):
    if written is not None:
        (tmp_path / "study.json").write_bytes(written)
    with pytest.raises(StudyError, match=rf"study.json {message}"):
        Study.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda i: i.pop("distance"), "no 'distance', one entry an image"),
        (lambda i: i.update(correct=i["correct"].astype(float)), "no 'correct'"),
        (lambda i: i.update(label=i["label"][:3]), "unlike numbers of 'label'"),
        (lambda i: i.update(row=i["row"][:, None]), "no 'row'"),
        (lambda i: i.update(method=np.full(len(i["row"]), "x")), "of x, which the study does not"),
        (lambda i: i.update(norm=np.full(len(i["row"]), 2, object)), "names that are no text"),
    ],
    ids=["missing", "type", "length", "shape", "method", "norm"],
)
def test_per_image_results_of_another_study_are_refused(large, change, message):
    images = copy.copy(large.images)
    change(images)
    with pytest.raises(StudyError, match=message):
        Study(large.content, images)


def test_damaged_images_are_refused_or_the_same(without_page, large, tmp_path):
    large.save(tmp_path)
    path = tmp_path / "images.parquet"
    whole, refused = path.read_bytes(), 0
    for place in range(0, len(whole), len(whole) // 40):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :])
        try:
            loaded = Study.load(tmp_path)
        except StudyError:
            refused += 1
            continue
        for name, values in large.images.items():
            assert np.array_equal(loaded.images[name], values, equal_nan=name == "strength")
    assert refused > 20


def test_a_full_disk_leaves_the_old_files_whole(
    without_page, large, content, tmp_path, monkeypatch
):
    large.save(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    content["flags"].append("another")
    written = []

    def full(descriptor):
        written.append(descriptor)
        if len(written) == 3:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        Study(content, large.images).save(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_study_saved_over_another_takes_none_of_its_images(without_page, large, tmp_path):
    large.save(tmp_path)
    Study(large.content).save(tmp_path)
    assert Study.load(tmp_path).images == {}
