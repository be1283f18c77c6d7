"""Numbers, names and tables of a report as people read them, in Markdown and on the page."""

from collections.abc import Mapping, Sequence
from typing import Any

from hf_specreg.robustness.attacks import ATTACKS, describe
from hf_specreg.robustness.statistics import FEWEST, Estimate

INTERVALS = f"in brackets 95 % intervals, for means and quantiles of {FEWEST} images or more"
HALF = "with half the queries"
STRENGTH = (
    "iterations",
    "steps",
    "binary_search_steps",
    "restarts",
    "runs",
    "attacks",
    "max_queries",
    "low_frequencies",
)


def percent(estimate: Estimate) -> str:
    """Return a proportion with its interval."""
    if estimate["value"] is None:
        return "none"
    low, high = estimate["ci"]
    value = f"{100 * estimate['value']:.1f} %"
    return value if low is None else f"{value} ({100 * low:.1f} to {100 * high:.1f})"


def points(difference: Estimate) -> str:
    """Return a difference of two proportions with its interval, where it has one."""
    if difference["value"] is None:
        return "none"
    low, high = difference["ci"]
    value = f"{100 * difference['value']:+.1f} points"
    return value if low is None else f"{value} ({100 * low:+.1f} to {100 * high:+.1f})"


def with_difference(estimate: Mapping[str, Any]) -> str:
    """Return a proportion, and by how many points it differs from the first model's."""
    difference = estimate["difference"]
    return percent(estimate) + (f"; {points(difference)}" if difference else "")


def number(estimate: Estimate, *, signed: bool = False) -> str:
    """Return a distance with its interval, where it has one."""
    sign = "+" if signed else ""

    def shown(value: float | None) -> str:
        return "beyond what was found" if value is None else f"{value:{sign}.3f}"

    value, (low, high) = estimate["value"], estimate["ci"]
    if low is None:  # so is the other end
        return "none" if value is None else shown(value)
    return f"{shown(value)} ({shown(low)} to {shown(high)})"


def half(distance: Mapping[str, Any]) -> str:
    """Return the mean distance that was found with half of the queries, where it is known."""
    value = distance.get("half_budget")
    return "" if value is None else f"{value:.3f}"


def farther(row: Mapping[str, Any]) -> str:
    """Return on how many images a model's distance is larger and smaller than the first's."""
    if row["farther"] is None:
        return ""
    return f"{row['farther']} farther, {row['nearer']} nearer"


def norm_name(norm: str) -> str:
    """Return the norm as it is written."""
    return {"l2": "L2", "linf": "Linf"}[norm]


def listed(names: Sequence[str]) -> str:
    """Return "a", "a and b", "a, b and c"."""
    return " and ".join(filter(None, (", ".join(names[:-1]), *names[-1:])))


def strength(name: str, settings: Mapping[str, Any]) -> str:
    """Return those of an attack's settings that say how hard it tried, "steps 50, restarts 1", and
    all others that are not its default.
    """
    usual = describe(ATTACKS[name]) if name in ATTACKS else {}
    known = {
        key: settings[key]
        for key in dict.fromkeys((*STRENGTH, *usual))
        if settings.get(key) is not None and (key in STRENGTH or settings[key] != usual[key])
    }
    shown = (
        f"{key.replace('_', ' ')} {'+'.join(map(str, value)) if isinstance(value, list) else value}"
        for key, value in known.items()
    )
    return ", ".join(shown) or "standard"


def attack_name(name: str, attack: Mapping[str, Any]) -> str:
    """Return an attack of a report with its strength, "pgd-l2 (steps 50, restarts 1)"."""
    return f"{name} ({strength(name, attack['settings'])})"


def distinct(names: Sequence[str]) -> list[str]:
    """Tell equal names apart by their place."""
    return [
        f"{name} ({names[:i].count(name) + 1})" if names.count(name) > 1 else name
        for i, name in enumerate(names)
    ]


def data_name(data: Mapping[str, Any]) -> str:
    """Return what the images are of."""
    name = data["id"] or "an unnamed data set"
    if data["revision"]:
        name += f" at {data['revision'][:12]}"
    split = f", {data['split']} split" if data["split"] else ""
    if data.get("cut"):
        split += " (cut from its training split)"
    return f"{name}{part_name(data.get('splits', {}))}{split}"


def part_name(splits: Mapping[str, Any]) -> str:
    """Return which part of an image set is taken, " (configuration, classes a, b)"; empty of all.

    Args:
        splits: the arguments of `load_splits`.
    """
    parts = [str(splits[key]) for key in ("configuration", "label_column") if splits.get(key)]
    if classes := splits.get("classes"):
        parts.append(f"classes {', '.join(map(str, classes))}")
    return f" ({', '.join(parts)})" if parts else ""


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def distances(content: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """Return a report's distances by what they are called, the nearest of several attacks before
    those of each.
    """
    of_all = [
        (f"nearest of {listed(nearest['attacks'])}", nearest)
        for nearest in content["nearest"]
        if len(nearest["attacks"]) > 1
    ]
    return of_all + [
        (name, {"half_budget": None, **attack, **attack["distance"]})
        for name, attack in content["attacks"].items()
        if "distance" in attack
    ]
