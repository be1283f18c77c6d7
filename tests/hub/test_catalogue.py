import re

import pytest
from huggingface_hub import constants

from hf_specreg.cli import main
from hf_specreg.hub.catalogue import Axis, to_html, write_catalogue
from tests.browser import CHROMIUM, Browser
from tests.study.test_page import Page

BOTH = "fmn-l2, pgd-l2"


def row(name, data, method, accuracy, robust, distance, **more):
    attacks = "L2 distance, fmn-l2, pgd-l2", "L2 distance, fmn-l2"
    return {
        **{"encoder": name, "method": method, "data": data, "n": 100, "accuracy": accuracy},
        f"robust at L2 0.5 by {BOTH}": robust[0],
        f"robust at L2 1.0 by {BOTH}": robust[1],
        **{
            "robust at Linf 0.03 by fmn-linf": robust[1],
            attacks[0]: distance,
            attacks[1]: 2 * distance,
        },
        **{"Linf distance, fmn-linf": distance / 10, **more},
    }


ROWS = [
    row("digits/plain", "digits", "supervised", 0.99, (0.8, 0.2), 0.77, ECE=0.01, parameters=5000),
    row("digits/b", "digits", "supervised, sensitivity 0.1", 0.98, (0.9, 0.8), 1.6, ECE=0.02),
    row("digits/c", "digits", "SimCLR", 0.9, (0.85, 0.5), 1.1, **{"ms an image": 2.5}),
    row("mnist/a", "mnist", "supervised", 0.95, (0.5, 0.1), 1.2, parameters=90),
    {"encoder": "bare", "method": None, "data": None, "n": None, "accuracy": None},
]


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("no chromium is installed")
    browser = Browser()
    yield browser
    browser.close()


@pytest.fixture
def page(tmp_path):
    path = tmp_path / "zoo.html"
    write_catalogue(path, ROWS, "org")
    return f"file://{path}"


def shown(browser):
    rows = "[...document.querySelectorAll('tbody tr:not(.off)')]"
    return browser.run(f"{rows}.map(r => r.querySelector('a').textContent)")


def test_the_page_is_whole_without_a_script_and_fetches_nothing():
    text = to_html(ROWS, "org", "zoo.html")
    without = re.sub("<script>.*</script>", "", text, flags=re.DOTALL)
    page = Page(without)
    assert page.open == []
    assert [r[0].strip() for r in page.rows if r] == [r["encoder"] for r in ROWS_BY_ACCURACY]
    named = [f"L2 0.5 by {BOTH}", f"L2 1.0 by {BOTH}", "Linf 0.03 by fmn-linf"]
    assert page.rows[1][4] == "80.0 % ({})20.0 % ({})20.0 % ({})".format(*named)
    assert "0.770 (L2, fmn-l2, pgd-l2)" in page.rows[1][5]
    for source in ("src=", "@import", "url(", "fetch("):
        assert source not in text
    addresses = {value for key, value in page.attributes if key == "href"}
    assert addresses == {f"{constants.ENDPOINT}/{row['encoder']}" for row in ROWS}
    assert text == to_html(ROWS, "org", "zoo.html")


ROWS_BY_ACCURACY = [ROWS[0], ROWS[1], ROWS[3], ROWS[2], ROWS[4]]


def test_cards_of_a_folder_are_linked_as_they_lie_beside_the_page(tmp_path):
    name = 'javascript:"a b'
    rows = [{**ROWS[0], "encoder": name}]
    (tmp_path / name).mkdir()
    assert 'href="../javascript%3A%22a%20b"' in to_html(
        rows, str(tmp_path), tmp_path / "pages/zoo.html"
    )
    (tmp_path / name / "README.md").touch()
    text = to_html(rows, str(tmp_path), tmp_path / "pages/zoo.html")
    assert 'href="../javascript%3A%22a%20b/README.md"' in text


def test_what_a_card_says_cannot_be_markup():
    hostile = {**ROWS[0], "encoder": "</td><script>", "method": "<b>'\"", "data": "<img src=x>"}
    hostile["robust at <i> 7 by x"], hostile['robust at L2 "x by <i>'] = 1e15, 0.5
    text = to_html([hostile, *ROWS], "<u>", "zoo.html")
    assert text.count("<script") == 1
    for tag in ("<b>", "<img", "<i>", "<u>"):
        assert tag not in text


def test_a_mean_of_some_images_only_is_shown_and_not_ranked():
    some = {**ROWS[0], "encoder": "some", "L2 distance, fmn-l2, pgd-l2": "0.200 for 9 of 12 images"}
    text = to_html([some, *ROWS], "org", "zoo.html", sort="L2 distance, fmn-l2, pgd-l2")
    assert 'data-value="">0.200 for 9 of 12 images <small>' in re.sub(' class="off"', "", text)
    assert text.index(">some</a>") > text.index(">mnist/a</a>")


