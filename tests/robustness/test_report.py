import copy
import json
from zipfile import ZipFile

import numpy as np
import pytest

from hf_specreg import FeatureSpace, RobustnessReport, evaluate_robustness
from hf_specreg.robustness.schema import ReportError
from hf_specreg.robustness.statistics import at_half_budget


def test_a_report_comes_back_as_it_was_saved(reports, tmp_path):
    reports[0].save(tmp_path / "a/robustness.json")
    loaded = RobustnessReport.load(tmp_path / "a")
    assert loaded.content == reports[0].content
    assert loaded.images.keys() == reports[0].images.keys()
    for key, values in loaded.images.items():
        assert np.array_equal(values, reports[0].images[key])
    reports[0].save(tmp_path / "b/robustness.json")
    for name in ("robustness.json", "robustness.npz"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(schema=1), "has format 1, this version .* reads 2"),
        (lambda c: c.pop("clean"), "'clean' is a required property"),
        (lambda c: c["attacks"]["tangent"].update(norm="l1"), "attacks/tangent/norm: 'l1'"),
        (lambda c: c.update(n="100"), "n: '100' is not of type 'integer'"),
        (lambda c: c.update(extra=1), "'extra' was unexpected"),
        (lambda c: c["nearest"][0]["attacks"].append("x"), r"attacks that were not run: \['x'\]"),
    ],
    ids=["version", "missing", "norm", "type", "unknown", "nearest"],
)
def test_what_is_no_report_is_refused(reports, tmp_path, change, message):
    content = copy.deepcopy(reports[0].content)
    change(content)
    path = tmp_path / "robustness.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ReportError, match=message):
        RobustnessReport.load(path)


def test_unreadable_files_are_named(reports, tmp_path):
    with pytest.raises(ReportError, match=r"robustness.json cannot be read"):
        RobustnessReport.load(tmp_path)
    reports[0].save(tmp_path / "robustness.json")
    arrays = tmp_path / "robustness.npz"
    arrays.write_bytes(arrays.read_bytes()[:1000])
    with pytest.raises(ReportError, match=r"robustness.npz cannot be read"):
        RobustnessReport.load(tmp_path)
    header = b"{'descr': ("  # whose bracket is never closed
    with ZipFile(arrays, "w") as file:
        file.writestr("images/row.npy", np.lib.format.magic(1, 0) + b"\x0b\x00" + header)
    with pytest.raises(ReportError, match=r"robustness.npz cannot be read"):
        RobustnessReport.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.pop("images/row"), "no 'row', a number an image"),
        (lambda a: a.pop("images/tangent/distances"), "no 'tangent/distances'"),
        (lambda a: a.update({"images/correct": a["images/correct"].astype(float)}), "'correct'"),
        (lambda a: a.update({"images/label": a["images/label"][:3]}), "results of 3 images"),
        (lambda a: a.update({"images/label": a["images/label"][:, None]}), "no 'label'"),
    ],
    ids=["row", "distances", "type", "length", "shape"],
)
def test_per_image_results_that_are_not_the_reports_are_refused(reports, tmp_path, change, message):
    reports[0].save(tmp_path / "robustness.json")
    with np.load(tmp_path / "robustness.npz") as file:
        arrays = dict(file)
    change(arrays)
    np.savez(tmp_path / "robustness.npz", **arrays)
    with pytest.raises(ReportError, match=message):
        RobustnessReport.load(tmp_path)


