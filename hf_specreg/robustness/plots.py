"""The report as pictures.

Colours are those of Okabe and Ito, which the colour-blind tell apart; markers and line styles
say the same in print. One colour a model, one line style an attack.
"""

import io
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_specreg.robustness.schema import Report
from hf_specreg.robustness.statistics import binomial_interval
from hf_specreg.robustness.text import listed, norm_name
from hf_specreg.robustness.threat import NORMS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES = ("-", "--", ":", "-.")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
WIDTH, HEIGHT = 6.4, 4.0  # inches
CURVE_POINTS = 80
KINDS = ("robust_accuracy", "distances", "distance_by_queries", "sigmas")


def figures(
    reports: Sequence[Report], names: Sequence[str], kinds: Sequence[str] = KINDS
) -> Iterator[tuple[str, "Figure", str]]:
    """Draw the reports of one model, or of several in one picture: its name, the figure, a caption.

    Args:
        reports: of the models.
        names: of the models, all different.
        kinds: of `KINDS`; each for every norm that there are attacks of.

    Raises:
        ImportError: matplotlib is not installed.
    """
    need_matplotlib()
    for kind, norm in product(kinds, NORMS):
        made = globals()[kind](reports, names, norm)
        if made is not None:
            yield f"{kind}_{norm}", *made


def pictures(
    reports: Sequence[Report], names: Sequence[str], kinds: Sequence[str]
) -> dict[str, tuple[bytes, str]]:
    """Return plots as PNG files with their captions, by name, see `figures`."""
    return {name: (png(figure), said) for name, figure, said in figures(reports, names, kinds)}


def robust_accuracy(
    reports: Sequence[Report], names: Sequence[str], norm: str
) -> tuple["Figure", str] | None:
    """Draw robust accuracy over eps in one norm, with 95 % bands; fixed-eps attacks as points."""
    attacks = _attacks(reports, norm)
    if not attacks:
        return None
    figure, axes = new_axes()
    largest = max(p["eps"] for r in reports for p in r.content["worst_case"] if p["norm"] == norm)
    grid = np.linspace(0, 1.25 * largest, CURVE_POINTS)
    for (i, report), (j, name) in product(enumerate(reports), enumerate(attacks)):
        attack = report.content["attacks"].get(name)
        if attack is None:
            continue
        label = _label(names[i], name, len(reports), len(attacks))
        look = {"color": _colour(i, j, len(reports)), "label": label}
        if "distance" in attack and report.images:
            found = report.images[f"{name}/distances"][:, None] > grid
            curve = (report.images["correct"][:, None] & found).mean(0)
            n = len(found)
            low, high = binomial_interval((curve * n).round(), n)
            axes.fill_between(grid, 100 * low, 100 * high, color=look["color"], alpha=0.15, lw=0)
            axes.plot(grid, 100 * curve, linestyle=STYLES[j % len(STYLES)], **look)
        else:
            points = attack["robust_accuracy"]
            value = 100 * np.array([p["value"] for p in points])
            ends = 100 * np.array([p["ci"] for p in points]).T
            error = np.abs(ends - value)
            style = {"marker": MARKERS[j % len(MARKERS)], "linestyle": "none", "capsize": 3}
            axes.errorbar([p["eps"] for p in points], value, error, **style, **look)
    axes.set(
        xlabel=f"eps ({norm_name(norm)}, [0, 1] pixels)",
        ylabel="robust accuracy (% of all images)",
        xlim=(0, 1.25 * largest),
        ylim=(0, 100),
    )
    axes.legend()
    caption = (
        f"Robust accuracy over eps in {norm_name(norm)}: how many of all images are classified "
        "correctly and withstand the attack within eps. Lines: attacks of minimum distance. "
        "Points: attacks run at that eps. Bands and bars: 95 %."
    )
    return figure, caption


