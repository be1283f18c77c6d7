"""A table of encoders, from the metadata on their cards: a namespace on the Hub, or a folder."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi

from hf_specreg.encoders.connection import retried, translated
from hf_specreg.encoders.download import PATIENCE
from hf_specreg.hub.card import TAGS
from hf_specreg.hub.encoder import CARD_FILE, card_metadata

LARGEST_CARD = 2**20  # bytes that are looked at
Row = dict[str, str | float | None]


def collect(source: str, *, token: str | None = None) -> list[Row]:
    """Return a row for each encoder: "encoder", "data", "n", "accuracy" and its robustness.

    Mean distances are named by norm and attack ("L2 distance, tangent"), robust accuracies by norm
    and eps, under the worst attack that the card has ("robust at L2 0.5").

    Args:
        source: a folder that holds encoders' folders, or a namespace on the Hub.
        token: for private repositories.

    Raises:
        HubError: the Hub cannot be reached.
        ValueError: neither a folder nor a name.
    """
    folder = Path(source)
    if folder.is_dir():
        cards = {
            str(path.parent.relative_to(folder)): card_metadata(_beginning(path))
            for path in sorted(folder.rglob(CARD_FILE))
        }
        cards = {name: card for name, card in cards.items() if TAGS[0] in (card.get("tags") or ())}
    elif "/" in source or source.startswith("."):
        raise ValueError(
            f"there is no folder {source}, and no namespace of the Hub has such a name"
        )
    else:
        with translated(f"listing {source}"):
            models = partial(HfApi(token=token).list_models, author=source, filter=TAGS[0])
            found = retried(lambda: list(models(cardData=True)), PATIENCE)
            cards = {m.id: m.card_data.to_dict() if m.card_data else {} for m in found}
    return [_row(name, card) for name, card in cards.items()]


def _beginning(path: Path) -> str:
    """What a card may have as its front matter."""
    with path.open("rb") as file:
        return file.read(LARGEST_CARD).decode("utf-8", "replace")


def sort_rows(rows: Sequence[Row], column: str) -> list[Row]:
    """Return the rows, the largest of a column first, those without it last.

    Raises:
        ValueError: no row has the column.
    """
    columns = columns_of(rows)
    if column not in columns:
        raise ValueError(f"no column {column!r}; there are {', '.join(columns)}")
    if column in ("encoder", "data"):
        return sorted(rows, key=lambda row: str(row.get(column)))
    with_it = [row for row in rows if row.get(column) is not None]
    return sorted(with_it, key=lambda row: row[column], reverse=True) + [
        row for row in rows if row.get(column) is None
    ]


def columns_of(rows: Sequence[Row]) -> list[str]:
    """Return the names of all columns, in order of appearance."""
    return list(dict.fromkeys(name for row in rows for name in row))


def _row(name: str, card: Mapping[str, Any]) -> Row:
    row: Row = {"encoder": name, "data": None, "n": None, "accuracy": None}
    for model in _list(card.get("model-index")):
        for result in _list(_dict(model).get("results")):
            data = _text(_dict(_dict(result).get("dataset")).get("name"))
            for metric in map(_dict, _list(_dict(result).get("metrics"))):
                value, how = metric.get("value"), _dict(metric.get("args"))
                if isinstance(value, bool) or not isinstance(value, int | float):
                    continue
                norm = _text(how.get("norm")).replace("l", "L", 1)
                if metric.get("type") == "accuracy":
                    n = how.get("n")
                    row |= {"data": data or None, "accuracy": value}
                    row["n"] = n if isinstance(n, int) else None
                elif metric.get("type") == "adversarial_distance":
                    row[f"{norm} distance, {_text(how.get('attack'))}"] = value
                elif metric.get("type") == "robust_accuracy":
                    key = f"robust at {norm} {_text(how.get('eps'))}"
                    row[key] = min(value, row.get(key, value))
    return row


def _text(value: Any) -> str:
    """A name or a number as it is shown; of anything else, which may be vast, nothing."""
    return str(value)[:60] if isinstance(value, str | int | float) else ""


def _dict(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _list(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list) else ()
