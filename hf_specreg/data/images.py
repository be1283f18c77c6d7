"""Labelled images for a data loader: decoded once and kept in memory where they are few, else
decoded on demand.
"""

import io
from collections.abc import Callable, Sequence
from typing import Any

import datasets
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from hf_specreg.data.datasets import DataError
from hf_specreg.data.transforms import crop_and_flip, derived_seed, seeded, to_channels

MEMORY_BUDGET = 2 * 1024**3  # bytes of decoded pixels
Transform = Callable[[Image.Image], Tensor]


class LabelledImages(Dataset):
    """Images [C, H, W], uint8, and labels of one split; batches are read at once.

    Args:
        rows: a split with columns "image" and "label".
        input_size: (C, H, W) of the images.
        evaluate: the evaluation transform, picture -> uint8 [C, H, W].
        augment: "none", "crop_flip", or a training transform, picture -> uint8 [C, H, W].
        seed: of what is random in `augment`, together with the epoch and the index.
        in_memory: decode once and keep; default: if it fits into 2 GiB.
        skip_unreadable: leave out images that cannot be read, instead of stopping.

    Attributes:
        skipped: the rows left out.

    Raises:
        DataError: images that cannot be read, with their rows.
    """

    def __init__(
        self,
        rows: datasets.Dataset,
        *,
        input_size: tuple[int, int, int],
        evaluate: Transform,
        augment: str | Transform = "none",
        seed: int = 0,
        in_memory: bool | None = None,
        skip_unreadable: bool = False,
    ):
        if isinstance(augment, str) and augment not in ("none", "crop_flip"):
            raise ValueError(f"augment ({augment!r}) must be 'none', 'crop_flip' or a transform")
        self.rows = rows.cast_column("image", datasets.Image(decode=False))
        self.labels = torch.as_tensor(rows["label"][:])
        self.input_size = tuple(input_size)
        self.evaluate = evaluate
        self.augment = augment
        self.seed = seed
        self.epoch = 0
        self._drawn: tuple[int, Tensor] | None = None
        self.skip_unreadable = skip_unreadable
        self.skipped: list[int] = []
        if in_memory is None:
            in_memory = len(rows) * torch.Size(input_size).numel() <= MEMORY_BUDGET
        self._memory = self._read_all() if in_memory else None

    def set_epoch(self, epoch: int) -> None:
        """Draw the augmentation of this epoch from now on."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        images, labels = self.__getitems__([index])
        return images[0], labels[0]

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return images [B, C, H, W], uint8, and labels [B], of several indices."""
        index = torch.as_tensor(indices)
        if callable(self.augment):
            read = [self._augmented(i) for i in indices]
            kept = [i for i, image in zip(indices, read, strict=True) if image is not None]
            images = [image for image in read if image is not None]
            return torch.stack(images), self.labels[kept]
        if self._memory is None:
            read = [self._evaluated(i) for i in indices]
            index = torch.as_tensor(
                [i for i, image in zip(indices, read, strict=True) if image is not None]
            )
            images = torch.stack([image for image in read if image is not None])
        else:
            images = self._memory[index]
        if self.augment == "crop_flip":
            images = crop_and_flip(images, self._draws()[index])
        return images, self.labels[index]

    def _draws(self) -> Tensor:
        """Three uniform numbers an image, [N, 3], of this epoch."""
        if self._drawn is None or self._drawn[0] != self.epoch:
            generator = torch.Generator().manual_seed(derived_seed(self.seed, self.epoch))
            self._drawn = self.epoch, torch.rand(len(self), 3, generator=generator)
        return self._drawn[1]

    def _augmented(self, index: int) -> Tensor | None:
        picture = self._picture(index)
        if picture is None:
            return None
        with seeded(self.seed, self.epoch, index):
            return self.augment(picture)

    def _evaluated(self, index: int) -> Tensor | None:
        picture = self._picture(index)
        return None if picture is None else self.evaluate(picture)

    def _picture(self, index: int) -> Image.Image | None:
        """The decoded picture of a row; None if it is unreadable and may be skipped."""
        try:
            return decode(self.rows[index]["image"], self.input_size[0])
        except UnreadableImageError as error:
            if not self.skip_unreadable:
                raise DataError(
                    f"row {index} cannot be read: {error}; to leave it out, set skip_unreadable"
                ) from error
            self.skipped.append(index)
            return None

    def _read_all(self) -> Tensor:
        """Decode everything, and leave out, or stop at, what is unreadable."""
        images, kept, unreadable = [], [], []
        for i, row in enumerate(self.rows):
            try:
                images.append(self.evaluate(decode(row["image"], self.input_size[0])))
                kept.append(i)
            except UnreadableImageError as error:
                unreadable.append((i, str(error)))
        if unreadable and not (self.skip_unreadable and images):
            named = "; ".join(f"row {i} ({why})" for i, why in unreadable[:5])
            raise DataError(
                f"{len(unreadable)} of {len(self.rows)} images cannot be read: {named}"
                f"{', ...' if len(unreadable) > 5 else ''}; to leave them out, set skip_unreadable"
            )
        if unreadable:
            self.skipped = [i for i, _ in unreadable]
            self.rows = self.rows.select(kept)
            self.labels = self.labels[kept]
        return torch.stack(images)


