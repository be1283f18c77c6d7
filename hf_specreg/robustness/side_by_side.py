"""Several saved classifiers, as before and after fine-tuning, attacked on the same images."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets

from hf_specreg.robustness.evaluate import check_settings, evaluate_robustness
from hf_specreg.robustness.images import ImageSet
from hf_specreg.robustness.plots import need_matplotlib
from hf_specreg.robustness.report import RobustnessReport
from hf_specreg.robustness.work import Processes


def check_evaluation(
    attacks: Mapping[str, Mapping[str, Any]], eps: Sequence[float], *, samples: int
) -> None:
    """Raise what the evaluation would raise of its settings, before a model is trained for it.

    Raises:
        ValueError: an unknown attack or setting, or an eps that is none.
        ImportError: an attack's library, or the one that draws the page, is not installed.
    """
    if not samples:
        return
    check_settings(attacks, eps)
    need_matplotlib()


def evaluate_side_by_side(
    folders: Mapping[str, Path],
    rows: datasets.Dataset,
    *,
    samples: int,
    output: Path,
    about: Mapping[str, Any] | None = None,
    shard: tuple[int, int] = (0, 1),
    barrier: Callable[[], None] = lambda: None,
    **settings: Any,
) -> list[RobustnessReport]:
    """Attack the classifiers; leave a report of each, and a page that compares them.

    Args:
        folders: of the classifiers, by the name that they have in the reports. The reports go
            beside them, into FOLDER_report/.
        rows: images and labels.
        samples: how many of them at most, drawn by the seed.
        output: folder for report.html.
        about: what the reports say of the images: "id", "revision", "split".
        shard: (rank, processes), which share the images out.
        barrier: waits for the other processes.
        settings: of `evaluate_robustness`.
    """
    reports = []
    for name, folder in folders.items():
        workspace = folder.parent / f"{folder.name}_report"
        report = evaluate_robustness(
            str(folder),
            ImageSet(rows, about=about or {}),
            name=name,
            samples=min(samples, len(rows)),
            output=workspace,
            processes=Processes(*shard, barrier),
            **settings,
        )
        reports.append(report)
        if shard[0] == 0:
            report.save(workspace / "robustness.json")
    if shard[0] == 0:
        shown = RobustnessReport.compare(reports) if len(reports) > 1 else reports[0]
        shown.to_html(output / "report.html")
    return reports
