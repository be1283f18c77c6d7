"""What a study measured at the chosen strengths: a line a method, estimates with intervals."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from hf_specreg.robustness.plots import need_matplotlib, new_axes
from hf_specreg.robustness.statistics import Estimate
from hf_specreg.study.plots import WIDTH, looks, reach, scaled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class Drawn(NamedTuple):
    """A figure, the table of `sections` that it stands beside, and what it shows."""

    beside: str
    figure: "Figure"
    caption: str


def figures(content: Mapping[str, Any]) -> Iterator[Drawn]:
    """Draw what there is, in the order in which it is read.

    Raises:
        ImportError: matplotlib is not installed.
    """
    need_matplotlib()
    rows = content["table"]
    if any(row["ratio"] for row in rows):
        yield Drawn("distances", *ratios(content))
    if any("ece" in row["calibration"] for row in rows):
        yield Drawn("measures", *calibration(content))
    if any(row["ood_auroc"] for row in rows):
        yield Drawn("measures", *ood(content))
    if any(row["step_time"] for row in rows):
        yield Drawn("measures", *cost(content))


def ratios(content: Mapping[str, Any]) -> tuple["Figure", str]:
    """Draw the ratios of mean distances with their intervals, against 1."""
    rows = [row for row in content["table"] if row["ratio"]]

    def control(row: Mapping[str, Any]) -> Estimate | None:
        return row["control"] and row["control"]["ratio"]

    figure, axes = _by_method(
        content,
        rows,
        {"plain": lambda row: row["ratio"], "plain, at its accuracy": control},
    )
    axes.axvline(1, color="black", lw=1)
    axes.set_xlabel("mean distance over that of the plain network")
    caption = (
        "Mean distance over that of the plain network (filled), and of the plain network, stopped "
        "earlier or not, that is nearest to its accuracy (open), paired, with 95 % intervals. "
        "Right of 1 is farther: harder to attack takes both."
    )
    return figure, caption


def calibration(content: Mapping[str, Any]) -> tuple["Figure", str]:
    """Draw the expected calibration error before and after the temperature."""
    figure, axes = _by_method(
        content,
        content["table"],
        {
            "after a temperature": lambda row: scaled(row["calibrated"].get("ece"), 100),
            "as trained": lambda row: scaled(row["calibration"].get("ece"), 100),
        },
    )
    axes.set_xlabel("expected calibration error (%)")
    axes.set_xlim(left=0)
    return figure, (
        "Expected calibration error as trained (open) and after a temperature that was fitted on "
        "the validation images (filled). Left is better."
    )


def ood(content: Mapping[str, Any]) -> tuple["Figure", str]:
    """Draw how well the other image set is told from the test images."""
    rows = [row for row in content["table"] if row["ood_auroc"]]
    scores = list(dict.fromkeys(score for row in rows for score in row["ood_auroc"]))
    ways: dict[str, Callable] = {
        score.replace("_", " "): lambda row, score=score: row["ood_auroc"].get(score)
        for score in scores
    }
    figure, axes = _by_method(content, rows, ways)
    axes.set_xlabel(f"AUROC of {content['ood']} against the test images")
    first, *rest = ways
    named = f"by {first} (filled)" + "".join(f" and by {score} (open)" for score in rest)
    return figure, (
        f"How well {content['ood']} is told from the test images {named}: area under the ROC "
        "curve. Right is better, 0.5 is chance."
    )


def cost(content: Mapping[str, Any]) -> tuple["Figure", str]:
    """Draw the time of a training step over the plain network's."""
    rows = [row for row in content["table"] if row["step_time"]]

    def rounds(row: Mapping[str, Any]) -> Estimate:
        time = row["step_time"]
        found = [*time["rounds"], time["ratio"]]
        return {"value": time["ratio"], "ci": [min(found), max(found)]}

    figure, axes = _by_method(content, rows, {"step": rounds})
    axes.axvline(1, color="black", lw=1)
    axes.set_xlabel("time of a training step over the plain network's")
    return (
        figure,
        "Time of a training step over the plain network's; bars: least and most of rounds.",
    )


def _by_method(
    content: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    ways: Mapping[str, Callable[[Mapping[str, Any]], Estimate | None]],
) -> tuple["Figure", "Axes"]:
    """A line a method, an estimate for each way, the first filled and the others open."""
    figure, axes = new_axes(height=0.8 + 0.36 * len(rows), width=WIDTH)
    look = looks(content)
    for place, row in enumerate(rows):
        for i, way in enumerate(ways.values()):
            estimate = way(row)
            if not estimate or estimate["value"] is None:
                continue
            style = look[row["method"]]
            axes.errorbar(
                estimate["value"],
                place + 0.26 * (i - (len(ways) - 1) / 2),
                xerr=[[end] for end in reach(estimate)],
                **style,
                markerfacecolor="white" if i else style["color"],
                markersize=7,
            )
    axes.set_yticks(range(len(rows)), [row["method"] for row in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    return figure, axes
