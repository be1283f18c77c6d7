"""A study as pictures.

One colour and one marker a method. The colours are Paul Tol's "muted" ones and three more, told
apart by the colour-blind (https://sronpersonalpages.nl/~pault/), and twelve methods differ by their
markers also in print; the next twelve have the same colours with other markers. The plain network
is black, the one stopped earlier grey.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from hf_specreg.robustness.plots import need_matplotlib, new_axes, png
from hf_specreg.robustness.statistics import Estimate
from hf_specreg.robustness.text import norm_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = (
    *("#332288", "#CC6677", "#44AA99", "#DDCC77", "#882255", "#88CCEE", "#117733", "#AA4499"),
    *("#999933", "#EE7733", "#0077BB", "#A0522D"),
)
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "h", "d")
STOPPED_COLOUR = "#777777"
WIDTH, PANEL = 5.0, (3.3, 2.6)  # inches; small, to be read on a phone
SHOWN_LOSS = 8  # margins of accuracy below the plain network's that a frontier shows at least


class Point(NamedTuple):
    """A strength of a method: accuracy and mean distance on test images."""

    strength: float | None
    accuracy: Estimate
    distance: Estimate
    chosen: bool


def picture(content: Mapping[str, Any]) -> bytes:
    """Return the frontier as a PNG file, for a card.

    Raises:
        ImportError: matplotlib is not installed.
    """
    need_matplotlib()
    return png(frontier(content)[0])


def looks(content: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the colour and the marker of each method."""
    others = [m for m in content["methods"] if m not in (content["plain"], content["stopped"])]
    found = {}
    for i, name in enumerate(others):
        again, place = divmod(i, len(COLOURS))
        marker = MARKERS[(place + again) % len(MARKERS)]
        found[name] = {"color": COLOURS[place], "marker": marker}
    found[content["plain"]] = {"color": "black", "marker": "*"}
    return found | {content["stopped"]: {"color": STOPPED_COLOUR, "marker": "."}}


def frontier(content: Mapping[str, Any]) -> tuple["Figure", str]:
    """Draw accuracy against mean distance: all methods, strengths and both intervals."""
    figure, axes = new_axes(height=5.8, width=WIDTH)
    points, look = points_of(content), looks(content)
    _reference(axes, points, content)
    for name, line in points.items():
        if name in (content["plain"], content["stopped"]):
            continue
        _line(axes, line, look[name], label=name)
    hidden = _frame(axes, points, content)
    axes.set(
        xlabel="accuracy on test images (%)",
        ylabel="mean L2 distance to the nearest adversarial\nimage found, in [0, 1] pixels",
    )
    figure.legend(loc="outside lower center", ncols=2, fontsize=8.5, frameon=False)
    caption = (
        "Accuracy against mean distance on test images, with 95 % intervals of both. A line joins "
        "the strengths of a method; a large mark is the strength that was chosen on validation "
        "images. Up and to the right is better. Dashed: the plain network, and what stopping it "
        "earlier gives, which a method has to surpass. Shaded: at most "
        f"{100 * content['accuracy_margin']:g} points below the plain network."
    )
    return figure, caption + hidden


def panels(content: Mapping[str, Any]) -> Iterator[tuple[str, "Figure"]]:
    """Draw the frontier once a method, its strengths written beside, all others in grey.

    Raises:
        ImportError: matplotlib is not installed.
    """
    need_matplotlib()
    points, look = points_of(content), looks(content)
    for name, line in points.items():
        if name in (content["plain"], content["stopped"]) or not line:
            continue
        figure, axes = new_axes(*reversed(PANEL))
        for other, rest in points.items():
            if other not in (name, content["plain"], content["stopped"]):
                axes.plot(*_middles(rest), color="#CCCCCC", lw=0.8, zorder=1)
        _reference(axes, points, content)
        _line(axes, line, look[name])
        _frame(axes, points, content)
        _strengths(axes, line)
        axes.set_title(name, fontsize=10, loc="left", weight="bold")
        axes.set(xlabel="accuracy (%)", ylabel="mean distance")
        yield name, figure


