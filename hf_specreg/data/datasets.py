"""Image sets: from a Hub id, a folder or the embedded digits to splits with an image and a label
column.

Sources:

- "digits": scikit-learn's 1,797 handwritten digits of 8x8 grey pixels, embedded, no download.
- a local folder: of class folders (also below train/ and test/, see `folders.py`), or of parquet
  files.
- anything else: a data set on the Hub.

The columns are found by their feature type, Image and ClassLabel. A held-out split that is missing
is cut from the training split: stratified, and the same for the same seed.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import datasets
import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Features, IterableDatasetDict
from datasets.exceptions import DatasetsError

from hf_specreg.connection import from_hub
from hf_specreg.data.fingerprint import fingerprint
from hf_specreg.data.folders import picture_splits
from hf_specreg.data.labels import (
    DataError,
    check_labels,
    cut_stratified,
    find_image_column,
    find_label_column,
    of_classes,
    with_class_labels,
)
from hf_specreg.ranges import require

DIGITS = "digits"
Rows = Dataset | datasets.IterableDataset
SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test",),
}


@dataclass(frozen=True)
class DataConfig:
    """Which images.

    Args:
        source: data set: "digits" (embedded), a local folder, or a Hub id.
        configuration: name of one of the data set's configurations, where it has several.
        revision: branch, tag or commit on the Hub.
        image_column: column of the images; default: the one with the Image feature.
        label_column: column of the labels; default: the one with the ClassLabel feature.
        validation_fraction: part of the training split that is held out for each of validation and
            test that is missing.
        split_seed: seed of those cuts; it is not the run's seed, so that runs of several seeds are
            tested on the same images.
        ignore_splits: splits of the source not to use, such as an unlabelled test split.
        classes: names of the classes to use, the others are left out; default: all.
        train_samples: how many of the (once shuffled) training images to use; the first ones of a
            stream; default: all.
        held_out_samples: how many of the (once shuffled) validation images, and of the test images,
            to use at most; the first ones of a stream; default: all.
        streaming: read from the Hub while training instead of downloading first; in the training
            process alone.
        in_memory: decode once and keep; default: if it fits into 2 GiB.
        skip_unreadable: leave out images that cannot be read, instead of stopping.
        num_workers: processes that load images; 0: the training process.
    """

    source: str = DIGITS
    configuration: str | None = None
    revision: str | None = None
    image_column: str | None = None
    label_column: str | None = None
    validation_fraction: float = 0.1
    split_seed: int = 0
    ignore_splits: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    train_samples: int | None = None
    held_out_samples: int | None = None
    streaming: bool = False
    in_memory: bool | None = None
    skip_unreadable: bool = False
    num_workers: int = 0

    def __post_init__(self):
        require(self, "at least 1", "train_samples", "held_out_samples")


@dataclass(frozen=True)
class ImageSplits:
    """The splits of an image set, with columns "image", "label" and "row", the place in the source.

    Attributes:
        train: to learn from; a `datasets.Dataset`, or an `IterableDataset` when streaming.
        validation: held out, to choose by.
        test: held out, to report.
        label_names: of the classes, in order.
        source: the Hub id, folder or name.
        cut: the splits that the source does not have, and that were cut from its training split.
    """

    train: Rows
    validation: Rows
    test: Rows
    label_names: list[str]
    source: str
    cut: tuple[str, ...] = ()

    @cached_property
    def fingerprints(self) -> dict[str, str]:
        """Of the splits' contents by split name (`fingerprint.py`); empty when streaming."""
        splits = {"train": self.train, "validation": self.validation, "test": self.test}
        return {n: fingerprint(rows) for n, rows in splits.items() if isinstance(rows, Dataset)}


