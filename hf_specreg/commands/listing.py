"""The table of encoders that `hf-specreg list` prints."""

import textwrap
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:  # its import takes seconds
    from hf_specreg.hub.collection import Row

FEW = ("encoder", "method", "data", "n", "accuracy")


def print_list(rows: "Sequence[Row]", source: str, sort: str) -> None:
    """Print encoders with one robust accuracy and one mean distance; name the other columns.

    Args:
        rows: from `hf_specreg.hub.collection.collect`.
        source: where they were collected.
        sort: a column's name; if it is of a robust accuracy or a mean distance, that is shown.
    """
    from hf_specreg.hub.collection import columns_of, sort_rows, without_card

    shown = _shown(rows, sort)
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in shown:
        right = name not in FEW[:3]
        table.add_column(escape(name), overflow="fold", justify="right" if right else "left")
    for row in sort_rows(rows, sort):
        table.add_row(*(_cell(name, row.get(name)) for name in shown))
    console = Console(width=None if Console().is_terminal else 120)
    print(f"{source}: {len(rows)} encoder{'s' if len(rows) > 1 else ''}")
    console.print(table)
    said = "Compare numbers of the same data and the same attack only: the cards have the settings."
    others = [name for name in columns_of(rows) if name not in shown]
    if others:
        said += f" --sort also takes: {'; '.join(_in_short(others))}."
    _print_text(said, console.width)
    if bare := without_card(rows, source):
        said = (
            f"No card yet, hence no robustness: {', '.join(bare)}. `hf-specreg evaluate` attacks "
        )
        _print_text(f"{said}an encoder, `hf-specreg card` writes its card.", console.width)


def _in_short(names: Sequence[str]) -> list[str]:
    """The columns, those that differ by eps alone as one: "robust at L2 0.5|1.0 by tangent"."""
    found: dict[tuple[str, str], list[str]] = {}
    for name in names:
        ball, by, attacks = name.partition(" by ")
        threat, _, eps = ball.rpartition(" ") if by else (name, "", "")
        found.setdefault((threat, by + attacks), []).append(eps)
    return [f"{threat} {'|'.join(eps)}".rstrip() + by for (threat, by), eps in found.items()]


def _print_text(text: str, width: int) -> None:
    print(textwrap.fill(text, width, break_on_hyphens=False, break_long_words=False))


def _shown(rows: "Sequence[Row]", sort: str) -> list[str]:
    """The columns: the few of all, a robust accuracy, a mean distance, and that of the order."""
    from hf_specreg.hub.catalogue import DISTANCE, ROBUST, robust_accuracies, usual_threat

    threat = usual_threat([robust_accuracies(row) for row in rows])
    distances = Counter(name for row in rows for name in row if DISTANCE in name)
    robust = sort if ROBUST in sort else threat and ROBUST + threat
    distance = sort if DISTANCE in sort else max(distances, key=distances.get, default=None)
    return list(dict.fromkeys(filter(None, (*FEW, robust, distance, sort))))


def _cell(column: str, value: str | float | None) -> str:
    if value is None:
        return ""
    if column in ("accuracy", "ECE") or column.startswith("robust"):
        return f"{value:.1%}"
    return f"{value:.3f}" if isinstance(value, float) else escape(str(value))