def distances(
    reports: Sequence[Report], names: Sequence[str], norm: str
) -> tuple["Figure", str] | None:
    """Draw how far the nearest adversarial images are, one box a model and attack."""
    attacks = [
        name
        for name in _attacks(reports, norm)
        if all("distance" in r.content["attacks"].get(name, {}) and r.images for r in reports)
    ]
    correct = _paired(reports)
    if not attacks or not correct.any():
        return None
    boxes, labels, colours = [], [], []
    for (j, attack), (i, report) in product(enumerate(attacks), enumerate(reports)):
        boxes.append(report.images[f"{attack}/distances"][correct].astype(float))
        missing = int(np.isinf(boxes[-1]).sum())
        label = _label(names[i], attack, len(reports), len(attacks))
        labels.append(f"{label}\n(+ {missing} not found)" if missing else label)
        colours.append(_colour(i, j, len(reports)))
    found = np.concatenate(boxes)
    edge = 1.05 * max(found[np.isfinite(found)], default=0.0)
    if not edge:
        return None
    figure, axes = new_axes(height=1.2 + 0.55 * len(boxes))
    drawn = axes.bxp(
        [
            {**_box(values, edge), "label": label}
            for values, label in zip(boxes, labels, strict=True)
        ],
        orientation="horizontal",
        widths=0.6,
        showmeans=True,
        patch_artist=True,
        flierprops={"markersize": 2},
        medianprops={"color": "black"},
        meanprops={"marker": "D", "markerfacecolor": "white", "markeredgecolor": "black"},
    )
    for box, colour in zip(drawn["boxes"], colours, strict=True):
        box.set(facecolor=colour, alpha=0.5)
    axes.invert_yaxis()
    axes.set_xlim(0, edge)
    axes.set_xlabel(f"nearest adversarial image found ({norm_name(norm)}, [0, 1] pixels)")
    caption = (
        f"Distances that {listed(attacks)} found on the {int(correct.sum())} images that "
        f"{'all models classify' if len(reports) > 1 else 'the model classifies'} correctly: box, "
        "quartiles and median; diamond, mean; whiskers, 1.5 box lengths."
    )
    if np.isinf(found).any():
        caption += (
            " Images for which nothing was found are farther than any other: what reaches the "
            "right edge is beyond what was found, and there is no mean."
        )
    return figure, caption


def distance_by_queries(
    reports: Sequence[Report], names: Sequence[str], norm: str
) -> tuple["Figure", str] | None:
    """Draw the best distance so far against the queries made."""
    attacks = [
        n for n in _attacks(reports, norm) if any(f"{n}/trajectory" in r.images for r in reports)
    ]
    correct = _paired(reports)
    curves = [
        (i, j, report.images[f"{attack}/trajectory"][correct])
        for (i, report), (j, attack) in product(enumerate(reports), enumerate(attacks))
        if correct.any() and f"{attack}/trajectory" in report.images
    ]
    curves = [c for c in curves if np.isfinite(_quartiles(c[2][:, -1, 1])[1])]
    if not curves:
        return None
    figure, axes = new_axes()
    for i, j, steps in curves:
        queries = np.median(steps[:, :, 0], axis=0)
        low, middle, high = _quartiles(steps[:, :, 1])
        look = {"color": _colour(i, j, len(reports)), "linestyle": STYLES[i % len(STYLES)]}
        axes.fill_between(queries, low, high, color=look["color"], alpha=0.15, lw=0)
        label = _label(names[i], attacks[j], len(reports), len(attacks))
        axes.plot(queries, middle, label=label, **look)
    axes.set(
        xlabel="queries an image",
        ylabel=f"best distance ({norm_name(norm)}, [0, 1] pixels)",
        xscale="log",
        yscale="log",
    )
    plain_ticks(axes.xaxis)
    plain_ticks(axes.yaxis)
    axes.legend()
    caption = (
        "Best distance so far against queries: median, and band of quartiles, over the images of "
        "the plot before; one for which nothing is found yet is farther than any other, so that a "
        "curve begins where something is found for half of them."
    )
    return figure, caption


def sigmas(
    reports: Sequence[Report], names: Sequence[str], norm: str
) -> tuple["Figure", str] | None:
    """Draw every layer's top singular value, in forward order."""
    if norm != "l2" or not any(r.content["layers"] for r in reports):
        return None
    layers = list(dict.fromkeys(la["name"] for r in reports for la in r.content["layers"]))
    figure, axes = new_axes(height=min(1.4 + 0.2 * len(layers), 14))
    for i, report in enumerate(reports):
        for key, fill in (("sigma", True), ("sigma_folded", False)):
            known = [la for la in report.content["layers"] if la.get(key) is not None]
            if not known:
                continue
            colour = _colour(i, 0, len(reports))
            axes.plot(
                [la[key] for la in known],
                [layers.index(la["name"]) for la in known],
                color=colour,
                marker=MARKERS[i % len(MARKERS)],
                markerfacecolor=colour if fill else "white",
                linestyle="none",
                markersize=5,
                label=names[i] + ("" if fill else ", norm folded"),
            )
    axes.set_yticks(range(len(layers)), layers, fontsize=7 if len(layers) > 12 else 9)
    axes.invert_yaxis()
    axes.set_xscale("log")
    plain_ticks(axes.xaxis)
    axes.set_xlabel("top singular value of the layer")
    figure.legend(loc="outside upper right", ncols=2)
    return figure, "Top singular value of every linear map up to the features, in forward order."


