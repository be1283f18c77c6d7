"""Whether a model is harder to attack than another, in words.

By the nearest adversarial images that all attacks together found, on the same images. Where there
is one for every image, the interval of the mean difference decides; where not, a mean would leave
out the farthest, and the sign test decides: on how many images they are farther, and on how many
nearer. Nothing is said where gradients look masked, or attacks found nothing for many images or
have not converged: they may have failed, and not the model withstood. A model that has learnt less
is often harder to attack: of one that is less accurate by more than a margin it is said that its
images are farther, not that it is harder to attack.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from hf_specreg.robustness.flags import MANY, is_many, is_masked
from hf_specreg.robustness.statistics import Estimate, binomial_interval
from hf_specreg.robustness.text import listed, norm_name, number, points

MARGIN = 0.005  # of accuracy; as studies allow (`StudyConfig.accuracy_margin`)


class Compared(NamedTuple):
    """A model of a comparison.

    Attributes:
        name: as it is called.
        accuracy: on all images, in [0, 1].
        gain: of accuracy over the first's, on the same images.
        flags: of its report.
        nearest: its rows of `Comparison.nearest`, one a norm.
        robust_accuracy: for every norm and eps: "norm", "eps", and "difference" from the first's.
    """

    name: str
    accuracy: float
    gain: Estimate
    flags: Sequence[str]
    nearest: Sequence[Mapping[str, Any]]
    robust_accuracy: Sequence[Mapping[str, Any]]


def verdict(model: Compared, first: Compared) -> list[str]:
    """Return what the comparison of a model with the first shows, in sentences."""
    if masked := [m.name for m in (first, model) if is_masked(m.flags)]:
        return [
            f"Whether {model.name} is harder to attack than {first.name} cannot be said: the "
            f"gradients of {listed(masked)} look masked (see below)."
        ]
    said = [
        _by_distance(model, first, row, before)
        for row, before in zip(model.nearest, first.nearest, strict=True)
    ]
    differences = ", ".join(
        f"{points(p['difference'])} at {norm_name(p['norm'])} {p['eps']:.4g}"
        for p in model.robust_accuracy
    )
    if differences:
        said.append(f"Robust accuracy against that of {first.name}: {differences}.")
    said.append(
        f"Accuracy is {100 * model.accuracy:.1f} %, that of {first.name} "
        f"{100 * first.accuracy:.1f} %: {points(model.gain)}."
    )
    return said


def direction(row: Mapping[str, Any]) -> int:
    """Return whether a model's adversarial images are shown to be farther than the first's: 1, to
    be nearer: -1, or neither: 0.

    Args:
        row: of `Comparison.nearest`.
    """
    low, high = row["difference"]["ci"]
    if low is None:  # not found for all, or too few for an interval of their mean
        decided = row["farther"] + row["nearer"]
        if not decided:
            return 0
        low, high = (end - 0.5 for end in binomial_interval(np.array(row["farther"]), decided))
    return int(low > 0) - int(high < 0)


def _by_distance(
    model: Compared, first: Compared, row: Mapping[str, Any], before: Mapping[str, Any]
) -> str:
    if not row["n"]:
        return (
            f"Whether {model.name} is harder to attack than {first.name} cannot be said: no image "
            "is classified correctly by all models."
        )
    return (
        f"{_claim(model, first, row, before)}: in {norm_name(row['norm'])} the nearest adversarial "
        f"images that {listed(row['attacks'])} found {_evidence(row, before)}."
    )


def _claim(
    model: Compared, first: Compared, row: Mapping[str, Any], before: Mapping[str, Any]
) -> str:
    """Who is harder to attack, or why that is not said."""
    unsaid = f"Whether {model.name} is harder to attack than {first.name} cannot be said, where the"
    if is_many(max(_missing(row), _missing(before)), row["n"]):
        return f"{unsaid} attacks found nothing for more than {100 * MANY:g} % of a model's images"
    if late := [m.name for m, r in ((first, before), (model, row)) if not r["converged"]]:
        return (
            f"{unsaid} attacks on {listed(late)} have not converged: more iterations bring "
            "distances down"
        )
    shown = direction(row)
    if not shown:
        return f"No difference between {model.name} and {first.name} is shown"
    harder = "harder" if shown > 0 else "easier"
    if -shown * model.gain["value"] > MARGIN:
        low, high = sorted(-shown * 100 * end for end in model.gain["ci"])
        return (
            f"{model.name} is {'less' if shown > 0 else 'more'} accurate than {first.name} by "
            f"{100 * abs(model.gain['value']):.1f} points ({low:.1f} to {high:.1f}); whether it is "
            f"{harder} to attack at equal accuracy is not known (`hf-specreg study` asks that)"
        )
    return f"{model.name} is {harder} to attack than {first.name}"


def _evidence(row: Mapping[str, Any], before: Mapping[str, Any]) -> str:
    """How far the adversarial images are, against those of the first."""
    difference = row["difference"]
    if difference["ci"][0] is None:
        how = (
            f"are farther on {row['farther']} and nearer on {row['nearer']} of the same "
            f"{row['n']} images, medians {_median(row)} and {_median(before)}"
        )
        missing = [_missing(r) for r in (row, before)]
        if any(missing):
            how += f" (for {missing[0]} and {missing[1]} nothing was found, which is farthest)"
        return how
    if shown := direction(row):
        low, high = sorted(map(abs, difference["ci"]))
        how = f"are {abs(difference['value']):.3f} ({low:.3f} to {high:.3f}) "
        return how + (
            f"{'farther' if shown > 0 else 'nearer'} on average, on the same {row['n']} images"
        )
    return f"differ by {number(difference, signed=True)} on the same {row['n']} images"


def _missing(row: Mapping[str, Any]) -> int:
    return row["n"] - row["found"]


def _median(row: Mapping[str, Any]) -> str:
    value = row["median"]["value"]
    return "beyond what was found" if value is None else f"{value:.3f}"


def summary(content: Mapping[str, Any]) -> str:
    """Return what a report says of one model, in two sentences."""
    clean = content["clean"]
    said = [f"{clean['correct']} of {content['n']} images are classified correctly."]
    for found in content["nearest"]:
        norm, attacks = norm_name(found["norm"]), listed(found["attacks"])
        if found["n"] and found["median"]["value"] is None:
            said.append(
                f"In {norm} {attacks} found no adversarial image for {found['not_found']} of "
                f"{found['n']} images."
            )
        elif found["n"]:
            said.append(
                f"In {norm} the nearest adversarial images that {attacks} found are at a median "
                f"distance of {number(found['median'])}."
            )
    return " ".join(said)
