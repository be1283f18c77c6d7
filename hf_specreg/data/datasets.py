"""Image sets: from a Hub id, a folder or the embedded digits to splits with an image and a label
column.

Sources:

- "digits": scikit-learn's 1,797 handwritten digits of 8x8 grey pixels, embedded, no download.
- a local folder: of class folders (also below train/ and test/), or of parquet files.
- anything else: a data set on the Hub.

The columns are found by their feature type, Image and ClassLabel. A held-out split that is missing
is cut from the training split: stratified, and the same for the same seed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Features, IterableDatasetDict, Value
from datasets.exceptions import DatasetsError

DIGITS = "digits"
SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test",),
}


class DataError(ValueError):
    """A data set that cannot be used, with what is wrong and what to do."""


@dataclass(frozen=True)
class ImageSplits:
    """The splits of an image set, with columns "image", "label" and "row", the place in the source.

    Attributes:
        train: to learn from; a `datasets.Dataset`, or an `IterableDataset` when streaming.
        validation: held out, to choose by.
        test: held out, to report.
        label_names: of the classes, in order.
        source: the Hub id, folder or name.
        fingerprints: of the splits' contents by split name; empty when streaming.
        cut: the splits that the source does not have, and that were cut from its training split.
    """

    train: Dataset | datasets.IterableDataset
    validation: Dataset | datasets.IterableDataset
    test: Dataset | datasets.IterableDataset
    label_names: list[str]
    source: str
    fingerprints: dict[str, str]
    cut: tuple[str, ...] = ()


def load_splits(
    source: str,
    *,
    revision: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    ignore_splits: Sequence[str] = (),
    classes: Sequence[str] = (),
    validation_fraction: float = 0.1,
    seed: int = 0,
    streaming: bool = False,
) -> ImageSplits:
    """Load an image set and see to it that it has a train, a validation and a test split.

    Args:
        source: "digits", a local folder, or a Hub id.
        revision: branch, tag or commit on the Hub.
        image_column: default: the one column with the Image feature.
        label_column: default: the one column with the ClassLabel feature, else "label", "labels" or
            "fine_label".
        ignore_splits: splits of the source not to use, such as an unlabelled test split.
        classes: names of the classes to use, in the order of their new labels; default: all.
        validation_fraction: of the training split, held out where there is no validation split; and
            again for a test split where there is none.
        seed: of that cut.
        streaming: do not download or index the whole set; it must then bring its own splits.

    Raises:
        DataError: missing folder, no or several image or label columns, an empty split, one class
            only, labels out of range, or no training split.
    """
    if source == DIGITS:
        found = DatasetDict(_digits())
    else:
        found = _load(source, revision, streaming)
    found = {name: split for name, split in found.items() if name not in ignore_splits}
    splits = _named_splits(found, source)
    first = splits["train"]
    features = first.features
    if features is None:
        raise DataError(f"the stream {source} does not state its columns: load it whole")
    image_column = _image_column(features, image_column, source)
    label_column = _label_column(features, label_column, source)
    splits = {
        name: split.select_columns([image_column, label_column]).rename_columns(
            {k: v for k, v in ((image_column, "image"), (label_column, "label")) if k != v}
        )
        for name, split in splits.items()
    }
    if streaming and classes:
        raise DataError("classes cannot be picked from a stream: load it whole")
    if streaming:
        return _streamed_splits(splits, source)
    splits = _with_class_labels(splits, source)
    splits = {name: split.add_column("row", range(len(split))) for name, split in splits.items()}
    if classes:
        splits = {name: _of_classes(split, classes, source) for name, split in splits.items()}
    label_names = splits["train"].features["label"].names
    for name, split in splits.items():
        _check(split, name, label_names, source)
    cut = tuple(name for name in ("test", "validation") if name not in splits)
    for name in cut:
        splits["train"], splits[name] = _cut(splits["train"], validation_fraction, seed, source)
    fingerprints = {name: split._fingerprint for name, split in splits.items()}
    return ImageSplits(
        **splits, label_names=label_names, source=source, fingerprints=fingerprints, cut=cut
    )


def place(source: str) -> str:
    """Return a Hub id as it is, and a folder with ./ before it where it looks like one: so that it
    is not taken for one where there is no such folder.
    """
    folder = source.count("/") == 1 and not source.startswith((".", "/", "~"))
    return f"./{source}" if folder and Path(source).is_dir() else source


def _digits() -> dict[str, Dataset]:
    """The embedded digits, 0 to 16 scaled to 0 to 255, as one split; the cut makes the others."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = np.round(bunch.images * (255 / 16)).astype(np.uint8)
    features = Features(
        {"image": datasets.Image(), "label": ClassLabel(names=[str(n) for n in range(10)])}
    )
    rows = {"image": list(images), "label": bunch.target.tolist()}
    return {"train": Dataset.from_dict(rows, features=features)}


def _load(source: str, revision: str | None, streaming: bool) -> DatasetDict | IterableDatasetDict:
    folder = Path(source).expanduser()
    if folder.is_dir():
        if not any(p.is_file() for p in folder.rglob("*")):
            raise DataError(f"the folder {source} is empty")
        source = str(folder)
    elif source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise DataError(f"there is no folder {source}")
    try:
        return datasets.load_dataset(source, revision=revision, streaming=streaming)
    except (OSError, ValueError, DatasetsError) as error:
        raise DataError(
            f"{source!r} cannot be loaded as a folder or from the Hub: {error}"
        ) from error


def _named_splits(found: Mapping, source: str) -> dict[str, Dataset]:
    splits = {}
    for role, names in SPLIT_NAMES.items():
        name = next((n for n in names if n in found), None)
        if name:
            splits[role] = found[name]
    if "train" not in splits:
        raise DataError(f"{source} has no training split, only {sorted(found)}")
    return splits


def _image_column(features: Features, stated: str | None, source: str) -> str:
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


def _label_column(features: Features, stated: str | None, source: str) -> str:
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


def _streamed_splits(splits: dict[str, datasets.IterableDataset], source: str) -> ImageSplits:
    """Streams as they are: with one held-out split only, it serves as validation and as test
    split.
    """
    held_out = splits.get("validation") or splits.get("test")
    if held_out is None:
        raise DataError(
            f"{source} has no held-out split, and none can be cut from a stream: load it whole"
        )
    label = splits["train"].features["label"]
    if not isinstance(label, ClassLabel):
        raise DataError(
            f"the labels of the stream {source} are no ClassLabel, so its classes are not known: "
            "load it whole"
        )
    splits = {"validation": held_out, "test": held_out, **splits}
    for name in ("validation", "test"):
        first = next(iter(splits[name].select_columns(["label"])), {"label": None})["label"]
        if first is None or not 0 <= first < label.num_classes:
            raise DataError(
                f"split {name!r} of the stream {source} begins with the label {first}, so it is "
                f"empty or not labelled with 0 to {label.num_classes - 1}; to do without that "
                "split, name it in ignore_splits"
            )
    return ImageSplits(**splits, label_names=label.names, source=source, fingerprints={})


def _with_class_labels(splits: dict[str, Dataset], source: str) -> dict[str, Dataset]:
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


def _of_classes(split: Dataset, classes: Sequence[str], source: str) -> Dataset:
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


def _cut(train: Dataset, fraction: float, seed: int, source: str) -> tuple[Dataset, Dataset]:
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


def _check(split: Dataset, name: str, label_names: list[str], source: str) -> None:
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
