"""Which images of a named set a model has not seen: the split, cut as its training cut it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from inspect import signature
from pathlib import Path
from typing import Any

import datasets

from hf_specreg.data.datasets import DIGITS, DataConfig, build_splits, load_splits, place
from hf_specreg.data.labels import DataError

# What a run's configuration calls the arguments of load_splits.
SETTINGS = {
    "configuration": "configuration",
    "revision": "revision",
    "image_column": "image_column",
    "label_column": "label_column",
    "ignore_splits": "ignore_splits",
    "classes": "classes",
    "validation_fraction": "validation_fraction",
    "split_seed": "seed",
}
TABLE = ("configuration", "revision")  # another of them may number its rows in another way
CUT_BY = ("configuration", "revision", "ignore_splits", "classes", "validation_fraction", "seed")


@dataclass(frozen=True)
class Unseen:
    """A split of an image set.

    Attributes:
        rows: its images and labels.
        options: the arguments of `load_splits` that it was loaded with.
        cut: whether it was cut from the training split, for lack of one.
        flags: what must be said of it.
    """

    rows: datasets.Dataset
    options: dict[str, Any]
    cut: bool = False
    flags: list[str] = field(default_factory=list)


def unseen_split(
    source: str,
    *,
    split: str = "test",
    options: Mapping[str, Any] | None = None,
    trainings: Sequence[Mapping[str, Any]] = (),
) -> Unseen:
    """Load a split as a model's last training on this set cut it, so that no image of that training
    is in it; how many an earlier one saw, or may have seen, is a flag.

    Args:
        source: of the image set, as for `load_splits`.
        split: train, validation or test.
        options: arguments of `load_splits`, before those of the training.
        trainings: of the model, the last first, each by its `DataConfig` as a mapping; empty of one
            where that is not known.

    Raises:
        DataError: the set cannot be loaded, or has no such split that was not trained on.
    """
    if split not in ("train", "validation", "test"):
        raise DataError(f"split ({split!r}) must be train, validation or test")
    known = [t for t in trainings if _same_source(t.get("source"), source)]
    trained, given = known[0] if known else {}, dict(options or {})
    own = cut_by(trained)
    options = {**own, **given}
    try:
        found = load_splits(source, **options)
    except TypeError as error:
        raise DataError(f"splits ({options}) must be arguments of load_splits: {error}") from error
    rows = getattr(found, split)
    if split not in found.cut:
        return Unseen(rows, options)
    if any(t.get("streaming") for t in known):
        raise DataError(
            f"the model was trained on a stream of {source}, which has no {split} split: what "
            "would be cut now was trained on; take one that it has"
        )
    cut_as_trained = known and not any(_differs(given, own, argument) for argument in CUT_BY)
    chosen = not known and {"validation_fraction", "seed"} <= set(given)
    earlier = [t for t in known[1:] if cut_by(t) != own]
    countable = [t for t in earlier if all(t.get(k) == options.get(k) for k in TABLE)]
    sure = cut_as_trained and all(t.get("source") for t in trainings) and countable == earlier
    flags = []
    if not (sure or chosen):
        flags.append(
            f"the {split} split was cut from the training split of {_shown(source)}: a model that "
            "was trained on another cut has seen some of its images"
        )
    if seen := set(rows["row"]) & {row for t in countable for row in _rows_of(t, source)}:
        flags.append(
            f"an earlier training of the model saw {len(seen)} of the {len(rows)} images of the "
            f"{split} split of {_shown(source)}"
        )
    return Unseen(rows, options, cut=True, flags=flags)


def cut_by(trained: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of `load_splits` that a training loaded its images with.

    Args:
        trained: its `DataConfig` as a mapping.
    """
    return {
        argument: trained[setting]
        for setting, argument in SETTINGS.items()
        if trained.get(setting) not in (None, (), [])
    }


def _rows_of(trained: Mapping[str, Any], source: str) -> list[int]:
    """Which rows of the source a training saw."""
    settings = {f.name: trained[f.name] for f in fields(DataConfig) if f.name in trained}
    return build_splits(DataConfig(**{**settings, "source": source})).train["row"][:]


def _shown(source: str) -> str:
    """The name of an image set; of a folder its last part, since a report may be published."""
    return Path(source).name if Path(source).exists() else source


def _same_source(trained: Any, source: str) -> bool:
    """Whether a model was trained on this image set: of the same name, or in the same folder."""
    if not isinstance(trained, str) or trained == place(source):
        return trained == place(source)
    here, there = Path(source).expanduser(), Path(trained).expanduser()
    folders = source != DIGITS and trained.startswith((".", "/", "~")) and here.is_dir()
    return folders and here.resolve() == there.resolve()


def _differs(given: Mapping[str, Any], own: Mapping[str, Any], argument: str) -> bool:
    """Whether an argument of `load_splits` was given, and not as in the training."""
    default = signature(load_splits).parameters[argument].default
    a, b = given.get(argument, default), own.get(argument, default)
    a, b = (list(x) if isinstance(x, tuple) else x for x in (a, b))
    return argument in given and a != b
