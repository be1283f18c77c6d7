"""The HTML page of a report or of a comparison: self-contained, no script, nothing from elsewhere.

Its sentences and tables are in report.html.jinja, beside this file; the style, which pages share,
is in page.html.jinja.
"""

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2

from hf_specreg.robustness.plots import difference_scale, figures, png, twin_figure
from hf_specreg.robustness.schema import Report
from hf_specreg.robustness.text import (
    INTERVALS,
    attack_name,
    data_name,
    distances,
    farther,
    half,
    listed,
    norm_name,
    number,
    percent,
    points,
)
from hf_specreg.robustness.verdict import summary

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FILTERS = {
    "percent": percent,
    "points": points,
    "number": number,
    "norm": norm_name,
    "listed": listed,
    "farther": farther,
    "half": half,
    "data_name": data_name,
    "distances": distances,
}


def write_page(
    path: str | Path,
    reports: Sequence[Report],
    names: Sequence[str],
    compared: Mapping[str, Any] | None = None,
) -> None:
    """Write the page about one model, or several that are compared.

    Args:
        path: the HTML file.
        reports: of the models.
        names: of the models, all different.
        compared: of several models "verdicts", "flags", "caution", "paired", "attacks",
            "distances" and "robust_accuracy", see `Comparison`.

    Raises:
        ImportError: matplotlib is not installed.
    """
    drawn = [
        {"caption": caption, "svg": svg(figure)} for _, figure, caption in figures(reports, names)
    ]
    scale = difference_scale(reports)
    text = render(
        Path(__file__).with_name("report.html.jinja"),
        reports=reports,
        names=names,
        compared=compared,
        verdicts=compared["verdicts"] if compared else [[summary(reports[0].content)]],
        flags=_flags(reports, names, compared),
        faced=_faced(reports[0].content, compared),
        figures=drawn,
        twins=[_twins(report, scale) for report in reports],
        intervals=INTERVALS,
    )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, "utf-8")


def _flags(
    reports: Sequence[Report], names: Sequence[str], compared: Mapping[str, Any] | None
) -> list[str]:
    if compared is None:
        return reports[0].content["flags"]
    return compared["flags"] + [
        f"{name}: {flag}"
        for name, report in zip(names, reports, strict=True)
        for flag in report.content["flags"]
    ]


def _faced(content: Mapping[str, Any], compared: Mapping[str, Any] | None) -> str:
    """The attacks that robust accuracy is under, with their strength."""
    names = compared["attacks"] if compared else list(content["attacks"])
    return listed([attack_name(name, content["attacks"][name]) for name in names])


def render(template: Path, **values: Any) -> str:
    """Return a page from its template, which may extend and import those that are beside this
    file.
    """
    folders = [template.parent, Path(__file__).parent]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folders),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= FILTERS
    return environment.get_template(template.name).render(values)


def svg(figure: "Figure", *, text: bool = False) -> str:
    """Return the figure as an SVG element, the same bytes for the same figure.

    Args:
        figure: is closed.
        text: write letters as text, in the reader's own font; else as outlines.
    """
    import matplotlib
    import matplotlib.pyplot as plt

    buffer = io.StringIO()
    letters = "none" if text else "path"
    with matplotlib.rc_context({"svg.hashsalt": "hf_specreg", "svg.fonttype": letters}):
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", metadata=nothing)
    plt.close(figure)
    drawn = buffer.getvalue()
    return drawn[drawn.index("<svg") :]


def _twins(report: Report, scale: float) -> str | None:
    """The picture of the twins as a PNG for an <img>, or None."""
    if not report.twins or report.twins["shown"].shape[1] not in (1, 3):
        return None
    return base64.b64encode(png(twin_figure(report, scale))).decode()