def test_any_flipped_byte_of_the_arrays_gives_the_same_arrays_or_an_error(reports, tmp_path):
    reports[0].save(tmp_path / "robustness.json")
    path = tmp_path / "robustness.npz"
    whole, refused = path.read_bytes(), 0
    for place in range(0, len(whole), max(1, len(whole) // 150)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :])
        try:
            loaded = RobustnessReport.load(tmp_path)
        except ReportError:
            refused += 1
            continue
        for mine, other in ((loaded.images, reports[0].images), (loaded.twins, reports[0].twins)):
            assert mine.keys() == other.keys()
            assert all(np.array_equal(mine[key], other[key]) for key in other)
    assert refused > 100


def test_a_report_is_saved_under_the_name_that_is_read(reports, tmp_path):
    with pytest.raises(ReportError, match=r"NAME\.json"):
        reports[0].save(tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_a_report_saved_over_another_takes_none_of_its_images(reports, tmp_path):
    reports[0].save(tmp_path / "robustness.json")
    RobustnessReport(reports[1].content).save(tmp_path / "robustness.json")
    assert RobustnessReport.load(tmp_path).images == {}
    fewer = {k: v[:10] for k, v in reports[0].images.items()}
    with pytest.raises(ReportError, match="of 10 images are not those of a report on 100"):
        RobustnessReport(reports[0].content, fewer)


def test_the_nearest_of_all_attacks_is_stated_before_that_of_each(reports):
    images, content = reports[0].images, reports[0].content
    correct = images["correct"]
    of_l2 = np.minimum(images["tangent/distances"], images["pgd-l2/distances"])[correct]
    (nearest,) = content["nearest"]  # none in Linf, where only one eps after the other was tried
    assert nearest["attacks"] == ["tangent", "pgd-l2"]
    assert nearest["mean"]["value"] == pytest.approx(of_l2.mean())
    table = reports[0].to_markdown()
    assert table.index("| nearest of tangent and pgd-l2 |") < table.index("| tangent |")


def test_a_mean_distance_stands_beside_the_number_of_images_it_is_of(reports):
    content = copy.deepcopy(reports[0].content)
    distance = content["attacks"]["tangent"]["distance"]
    distance["not_found"] = 7
    row = next(
        line
        for line in RobustnessReport(content).to_markdown().splitlines()
        if line.startswith("| tangent |")
    )
    assert row.endswith(f"| {distance['n'] - 7} of {distance['n']} |")


def test_the_mean_distance_with_half_of_the_queries_stands_beside_that_with_all(trained, tmp_path):
    net, images, labels = trained
    space = FeatureSpace.of(net, head="3", input_size=(1, 8, 8))
    attacks = {"fmn-l2": {"steps": 20}, "tangent": {"iterations": 3}, "deepfool-l2": {}}
    report = evaluate_robustness(space, (images[:30], labels[:30]), attacks=attacks, progress=False)
    content = report.content
    table, flagged = report.to_markdown(), " ".join(content["flags"])
    header = "| attack | norm | mean distance | with half the queries |"
    assert header in table
    assert table.index("| nearest of fmn-l2, tangent and deepfool-l2 |") < table.index("| fmn-l2 |")
    correct = report.images["correct"]
    for name in ("fmn-l2", "tangent"):
        steps, entry = report.images[f"{name}/trajectory"], content["attacks"][name]
        half, mean = entry["half_budget"], entry["distance"]["mean"]["value"]
        assert half == pytest.approx(at_half_budget(steps[correct]).mean())
        assert half >= mean
        assert (f"mean distance of {name} was" in flagged) == (half > 1.05 * mean)
        assert f" | {half:.3f} | " in table
    assert "mean distance of tangent was" in flagged
    assert content["attacks"]["deepfool-l2"]["half_budget"] is None
    report.to_html(tmp_path / "one.html")
    assert "<th>with half the queries</th>" in (tmp_path / "one.html").read_text()
    rows = RobustnessReport.compare([report, report]).rows
    assert [row["half_budget"] is None for row in rows] == [False] * 4 + [True] * 2
    assert rows[0]["half_budget"] == pytest.approx(content["attacks"]["fmn-l2"]["half_budget"])


def test_a_report_without_half_budgets_is_read(reports, tmp_path):
    old = copy.deepcopy(reports[0])
    del old.content["attacks"]["tangent"]["half_budget"]
    old.save(tmp_path / "robustness.json")
    loaded = RobustnessReport.load(tmp_path)
    assert "| tangent | L2 |" in loaded.to_markdown()
    loaded.to_html(tmp_path / "old.html")
