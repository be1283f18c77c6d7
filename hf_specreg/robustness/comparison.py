"""Several models on the same images, paired.

Means over "correctly classified images" would compare different images for different models; here
distances are those of the images that all models classify correctly. None of these is left out: an
image for which nothing was found is farther than any other. So it counts in medians, and in how
often a model's adversarial images are farther than the first's; there is no mean then.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hf_specreg.robustness.flags import is_converged
from hf_specreg.robustness.page import write_page
from hf_specreg.robustness.schema import Report, ReportError
from hf_specreg.robustness.statistics import (
    NOTHING,
    Estimate,
    at_half_budget,
    mean,
    paired_difference,
    proportion,
    quantile,
)
from hf_specreg.robustness.text import (
    HALF,
    INTERVALS,
    data_name,
    distinct,
    farther,
    half,
    listed,
    norm_name,
    number,
    percent,
    table,
    with_difference,
)
from hf_specreg.robustness.threat import NORMS
from hf_specreg.robustness.verdict import Compared, verdict

# In what evaluations may differ, and what of it. Images, seed and settings of attacks may not.
CIRCUMSTANCES = {
    "batch_size": "batch sizes: libraries' attacks draw random numbers by batch",
    "device": "devices or types of weights: sums are rounded in other ways",
    "versions": "versions of libraries",
}


class Comparison:
    """Several models on the same images, paired: the first is what the others are compared with.

    Args:
        reports: with per-image results, of the same images and seed.

    Attributes:
        paired: how many images all models classify correctly.
        rows: for every attack of minimum distance that all have and every model: "attack", "norm",
            "model", "n" paired images, "found" for how many, "median" over all of them, "mean"
            (null unless something was found for each), "half_budget", the mean with half of the
            queries (None where it is not known), whether the attacks have "converged" (True where
            they do not tell), and against the first model (None for the
            first) "difference" of the means (null likewise), and on how many images it is
            "farther" and "nearer".
        nearest: such rows for every norm, of the nearest that any of the attacks found that all
            have; "attacks" are their names.
        robust_accuracy: for every norm and eps that all have: "norm", "eps", and "models", the
            robust accuracy of each under the worst of the attacks that all have, with its paired
            "difference" from the first model's.
        flags: in what the evaluations differ, in words.

    Raises:
        ReportError: fewer than two reports, other images or attack settings, or no per-image
            results.
    """

    def __init__(self, reports: Sequence[Report]):
        self.attacks = _check_comparable(reports)
        self.reports = list(reports)
        self.names = distinct([report.name for report in reports])
        self.correct = np.all([r.images["correct"] for r in reports], axis=0)
        self.paired = int(self.correct.sum())
        minimal = [n for n in self.attacks if "distance" in reports[0].content["attacks"][n]]
        self.rows = [row for name in minimal for row in self._rows(name, [name])]
        self.nearest = [row for norm in NORMS for row in self._nearest(norm, minimal)]
        self.robust_accuracy = self._robust_accuracy()
        self.flags = _circumstances(self.reports, self.names)

    @property
    def distances(self) -> list[dict[str, Any]]:
        """All rows, the nearest of several attacks before those of each."""
        return [row for row in self.nearest if len(row["attacks"]) > 1] + self.rows

    @property
    def caution(self) -> str:
        """How many comparisons these are, which a reader must know who looks for one that stands
        out.
        """
        made = sum(row["difference"] is not None for row in self.distances)
        made += len(self.robust_accuracy) * (len(self.names) - 1)
        return (
            f"{made} comparisons with {self.names[0]} are stated; each holds at 95 % by itself, "
            "none is adjusted for their number."
        )

    @property
    def verdicts(self) -> list[list[str]]:
        """Whether each model but the first is harder to attack than the first, in sentences."""
        first, *others = (
            Compared(
                name,
                report.content["clean"]["accuracy"]["value"],
                paired_difference(report.images["correct"], self.reports[0].images["correct"]),
                report.content["flags"],
                [row for row in self.nearest if row["model"] == name],
                [{**point, **point["models"][i]} for point in self.robust_accuracy],
            )
            for i, (name, report) in enumerate(zip(self.names, self.reports, strict=True))
        )
        return [verdict(model, first) for model in others]

    def _rows(self, label: str, attacks: Sequence[str]) -> list[dict[str, Any]]:
        """Of the nearest that any of these attacks found, for each model."""
        content = self.reports[0].content
        seed = content["seed"]
        distances = _nearest(self.reports, attacks)[:, self.correct].astype(float)
        reference, rows = distances[0], []
        for report, name, own in zip(self.reports, self.names, distances, strict=True):
            row = {
                "attack": label,
                "attacks": list(attacks),
                "norm": content["attacks"][attacks[0]]["norm"],
                "model": name,
                "n": self.paired,
                "found": int(np.isfinite(own).sum()),
                "mean": _mean(own, seed),
                **self._half_budget(report, attacks, own),
                "median": quantile(own, 0.5, seed=seed),
                **dict.fromkeys(("difference", "farther", "nearer")),
            }
            if rows:
                known = np.isfinite(reference).all() and np.isfinite(own).all()
                row["difference"] = mean(own - reference, seed=seed) if known else NOTHING
                row["farther"] = int((own > reference).sum())
                row["nearer"] = int((own < reference).sum())
            rows.append(row)
        return rows

    def _half_budget(
        self, report: Report, attacks: Sequence[str], full: np.ndarray
    ) -> dict[str, Any]:
        found = nearest_at_half_budget(report, attacks)
        if found is None or not self.paired:
            return {"half_budget": None, "converged": True}
        half = found[self.correct].astype(float)
        known = len(attacks) == 1 and np.isfinite(half).all()
        return {
            "half_budget": float(half.mean()) if known else None,
            "converged": is_converged(half, full),
        }

    def _nearest(self, norm: str, minimal: Sequence[str]) -> list[dict[str, Any]]:
        known = [report.content["attacks"] for report in self.reports]

        def grid(of: dict[str, Any]) -> list[float]:
            return [point["eps"] for point in of["robust_accuracy"]]

        names = [
            name
            for name in self.attacks
            if known[0][name]["norm"] == norm
            # What attacks at fixed eps find depends on the grid.
            and (name in minimal or all(grid(k[name]) == grid(known[0][name]) for k in known))
        ]
        if not set(names) & set(minimal):
            return []
        return self._rows(names[0] if len(names) == 1 else f"nearest of {listed(names)}", names)

    def _robust_accuracy(self) -> list[dict[str, Any]]:
        first = self.reports[0].content
        known = [{(p["norm"], p["eps"]) for p in r.content["worst_case"]} for r in self.reports]
        points = []
        for norm, eps in ((p["norm"], p["eps"]) for p in first["worst_case"]):
            attacks = [n for n in self.attacks if first["attacks"][n]["norm"] == norm]
            if not attacks or not all((norm, eps) in k for k in known):
                continue
            stands = _nearest(self.reports, attacks) > eps
            hits = [r.images["correct"] & s for r, s in zip(self.reports, stands, strict=True)]
            estimates = [{**proportion(own), "difference": None} for own in hits]
            for own, estimate in zip(hits[1:], estimates[1:], strict=True):
                estimate["difference"] = paired_difference(own, hits[0])
            points.append({"norm": norm, "eps": eps, "models": estimates})
        return points

    def to_markdown(self) -> str:
        """Return the paired tables."""
        first = self.reports[0].content
        lines = [
            f"{first['n']} images of {data_name(first['data'])}, seed {first['seed']}; distances "
            f"on the {self.paired} that all models classify correctly, where an image for which "
            "nothing was found is farther than any other, and means only if there is none; [0, 1] "
            f"pixels; {INTERVALS}. {self.caution}",
            "",
        ]
        accuracy = [r.content["clean"]["accuracy"] for r in self.reports]
        rows = [[n, percent(a)] for n, a in zip(self.names, accuracy, strict=True)]
        lines += [table(["model", "accuracy"], rows), ""]
        if self.rows:
            header = ["attack", "model", "found for", "mean distance", HALF, "median"]
            header += [f"{what} against {self.names[0]}" for what in ("mean", "images")]
            rows = [
                [
                    row["attack"],
                    row["model"],
                    f"{row['found']} of {row['n']}",
                    number(row["mean"]),
                    half(row),
                    number(row["median"]),
                    number(row["difference"], signed=True) if row["difference"] else "",
                    farther(row),
                ]
                for row in self.distances
            ]
            lines += [table(header, rows), ""]
        rows = [
            [norm_name(p["norm"]), f"{p['eps']:.4g}", *map(with_difference, p["models"])]
            for p in self.robust_accuracy
        ]
        if rows:
            header = ["norm", "eps", *(f"robust accuracy, {name}" for name in self.names)]
            lines += [table(header, rows), ""]
        lines += [f"- {flag}" for flag in self.flags]
        for name, report in zip(self.names, self.reports, strict=True):
            lines += [f"- {name}: {flag}" for flag in report.content["flags"]]
        return "\n".join(lines).rstrip() + "\n"

    def to_html(self, path: str | Path) -> None:
        """Write one self-contained page with tables and plots (extra: plots)."""
        compared = {
            "verdicts": self.verdicts,
            "flags": self.flags,
            "caution": self.caution,
            "paired": self.paired,
            "attacks": self.attacks,
            "distances": self.distances,
            "robust_accuracy": self.robust_accuracy,
        }
        write_page(path, self.reports, self.names, compared)


def _nearest(reports: Sequence[Report], attacks: Sequence[str]) -> np.ndarray:
    """The least distance of each model's images, [models, n]."""
    found = [[report.images[f"{name}/distances"] for name in attacks] for report in reports]
    return np.min(found, axis=1)


