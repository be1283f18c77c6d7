"""Which columns of a data set hold the images and the labels, the classes, and the cut that holds
some of each class out.
"""

import math
from collections.abc import Sequence

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import ClassLabel, Dataset, Features, Value
from datasets.utils.stratify import stratified_shuffle_split_generate_indices


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
        DataError: it does not exist, holds no single values, or there is not exactly one.
    """
    if stated is not None:
        if stated not in features:
            raise DataError(
                f"label_column {stated!r} is no column of {source}; columns: {sorted(features)}"
            )
        if not isinstance(features[stated], ClassLabel | Value):
            plain = [n for n, f in features.items() if isinstance(f, ClassLabel | Value)]
            raise DataError(
                f"label_column {stated!r} of {source} holds {type(features[stated]).__name__}, not "
                f"an integer or a name of each image; columns that do: {sorted(plain)}"
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


def label_array(split: Dataset) -> np.ndarray:
    """Return the integer labels of all rows at once, [N]; -1 where there is none."""
    return _column(split).fill_null(-1).to_numpy()


def _column(split: Dataset) -> pa.ChunkedArray:
    return split.select_columns(["label"]).with_format("arrow")[:]["label"]


def with_class_labels(splits: dict[str, Dataset], source: str) -> dict[str, Dataset]:
    """Give plain labels the classes of the training split, the same in every split."""
    if isinstance(splits["train"].features["label"], ClassLabel):
        return splits
    values = splits["train"].unique("label")
    if wrong := [v for v in values if not isinstance(v, int | str)]:
        raise DataError(
            f"the labels of {source} must be integers or names, but are such as {wrong[:3]}: name "
            "another column as label_column, or leave such rows out"
        )
    values = sorted(values)
    names = ClassLabel(names=[str(v) for v in values])
    encoded = {}
    for name, split in splits.items():
        unknown = set(split.unique("label")) - set(values)
        if unknown:
            raise DataError(
                f"split {name!r} of {source} has labels that the training split lacks: "
                f"{sorted(unknown, key=str)[:3]}; to do without that split, name it in "
                "ignore_splits"
            )
        column = _column(split)
        places = pc.index_in(column, value_set=pa.array(values, column.type))
        split = split.remove_columns("label")
        encoded[name] = split.add_column("label", places.to_numpy(), feature=names)
    return encoded


def of_classes(split: Dataset, classes: Sequence[str], source: str) -> Dataset:
    """Return the rows of these classes, labelled anew.

    Raises:
        DataError: a class that there is not, or one twice.
    """
    names = split.features["label"].names
    unknown = sorted(set(classes) - set(names))
    if unknown or len(set(classes)) < len(classes):
        raise DataError(f"classes {list(classes)} must be different ones of {source}: {names}")
    new = np.full(len(names) + 1, -1)  # the last is for labels out of range
    new[[names.index(name) for name in classes]] = range(len(classes))
    labels = label_array(split)
    labels = new[np.where((labels >= 0) & (labels < len(names)), labels, -1)]
    feature = ClassLabel(names=list(classes))
    split = split.remove_columns("label").add_column("label", labels, feature=feature)
    return split.select(np.flatnonzero(labels >= 0))


def cut_stratified(
    train: Dataset, fraction: float, seed: int, source: str
) -> tuple[Dataset, Dataset]:
    """Return the training split without a fraction of each class, and that fraction: the rows of
    `Dataset.train_test_split`, which reads the labels row by row.

    Raises:
        DataError: the fraction is none, or leaves too few of a class.
    """
    if not 0 < fraction < 1:
        raise DataError(f"validation_fraction ({fraction}) must lie between 0 and 1")
    labels, held_out = label_array(train), math.ceil(fraction * len(train))
    cuts = stratified_shuffle_split_generate_indices(
        labels, len(train) - held_out, held_out, rng=np.random.default_rng(seed)
    )
    try:
        found, counts = np.unique(labels, return_counts=True)
        if counts.min() < 2:
            alone = train.features["label"].int2str(int(found[counts.argmin()]))
            raise ValueError(f"there is only one of class {alone!r}")
        kept, cut = next(cuts)
    except ValueError as error:
        raise DataError(
            f"cannot hold out {fraction:.0%} of the {len(train)} training images of {source}: "
            f"{error}"
        ) from error
    return train.select(kept), train.select(cut)


def check_labels(split: Dataset, name: str, label_names: list[str], source: str) -> None:
    """Raise DataError for a split without rows, with labels out of range, or to train one class."""
    if len(split) == 0:
        raise DataError(f"split {name!r} of {source} is empty")
    labels = label_array(split)
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
