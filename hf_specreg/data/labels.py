"""Which columns of a data set hold the images and the labels, the classes, and the cut that holds
some of each class out.
"""

from collections.abc import Sequence

import datasets
import numpy as np
from datasets import ClassLabel, Dataset, Features, Value


class DataError(ValueError):
    """A data set that cannot be used, with what is wrong and what to do."""


def find_image_column(features: Features, stated: str | None, source: str) -> str:
    """Return the stated image column, or else the only one.

    Raises:
        DataError: it is none, or there is not exactly one.
    """
    images = [n for n, f in features.items() if isinstance(f, datasets.Image)]
    if stated is not None:
        if stated not in images:
            raise DataError(
                f"image_column {stated!r} is no image column of {source}; image columns: {images}"
            )
        return stated
    if len(images) != 1:
        raise DataError(
            f"{source} has {len(images) or 'no'} image columns {images} among {sorted(features)}: "
            "name one as image_column"
        )
    return images[0]


def find_label_column(features: Features, stated: str | None, source: str) -> str:
    """Return the stated label column, or else the only ClassLabel, or else "label", "labels" or
    "fine_label".

    Raises:
        DataError: it does not exist, or there is not exactly one.
    """
    if stated is not None:
        if stated not in features:
            raise DataError(
                f"label_column {stated!r} is no column of {source}; columns: {sorted(features)}"
            )
        return stated
    labels = [n for n, f in features.items() if isinstance(f, ClassLabel)]
    if not labels:
        plain = ("label", "labels", "fine_label")
        labels = [n for n in plain if n in features and isinstance(features[n], Value)][:1]
    if len(labels) != 1:
        raise DataError(
            f"{source} has {len(labels) or 'no'} label columns {labels} among {sorted(features)}: "
            "name one as label_column"
        )
    return labels[0]


def with_class_labels(splits: dict[str, Dataset], source: str) -> dict[str, Dataset]:
    """Give plain labels the classes of the training split, the same in every split."""
    if isinstance(splits["train"].features["label"], ClassLabel):
        return splits
    values = splits["train"].unique("label")
    if not all(isinstance(v, int | str) for v in values):
        raise DataError(
            f"the labels of {source} must be integers or names, but are such as {values[:3]}"
        )
    values = sorted(values)
    places = {value: place for place, value in enumerate(values)}
    names = ClassLabel(names=[str(v) for v in values])
    encoded = {}
    for name, split in splits.items():
        unknown = set(split.unique("label")) - set(values)
        if unknown:
            raise DataError(
                f"split {name!r} of {source} has labels that the training split lacks: "
                f"{sorted(unknown)[:3]}"
            )
        labels = [places[v] for v in split["label"][:]]
        split = split.remove_columns("label").add_column("label", labels)
        encoded[name] = split.cast_column("label", names)
    return encoded


def of_classes(split: Dataset, classes: Sequence[str], source: str) -> Dataset:
    """The rows of these classes, labelled anew."""
    names = split.features["label"].names
    unknown = sorted(set(classes) - set(names))
    if unknown or len(set(classes)) < len(classes):
        raise DataError(f"classes {list(classes)} must be different ones of {source}: {names}")
    new = {names.index(name): label for label, name in enumerate(classes)}
    labels = split["label"][:]
    split = split.select([i for i, label in enumerate(labels) if label in new])
    kept = [new[label] for label in split["label"][:]]
    feature = ClassLabel(names=list(classes))
    return split.remove_columns("label").add_column("label", kept).cast_column("label", feature)


def cut_stratified(
    train: Dataset, fraction: float, seed: int, source: str
) -> tuple[Dataset, Dataset]:
    """Return the training split without a fraction of each class, and that fraction.

    Raises:
        DataError: the fraction is none, or leaves too few of a class.
    """
    if not 0 < fraction < 1:
        raise DataError(f"validation_fraction ({fraction}) must lie between 0 and 1")
    try:
        cut = train.train_test_split(fraction, seed=seed, stratify_by_column="label")
    except ValueError as error:
        raise DataError(
            f"cannot hold out {fraction:.0%} of the {len(train)} training images of {source}: "
            f"{error}"
        ) from error
    return cut["train"], cut["test"]


def check_labels(split: Dataset, name: str, label_names: list[str], source: str) -> None:
    """Raise DataError for a split without rows, with labels out of range, or to train one class."""
    if len(split) == 0:
        raise DataError(f"split {name!r} of {source} is empty")
    labels = np.asarray([-1 if label is None else label for label in split["label"]])
    if labels.min() < 0 or labels.max() >= len(label_names):
        wrong = labels[(labels < 0) | (labels >= len(label_names))]
        raise DataError(
            f"split {name!r} of {source} has {len(wrong)} labels out of range 0 to "
            f"{len(label_names) - 1}, such as {wrong[0]}; to do without that split, name it in "
            "ignore_splits"
        )
    if name == "train" and len(np.unique(labels)) < 2:
        raise DataError(
            f"the training split of {source} has one class only, {label_names[labels[0]]!r}"
        )