def load_splits(
    source: str,
    *,
    configuration: str | None = None,
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
        configuration: of a data set that has several.
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
        DataError: missing folder, a configuration that is not chosen, no or several image or label
            columns, an empty split, one class only, labels out of range, or no training split.
    """
    if source == DIGITS:
        if configuration is not None:
            raise DataError(f"digits has no configurations, such as {configuration!r}")
        found = DatasetDict(train=_digits())
    else:
        found = _load(source, configuration, revision, streaming)
    found = {name: split for name, split in found.items() if name not in ignore_splits}
    splits = _with_columns(_named_splits(found, source), image_column, label_column, source)
    if not streaming:
        return _whole_splits(splits, source, classes, validation_fraction, seed)
    if classes:
        raise DataError("classes cannot be picked from a stream: load it whole")
    return _streamed_splits(splits, source)


def build_splits(config: DataConfig) -> ImageSplits:
    """Load the splits, cut down to `train_samples` and `held_out_samples`."""
    splits = load_splits(
        config.source,
        configuration=config.configuration,
        revision=config.revision,
        image_column=config.image_column,
        label_column=config.label_column,
        validation_fraction=config.validation_fraction,
        seed=config.split_seed,
        ignore_splits=config.ignore_splits,
        classes=config.classes,
        streaming=config.streaming,
    )
    if not config.streaming and (config.train_samples or 0) > len(splits.train):
        raise DataError(
            f"data.train_samples ({config.train_samples}) exceeds the {len(splits.train)} training "
            "images"
        )
    return replace(
        splits,
        train=_part(splits.train, config.train_samples, config.split_seed),
        validation=_part(splits.validation, config.held_out_samples, config.split_seed),
        test=_part(splits.test, config.held_out_samples, config.split_seed),
    )


def _part(rows: Rows, count: int | None, seed: int) -> Rows:
    """So many of the images, or all where there are no more; the first ones of a stream."""
    if count is None:
        return rows
    if isinstance(rows, Dataset):
        return rows.shuffle(seed=seed).take(min(count, len(rows)))
    return rows.take(count)


def place(source: str) -> str:
    """Return a Hub id as it is, and a folder with ./ before it where it looks like one: so that it
    is not taken for one where there is no such folder.
    """
    folder = source.count("/") == 1 and not source.startswith((".", "/", "~"))
    return f"./{source}" if folder and Path(source).is_dir() else source


@functools.cache
def _digits() -> Dataset:
    """The embedded digits, 0 to 16 scaled to 0 to 255, as one split; the cut makes the others."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = np.round(bunch.images * (255 / 16)).astype(np.uint8)
    features = Features(
        {"image": datasets.Image(), "label": ClassLabel(names=[str(n) for n in range(10)])}
    )
    rows = {"image": list(images), "label": bunch.target.tolist()}
    return Dataset.from_dict(rows, features=features)


def _load(
    source: str, configuration: str | None, revision: str | None, streaming: bool
) -> DatasetDict | IterableDatasetDict:
    folder, files = Path(source).expanduser(), None
    if folder.is_dir():
        if not any(p.is_file() for p in folder.rglob("*")):
            raise DataError(f"the folder {source} is empty")
        source = str(folder)
        if configuration is None:
            files = picture_splits(folder)
    elif source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise DataError(f"there is no folder {source}")

    def load():
        if configuration is not None:  # load_dataset takes any name where there is no choice
            names = datasets.get_dataset_config_names(source, revision=revision)
            if configuration not in names:
                raise ValueError(f"configuration ({configuration!r}) is none of {names}")
        return datasets.load_dataset(
            source, configuration, data_files=files, revision=revision, streaming=streaming
        )

    try:
        return load() if folder.is_dir() else from_hub(source, load)
    except (OSError, ValueError, DatasetsError) as error:
        choose = "\nName it as configuration" if "Config name is missing" in str(error) else ""
        raise DataError(
            f"{source!r} cannot be loaded as a folder or from the Hub: {error}{choose}"
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


def _with_columns(
    splits: dict[str, Dataset], image_column: str | None, label_column: str | None, source: str
) -> dict[str, Dataset]:
    """The splits with the columns "image" and "label" alone."""
    features = splits["train"].features
    if features is None:
        raise DataError(f"the stream {source} does not state its columns: load it whole")
    image_column = find_image_column(features, image_column, source)
    label_column = find_label_column(features, label_column, source)
    renamed = {k: v for k, v in ((image_column, "image"), (label_column, "label")) if k != v}
    return {
        name: split.select_columns([image_column, label_column]).rename_columns(renamed)
        for name, split in splits.items()
    }


def _whole_splits(
    splits: dict[str, Dataset], source: str, classes: Sequence[str], fraction: float, seed: int
) -> ImageSplits:
    """Checked splits of the classes; those that are missing are cut from the training split."""
    splits = with_class_labels(splits, source)
    splits = {name: split.add_column("row", range(len(split))) for name, split in splits.items()}
    if classes:
        splits = {name: of_classes(split, classes, source) for name, split in splits.items()}
    label_names = splits["train"].features["label"].names
    for name, split in splits.items():
        check_labels(split, name, label_names, source)
    cut = tuple(name for name in ("test", "validation") if name not in splits)
    for name in cut:
        splits["train"], splits[name] = cut_stratified(splits["train"], fraction, seed, source)
    return ImageSplits(**splits, label_names=label_names, source=source, cut=cut)


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
    return ImageSplits(**splits, label_names=label.names, source=source)
