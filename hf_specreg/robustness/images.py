"""Any kind of data set, read as float images in [0, 1] with labels."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Integral
from operator import index
from typing import Any

import datasets
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset, TensorDataset

from hf_specreg.data.datasets import place
from hf_specreg.data.images import LabelledImages
from hf_specreg.data.transforms import evaluation_transform
from hf_specreg.data.unseen import unseen_split
from hf_specreg.robustness.chunks import EvaluationError
from hf_specreg.robustness.subject import Subject


@dataclass(frozen=True)
class ImageSet:
    """An image set by its name, or any other with what the report shall say of it.

    Args:
        source: as the `dataset` of `evaluate_robustness`.
        split: train, validation or test, of a set given by name.
        options: of a set given by name, the arguments of `load_splits`, such as revision,
            validation_fraction or label_column. What is not given is as in the model's training, if
            its specreg.json says that it was trained on this image set: with another cut, images
            that it was trained on could be in its test split.
        about: for the report: "id", "revision", "split".
    """

    source: Any
    split: str = "test"
    options: Mapping[str, Any] = field(default_factory=dict)
    about: Mapping[str, Any] = field(default_factory=dict)


class Images:
    """The images of a set, and those of them that are evaluated.

    Args:
        dataset: as for `evaluate_robustness`.
        subject: whose size and transform pictures are brought to, and whose training says which
            images of a named set it has not seen.
        samples: how many images are evaluated; default: all.
        seed: that they are drawn by.

    Attributes:
        rows: those that are evaluated.
        size: (C, H, W).
        names: of the classes, by label, as `datasets` (ClassLabel) and torchvision (classes) keep
            them, None of one that no image has; empty where there are none.
        about: what the report says of them.
        flags: what must be said of them.

    Raises:
        EvaluationError: there are no images, they have other columns, or their labels are not an
            integer each.
        DataError: the image set cannot be loaded, or not split as its options say.
    """

    def __init__(
        self, dataset: Any, subject: Subject, *, samples: int | None = None, seed: int = 0
    ):
        image_set = dataset if isinstance(dataset, ImageSet) else ImageSet(dataset)
        dataset, about, self.flags = image_set.source, {}, []
        if isinstance(dataset, str):
            found = unseen_split(
                dataset,
                split=image_set.split,
                options=image_set.options,
                trainings=subject.trained_on,
            )
            options, self.flags = dict(found.options), found.flags
            about = {"id": place(dataset), "revision": options.pop("revision", None)}
            about |= {"split": image_set.split, "splits": options, "cut": found.cut}
            dataset = found.rows
        self.dataset = _readable(dataset, subject)
        if not len(self):
            raise EvaluationError("the data set has no images")
        self.about = {**about, **image_set.about, "images": len(self)}
        self.size = tuple(self.read(np.arange(1))[0].shape[1:])
        self.names = _class_names(self.dataset)
        self.rows = draw(len(self), samples, seed)

    def __len__(self) -> int:
        return len(self.dataset)

    def read(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """Return images [B, C, H, W], float32, and labels [B], both on the CPU; 8-bit pixels are
        divided by 255.
        """
        rows = [int(row) for row in rows]
        if isinstance(self.dataset, LabelledImages):
            images, labels = self.dataset.__getitems__(rows)
        elif isinstance(self.dataset, TensorDataset):
            images, labels = self.dataset[rows]
        else:
            pairs = [self.dataset[row] for row in rows]
            if not all(isinstance(image, Tensor) for image, _ in pairs):
                raise EvaluationError(
                    f"the data set gives {type(pairs[0][0]).__name__}, not tensors [C, H, W] in "
                    "[0, 1]: give it a transform such as torchvision's ToTensor"
                )
            images = torch.stack([image for image, _ in pairs])
            labels = torch.tensor([_integer(label) for _, label in pairs])
        if images.dtype == torch.uint8:
            images = images.float() / 255
        if images.is_floating_point():
            images = images.float()
        return images.detach().cpu().contiguous(), labels.cpu().long()


def draw(count: int, samples: int | None, seed: int) -> np.ndarray:
    """Return so many rows of `count`, in order, drawn by a seed; all of them by default."""
    if samples is not None and not (isinstance(samples, Integral) and samples > 0):
        raise EvaluationError(f"samples ({samples}) must be an integer of at least 1")
    if samples is None or samples >= count:
        return np.arange(count)
    return np.sort(np.random.default_rng(seed).choice(count, samples, replace=False))


def _class_names(dataset: Any) -> list[str | None]:
    if isinstance(dataset, LabelledImages):
        feature, used = dataset.rows.features["label"], set(dataset.labels.tolist())
        names = feature.names if isinstance(feature, datasets.ClassLabel) else ()
        return [name if label in used else None for label, name in enumerate(names)]
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    if getattr(dataset, "target_transform", None):  # torchvision's: its labels are others
        return []
    names = getattr(dataset, "classes", None)
    named = isinstance(names, list | tuple) and all(isinstance(name, str) for name in names)
    return list(names) if named else []


def _readable(dataset: Any, subject: Subject) -> Any:
    _check_rows(dataset)
    if isinstance(dataset, Tensor | np.ndarray):
        raise EvaluationError("images alone have no labels: give (images, labels)")
    if isinstance(dataset, datasets.Dataset):
        missing = {"image", "label"} - set(dataset.column_names)
        if missing:
            raise EvaluationError(
                f"the data set has columns {dataset.column_names}, but not {sorted(missing)}: "
                "rename_columns gives them these names"
            )
        _check_label_column(dataset)
        size = subject.input_size
        transform = evaluation_transform(size, **subject.preprocessing)
        return LabelledImages(dataset, input_size=size, evaluate=transform)
    pair = isinstance(dataset, tuple | list) and len(dataset) == 2
    if pair and isinstance(dataset[0], Tensor | np.ndarray):
        dataset = _tensors(*dataset)
    if isinstance(dataset, TensorDataset):
        _check_label_tensor(dataset.tensors[-1])
    return dataset


def _check_rows(dataset: Any) -> None:
    """Raise EvaluationError unless a data set has rows, as many as it says."""
    kind, remedy = type(dataset).__name__, None
    if isinstance(dataset, Mapping):
        remedy = f"take one of its splits, {', '.join(map(repr, dataset))}"
    elif isinstance(dataset, DataLoader):
        remedy = "give its .dataset"
    elif not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        remedy = "load it without streaming, or keep some, Dataset.from_list(list(it.take(500)))"
    if remedy:
        raise EvaluationError(f"a {kind} has no rows by number: {remedy}")


def _tensors(images: Tensor | np.ndarray, labels: Any) -> TensorDataset:
    if len(images) != len(labels):
        raise EvaluationError(
            f"images and labels must be as many, not {len(images)} and {len(labels)}"
        )
    try:
        return TensorDataset(torch.as_tensor(images), torch.as_tensor(labels))
    except (TypeError, ValueError, RuntimeError) as error:  # of names, or of None
        raise EvaluationError(f"images and labels must be numbers: {error}") from error


def _check_label_tensor(labels: Tensor) -> None:
    if labels.ndim == 1 and not labels.is_floating_point():
        return
    remedy = "labels.long() makes whole ones so"
    if labels.ndim > 1:
        remedy = f"give labels.{'squeeze' if labels.shape[1] == 1 else 'argmax'}(1)"
    raise EvaluationError(
        f"labels must be integers [N], not {labels.dtype} {tuple(labels.shape)}: {remedy}"
    )


def _check_label_column(dataset: datasets.Dataset) -> None:
    feature = dataset.features["label"]
    kind = feature.dtype if isinstance(feature, datasets.ClassLabel | datasets.Value) else "list"
    if "int" not in kind and kind != "bool":
        raise EvaluationError(
            f"the labels must be integers, not {feature}: cast_column('label', ClassLabel(names)) "
            "makes classes of names, class_encode_column('label') those of their alphabetical order"
        )
    column = dataset.select_columns(["label"]).with_format("arrow")[:]["label"]
    if column.null_count:
        raise EvaluationError(
            f"{column.null_count} of the {len(dataset)} images have no label: filter leaves them "
            "out"
        )


def _integer(label: Any) -> int:
    try:
        return index(label)
    except TypeError as error:
        raise EvaluationError(
            f"labels must be integers, one of each image, not {label!r}: give the data set a "
            "target_transform"
        ) from error
