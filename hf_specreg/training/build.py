"""From a configuration to what it names: the model and the images of each split."""

from importlib.metadata import version
from typing import Any

from transformers import AutoConfig

from hf_specreg.data.datasets import DataError, ImageSplits, load_splits
from hf_specreg.data.images import LabelledImages, StreamedImages
from hf_specreg.data.transforms import evaluation_transform, training_transform
from hf_specreg.encoders.model import SpecRegModel
from hf_specreg.training.config import DataConfig, ModelConfig, RunConfig

LIBRARIES = ("torch", "timm", "transformers", "datasets", "accelerate", "hf-specreg")


def build_splits(config: DataConfig, *, seed: int) -> ImageSplits:
    """Load the splits, the training split cut down to `train_samples`."""
    splits = load_splits(
        config.source,
        revision=config.revision,
        image_column=config.image_column,
        label_column=config.label_column,
        validation_fraction=config.validation_fraction,
        seed=seed,
        streaming=config.streaming,
    )
    if config.train_samples is None:
        return splits
    if not config.streaming and config.train_samples > len(splits.train):
        raise DataError(
            f"data.train_samples ({config.train_samples}) exceeds the {len(splits.train)} training images"
        )
    train = splits.train.shuffle(seed=seed).take(config.train_samples)
    return ImageSplits(**{**vars(splits), "train": train})


def build_model(config: ModelConfig, label_names: list[str]) -> SpecRegModel:
    """Create the model with a head for these classes."""
    shared = {"num_classes": len(label_names), "label_names": label_names, "input_size": config.input_size}
    if config.library == "timm":
        return SpecRegModel.from_timm(config.name, pretrained=config.pretrained, **shared, **config.args)
    if config.pretrained:
        if config.args:
            raise ValueError("model.args are for transformers models that are not pretrained")
        return SpecRegModel.from_transformers(config.name, **shared)
    return SpecRegModel.from_transformers(AutoConfig.for_model(config.name, **config.args), **shared)


def build_images(splits: ImageSplits, model: SpecRegModel, config: RunConfig) -> dict[str, Any]:
    """Return train_images, validation_images and test_images, as the model takes them."""
    evaluate = evaluation_transform(model.input_size, **model.preprocessing)
    augment = config.augment.kind
    if augment == "timm":
        interpolation = model.preprocessing["interpolation"]
        augment = training_transform(model.input_size, interpolation=interpolation, **config.augment.options)
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


def run_metadata(splits: ImageSplits) -> dict[str, Any]:
    """Return what a trained model says of its data and libraries."""
    return {
        "data": {"source": splits.source, "fingerprints": splits.fingerprints},
        "versions": {name: version(name) for name in LIBRARIES},
    }