def difference_scale(reports: Sequence[Report]) -> float:
    """Return by how much the differences of all models' images and twins are magnified."""
    found = [r.twins["twins"] - r.twins["shown"] for r in reports if r.twins]
    return 0.5 / max([1e-12, *(np.abs(difference).max() for difference in found)])


def twin_figure(report: Report, scale: float) -> "Figure":
    """Draw a few images, their adversarial twins, and the difference magnified."""
    import matplotlib.pyplot as plt

    shown, twins = report.twins["shown"], report.twins["twins"]
    figure, grid = plt.subplots(
        3, len(shown), figsize=(1.3 * len(shown), 4), squeeze=False, layout="constrained"
    )
    difference = twins - shown
    rows = (shown, twins, 0.5 + scale * difference)
    titles = ("image", "adversarial", f"difference x {scale:.2g}")
    for axes, images, title in zip(grid, rows, titles, strict=True):
        axes[0].set_ylabel(title)
        for ax, image in zip(axes, images, strict=True):
            picture = np.moveaxis(image, 0, -1).clip(0, 1)
            ax.imshow(picture[..., 0] if len(image) == 1 else picture, cmap="gray", vmin=0, vmax=1)
            ax.set(xticks=[], yticks=[])
    sizes = np.linalg.norm(difference.reshape(len(difference), -1), axis=1)
    for ax, size in zip(grid[0], sizes, strict=True):
        ax.set_title(f"L2 {size:.2f}" if size else "none found", fontsize=9)
    return figure


def _quartiles(values: np.ndarray) -> np.ndarray:
    """Of values [n, ...], infinite ones as larger than any other, [3, ...]."""
    return np.quantile(values, (0.25, 0.5, 0.75), axis=0, method="inverted_cdf")


def _box(values: np.ndarray, edge: float) -> dict[str, Any]:
    """What is drawn of distances [n]; what is infinite ends at the edge."""
    low, middle, high = _quartiles(values)
    reach = 1.5 * (high - low) if np.isfinite(high) else 0.0
    inside = values[(values >= low - reach) & (values <= high + reach)]
    ends = {"q1": low, "med": middle, "q3": high, "whislo": inside.min(), "whishi": inside.max()}
    return {
        **{key: min(end, edge) for key, end in ends.items()},
        "mean": values.mean() if np.isfinite(values).all() else np.nan,
        "fliers": values[(values < inside.min()) | (values > inside.max()) & (values < np.inf)],
    }


def _paired(reports: Sequence[Report]) -> np.ndarray:
    """Which images all models classify correctly."""
    if not all(report.images for report in reports):
        return np.zeros(1, bool)
    return np.all([report.images["correct"] for report in reports], axis=0)


def _attacks(reports: Sequence[Report], norm: str) -> list[str]:
    names = {
        name: None
        for report in reports
        for name, attack in report.content["attacks"].items()
        if attack["norm"] == norm
    }
    return list(names)


def _label(model: str, attack: str, models: int, attacks: int) -> str:
    if models == 1:
        return attack
    return model if attacks == 1 else f"{model}, {attack}"


def _colour(model: int, attack: int, models: int) -> str:
    return COLOURS[(model if models > 1 else attack) % len(COLOURS)]


def new_axes(height: float = HEIGHT, width: float = WIDTH) -> tuple["Figure", Any]:
    """Return a figure of so many inches with one plot in it."""
    import matplotlib

    matplotlib.use("agg", force=False)
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(width, height), layout="constrained")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    return figure, axes


def plain_ticks(axis: Any) -> None:
    """Label a logarithmic axis at 1, 2 and 5 of each decade, in plain numbers."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def png(figure: "Figure") -> bytes:
    """The figure as a PNG file, the same bytes for the same figure."""
    import matplotlib.pyplot as plt

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, metadata={"Software": None})
    plt.close(figure)
    return buffer.getvalue()


def need_matplotlib() -> None:
    """Raise ImportError, with what to install, where matplotlib is not there."""
    if find_spec("matplotlib") is None:
        raise ImportError("plots need matplotlib: install the extra plots")
