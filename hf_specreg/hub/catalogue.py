"""Encoders as one HTML page to sort and to filter: self-contained, nothing from elsewhere.

Its layout and its script are in catalogue.html.jinja, beside this file; the style is that of the
reports' pages. Without a script it is a table and its scatters.
"""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil, floor
from pathlib import Path
from typing import Any
from urllib.parse import quote

from huggingface_hub import constants

from hf_specreg.hub.collection import ATTACK_STRENGTH, Row, sort_rows
from hf_specreg.hub.encoder import CARD_FILE
from hf_specreg.robustness.page import render
from hf_specreg.study.plots import COLOURS

ROBUST, DISTANCE = "robust at ", " distance, "
STEPS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2)


@dataclass(frozen=True)
class Axis:
    """The part of [0, 1] that a scatter shows, between ticks.

    Attributes:
        low: its end.
        step: between ticks.
        count: of steps.
    """

    low: float
    step: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Axis":
        """Return the finest axis of at most five steps that has all values."""
        for step in STEPS:
            low, high = floor(min(values) / step + 1e-9), ceil(max(values) / step - 1e-9)
            if high - low <= 5:
                break
        if low == high:
            low, high = max(low - 1, 0), min(low + 1, round(1 / step))
        return cls(low * step, step, high - low)

    def place(self, value: float) -> float:
        """Return where a value lies on the axis, from 0 to 1."""
        return (value - self.low) / (self.step * self.count)

    @property
    def ticks(self) -> list[tuple[float, str]]:
        """The places of the ticks, and what stands there."""
        values = [self.low + i * self.step for i in range(self.count + 1)]
        return [(self.place(value), f"{100 * value:.3g}") for value in values]


def write_catalogue(
    path: str | Path, rows: Sequence[Row], source: str, *, sort: str = "accuracy"
) -> None:
    """Write the page; arguments as for `to_html`."""
    path = Path(path)
    text = to_html(rows, source, path, sort=sort)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, "utf-8")


def to_html(rows: Sequence[Row], source: str, path: str | Path, *, sort: str = "accuracy") -> str:
    """Return the page.

    Args:
        rows: from `hf_specreg.hub.collection.collect`.
        source: where they were collected; of a folder, its cards are linked.
        path: where the page will be, for these links.
        sort: a column's name; the largest first.

    Raises:
        ValueError: no row has the column.
    """
    rows = sort_rows(rows, sort) if rows else []
    methods = sorted({row["method"] or "unknown" for row in rows})
    letters = {name: _letter(i) for i, name in enumerate(methods)}
    entries = [
        {
            **row,
            "id": i,
            "href": _address(str(row["encoder"]), source, Path(path)),
            "method": row["method"] or "unknown",
            "letter": letters[row["method"] or "unknown"],
            "robust": robust_accuracies(row),
            "distances": _nearest(row),
        }
        for i, row in enumerate(rows)
    ]
    robust = [entry["robust"] for entry in entries]
    threats = threats_of(robust)
    chosen = sort.removeprefix(ROBUST) if ROBUST in sort else usual_threat(robust)
    return render(
        Path(__file__).with_name("catalogue.html.jinja"),
        source=source,
        sort="robust" if ROBUST in sort else "distance" if DISTANCE in sort else sort,
        entries=entries,
        threats=threats,
        chosen=chosen,
        letters=letters,
        colours={letter: COLOURS[i % len(COLOURS)] for i, letter in enumerate(letters.values())},
        sets=sorted({entry["data"] or "unknown" for entry in entries}),
        scatters=_scatters(entries, threats),
    )


def _letter(i: int) -> str:
    """A, B, ... Z, A2, B2, ..."""
    return chr(65 + i % 26) + (str(1 + i // 26) if i >= 26 else "")


def _address(name: str, source: str, path: Path) -> str:
    """The address of a card, or else of its folder: on the Hub, or as it lies beside the page."""
    if not Path(source).is_dir():
        return f"{constants.ENDPOINT}/{quote(name)}"
    folder = Path(source).resolve() / name
    card = folder / CARD_FILE
    there = card if card.is_file() else folder
    return quote(Path(os.path.relpath(there, path.resolve().parent)).as_posix())


def robust_accuracies(row: Row) -> dict[str, Any]:
    """Return an encoder's robust accuracies by threat, such as "L2 0.5 by fmn-l2, pgd-l2"."""
    return {key.removeprefix(ROBUST): row[key] for key in row if ROBUST in key}


def _nearest(row: Row) -> dict[str, dict[str, Any]]:
    """From a norm to the mean distance that most attacks together found, and their names."""
    found: dict[str, dict[str, Any]] = {}
    for key, value in row.items():
        norm, there, attacks = key.partition(DISTANCE)
        if there and (norm not in found or _how_many(attacks) > _how_many(found[norm]["attacks"])):
            found[norm] = {"value": value, "attacks": attacks}
    return found


def _how_many(attacks: str) -> int:
    """Attacks that are named beyond the first."""
    return ATTACK_STRENGTH.sub("", attacks).count(",")


def threats_of(robust: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the threats of several encoders, by norm, eps and attacks.

    Args:
        robust: of each, from `robust_accuracies`.
    """

    def order(threat: str) -> tuple[str, float, str]:
        ball, _, attacks = threat.partition(" by ")
        norm, _, eps = ball.partition(" ")
        try:
            return norm, float(eps), attacks
        except ValueError:  # a card may say anything
            return norm, float("inf"), attacks

    return sorted({threat for known in robust for threat in known}, key=order)


def usual_threat(robust: Sequence[Mapping[str, Any]]) -> str | None:
    """Return the threat to begin with: of those that most encoders have, those of most attacks, and
    of them the middle one; arguments as for `threats_of`.
    """
    counts = Counter(threat for known in robust for threat in known)

    def rank(threat: str) -> tuple[int, int]:
        return counts[threat], _how_many(threat)

    best = max(map(rank, counts), default=None)
    most = [threat for threat in threats_of(robust) if rank(threat) == best]
    return most[(len(most) - 1) // 2] if most else None


def _scatters(entries: Sequence[Mapping[str, Any]], threats: Sequence[str]) -> list[dict[str, Any]]:
    """A scatter for each data set and threat: numbers of several sets, or by several attacks, have
    no common axes.
    """
    found = []
    for threat in threats:
        for data in dict.fromkeys(entry["data"] for entry in entries):
            here = [e for e in entries if e["data"] == data and threat in e["robust"]]
            shown = [e for e in here if _is_share(e["accuracy"]) and _is_share(e["robust"][threat])]
            if not shown:
                continue
            across = Axis.of([entry["robust"][threat] for entry in shown])
            up = Axis.of([entry["accuracy"] for entry in shown])
            points = [
                (entry, across.place(entry["robust"][threat]), up.place(entry["accuracy"]))
                for entry in shown
            ]
            found.append(
                {
                    "data": data or "unknown",
                    "threat": threat,
                    "x": across,
                    "y": up,
                    "points": points,
                }
            )
    return found


def _is_share(value: float | None) -> bool:
    return value is not None and 0 <= value <= 1
