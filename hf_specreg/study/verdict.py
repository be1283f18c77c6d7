"""Whether a method makes networks harder to attack at equal accuracy, in words.

Harder only where the interval of the mean distance's ratio lies above 1 three times: against the
plain network, against the plain network, stopped earlier or not, whose accuracy is nearest, and
against the curve of these at the very accuracy on test images. A network that has learnt less is
often harder to attack, so that the first alone shows nothing of the method. Easier where one of
the first two intervals lies below 1. All else is no difference that was shown.

Where the nearest is not as accurate within the margin, nothing is known at equal accuracy, but for
a method that lies between that one and the network trained to the end, or above all: harder or
easier is then what holds against both.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from hf_specreg.robustness.statistics import Estimate
from hf_specreg.robustness.text import listed, number, points

HARDER, EASIER, NEITHER = "harder", "easier", "no difference shown"
UNMATCHED, UNKNOWN = "not known at equal accuracy", "cannot be said"
WITHDRAWN = "withdrawn"


def outcome(row: Mapping[str, Any], content: Mapping[str, Any]) -> str:
    """Return what a row of a study's table shows: HARDER, EASIER or NEITHER; UNMATCHED where it is
    not known at equal accuracy, UNKNOWN where there is no ratio to any plain network; WITHDRAWN
    where something speaks against the distances.
    """
    if not _known(row["ratio"]):
        return UNKNOWN
    if row.get("withdrawn"):
        return WITHDRAWN
    control = row["control"]
    if not (control and _known(control["ratio"])):
        return UNMATCHED
    sides = [side(row["ratio"]), side(control["ratio"])]
    if not control["matched"]:
        agreed = {(1, 1): HARDER, (-1, -1): EASIER} if _is_between(row, content) else {}
        return agreed.get(tuple(sides), UNMATCHED)
    if sides == [1, 1]:
        return HARDER if _is_beyond_curve(row, content) else NEITHER
    return EASIER if -1 in sides else NEITHER


def _is_beyond_curve(row: Mapping[str, Any], content: Mapping[str, Any]) -> bool:
    """Whether a method is farther than plain networks of its accuracy on test images, stopped
    between two epochs as it were; True where that is not known.
    """
    over = _over_curve(row, content)
    return over is None or None in over["ci"] or side(over) > 0


def _over_curve(row: Mapping[str, Any], content: Mapping[str, Any]) -> Estimate | None:
    key = row["method"], row["strength"]
    points = (p for p in content["frontier"] if (p["method"], p["strength"]) == key)
    return next((point.get("over_plain") for point in points), None)


def _is_between(row: Mapping[str, Any], content: Mapping[str, Any]) -> bool:
    """Whether a method is no less accurate on validation images than its control, and no plain
    network is more accurate than the method but from the one trained to the end on.
    """
    reached = {
        (point["method"], point["strength"]): point["validation"]["accuracy"]["value"]
        for point in content["frontier"]
        if point["validation"]["accuracy"]["value"] is not None
    }
    plain, stopped = content["plain"], content["stopped"]
    own, whole = reached[row["method"], row["strength"]], reached[plain, None]
    control = reached.get((stopped, row["control"]["strength"]), whole)
    above = [a for (method, _), a in reached.items() if method in (plain, stopped) and a > own]
    return control <= own and (not above or min(above) == whole)


def summary(content: Mapping[str, Any]) -> list[str]:
    """Return which methods are harder to attack, which are not, in a line each."""
    order = HARDER, NEITHER, EASIER, UNMATCHED, WITHDRAWN, UNKNOWN
    found: dict[str, list[str]] = {shown: [] for shown in order}
    for row in _compared(content):
        shown = outcome(row, content)
        doubt = shown == HARDER and _not_by_final_attacks(row, content)
        said = f"{at_strength(row)} (the final attacks do not show it)" if doubt else None
        found[shown].append(said or at_strength(row))
    found[UNKNOWN] += [entry["method"] for entry in not_chosen(content)]
    titles = {
        HARDER: "Harder to attack than the plain network at equal accuracy",
        NEITHER: "No difference shown",
        EASIER: "Easier to attack",
        UNMATCHED: "Not known at equal accuracy",
        WITHDRAWN: "Withdrawn, since something speaks against the distances",
        UNKNOWN: "Not compared at equal accuracy",
    }
    return [
        f"{titles[shown]}: {'; '.join(names) or 'no method'}."
        for shown, names in found.items()
        if names or shown == HARDER
    ]


def _not_by_final_attacks(row: Mapping[str, Any], content: Mapping[str, Any]) -> bool:
    """Whether the final attacks, where there were any, do not show that a method is farther than
    the plain network, or than its control.
    """
    again = next((r for r in content["final"] if r["method"] == row["method"]), None)
    if again is None:
        return False
    ratios = again["ratio"], again["control"] and again["control"]["ratio"]
    return any(side(ratio) <= 0 for ratio in ratios if ratio)


def verdicts(content: Mapping[str, Any]) -> list[str]:
    """Return a sentence a method of a study, in the order of its table, then those not chosen."""
    return [verdict(row, content) for row in _compared(content)] + [
        f"{entry['method']} is not compared at equal accuracy: {entry['reason']}."
        for entry in not_chosen(content)
    ]


def not_chosen(content: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the entries of methods of which no strength was chosen."""
    plain = content["plain"]
    return [e for e in content["chosen"] if e["strength"] is None and e["method"] != plain]