def robust_panels(content: Mapping[str, Any], norm: str) -> Iterator[tuple[str, "Figure"]]:
    """Draw robust accuracy over eps once a method, at its chosen strength, over the plain network's
    and all others in grey.

    Raises:
        ImportError: matplotlib is not installed.
    """
    need_matplotlib()
    look = looks(content)
    curves = {
        row["method"]: [p for p in row["robust_accuracy"] if p["norm"] == norm]
        for row in content["table"]
    }
    for name, points in curves.items():
        if name == content["plain"] or not points:
            continue
        figure, axes = new_axes(*reversed(PANEL))
        for other, rest in curves.items():
            if other not in (name, content["plain"]):
                axes.plot(*_robust(rest)[:2], color="#CCCCCC", lw=0.8, zorder=1)
        for shown in (content["plain"], name):
            eps, values, reaches = _robust(curves.get(shown, ()))
            axes.errorbar(eps, values, reaches, **look[shown], lw=1.2, elinewidth=0.8, markersize=5)
        axes.set_xticks(content["eps"][norm])
        axes.set_ylim(0, 100)
        axes.set_title(name, fontsize=10, loc="left", weight="bold")
        axes.set(xlabel=f"eps ({norm_name(norm)})", ylabel="robust accuracy (%)")
        yield name, figure


def points_of(content: Mapping[str, Any]) -> dict[str, list[Point]]:
    """Return the points of each method's line, without those where no cell is done."""
    chosen = {e["method"]: e["strength"] for e in content["chosen"]}
    found: dict[str, list[Point]] = {name: [] for name in content["methods"]}
    for p in content["frontier"]:
        accuracy, distance = p["test"]["accuracy"], p["test"]["distance"]
        if accuracy["value"] is not None and distance["value"] is not None:
            is_chosen = p["strength"] is not None and chosen.get(p["method"]) == p["strength"]
            found[p["method"]].append(Point(p["strength"], accuracy, distance, is_chosen))
    return {
        name: sorted(line, key=lambda point: (point.strength is not None, point.strength))
        for name, line in found.items()
    }


def _reference(axes: "Axes", points: Mapping[str, list[Point]], content: Mapping[str, Any]) -> None:
    """The plain network, and the curve of stopping it earlier."""
    look, plain = looks(content), points[content["plain"]]
    curve = [*points.get(content["stopped"], ()), *plain]
    if len(curve) > 1:
        label = f"{content['stopped']} (epochs)"
        axes.plot(*_middles(curve), "--", color=STOPPED_COLOUR, lw=1.4, zorder=2, label=label)
    axes.plot(
        *_middles(plain),
        **look[content["plain"]],
        ls="none",
        markersize=13,
        zorder=4,
        label=content["plain"],
    )
    axes.plot(*_middles(curve), ".", color=STOPPED_COLOUR, markersize=7, zorder=3)
    for point in curve:
        _cross(axes, point, color="black" if point in plain else STOPPED_COLOUR, alpha=0.6)
    for point in plain:
        at = 100 * point.accuracy["value"]
        axes.axvspan(at - 100 * content["accuracy_margin"], at + 100, color="#F0F0F0", zorder=0)


def _line(axes: "Axes", line: Sequence[Point], look: Mapping[str, Any], label: str = "") -> None:
    """A method's strengths, joined; the chosen one large."""
    axes.plot(*_middles(line), **look, lw=1.2, markersize=5, label=label or None, zorder=3)
    for point in line:
        _cross(axes, point, color=look["color"], alpha=0.45)
        if point.chosen:
            axes.plot(*_middles([point]), **look, markersize=10, markeredgecolor="black", zorder=5)