class StreamedImages(IterableDataset):
    """Images [C, H, W], uint8, and labels of a stream, for what does not fit on the disk.

    The arguments are those of `LabelledImages`; the order is that of the stream, shuffled in a
    buffer.
    """

    def __init__(
        self,
        rows: datasets.IterableDataset,
        *,
        input_size: tuple[int, int, int],
        transform: Transform,
        seed: int = 0,
        shuffle_buffer: int = 0,
        skip_unreadable: bool = False,
    ):
        rows = rows.cast_column("image", datasets.Image(decode=False))
        self.rows = rows.shuffle(seed=seed, buffer_size=shuffle_buffer) if shuffle_buffer else rows
        self.input_size = tuple(input_size)
        self.transform = transform
        self.seed = seed
        self.epoch = 0
        self.skip_unreadable = skip_unreadable
        self.skipped: list[int] = []

    def set_epoch(self, epoch: int) -> None:
        """Draw order and augmentation of this epoch from now on."""
        self.epoch = epoch
        self.rows.set_epoch(epoch)

    def __iter__(self):
        for position, row in enumerate(self.rows):
            try:
                picture = decode(row["image"], self.input_size[0])
            except UnreadableImageError as error:
                if not self.skip_unreadable:
                    raise DataError(
                        f"image {position} of the stream cannot be read: {error}; to leave it out, "
                        "set skip_unreadable"
                    ) from error
                self.skipped.append(position)
                continue
            with seeded(self.seed, self.epoch, position):
                yield self.transform(picture), torch.tensor(row["label"])


class UnreadableImageError(ValueError):
    """An image that is missing, broken, or of a kind that has no pixels in a known range."""


def decode(stored: dict[str, Any] | None, channels: int) -> Image.Image:
    """Return the picture that a `datasets` image column stores as bytes or as a path, grey or RGB.

    Raises:
        UnreadableImageError: with the file's name where there is one.
    """
    if stored is None:
        raise UnreadableImageError("it is missing")
    name = stored.get("path")
    source = io.BytesIO(stored["bytes"]) if stored.get("bytes") is not None else name
    try:
        with Image.open(source) as picture:
            return to_channels(picture, channels)
    except (
        OSError,
        UnidentifiedImageError,
        ValueError,
        SyntaxError,
        Image.DecompressionBombError,
    ) as error:
        raise UnreadableImageError(f"{name}: {error}" if name else str(error)) from error


def collate(batch: tuple[Tensor, Tensor] | list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Pass on a batch that was read at once; stack one that was read image by image."""
    if isinstance(batch, tuple):
        return batch
    images, labels = zip(*batch, strict=True)
    return torch.stack(images), torch.stack(labels)
