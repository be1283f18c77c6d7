"""The images of a run as the model takes them, their loaders, and what is said of them."""

import logging
from importlib.metadata import version
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from hf_specreg.data.datasets import ImageSplits, place
from hf_specreg.data.images import LabelledImages, StreamedImages, collate
from hf_specreg.data.transforms import (
    VIEWS,
    evaluation_transform,
    training_transform,
    two_view_transform,
)
from hf_specreg.encoders.model import SpecRegModel
from hf_specreg.training.config import RunConfig
from hf_specreg.training.interruption import ignore_sigterm

logger = logging.getLogger(__name__)
LIBRARIES = ("torch", "timm", "transformers", "datasets", "accelerate", "hf-specreg")


def build_images(splits: ImageSplits, model: SpecRegModel, config: RunConfig) -> dict[str, Any]:
    """Return train_images, validation_images and test_images, as the model takes them."""
    evaluate = evaluation_transform(model.input_size, **model.preprocessing)
    augment, options = config.augment.kind, config.augment.options
    if augment == "timm":
        interpolation = model.preprocessing["interpolation"]
        augment = training_transform(model.input_size, interpolation=interpolation, **options)
    elif augment in VIEWS:
        augment = two_view_transform(augment, model.input_size, **options)
    common = {"input_size": model.input_size, "skip_unreadable": config.data.skip_unreadable}
    images = {}
    for name in ("train", "validation", "test"):
        rows = getattr(splits, name)
        if config.data.streaming:
            transform = augment if name == "train" and callable(augment) else evaluate
            buffer = 10 * config.batch_size if name == "train" else 0
            images[f"{name}_images"] = StreamedImages(
                rows, transform=transform, seed=config.seed, shuffle_buffer=buffer, **common
            )
        else:
            images[f"{name}_images"] = LabelledImages(
                rows,
                evaluate=evaluate,
                augment=augment if name == "train" else "none",
                seed=config.seed,
                in_memory=config.data.in_memory,
                **common,
            )
    return images


def plain_training_images(
    splits: ImageSplits, model: SpecRegModel, config: RunConfig, count: int | None
) -> LabelledImages:
    """Return training images without augmentation, the first `count` of a shuffled split."""
    rows = splits.train
    if count is not None and count < len(rows):
        rows = rows.shuffle(seed=config.data.split_seed).take(count)
    return LabelledImages(
        rows,
        input_size=model.input_size,
        evaluate=evaluation_transform(model.input_size, **model.preprocessing),
        in_memory=config.data.in_memory,
        skip_unreadable=config.data.skip_unreadable,
    )


def with_channels_last(images: Tensor) -> Tensor:
    """Return images [..., C, H, W] with the channels of a pixel side by side in memory."""
    return images.movedim(-3, -1).contiguous().movedim(-1, -3)


def build_loaders(
    splits: tuple[Dataset, Dataset, Dataset],
    config: RunConfig,
    processes: int,
    *,
    pin_memory: bool = False,
) -> tuple[list[DataLoader], int]:
    """Return loaders of the train, validation and test images, and the steps of an epoch.

    The workers of the first two stay between epochs: `ending_workers` ends them.

    Args:
        splits: train, validation and test images.
        config: of the run.
        processes: how many train.
        pin_memory: copy batches to page-locked memory, from which a GPU takes them without waiting.

    Raises:
        ValueError: the batch size does not fit the processes, the data, mixup or the adversarial
            images, or a burn-in is as long as the training.
    """
    parts = processes * config.accumulation
    micro_batch = config.batch_size // parts
    if config.batch_size % parts:
        raise ValueError(
            f"batch_size ({config.batch_size}) must be divisible by processes x accumulation "
            f"({processes} x {config.accumulation})"
        )
    if (config.augment.mixup or config.augment.cutmix) and micro_batch % 2:
        raise ValueError(
            f"mixup pairs the images of a micro-batch, so its size ({micro_batch}) must be even: "
            "change batch_size or accumulation"
        )
    if (config.adversarial.images or 0) > micro_batch:
        raise ValueError(
            f"adversarial.images ({config.adversarial.images}) exceeds the images of a micro-batch "
            f"({micro_batch}, by batch_size): set it to {micro_batch} at most"
        )
    train, validation, test = splits
    stream = isinstance(train, IterableDataset)
    if not stream and len(train) < config.batch_size:
        raise ValueError(
            f"batch_size ({config.batch_size}) exceeds the {len(train)} training images"
        )
    shared = {
        "num_workers": config.data.num_workers,
        "collate_fn": collate,
        "worker_init_fn": ignore_sigterm,
        "pin_memory": pin_memory,
    }
    order = {} if stream else {"shuffle": True}
    staying = {"persistent_workers": config.data.num_workers > 0}
    loader = DataLoader(train, micro_batch, drop_last=True, **order, **staying, **shared)
    steps = config.steps_per_epoch or len(loader) // parts
    config.check_burn_ins(steps)
    validation = DataLoader(validation, config.eval_batch_size, **staying, **shared)
    return [loader, validation, DataLoader(test, config.eval_batch_size, **shared)], steps


def run_metadata(splits: ImageSplits, images: dict[str, Any]) -> dict[str, Any]:
    """Return what a trained model says of its data and libraries; name what was left out."""
    skipped = {}
    for name, split in images.items():
        if split.skipped:
            skipped[name] = len(split.skipped)
            logger.warning("left out of %s: %s", name, "; ".join(split.skipped))
    return {
        "data": {
            "source": place(splits.source),
            "fingerprints": splits.fingerprints,
            "unreadable": skipped,
        },
        "versions": {name: version(name) for name in LIBRARIES},
    }
