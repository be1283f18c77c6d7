"""Labelled images for a data loader: few are decoded once and kept, many are decoded on demand."""

import io
import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import datasets
import torch
from datasets.utils.file_utils import xopen
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from hf_specreg.data.datasets import DataError
from hf_specreg.data.transforms import crop_and_flip, derived_seed, seeded, to_channels

MEMORY_BUDGET = 2 * 1024**3  # bytes of decoded pixels
Transform = Callable[[Image.Image], Tensor]
# Pixels that somebody in this process has already, by what they were decoded from and how.
_held: weakref.WeakValueDictionary[tuple, Tensor] = weakref.WeakValueDictionary()


class LabelledImages(Dataset):
    """Images [C, H, W], uint8, and labels of one split; batches are read at once.

    What is kept in memory is decoded once a process, as long as somebody has it.

    Args:
        rows: a split with columns "image" and "label".
        input_size: (C, H, W) of the images.
        evaluate: the evaluation transform, picture -> uint8 [C, H, W].
        augment: "none", "crop_flip", or a training transform, picture -> uint8 [C, H, W].
        seed: of what is random in `augment`, together with the epoch and the index.
        in_memory: decode once and keep; default: if it fits into 2 GiB.
        skip_unreadable: leave out images that cannot be read, instead of stopping; all are read
            once at the start to find them.

    Attributes:
        skipped: what was left out, each with its row and its reason.

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
        self.input_size = tuple(input_size)
        self.evaluate = evaluate
        self.augment = augment
        self.seed = seed
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # with workers that stay
        self.skipped: list[str] = []
        self._drawn: tuple[int, Tensor] | None = None
        budget = {None: MEMORY_BUDGET, True: math.inf, False: 0}[in_memory]
        keep = len(rows) * torch.Size(input_size).numel() <= budget
        self._pictures: list[Image.Image] | None = None
        self._pixels: Tensor | None = None
        # A fingerprint is of the rows and all that was done to them.
        key = (self.rows._fingerprint, self.input_size, repr(evaluate))
        if keep and not skip_unreadable and not callable(augment):
            self._pixels = _held.get(key)
        if self._pixels is None and (keep or skip_unreadable):
            pictures = self._readable_pictures(skip_unreadable)
            if keep and callable(augment):
                self._pictures = _within(budget, pictures)
            elif keep:
                self._pixels = torch.stack([evaluate(picture) for picture in pictures])
                if not skip_unreadable:  # else rows are missing
                    _held[key] = self._pixels
            for _ in pictures if skip_unreadable else ():  # to the end, to know which can be read
                pass
            if not skip_unreadable:
                self.skipped = []
        self.labels = torch.as_tensor(self.rows["label"][:])

    @property
    def epoch(self) -> int:
        """Whose augmentation is drawn."""
        return self._epoch.item()

    def set_epoch(self, epoch: int) -> None:
        """Draw the augmentation of this epoch from now on, also in workers that run already."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        images, labels = self.__getitems__([index])
        return images[0], labels[0]

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return images [B, C, H, W], uint8, and labels [B], of several indices."""
        index = torch.as_tensor(indices)
        if callable(self.augment):
            images = torch.stack([self._augmented(i) for i in indices])
        elif self._pixels is not None:
            images = self._pixels[index]
        else:
            images = torch.stack([self.evaluate(self._picture(i)) for i in indices])
        if self.augment == "crop_flip":
            images = crop_and_flip(images, self._draws()[index])
        return images, self.labels[index]

    def _draws(self) -> Tensor:
        """Three uniform numbers an image, [N, 3], of this epoch."""
        if self._drawn is None or self._drawn[0] != self.epoch:
            generator = torch.Generator().manual_seed(derived_seed(self.seed, self.epoch))
            self._drawn = self.epoch, torch.rand(len(self), 3, generator=generator)
        return self._drawn[1]

    def _augmented(self, index: int) -> Tensor:
        picture = self._picture(index)
        with seeded(self.seed, self.epoch, index):
            return self.augment(picture)

    def _picture(self, index: int) -> Image.Image:
        if self._pictures is not None:
            return self._pictures[index]
        row = self.rows[int(index)]
        try:
            return decode(row["image"], self.input_size[0])
        except UnreadableImageError as error:
            raise DataError(
                f"row {row.get('row', index)} cannot be read: {error}; to leave such images out, "
                "set skip_unreadable"
            ) from error

    def _readable_pictures(self, skip_unreadable: bool) -> Iterator[Image.Image]:
        """Yield every picture that can be read; leave out the other rows, or stop at the end."""
        kept, total = [], len(self.rows)
        for i, row in enumerate(self.rows):
            try:
                picture = decode(row["image"], self.input_size[0])
            except UnreadableImageError as error:
                self.skipped.append(f"row {row.get('row', i)} ({error})")
            else:
                kept.append(i)
                yield picture
        if self.skipped and not (skip_unreadable and kept):
            raise DataError(
                f"{len(self.skipped)} of {total} images cannot be read: "
                f"{'; '.join(self.skipped[:5])}{', ...' if len(self.skipped) > 5 else ''}; "
                "to leave them out, set skip_unreadable"
            )
        if self.skipped:
            self.rows = self.rows.select(kept)


def _within(budget: float, pictures: Iterator[Image.Image]) -> list[Image.Image] | None:
    """The pictures, which have the size that they are stored in; None if they exceed the budget."""
    kept: list[Image.Image] = []
    for picture in pictures:
        budget -= picture.width * picture.height * (1 if picture.mode == "L" else 4)
        if budget < 0:
            return None
        kept.append(picture)
    return kept


class StreamedImages(IterableDataset):
    """Images [C, H, W], uint8, and labels of a stream, for what does not fit on the disk.

    The order is that of the stream, shuffled in a buffer. It is read by one process: what is random
    depends on an image's place in the stream.

    Args:
        rows: a stream with columns "image" and "label".
        input_size: (C, H, W) of the images.
        transform: picture -> uint8 [C, H, W].
        seed: of the order and of what is random in `transform`, with the epoch and the place.
        shuffle_buffer: images to draw the next one from; 0: not shuffled.
        skip_unreadable: leave out images that cannot be read, instead of stopping.

    Attributes:
        skipped: what was left out so far, each with its place and its reason.
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
        self.skipped: list[str] = []

    def set_epoch(self, epoch: int) -> None:
        """Draw order and augmentation of this epoch from now on."""
        self.epoch = epoch
        self.rows.set_epoch(epoch)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for place, row in enumerate(self.rows):
            try:
                picture = decode(row["image"], self.input_size[0])
            except UnreadableImageError as error:
                if not self.skip_unreadable:
                    raise DataError(
                        f"image {place} of the stream cannot be read: {error}; to leave it out, "
                        "set skip_unreadable"
                    ) from error
                self.skipped.append(f"image {place} ({error})")
                continue
            with seeded(self.seed, self.epoch, place):
                yield self.transform(picture), torch.tensor(row["label"])


class UnreadableImageError(ValueError):
    """An image that is missing, broken, or of a kind that has no pixels in a known range."""


def decode(stored: dict[str, Any] | None, channels: int) -> Image.Image:
    """Return the picture that a `datasets` image column stores as bytes or as a path, upright.

    Args:
        stored: {"bytes", "path"}.
        channels: 1 for grey, 3 for RGB.

    Raises:
        UnreadableImageError: with the file's name where there is one.
    """
    if stored is None:
        raise UnreadableImageError("it is missing")
    name = stored.get("path")
    try:
        content = stored.get("bytes")
        if content is None and "://" in (name or ""):  # a folder that is streamed from the Hub
            with xopen(name, "rb") as file:
                content = file.read()
        with Image.open(name if content is None else io.BytesIO(content)) as picture:
            return to_channels(ImageOps.exif_transpose(picture), channels)
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
