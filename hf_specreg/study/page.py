"""The HTML page of a study: self-contained, no script, nothing from elsewhere.

Its layout is in study.html.jinja, beside this file; its sentences and tables are those of
`hf_specreg.study.text` and `tables`, its style that of the reports' pages.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from hf_specreg.robustness.page import render, svg
from hf_specreg.study.chosen_plots import figures
from hf_specreg.study.plots import frontier, panels, robust_panels
from hf_specreg.study.tables import sections
from hf_specreg.study.text import caution, facts
from hf_specreg.study.verdict import cautions, summary, verdicts


def to_html(content: Mapping[str, Any]) -> str:
    """Return the page of what study.json holds.

    Raises:
        ImportError: matplotlib is not installed.
    """
    drawn = [
        {"beside": d.beside, "caption": d.caption, "svg": svg(d.figure)} for d in figures(content)
    ]
    first = None
    if content["frontier"]:
        figure, caption = frontier(content)
        small = [(name, svg(panel)) for name, panel in panels(content)]
        first = {"svg": svg(figure), "caption": caption, "panels": small}
    return render(
        Path(__file__).with_name("study.html.jinja"),
        content=content,
        summary=summary(content),
        verdicts=verdicts(content),
        caution=caution(content),
        cautions=cautions(content),
        sections=sections(content),
        facts=facts(content),
        settings=yaml.safe_dump(content["settings"], sort_keys=False, allow_unicode=True),
        frontier=first,
        figures=drawn,
        robust={
            norm: [(name, svg(panel)) for name, panel in robust_panels(content, norm)]
            for norm in content["eps"]
        },
    )
