"""A table of encoders, from the metadata on their cards: a folder, or a namespace or a collection
of the Hub.
"""

import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi

from hf_specreg.encoders.connection import retried, translated
from hf_specreg.encoders.download import PATIENCE
from hf_specreg.hub.card import TAGS
from hf_specreg.hub.encoder import CARD_FILE, card_metadata
from hf_specreg.hub.summary import KEY

LARGEST_CARD = 2**20  # bytes that are looked at
LARGEST = 1e15  # of a number on a card
COLLECTION = re.compile(r"(?:https?://[^/]+/collections/)?([\w.-]+/[\w.-]+-[0-9a-f]{24})")
Row = dict[str, str | float | None]


def collect(source: str, *, token: str | None = None) -> list[Row]:
    """Return a row for each encoder: "encoder", "method", "data", "n", "accuracy", its robustness,
    "ECE" (the expected calibration error), "ms an image" (of training) and "parameters".

    Mean distances are named by norm and attack ("L2 distance, tangent"), and are text, which is not
    ranked, where they are not of all images ("0.770 for 90 of 100 images"); robust accuracies by
    norm and eps, under the worst attack that the card has ("robust at L2 0.5").

    Args:
        source: a folder that holds encoders' folders, a namespace on the Hub, or a collection there
            (its slug, org/title-64f9a55bb3115b4f513ec026, or its address).
        token: for private repositories.

    Raises:
        HubError: the Hub cannot be reached.
        ValueError: neither a folder nor a name.
    """
    folder, collection = Path(source), COLLECTION.fullmatch(source)
    if folder.is_dir():
        cards = {
            str(path.parent.relative_to(folder)): card_metadata(_beginning(path))
            for path in sorted(folder.rglob(CARD_FILE))
        }
    elif collection is None and ("/" in source or source.startswith(".")):
        raise ValueError(
            f"there is no folder {source}, and no namespace of the Hub has such a name"
        )
    else:
        api = HfApi(token=token)
        find = (
            partial(_collected, api, collection[1])
            if collection
            else lambda: list(api.list_models(author=source, filter=TAGS[0], cardData=True))
        )
        with translated(f"listing {source}"):
            found = retried(find, PATIENCE)
        cards = {m.id: m.card_data.to_dict() if m.card_data else {} for m in found}
    ours = {name: card for name, card in cards.items() if TAGS[0] in _list(card.get("tags"))}
    return [_row(name, card) for name, card in ours.items()]


def _collected(api: HfApi, slug: str) -> list[Any]:
    """What the Hub knows of the models of a collection, in its order."""
    items = api.get_collection(slug).items
    return [api.model_info(item.item_id) for item in items if item.item_type == "model"]


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
    if column in ("encoder", "method", "data"):
        return sorted(rows, key=lambda row: str(row.get(column)))
    ranked = [row for row in rows if isinstance(row.get(column), int | float)]
    return sorted(ranked, key=lambda row: row[column], reverse=True) + [
        row for row in rows if not isinstance(row.get(column), int | float)
    ]


def columns_of(rows: Sequence[Row]) -> list[str]:
    """Return the names of all columns, in order of appearance."""
    return list(dict.fromkeys(name for row in rows for name in row))


def _row(name: str, card: Mapping[str, Any]) -> Row:
    about = _dict(card.get(KEY))
    row: Row = {"encoder": name, "method": _text(about.get("method")) or None}
    row |= {"data": None, "n": None, "accuracy": None}
    for model in _list(card.get("model-index")):
        for result in _list(_dict(model).get("results")):
            data = _text(_dict(_dict(result).get("dataset")).get("name"))
            for metric in map(_dict, _list(_dict(result).get("metrics"))):
                value, how = _number(metric.get("value")), _dict(metric.get("args"))
                if value is None:
                    continue
                norm = _text(how.get("norm")).replace("l", "L", 1)
                if metric.get("type") == "accuracy":
                    n = how.get("n")
                    row |= {"data": data or None, "accuracy": value}
                    row["n"] = n if isinstance(n, int) else None
                elif metric.get("type") == "expected_calibration_error":
                    row["ECE"] = value
                elif metric.get("type") == "adversarial_distance":
                    key = f"{norm} distance, {_text(how.get('attack'))}"
                    row[key] = f"{value:.3f} for {_found(how)}" if how.get("not_found") else value
                elif metric.get("type") == "robust_accuracy":
                    key = f"robust at {norm} {_text(how.get('eps'))}"
                    row[key] = min(value, row.get(key, value))
    stated = {
        "ms an image": _number(about.get("training_ms_per_image")),
        "parameters": _number(about.get("parameters")),
    }
    return row | {key: value for key, value in stated.items() if value is not None}


def _found(how: Mapping[str, Any]) -> str:
    """Of how many images a mean distance is; such a mean leaves out those that are farthest."""
    return f"{_text(how.get('n'))} of {_text(how.get('of'))} images"


def _text(value: Any) -> str:
    """A name or a number as it is shown; of anything else, which may be vast, nothing."""
    return str(value)[:60] if isinstance(value, str | int | float) else ""


def _number(value: Any) -> float | None:
    known = isinstance(value, int | float) and not isinstance(value, bool)
    return value if known and abs(value) <= LARGEST else None


def _dict(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _list(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list) else ()
