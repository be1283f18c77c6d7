"""Which images of a named set a model has not seen: the split, cut as its training cut it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from inspect import signature
from pathlib import Path
from typing import Any

import datasets

from hf_specreg.data.datasets import DIGITS, load_splits, place
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
CUT_BY = ("configuration", "revision", "ignore_splits", "classes", "validation_fraction", "seed")


@dataclass(frozen=True)
class Unseen:
    """A split of an image set.

    Attributes:
        rows: its images and labels.
        options: the arguments of `load_splits` that it was loaded with.
        flags: what must be said of it.
    """

    rows: datasets.Dataset
    options: dict[str, Any]
    flags: list[str] = field(default_factory=list)


def unseen_split(
    source: str,
    *,
    split: str = "test",
    options: Mapping[str, Any] | None = None,
    trained: Mapping[str, Any] | None = None,
) -> Unseen:
    """Load a split as a model's training cut it, so that no image that it was trained on is in it.

    Args:
        source: of the image set, as for `load_splits`.
        split: train, validation or test.
        options: arguments of `load_splits`, before those of the training.
        trained: the model's `DataConfig` as a mapping; nothing where it is not known.

    Raises:
        DataError: the set cannot be loaded, or has no such split that was not trained on.
    """
    if split not in ("train", "validation", "test"):
        raise DataError(f"split ({split!r}) must be train, validation or test")
    trained, given = trained or {}, dict(options or {})
    known = _same_source(trained.get("source"), source)
    own = {
        argument: trained[setting]
        for setting, argument in SETTINGS.items()
        if known and trained.get(setting) not in (None, (), [])
    }
    options = {**own, **given}
    try:
        found = load_splits(source, **options)
    except TypeError as error:
        raise DataError(f"splits ({options}) must be arguments of load_splits: {error}") from error
    if split in found.cut and known and trained.get("streaming"):
        raise DataError(
            f"the model was trained on a stream of {source}, which has no {split} split: what "
            "would be cut now was trained on; take one that it has"
        )
    flags = []
    cut_as_trained = known and not any(_differs(given, own, argument) for argument in CUT_BY)
    chosen = not known and {"validation_fraction", "seed"} <= set(given)
    if split in found.cut and not (cut_as_trained or chosen):
        flags.append(
            f"the {split} split was cut from the training split of {_shown(source)}: a model that "
            "was trained on another cut has seen some of its images"
        )
    return Unseen(getattr(found, split), options, flags)


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