def test_points_name_their_attack_and_those_by_another_have_their_own_scatter():
    other = {**ROWS[2], "encoder": "digits/d", "robust at L2 0.5 by pgd-l2": 0.95}
    del other[f"robust at L2 0.5 by {BOTH}"]
    text = to_html([*ROWS[:2], other], "org", "zoo.html")
    for name, how, value in (("b", BOTH, 90.0), ("d", "pgd-l2", 95.0)):
        said = f"accuracy at L2 0.5 by {how} {value} %"
        assert re.search(f"<title>digits/{name}, [^<]*{said}</title>", text)
    figures = re.findall("<figure.*?</figure>", text, re.DOTALL)
    alone = [figure for figure in figures if "accuracy at L2 0.5 by pgd-l2" in figure]
    assert [figure.count("<circle") for figure in alone] == [1]


def test_one_encoder_is_counted_as_one():
    assert ">1 encoder</p>" in to_html(ROWS[:1], "org", "zoo.html")


def test_no_encoders_are_a_page_that_says_so():
    assert "There are none" in to_html([], "org", "zoo.html")


@pytest.mark.parametrize("values", [[0.9], [1.0], [0.0], [0.0, 1.0], [0.953, 0.991], [0.5, 0.5001]])
def test_an_axis_has_all_values_between_its_ends(values):
    axis = Axis.of(values)
    assert all(-1e-9 <= axis.place(v) <= 1 + 1e-9 for v in values)
    assert 1 <= axis.count <= 5
    assert axis.low >= 0
    assert axis.low + axis.count * axis.step <= 1 + 1e-9
    assert len(axis.ticks) == axis.count + 1


def test_a_click_on_a_heading_sorts_and_another_turns_it(browser, page):
    browser.open(page)
    assert shown(browser) == [r["encoder"] for r in ROWS_BY_ACCURACY]
    browser.click("[data-sort=parameters]")
    assert shown(browser)[:2] == ["digits/plain", "mnist/a"]
    assert browser.run("document.querySelector('[aria-sort]').textContent") == "parameters"
    browser.click("[data-sort=parameters]")
    assert shown(browser)[:2] == ["mnist/a", "digits/plain"]
    assert browser.run("document.querySelector('[aria-sort]').ariaSort") == "ascending"
    browser.click("[data-sort=encoder]")
    assert shown(browser) == sorted(r["encoder"] for r in ROWS)
    assert browser.errors == []


def test_filters_leave_rows_and_points_of_what_is_asked_for(browser, page):
    browser.open(page)
    points = "document.querySelectorAll('figure:not(.off) .point:not(.off)').length"
    assert browser.run(points) == 4
    browser.click("input[name=words]")
    browser.type("DIGITS super")
    assert shown(browser) == ["digits/plain", "digits/b"]
    assert browser.run("document.getElementById('count').textContent") == "2 of 5 encoders"
    assert browser.run(points) == 2
    assert browser.run("document.querySelectorAll('figure:not(.off)').length") == 1
    assert browser.errors == []


def test_the_keyboard_chooses_the_eps_and_sorts_by_it(browser, page):
    browser.open(page)
    browser.run("document.querySelector('[name=threat]').focus()")
    browser.press("ArrowUp")
    assert browser.run("document.querySelector('[name=threat]').value") == f"L2 0.5 by {BOTH}"
    browser.run("document.querySelector('[data-sort=robust]').focus()")
    browser.press("Enter")
    assert shown(browser)[:4] == ["digits/b", "digits/c", "digits/plain", "mnist/a"]
    assert shown(browser)[-1] == "bare"
    visible = "[...document.querySelectorAll('tbody tr:first-child span:not(.off)')]"
    said = browser.run(f"{visible}.map(e => e.textContent)")
    assert f"90.0 % (L2 0.5 by {BOTH})" in said
    assert any("L2, fmn-l2, pgd-l2" in text for text in said)
    assert not any("Linf" in text for text in said)


def test_on_a_phone_nothing_is_wider_than_the_screen_and_it_sorts(browser, page):
    browser.open(page, width=400)
    assert browser.run("document.documentElement.scrollWidth") == 400
    first = "document.querySelector('tbody tr').getBoundingClientRect().height"
    assert browser.run(first) > 50  # the first row is shown too
    browser.run("document.querySelector('[name=order]').focus()")
    browser.press("ArrowDown")
    assert shown(browser)[0] == "digits/c"


def test_the_command_writes_the_page(tmp_path, capsys):
    (tmp_path / "README.md").write_text("---\ntags: [hf-specreg]\n---\n")
    main(["list", str(tmp_path), "--html", str(tmp_path / "pages/zoo.html")])
    assert 'href="../README.md"' in (tmp_path / "pages/zoo.html").read_text()
    assert capsys.readouterr().out.endswith("zoo.html\n")
