"""What recipes/results.py writes is what the studies that are kept say."""

import re

import numpy as np
import pytest

from hf_specreg.study.result import Study
from recipes import results
from tests.study.example import make_content, make_images

KEPT = sorted(results.KEPT.glob("*.json"))


def test_the_results_are_made_from_the_studies_that_are_kept():
    found = results.studies()
    assert found
    assert results.RESULTS.read_text("utf-8") == results.results(found)


def test_the_readmes_table_is_made_from_its_study():
    (content,) = (c for c in results.studies() if c["name"] == results.HEADLINE)
    text = results.README.read_text("utf-8")
    assert results.headline(content) in text
    assert results.with_headline(text, content) == text


def test_what_the_file_of_a_study_asks_for_beyond_what_is_kept_is_said():
    found = {content["name"]: content for content in results.studies()}
    whole = found["cifar10_animals"]
    assert results.not_made(whole) == []
    names = [name for name in whole["methods"] if name not in ("none", whole["stopped"])]
    first, second, *rest = names
    methods = {name: whole["methods"][name] for name in ("none", whole["stopped"], second, *rest)}
    cut = {**methods[second], "strengths": methods[second]["strengths"][1:]}
    (said,) = results.not_made({**whole, "methods": {**methods, second: cut}})
    assert "recipes/studies/cifar10_animals.yaml" in said
    lost = whole["methods"][second]["strengths"][0]
    assert f"{first} at " in said
    assert f"{second} at {lost:g}" in said
    assert not any(f"{name} at" in said for name in rest)
    assert results.not_made({**whole, "command": "hf-specreg study --config mine"}) == []


@pytest.mark.parametrize("path", KEPT, ids=lambda path: path.stem)
def test_what_is_kept_is_a_whole_study_that_names_no_folder_of_a_machine(path):
    content = Study.load(path).content
    assert {cell["status"] for cell in content["cells"]} <= {"done", "diverged"}
    assert content["name"] == path.stem
    assert not re.search(r"[\s=\"']/\w", path.read_text())


def test_a_study_is_kept_under_its_name_without_paths(tmp_path, monkeypatch):
    content = make_content(names=("a", "b"), seeds=(0,))
    content["command"] = "python recipes/study.py --settings.data.source /home/me/mnist"
    content["settings"] = {**content["settings"], "output_dir": "/home/me/runs/x"}
    images = make_images(np.random.default_rng(1), content["cells"])
    monkeypatch.setattr("hf_specreg.study.result.find_spec", lambda name: None)  # no page
    Study(content, images).save(tmp_path)
    monkeypatch.setattr(results, "KEPT", tmp_path / "kept")
    results.keep([str(tmp_path)])
    (kept,) = (tmp_path / "kept").glob("*.json")
    assert "/home" not in kept.read_text()
    assert Study.load(kept).attacked("none", None)[0].shape == (1, 40)
    monkeypatch.setattr(results, "LARGEST_KEPT", 100)
    results.keep([str(tmp_path)])
    assert not Study.load(kept).images
    found = results.studies()
    said = results.results(found)
    assert f"## {content['name']}: what was found" in said
    shown = results.headline(found[0])
    assert all(row["method"] in shown for row in content["table"])