def cautions(content: Mapping[str, Any]) -> list[str]:
    """Return what a reader must know before believing the numbers, in sentences."""
    said = [*content["flags"]]
    if any("withdrawn" not in row for row in _compared(content)):
        said.append(
            "made before verdicts could be withdrawn: whether the attacks speak against these "
            "distances was not looked at, and a plain network that was more accurate than a method "
            "by however little was not taken for its equal"
        )
    if content["final"] and content["attacks"]["final"] == content["attacks"]["cells"]:
        said.append("the final attacks are those of every cell: no other confirms the distances")
    said += untried(content["chosen"], content["methods"])
    return list(dict.fromkeys(said))


def untried(
    chosen: Sequence[Mapping[str, Any]], methods: Mapping[str, Mapping[str, Any]]
) -> list[str]:
    """Return of which methods the grid of strengths may be too small.

    Args:
        chosen: the method and strength of each choice.
        methods: by name, with their "strengths".
    """
    alone, edge = [], []
    for entry in chosen:
        tried, strength = methods[entry["method"]]["strengths"], entry["strength"]
        if len(tried) == 1:
            alone.append(entry["method"])
        elif strength is not None and strength in (min(tried), max(tried)):
            beyond = "above" if strength == max(tried) else "below"
            edge.append(f"{at_strength(entry)} ({beyond})")
    found = []
    if edge:
        found.append(
            "chosen at the edge of the strengths that were tried, beyond which others may be "
            f"farther: {'; '.join(edge)}"
        )
    if alone:
        found.append(f"one strength alone, so that others may be farther: {'; '.join(alone)}")
    return found


def verdict(row: Mapping[str, Any], content: Mapping[str, Any]) -> str:
    """Return what a row of a study's table shows, in a sentence."""
    name, shown = at_strength(row), outcome(row, content)
    if shown == UNKNOWN:
        return (
            f"Whether {name} is harder to attack than the plain network cannot be said: there is "
            "no mean distance over images that both classify correctly."
        )
    if shown == HARDER:
        said = f"{name} is harder to attack than the plain network at equal accuracy"
    elif shown == EASIER:
        worse = [
            network
            for network, of in (
                ("the plain network", row),
                ("the plain network stopped at its accuracy", _stopped(row, content)),
            )
            if of and side(of["ratio"]) < 0
        ]
        said = f"{name} is easier to attack than {listed(worse)}"
    elif shown == WITHDRAWN:
        said = f"The verdict on {name} is withdrawn"
    elif shown == UNMATCHED:
        said = f"Whether {name} is harder to attack is not known at equal accuracy"
    else:
        said = f"No difference between {name} and the plain network is shown at equal accuracy"
    parts = [
        *row.get("withdrawn", ()),
        "the mean distance of its nearest adversarial images is "
        f"{_times(row['ratio'], 'the plain network')}",
        _against_control(row, content),
    ]
    if shown == NEITHER and side(row["ratio"]) == side(row["control"]["ratio"]) == 1:
        line = "the line between plain networks at its accuracy on test images"
        parts.append(_times(_over_curve(row, content), line))
    if row["accuracy_difference"] is not None:
        parts.append(_accuracy(row["accuracy_difference"], content["accuracy_margin"]))
    parts.append(_seeds(row))
    return f"{said}: {'; '.join(parts)}."


def _compared(content: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The rows of the methods: without the plain network, however long it was trained."""
    return [
        r for r in content["table"] if r["method"] not in (content["plain"], content["stopped"])
    ]


def at_strength(entry: Mapping[str, Any]) -> str:
    """Return a method with its strength, "jacobian at 0.01"."""
    strength = entry["strength"]
    return entry["method"] if strength is None else f"{entry['method']} at {strength:g}"


def _known(ratio: Estimate | None) -> bool:
    return ratio is not None and ratio["value"] is not None


def side(ratio: Estimate | None) -> int:
    """Return 1 where the interval lies above 1, -1 below, 0 where it holds 1 or there is none; its
    ends to the thousandth that is shown, for attacks find no distance more exactly.
    """
    if ratio is None or None in ratio["ci"]:
        return 0
    low, high = (round(end, 3) for end in ratio["ci"])
    return int(low > 1) - int(high < 1)


def _stopped(row: Mapping[str, Any], content: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The control of a method, where it is not the network trained to the end."""
    shorter = content["methods"].get(content["stopped"], {"strengths": ()})["strengths"]
    return row["control"] if row["control"] and row["control"]["strength"] in shorter else None


def _times(ratio: Estimate, network: str) -> str:
    shown = {1: "farther", -1: "nearer", 0: "no difference shown"}[side(ratio)]
    return f"{number(ratio)} times that of {network} ({shown})"


def _against_control(row: Mapping[str, Any], content: Mapping[str, Any]) -> str:
    control = row["control"]
    if control is None or not _known(control["ratio"]):
        return "it is not compared with the plain network stopped at its accuracy"
    epochs = "" if control["strength"] is None else f" at {control['strength']:g} epochs"
    if control["matched"] and _stopped(row, content) is None:
        return "of the plain networks the one trained to the end is nearest to its accuracy"
    times = _times(control["ratio"], f"the plain network stopped{epochs}")
    if control["matched"]:
        return times
    if outcome(row, content) == UNMATCHED:
        return (
            f"{times}, which has not its accuracy (stopped_epochs whose accuracy is nearer would "
            "decide)"
        )
    return f"{times}, which is less accurate"


def _accuracy(difference: Estimate, margin: float) -> str:
    said = f"accuracy {points(difference)}"
    if difference["value"] is not None and difference["value"] < -margin:
        said += f", more than the {100 * margin:g} points that were allowed on validation images"
    return said


def _seeds(row: Mapping[str, Any]) -> str:
    if row["seeds"] == 1:
        return "one seed, so nothing is known of the spread between trainings"
    signs = row["signs"] or []
    return f"farther with {signs.count(1)} and nearer with {signs.count(-1)} of {len(signs)} seeds"
