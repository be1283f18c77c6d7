import contextlib
import copy
import json

import numpy as np
import pytest

from hf_specreg import RobustnessReport, evaluate_robustness
from hf_specreg.robustness.report import ReportError


@pytest.fixture(scope="module")
def reports(trained):
    net, images, labels = trained
    worse = copy.deepcopy(net)
    worse[3].weight.data[0] *= 0.8
    attacks = {"tangent": {"iterations": 5}, "pgd-l2": {"steps": 5}, "pgd-linf": {"steps": 5}}
    return [
        evaluate_robustness(
            model, (images, labels), attacks=attacks, head="3", name=name, progress=False
        )
        for name, model in (("plain", net), ("weaker", worse))
    ]


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
        (lambda c: c.update(schema=2), "has format 2, this version .* reads 1"),
        (lambda c: c.pop("clean"), "'clean' is a required property"),
        (lambda c: c["attacks"]["tangent"].update(norm="l1"), "attacks/tangent/norm: 'l1'"),
        (lambda c: c.update(n="100"), "n: '100' is not of type 'integer'"),
        (lambda c: c.update(extra=1), "'extra' was unexpected"),
    ],
    ids=["version", "missing", "norm", "type", "unknown"],
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


def test_any_flipped_byte_of_the_arrays_gives_the_report_or_an_error_that_names_them(
    reports, tmp_path
):
    reports[0].save(tmp_path / "robustness.json")
    path = tmp_path / "robustness.npz"
    whole = path.read_bytes()
    for place in range(0, len(whole), max(1, len(whole) // 150)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :])
        with contextlib.suppress(ReportError):
            assert RobustnessReport.load(tmp_path).content == reports[0].content


def test_a_report_is_saved_under_the_name_that_is_read(reports, tmp_path):
    with pytest.raises(ReportError, match=r"NAME\.json"):
        reports[0].save(tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_a_comparison_is_paired_on_images_that_all_classify_correctly(reports):
    comparison = RobustnessReport.compare(reports)
    both = reports[0].images["correct"] & reports[1].images["correct"]
    assert comparison.paired == both.sum()
    first, second = comparison.rows
    assert [first["model"], second["model"]] == ["plain", "weaker"]
    distances = [r.images["tangent/distances"][both].astype(float) for r in reports]
    assert first["difference"] is None
    assert second["difference"]["value"] == pytest.approx((distances[1] - distances[0]).mean())
    low, high = second["difference"]["ci"]
    paired_width = high - low
    low, high = second["mean"]["ci"]
    assert paired_width < high - low  # what pairing is for
    table = comparison.to_markdown()
    assert f"on the {comparison.paired} that all models classify correctly" in table
    assert "| L2 | 0.25 |" in table


def test_reports_of_other_images_or_settings_are_not_compared(reports):
    other = copy.deepcopy(reports[1])
    other.content["data"]["sha256"] = "0" * 64
    with pytest.raises(ReportError, match="plain and weaker have other data sha256"):
        RobustnessReport.compare([reports[0], other])
    other = copy.deepcopy(reports[1])
    other.content["attacks"]["tangent"]["settings"]["iterations"] = 6
    with pytest.raises(ReportError, match="tangent was run with other settings"):
        RobustnessReport.compare([reports[0], other])
    with pytest.raises(ReportError, match="two reports or more"):
        RobustnessReport.compare(reports[:1])
    bare = RobustnessReport(reports[1].content)
    with pytest.raises(ReportError, match=r"per-image results .* are missing"):
        RobustnessReport.compare([reports[0], bare])


def test_robust_accuracy_is_compared_under_the_attacks_that_all_models_faced(reports):
    strong, weak = copy.deepcopy(reports)
    eps = strong.content["worst_case"][0]["eps"]
    del weak.content["attacks"]["tangent"]
    points = RobustnessReport.compare([strong, weak]).robust_accuracy
    assert [(p["norm"], p["eps"]) for p in points] == [
        (p["norm"], p["eps"]) for p in strong.content["worst_case"]
    ]
    images = strong.images
    stands = images["correct"] & (images["pgd-l2/distances"] > eps)
    assert points[0]["models"][0]["value"] == pytest.approx(stands.mean())
    assert points[0]["models"][0]["difference"] is None
    others = weak.images["correct"] & (weak.images["pgd-l2/distances"] > eps)
    gain = points[0]["models"][1]["difference"]["value"]
    assert gain == pytest.approx(others.mean() - stands.mean())


def test_a_report_saved_over_another_takes_none_of_its_images(reports, tmp_path):
    reports[0].save(tmp_path / "robustness.json")
    RobustnessReport(reports[1].content).save(tmp_path / "robustness.json")
    assert RobustnessReport.load(tmp_path).images == {}
    fewer = {k: v[:10] for k, v in reports[0].images.items()}
    with pytest.raises(ReportError, match="of 10 images are not those of a report on 100"):
        RobustnessReport(reports[0].content, fewer)


def test_models_of_the_same_name_are_told_apart(reports):
    comparison = RobustnessReport.compare([reports[0], reports[0]])
    assert comparison.names == ["plain (1)", "plain (2)"]


def test_the_page_is_self_contained_and_escapes_names(reports, tmp_path):
    content = copy.deepcopy(reports[0].content)
    content["model"]["id"] = "<script>alert(1)</script>"
    content["flags"] = ["gradient masking: <b>"]
    report = RobustnessReport(content, reports[0].images, reports[0].twins)
    report.to_html(tmp_path / "one.html")
    page = (tmp_path / "one.html").read_text()
    assert "<script" not in page
    assert "gradient masking: &lt;b&gt;" in page
    assert page.count("<figure>") == 6  # accuracy in two norms, distances, queries, sigmas, twins
    for source in ('src="http', 'href="http', "@import", "url(http"):
        assert source not in page
    report.to_html(tmp_path / "again.html")
    assert (tmp_path / "again.html").read_text() == page


def test_the_page_of_a_comparison_shows_every_model(reports, tmp_path):
    RobustnessReport.compare(reports).to_html(tmp_path / "both.html")
    page = (tmp_path / "both.html").read_text()
    assert "How robust is plain against weaker?" in page
    assert "Distance to the nearest adversarial image, paired" in page


def test_a_report_without_per_image_results_still_has_a_page(reports, tmp_path):
    RobustnessReport(reports[0].content).to_html(tmp_path / "bare.html")
    assert "Robust accuracy" in (tmp_path / "bare.html").read_text()
    assert "| tangent | L2 |" in RobustnessReport(reports[0].content).to_markdown()
