"""The tables of a study, for Markdown and the page."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any, NamedTuple

from hf_specreg.robustness.statistics import Estimate
from hf_specreg.robustness.text import attack_name, listed, norm_name, number, percent, points
from hf_specreg.study.verdict import at_strength, not_chosen, outcome, side

SIGNS = {1: "+", -1: "-", 0: "0"}


class Section(NamedTuple):
    """A heading, what to know of the table, its header and rows; a table may be empty."""

    title: str
    note: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


def attacks(content: Mapping[str, Any], part: str) -> str:
    """Return the attacks of the cells or the final ones, each with its strength."""
    settings = content["attacks"][part]
    return listed([attack_name(name, {"settings": s}) for name, s in settings.items()])


def sections(content: Mapping[str, Any]) -> dict[str, Section]:
    """Return all tables that have rows, by what they are of, as they are read."""
    final = "At equal accuracy, by the final attacks"
    made = {
        "distances": _distances(content, "table", "cells", "At equal accuracy"),
        "pairs": _pairs(content),
        "robust_accuracy": _robust_accuracy(content),
        "measures": _measures(content),
        "final": _distances(content, "final", "final", final),
        "frontier": _frontier(content),
        "choices": _choices(content),
        "missing": _missing(content),
        "methods": _methods(content),
    }
    return {name: section for name, section in made.items() if section.rows}


def _distances(content: Mapping[str, Any], part: str, faced: str, title: str) -> Section:
    plain = content["plain"]
    images = content["attacked"]["test" if faced == "cells" else "final"]
    note = (
        f"Mean L2 distance in [0, 1] pixels to the nearest adversarial image that "
        f"{attacks(content, faced)} found, over those of {images:,} test images that are "
        f"classified correctly. Ratio: mean distance over that of {plain}, seed by seed, on images "
        "that both classify correctly; its seeds: + farther, - nearer. Ratio to stopped: the same "
        f"over {plain} trained for as many epochs as bring it nearest to the method's accuracy. "
        "Images: that are compared, a seed; left out: where nothing was found for one of the two."
    )
    header = ["method", "strength", "accuracy", f"against {plain}", "mean distance"]
    header += ["ratio", "seeds", "ratio to stopped", "its seeds", "stopped at", "images"]
    rows = [
        [
            row["method"],
            strength(row),
            percent(row["accuracy"]),
            maybe(points, row["accuracy_difference"]),
            number(row["distance"]),
            ratio(row["ratio"]),
            signs(row["signs"]),
            *_control(row["control"]),
            _counts(row),
        ]
        for row in content[part]
    ]
    if part == "table":  # what is said of a method; the final attacks may only contradict it
        header.append("verdict")
        for row, shown in zip(content[part], rows, strict=True):
            shown.append("" if row["method"] == plain else outcome(row, content))
    return Section(title, note, header, rows)


def _pairs(content: Mapping[str, Any]) -> Section:
    note = (
        "At their chosen strengths. Ratio: mean distance of the first over that of the second, "
        "seed by seed, on images that both classify correctly; accuracy: of the first against the "
        "second."
    )
    header = ["method", "against", "accuracy", "ratio", "seeds", "images", "withdrawn"]
    rows = [
        [
            *map(_at, pair["methods"], pair["strengths"]),
            maybe(points, pair["accuracy_difference"]),
            _ratio_of_pair(pair),
            signs(pair["signs"]),
            _counts(pair),
            "; ".join(pair.get("withdrawn", ())),
        ]
        for pair in content.get("pairs", ())
    ]
    return Section("Methods against each other", note, header, rows)


def _ratio_of_pair(pair: Mapping[str, Any]) -> str:
    if pair["ratio"] is None:
        return "not chosen"
    return number(pair["ratio"]) if pair.get("withdrawn") else ratio(pair["ratio"])


def _at(method: str, strength: float | None) -> str:
    return at_strength({"method": method, "strength": strength})


def _robust_accuracy(content: Mapping[str, Any]) -> Section:
    columns = _eps(content)
    note = (
        "Of the attacked test images: classified correctly, and nothing found within eps. The mean "
        "is over the eps."
    )
    header = ["method", *(f"{norm_name(norm)} {eps:g}" for norm, eps in columns), "mean"]
    rows = []
    for row in content["table"]:
        found = {(p["norm"], p["eps"]): percent(p) for p in row["robust_accuracy"]}
        shown = [found.get(column, "") for column in columns]
        rows.append([row["method"], *shown, maybe(percent, row["mean_robust_accuracy"])])
    if any(row["distance_half_budget"] is not None for row in content["table"]):
        note += (
            " Half the budget: the mean distance that the attacks had found by then, which is no "
            "longer falling where they have converged."
        )
        header += ["mean distance at half the budget", "in full"]
        for row, shown in zip(content["table"], rows, strict=True):
            shown += [
                maybe("{:.3f}".format, row["distance_half_budget"]),
                number(row["distance"]).split(" (")[0],
            ]
    return Section("Robust accuracy", note, header, rows)


def _measures(content: Mapping[str, Any]) -> Section:
    scores = dict.fromkeys(s for row in content["table"] for s in row["ood_auroc"] or ())
    note = (
        "ECE: expected calibration error, before and after a temperature that is fitted on the "
        "validation images. "
        + (f"AUROC: how well {content['ood']} is told from the test images. " if scores else "")
        + "Step: seconds of a training step over the plain network's, and the least and most of "
        "the rounds."
    )
    header = ["method", "ECE", "after temperature"]
    header += [f"AUROC, {score.replace('_', ' ')}" for score in scores]
    header += ["step", "sum of sigma^2"]
    rows = [
        [
            row["method"],
            maybe(percent, row["calibration"].get("ece")),
            maybe(percent, row["calibrated"].get("ece")),
            *(maybe(number, (row["ood_auroc"] or {}).get(score)) for score in scores),
            step_time(row["step_time"]),
            compact(row["sum_sigma2"]),
        ]
        for row in content["table"]
    ]
    return Section("Calibration, out of distribution, cost", note, header, rows)


def _frontier(content: Mapping[str, Any]) -> Section:
    chosen = {e["method"]: e["strength"] for e in content["chosen"]}
    rows = [
        [
            p["method"],
            strength(p) + (" (chosen)" if chosen_is(chosen, p) else ""),
            f"{p['seeds']}" + (f", {p['diverged']} diverged" if p["diverged"] else ""),
            *(
                shown(p[part][key])
                for part in ("validation", "test")
                for key, shown in (("accuracy", percent), ("distance", number))
            ),
            ratio(p.get("over_plain")),
            *_mean_robust(content, p),
        ]
        for p in content["frontier"]
    ]
    header = ["method", "strength", "seeds", "validation accuracy", "validation distance"]
    header += ["test accuracy", "test distance", "over stopped"]
    header += [f"robust at {norm_name(norm)} {eps:g}" for norm, eps in _eps(content)]
    note = (
        f"Over stopped: the test distance over that of {content['plain']} stopped at the same test "
        "accuracy, of the same images, on straight lines between the epochs at which it was "
        "stopped; of what is more accurate than all of these over that of the most accurate; "
        "nothing of what is less. The intervals take the accuracies as known. Robust: robust "
        "accuracy, the mean over seeds."
    )
    return Section("Every strength", note, header, rows)


def _mean_robust(content: Mapping[str, Any], point: Mapping[str, Any]) -> list[str]:
    """The robust accuracy of a strength over eps, the mean over its cells."""
    of_point = point["method"], point["strength"]
    found = defaultdict(list)
    for cell in content["cells"]:
        if cell["status"] == "done" and (cell["method"], cell["strength"]) == of_point:
            for one in cell["test"]["robust_accuracy"]:
                found[one["norm"], one["eps"]].append(one["value"])
    columns = (found[column] for column in _eps(content))
    return [f"{100 * fmean(values):.1f} %" if values else "" for values in columns]


def _eps(content: Mapping[str, Any]) -> list[tuple[str, float]]:
    return [(norm, eps) for norm, radii in content["eps"].items() for eps in radii]


def chosen_is(chosen: Mapping[str, float | None], point: Mapping[str, Any]) -> bool:
    """Return whether a point of the frontier is the one that was chosen of its method."""
    method, at = point["method"], point["strength"]
    return at is not None and chosen.get(method) == at


def _choices(content: Mapping[str, Any]) -> Section:
    rows = [[e["method"], strength(e) or "none", _in_cell(e["reason"])] for e in content["chosen"]]
    missing = listed([e["method"] for e in not_chosen(content)])
    note = f"Not chosen, hence in no table at equal accuracy: {missing}." if missing else ""
    return Section("What was chosen, and why", note, ["method", "strength", "reason"], rows)


def _missing(content: Mapping[str, Any]) -> Section:
    rows = [
        [c["method"], strength(c), str(c["seed"]), c["status"], _in_cell(c["reason"] or "")]
        for c in content["cells"]
        if c["status"] != "done"
    ]
    note = (
        "Diverged cells count as tried: they stand in no mean. The same command tries what failed "
        "again, and does what is missing."
    )
    header = ["method", "strength", "seed", "cell", "reason"]
    return Section("What diverged, failed or is missing", note, header, rows)


def _methods(content: Mapping[str, Any]) -> Section:
    rows = [
        [
            name,
            method["key"] or "",
            ", ".join(f"{s:g}" for s in method["strengths"] if s is not None),
            _in_cell(", ".join(f"{key} {value}" for key, value in method["settings"].items())),
        ]
        for name, method in content["methods"].items()
    ]
    header = ["method", "its strength is", "strengths tried", "also set"]
    return Section("Methods", "All settings are in study.json.", header, rows)


def _in_cell(text: str) -> str:
    """Text that somebody wrote, such that it leaves the table one."""
    return " ".join(text.split()).replace("|", "/")


def strength(entry: Mapping[str, Any]) -> str:
    """Return a strength; nothing for the plain network."""
    return maybe("{:g}".format, entry["strength"])


def maybe(shown: Callable[[Any], str], value: Any) -> str:
    """Return a value as it is shown, or nothing where there is none."""
    return "" if value is None else shown(value)


def ratio(estimate: Estimate | None) -> str:
    """Return a ratio of distances with its interval, and what it shows where it excludes 1."""
    said = {1: ", farther", -1: ", nearer", 0: ""}[side(estimate)]
    return "" if estimate is None else f"{number(estimate)}{said}"


def compact(estimate: Estimate) -> str:
    """Return a number of any size with its interval."""
    value, (low, high) = maybe("{:.4g}".format, estimate["value"]), estimate["ci"]
    return value if low is None else f"{value} ({low:.4g} to {high:.4g})"


def signs(found: Sequence[int] | None) -> str:
    """Return a sign a seed, "++-"."""
    return "".join(SIGNS[sign] for sign in found or ())


def step_time(time: Mapping[str, Any] | None) -> str:
    """Return a step's time over the plain network's, with the range of the rounds."""
    if time is None:
        return ""
    rounds = time["rounds"] or [time["ratio"]]
    return f"{time['ratio']:.2f} ({min(rounds):.2f} to {max(rounds):.2f})"


def _counts(row: Mapping[str, Any]) -> str:
    """How many images are compared a seed, and how many in all are not, for which an adversarial
    image was found of one network alone.
    """
    left_out = f", {row['unpaired_images']} left out" if row.get("unpaired_images") else ""
    return maybe("{:.0f}".format, row["paired_images"]) + left_out


def _control(control: Mapping[str, Any] | None) -> tuple[str, str, str]:
    """Against the plain network stopped earlier: the ratio, a sign a seed, where it was stopped."""
    if control is None:
        return "", "", ""
    epochs = maybe("{:g} epochs, ".format, control["strength"])
    at = f"{epochs}{percent(control['accuracy']).split(' (')[0]}"
    said = at if control["matched"] else f"{at}: not the method's accuracy"
    return ratio(control["ratio"]), signs(control["signs"]), said
