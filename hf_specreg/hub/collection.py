"""A table of encoders, from the metadata on their cards: a folder, or a namespace or a collection
of the Hub.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi

from hf_specreg.connection import retried, translated
from hf_specreg.encoders.blueprint import FolderError, check_schema, read_json
from hf_specreg.encoders.download import RUN_FILE
from hf_specreg.hub.card import TAGS
from hf_specreg.hub.encoder import CARD_FILE, card_metadata
from hf_specreg.hub.run import RUN_SCHEMA, public_name
from hf_specreg.hub.summary import KEY, method, training_ms_per_image
from hf_specreg.robustness.text import part_name, strength

LARGEST_CARD = 2**20  # bytes that are looked at
LARGEST = 1e15  # of a number on a card
PASSING = {"checkpoints", "best"}  # folders of a run whose encoders are not its last
ATTACK_STRENGTH = re.compile(r" \([^()]*\)")  # in the name of a column
COLLECTION = re.compile(r"(?:https?://[^/]+/collections/)?([\w.-]+/[\w.-]+-[0-9a-f]{24})")
Row = dict[str, str | float | None]


def collect(source: str, *, token: str | None = None) -> list[Row]:
    """Return a row for each encoder: "encoder", "method", "data", "n", "accuracy", its robustness,
    "ECE" (the expected calibration error), "ms an image" (of training) and "parameters".

    Mean distances are named by norm and attacks ("L2 distance, tangent"), and are text, which is
    not ranked, where they are not of all images ("0.770 for 90 of 100 images"); robust accuracies
    by norm, eps and attacks, of several the worst case ("robust at L2 0.5 by fmn-l2, pgd-l2").
    An attack that the cards ran at several strengths has its strength in its name.

    A saved encoder of a folder that has no card yet is a row of what its run recorded, without
    robustness.

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
        return _told_apart(_of_folder(folder))
    if collection is None and ("/" in source or source.startswith(".")):
        raise ValueError(
            f"there is no folder {source}, and no namespace of the Hub has such a name"
        )
    api = HfApi(token=token)
    find = (
        partial(_collected, api, collection[1])
        if collection
        else lambda: list(api.list_models(author=source, filter=TAGS[0], cardData=True))
    )
    with translated(f"listing {source}"):
        found = retried(find)
    cards = {m.id: m.card_data.to_dict() if m.card_data else {} for m in found}
    return _told_apart([_row(name, card) for name, card in cards.items() if _is_ours(card)])


def without_card(rows: Sequence[Row], source: str) -> list[str]:
    """Return the encoders of a folder that have no card yet."""
    folder = Path(source)
    names = [str(row["encoder"]) for row in rows] if folder.is_dir() else []
    return [name for name in names if not (folder / name / CARD_FILE).is_file()]


def _of_folder(folder: Path) -> list[Row]:
    rows = {}
    for path in sorted([*folder.rglob(CARD_FILE), *folder.rglob(RUN_FILE)]):
        place = path.parent.relative_to(folder)
        card = card_metadata(_beginning(path)) if path.name == CARD_FILE else {}
        if _is_ours(card):
            rows[str(place)] = _row(str(place), card)
        elif path.name == RUN_FILE and not PASSING & set(place.parts):
            rows.setdefault(str(place), _row_of_run(str(place), path))
    return list(rows.values())


def _is_ours(card: Mapping[str, Any]) -> bool:
    return TAGS[0] in _list(card.get("tags"))


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
    row = _bare(name) | {"method": _text(about.get("method"), 300) or None}
    for model in _list(card.get("model-index")):
        for result in _list(_dict(model).get("results")):
            data = _data(_dict(_dict(result).get("dataset")))
            for metric in map(_dict, _list(_dict(result).get("metrics"))):
                value, how = _number(metric.get("value")), _dict(metric.get("args"))
                if value is not None:
                    row |= _measured(_text(metric.get("type")), value, how, data)
    stated = {
        "ms an image": _number(about.get("training_ms_per_image")),
        "parameters": _number(about.get("parameters")),
    }
    return row | {key: value for key, value in stated.items() if value is not None}


