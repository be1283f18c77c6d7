import re
from html.parser import HTMLParser

import pytest

from hf_specreg.study.chosen_plots import ratios
from hf_specreg.study.page import to_html
from hf_specreg.study.plots import COLOURS, MARKERS, frontier, looks, panels, picture, points_of
from hf_specreg.study.result import Study
from hf_specreg.study.tables import sections
from hf_specreg.study.text import facts
from hf_specreg.study.verdict import cautions, summary, verdicts
from tests.study.example import NAMES, make_content

VOID = {"meta", "link", "br", "img", "hr", "input"}


class Page(HTMLParser):
    """Its tables, all text, and whether each tag that is opened is closed in turn."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.rows, self.text = [], [], [], [], ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag == "td":
            self.rows[-1].append("")

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data
        if "td" in self.open:
            self.rows[-1][-1] += data


@pytest.fixture(scope="module")
def twelve():
    """A study of twelve methods, and its page."""
    content = make_content(names=NAMES[:10])
    return content, to_html(content)


def test_the_page_is_whole_and_fetches_nothing(twelve):
    _, text = twelve
    page = Page(text)
    assert text.startswith("<!doctype html>")
    assert page.open == []
    assert not {"script", "link", "iframe", "img", "object"} & set(page.tags)
    for name, value in page.attributes:
        if name in ("src", "href", "xlink:href"):
            assert value.startswith("#")
    style = re.search(r"<style>(.*?)</style>", text, re.DOTALL).group(1)
    assert "url(" not in text.replace("url(#", "")
    assert "@import" not in style


def test_every_number_of_the_tables_is_on_the_page(twelve):
    content, text = twelve
    page = Page(text)
    rows = [row for row in page.rows if row]
    for section in sections(content).values():
        for row in section.rows:
            assert list(row) in rows, row
    for name, said in facts(content):
        assert [name, said] in rows


def test_every_method_flag_and_sentence_is_on_the_page(twelve):
    content, text = twelve
    said = " ".join(Page(text).text.split())
    for sentence in [*summary(content), *verdicts(content), *cautions(content), content["command"]]:
        assert sentence in said
    for name in content["methods"]:
        assert name in said


def test_what_a_study_says_cannot_be_markup(small):
    small["description"] = "<script>alert(1)</script>"
    small["flags"] = ["<b>bold</b>"]
    small["settings"] = {"a": "</pre><script>"}
    small["cells"][0] |= {"status": "missing", "reason": "<img src=x>"}
    text = to_html(small)
    assert "<script" not in text
    assert "<b>" not in text
    assert "<img" not in text


def test_the_same_study_gives_the_same_page_and_picture(small):
    assert to_html(small) == to_html(small)
    assert picture(small) == picture(small)


def test_more_than_twelve_methods_differ_in_colour_and_marker():
    more = [*NAMES, "a thirteenth", "a fourteenth"]
    look = looks(make_content(names=more, strengths=(0.1,), seeds=(0,)))
    assert len({tuple(style.values()) for style in look.values()}) == len(look) == 16
    content = make_content(names=NAMES, strengths=(0.1,), seeds=(0,))
    look = looks(content)
    assert len(look) == 14
    assert len({tuple(style.values()) for style in look.values()}) == 14
    assert len(set(COLOURS)) == len(set(MARKERS)) == 12
    assert "#" not in look[content["plain"]]["color"]


def test_the_frontier_shows_both_intervals_and_says_what_lies_outside(content):
    figure, caption = frontier(content)
    (axes,) = figure.axes
    drawn = sum(len(line) for line in points_of(content).values())
    bars = [c.get_segments()[0] for c in axes.collections if hasattr(c, "get_segments")]
    assert len(bars) == 2 * drawn
    across = [bar for bar in bars if bar[0][1] == bar[1][1]]
    assert len(across) == drawn
    low, high = axes.get_ylim()
    for bar in bars:
        if bar[0][1] != bar[1][1] and bar[0][0] > axes.get_xlim()[0]:
            assert low < bar[0][1] < bar[1][1] < high  # none is cut off
    for bar in across:
        assert bar[1][0] - bar[0][0] == pytest.approx(0.6)  # the example's interval
    assert "4 strengths with less accuracy lie outside" in caption  # cross-Lipschitz
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    for name in content["methods"]:
        assert any(name in label for label in labels)


def test_the_ratios_show_both_networks_that_decide(content):
    content["table"][1]["control"]["matched"] = False
    content["table"][2]["control"] = None
    figure, caption = ratios(content)
    (axes,) = figure.axes
    assert len(axes.containers) == 2 * (len(content["table"]) - 1) - 1
    assert "harder to attack takes both" in caption


def test_a_panel_a_method_names_the_chosen_strength(content):
    chosen = {e["method"]: e["strength"] for e in content["chosen"]}
    drawn = dict(panels(content))
    assert set(drawn) == set(content["methods"]) - {"none", "stopped earlier"}
    for name, figure in drawn.items():
        bold = [t.get_text() for t in figure.axes[0].texts if t.get_weight() == "bold"]
        assert bold == ([] if chosen[name] is None else [f"{chosen[name]:g}"])
    said = [t.get_text() for t in drawn["cross-Lipschitz"].axes[0].texts]
    assert said == ["every strength\nhas less accuracy"]


@pytest.mark.parametrize("missing", ["table", "control", "ood", "step_time", "interval", "all"])
def test_a_page_is_drawn_of_what_there_is(small, missing):
    if missing in ("table", "all"):
        small["table"] = small["final"] = []
    if missing == "all":
        small["frontier"] = small["chosen"] = small["cells"] = []
        small["stopped"] = None
        del small["methods"]["stopped earlier"]
    for row in small["table"]:
        if missing == "control":
            row["control"] = None
        if missing == "ood":
            row["ood_auroc"] = None
        if missing == "step_time":
            row["step_time"] = None
        if missing == "interval":
            for estimate in (row["accuracy"], row["distance"], row["robust_accuracy"][0]):
                estimate["ci"] = [None, None]
    text = to_html(small)
    assert Page(text).open == []
    assert ("AUROC" in text) == (missing not in ("ood", "table", "all"))


def test_every_cell_is_labelled_for_narrow_screens(twelve):
    for table in twelve[1].split('<table class="stack">')[1:]:
        header, *rows = table.split("</table>")[0].strip().split("</tr>")[:-1]
        columns = re.findall("<th[^>]*>(.*?)</th>", header)
        for row in rows:
            assert re.findall('<td data-label="(.*?)"', row) == columns


def test_a_saved_study_has_its_page_where_it_can_be_drawn(small, tmp_path, request):
    study = Study(small)
    study.save(tmp_path)
    assert (tmp_path / "study.html").read_text() == to_html(study.content)
    request.getfixturevalue("without_page")
    study.save(tmp_path)
    assert not (tmp_path / "study.html").exists()
    assert (tmp_path / "study.md").exists()