def nearest_at_half_budget(report: Report, attacks: Sequence[str]) -> np.ndarray | None:
    """Return the least distance of each image with half of the budget of the attacks of minimum
    distance, and all of the others', [n]; None where one does not tell.
    """
    halves = []
    for name in attacks:
        if "distance" not in report.content["attacks"][name]:
            halves.append(report.images[f"{name}/distances"])
        elif (steps := report.images.get(f"{name}/trajectory")) is None:
            return None
        else:
            halves.append(at_half_budget(steps))
    return np.min(halves, axis=0)


def _check_comparable(reports: Sequence[Report]) -> list[str]:
    """The names of the attacks that all models faced; raises unless they faced the same."""
    if len(reports) < 2:
        raise ReportError("a comparison needs two reports or more")
    first = reports[0]
    for report in reports:
        if not report.images:
            raise ReportError(
                f"{report.name}: the per-image results (.npz beside the report) are missing"
            )
        for what in (("data", "sha256"), ("n",), ("seed",)):
            mine, other = _at(first.content, what), _at(report.content, what)
            if mine != other:
                raise ReportError(
                    f"{first.name} and {report.name} have other {' '.join(what)} ({mine}, "
                    f"{other}): evaluate them on the same images"
                )
    common = set.intersection(*(set(r.content["attacks"]) for r in reports))
    attacks = [name for name in first.content["attacks"] if name in common]
    for name in attacks:
        settings = [r.content["attacks"][name]["settings"] for r in reports]
        if any(s != settings[0] for s in settings):
            raise ReportError(f"{name} was run with other settings: {settings}")
    return attacks


def _circumstances(reports: Sequence[Report], names: Sequence[str]) -> list[str]:
    """What is to be said of evaluations that were not made in the same way."""
    said = []
    for key, what in CIRCUMSTANCES.items():
        values = [report.content[key] for report in reports]
        if isinstance(values[0], dict):  # those entries alone that differ
            keys = dict.fromkeys(k for value in values for k in value)
            other = [k for k in keys if len({value.get(k) for value in values}) > 1]
            values = [", ".join(f"{k} {value.get(k, 'none')}" for k in other) for value in values]
        if len(set(values)) > 1:
            each = "; ".join(f"{n}: {v}" for n, v in zip(names, values, strict=True))
            said.append(f"the evaluations differ in {what} ({each})")
    return said


def _at(content: Any, path: Sequence[str]) -> Any:
    for key in path:
        content = content[key]
    return content


def _mean(distances: np.ndarray, seed: int) -> Estimate:
    """The mean distance, where something was found for every image."""
    if not np.isfinite(distances).all():
        return NOTHING
    return mean(distances, seed=seed, within=(0, np.inf))