def _data(dataset: Mapping[str, Any]) -> str:
    """What numbers of a card are of, with a split other than test: other images have no common
    axes.
    """
    name, split = _text(dataset.get("name"), 300), _text(dataset.get("split"))
    return f"{name}, {split} split" if name and split and split != "test" else name


def _measured(kind: str, value: float, how: Mapping[str, Any], data: str) -> Row:
    """The columns that a metric of a card fills."""
    norm = _text(how.get("norm")).replace("l", "L", 1)
    if kind == "accuracy":
        n = how.get("n")
        return {"data": data or None, "accuracy": value, "n": n if isinstance(n, int) else None}
    if kind == "expected_calibration_error":
        return {"ECE": value}
    if kind == "adversarial_distance":
        shown = f"{value:.3f} for {_found(how)}" if how.get("not_found") else value
        return {f"{norm} distance, {_attacks(how)}": shown}
    if kind == "robust_accuracy":
        return {f"robust at {norm} {_text(how.get('eps'))} by {_attacks(how)}": value}
    return {}


def _row_of_run(name: str, file: Path) -> Row:
    """What the run of an encoder without a card recorded; nothing where its file is damaged."""
    row = _bare(name)
    try:
        run = read_json(file)
        check_schema(run, RUN_SCHEMA, file)
    except FolderError:
        return row
    metrics, data = run.get("metrics", {}), run.get("data", {}).get("source")
    row["method"] = _text(method(run), 300) or None
    known = run.get("config", {}).get("data", {})
    row["data"] = _text(public_name(data) + part_name(known), 300) if data else None
    headless = "ssl" in run.get("config", {})  # its accuracy is of nearest neighbours
    if (accuracy := metrics.get("test_accuracy")) is not None and not headless:
        row |= {"accuracy": accuracy, "n": metrics.get("test_images")}
    if milliseconds := training_ms_per_image(run):
        row["ms an image"] = milliseconds
    return row


def _bare(name: str) -> Row:
    return {"encoder": name, "method": None, "data": None, "n": None, "accuracy": None}


def _attacks(how: Mapping[str, Any]) -> str:
    """The attacks of a metric, each with its strength: "fmn-l2 (steps 50, runs 2), tangent"."""
    names, settings = _text(how.get("attack")).split(", "), _dict(how.get("settings"))
    each = settings if len(names) > 1 else {names[0]: settings}
    return ", ".join(f"{name} ({_strength(name, _dict(each.get(name)))})" for name in names)


def _strength(name: str, settings: Mapping[str, Any]) -> str:
    return strength(name, {key: _setting(value) for key, value in settings.items()})


def _setting(value: Any) -> Any:
    if isinstance(value, list):
        return [*map(_text, value[:9])]
    return value if _number(value) is not None or isinstance(value, bool) else _text(value) or None


def _told_apart(rows: Sequence[Row]) -> list[Row]:
    """The rows without the strengths of attacks, where those tell no two columns apart."""
    short = {name: ATTACK_STRENGTH.sub("", name) for name in columns_of(rows)}
    counts = Counter(short.values())
    names = {name: name if counts[plain] > 1 else plain for name, plain in short.items()}
    return [{names[name]: value for name, value in row.items()} for row in rows]


def _found(how: Mapping[str, Any]) -> str:
    """Of how many images a mean distance is; such a mean leaves out those that are farthest."""
    return f"{_text(how.get('n'))} of {_text(how.get('of'))} images"


def _text(value: Any, most: int = 60) -> str:
    """A name or a number as it is shown, without what would steer a terminal; of anything else,
    which may be vast, nothing.
    """
    shown = str(value)[:most] if isinstance(value, str | int | float) else ""
    return "".join(filter(str.isprintable, shown))


def _number(value: Any) -> float | None:
    known = isinstance(value, int | float) and not isinstance(value, bool)
    return value if known and abs(value) <= LARGEST else None


def _dict(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _list(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list) else ()
