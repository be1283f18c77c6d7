import copy
import re

import numpy as np
import pytest

from hf_specreg import RobustnessReport
from hf_specreg.robustness.plots import difference_scale, twin_figure


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
    assert "How robust is weaker, compared with plain?" in page
    assert "Distance to the nearest adversarial image found, paired" in page


def test_a_report_without_per_image_results_still_has_a_page(reports, tmp_path):
    RobustnessReport(reports[0].content).to_html(tmp_path / "bare.html")
    assert "Robust accuracy" in (tmp_path / "bare.html").read_text()
    assert "| tangent | L2 |" in RobustnessReport(reports[0].content).to_markdown()


def test_the_page_begins_with_what_was_found(reports, tmp_path):
    reports[0].to_html(tmp_path / "one.html")
    page = (tmp_path / "one.html").read_text()
    n, correct = reports[0].content["n"], reports[0].content["clean"]["correct"]
    assert f'<span class="verdict">{correct} of {n} images are classified correctly. In L2 ' in page
    comparison = RobustnessReport.compare(reports)
    comparison.to_html(tmp_path / "both.html")
    page = (tmp_path / "both.html").read_text()
    assert f'<span class="verdict">{comparison.verdicts[0][0]}</span>' in page
    assert comparison.caution in page
    assert "Distances that tangent found on the" in page


def test_differences_of_all_models_are_magnified_alike(reports):
    near, far = copy.deepcopy(reports)
    far.twins["twins"] = far.twins["shown"] + 0.5 * (far.twins["twins"] - far.twins["shown"])
    scale = difference_scale([near, far])
    largest = np.abs(near.twins["twins"] - near.twins["shown"]).max()
    assert scale == pytest.approx(0.5 / largest)
    for report in (near, far):
        grey = twin_figure(report, scale).axes[-1].images[0].get_array()
        difference = (report.twins["twins"] - report.twins["shown"])[-1, 0]
        assert np.allclose(grey, 0.5 + scale * difference, atol=1e-6)


def test_an_image_for_which_nothing_was_found_is_not_titled_with_a_distance(reports):
    report = copy.deepcopy(reports[0])
    report.twins["twins"][1] = report.twins["shown"][1]
    titles = [axes.get_title() for axes in twin_figure(report, 1.0).axes[:3]]
    assert titles[1] == "none found"
    assert titles[0].startswith("L2 0.")


def test_every_cell_is_labelled_for_narrow_screens(reports, tmp_path):
    RobustnessReport.compare(reports).to_html(tmp_path / "both.html")
    page = (tmp_path / "both.html").read_text()
    for table in page.split('<table class="stack">')[1:]:
        header, *rows = table.split("</table>")[0].strip().split("</tr>")[:-1]
        columns = re.findall("<th[^>]*>(.*?)</th>", header)
        for row in rows:
            assert re.findall('<td data-label="(.*?)"', row) == columns


@pytest.mark.parametrize(("correct", "found"), [(0, 0), (1, 0), (100, 30), (100, 60)])
def test_a_page_is_drawn_where_little_or_nothing_was_found(reports, tmp_path, correct, found):
    report = copy.deepcopy(reports[0])
    report.images["correct"][correct:] = False
    report.images["tangent/distances"][found:] = np.inf
    report.images["tangent/trajectory"][found:, :, 1] = np.inf
    report.to_html(tmp_path / "one.html")
    RobustnessReport.compare([report, report]).to_html(tmp_path / "both.html")
    assert ("Best distance so far" in (tmp_path / "both.html").read_text()) == (found == 60)