def _frame(axes: "Axes", points: Mapping[str, list[Point]], content: Mapping[str, Any]) -> str:
    """Show where methods can be compared; return what is said of points that lie outside."""
    every = [point for line in points.values() for point in line]
    if not every:
        return ""
    plain = points[content["plain"]] or every
    start = plain[0].accuracy["value"] - SHOWN_LOSS * content["accuracy_margin"]
    left = max(start, min(point.accuracy["value"] for point in every))
    inside = [point for point in every if point.accuracy["value"] >= left]
    right = max(_ends(point.accuracy)[1] for point in inside)
    low = min(_ends(point.distance)[0] for point in inside)
    high = max(_ends(point.distance)[1] for point in inside)
    wide, tall = (right - left) or 0.01, (high - low) or 0.1
    axes.set_xlim(100 * (left - 0.07 * wide), 100 * (right + 0.02 * wide))
    axes.set_ylim(low - 0.03 * tall, high + 0.03 * tall)
    hidden = len(every) - len(inside)
    return (
        f" {hidden} strengths with less accuracy lie outside; all are in the table below."
        if (hidden)
        else ""
    )


def _cross(axes: "Axes", point: Point, **look: Any) -> None:
    """A point's two intervals."""
    accuracy = scaled(point.accuracy, 100)
    x_reach, y_reach = ([[end] for end in reach(of)] for of in (accuracy, point.distance))
    at = (accuracy["value"], point.distance["value"])
    axes.errorbar(*at, xerr=x_reach, yerr=y_reach, ls="none", lw=0.8, zorder=2, **look)


def _robust(points: Sequence[Mapping[str, Any]]) -> tuple[list[float], list[float], Any]:
    """The eps, robust accuracy in percent, and how far its intervals reach, [2, n]."""
    shown = [scaled(p, 100) for p in points]
    reaches = [list(ends) for ends in zip(*map(reach, shown), strict=True)]
    return [p["eps"] for p in points], [p["value"] for p in shown], reaches or None


def _middles(line: Sequence[Point]) -> tuple[list[float], list[float]]:
    return [100 * p.accuracy["value"] for p in line], [p.distance["value"] for p in line]


def reach(estimate: Estimate) -> tuple[float, float]:
    """Return how far an interval reaches below and above its value; 0 where there is none."""
    value, (low, high) = estimate["value"], estimate["ci"]
    return (0.0, 0.0) if low is None else (max(0.0, value - low), max(0.0, high - value))


def _ends(estimate: Estimate) -> tuple[float, float]:
    """The ends of the interval, or the value twice."""
    value, (down, up) = estimate["value"], reach(estimate)
    return value - down, value + up


def scaled(estimate: Estimate | None, factor: float) -> Estimate | None:
    """Return the estimate of a multiple; None where there is nothing."""
    if estimate is None or estimate["value"] is None:
        return None
    ends = [None if end is None else factor * end for end in estimate["ci"]]
    return {"value": factor * estimate["value"], "ci": ends}


def _strengths(axes: "Axes", line: Sequence[Point]) -> None:
    """Write the strengths beside their points, the chosen first, where there is room."""
    left, _ = axes.get_xlim()
    if all(100 * point.accuracy["value"] < left for point in line):
        said = "every strength\nhas less accuracy"
        axes.text(0.04, 0.06, said, transform=axes.transAxes, fontsize=8, zorder=6)
    taken: list[tuple[float, float]] = []
    for point in sorted(line, key=lambda p: (p.chosen, p.strength), reverse=True):
        where = (100 * point.accuracy["value"], point.distance["value"])
        x, y = axes.transAxes.inverted().transform(axes.transData.transform(where))
        if 0 <= x <= 1 and all(abs(x - a) > 0.16 or abs(y - b) > 0.1 for a, b in taken):
            taken.append((x, y))
            look = {"fontsize": 8, "weight": "bold" if point.chosen else "normal", "zorder": 6}
            text = f"{point.strength:g}"
            axes.annotate(
                text,
                where,
                xytext=(-5, -5),
                textcoords="offset points",
                ha="right",
                va="top",
                **look,
            )
