"""Saved models in the formats of timm and transformers, so that each library alone loads them.

timm           config.json, model.safetensors
transformers   config.json, model.safetensors, preprocessor_config.json
"""

import contextlib
import json
import logging
import math
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

import hf_specreg.encoders.norm_layers
import hf_specreg.encoders.small  # noqa: F401  both register with timm
from hf_specreg.connection import from_hub, is_missing
from hf_specreg.encoders.blueprint import FolderError, read_json
from hf_specreg.encoders.head import find_head
from hf_specreg.encoders.labels import (
    class_entries,
    timm_labels,
    transformers_labels,
    wrapper_entries,
)
from hf_specreg.encoders.processor import RESAMPLING, processor_data

logger = logging.getLogger(__name__)

# How transformers loads them: in float32 as images are, whatever they were saved in.
_WEIGHTS = {"use_safetensors": True, "output_loading_info": True, "dtype": torch.float32}


def renew_head(network: nn.Module) -> None:
    """Draw the head's weights anew."""
    for name in find_head(network):
        for module in network.get_submodule(name).modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON object, readable.

    Raises:
        ValueError: a number is NaN or infinite, which JSON has not.
    """
    try:
        text = json.dumps(content, indent=2, allow_nan=False)
    except ValueError as error:
        raise ValueError(f"{path} cannot be written: {error}") from error
    path.write_text(text + "\n")


def save_timm(
    network: nn.Module,
    folder: Path,
    *,
    model_args: dict[str, Any],
    label_names: Sequence[str] | None,
    data: dict[str, Any],
) -> None:
    """Write a timm model as `timm.create_model("local-dir:...")` and AutoModel load it.

    Args:
        network: made by `timm.create_model`.
        folder: an existing folder.
        model_args: what `timm.create_model` was given.
        label_names: of the classes.
        data: input_size, mean, std, crop_pct, crop_mode and interpolation.
    """
    timm.models.save_for_hf(network, folder, model_args=model_args, safe_serialization=True)
    config = read_json(folder / "config.json")
    config["model_args"] = _but_for_classes(config)  # TimmWrapper would be given them twice
    config["pretrained_cfg"] |= {**data, "num_classes": network.num_classes}
    for entry in ("test_input_size", "label_names"):
        config["pretrained_cfg"].pop(entry, None)
    if label_names:
        config |= wrapper_entries(config["num_classes"], list(label_names))
        config["pretrained_cfg"]["label_names"] = list(label_names)
    write_json(folder / "config.json", config)


def make_timm(name: str, *, pretrained: bool, **arguments: Any) -> nn.Module:
    """Make a network of timm's, with published weights or random ones.

    Raises:
        FileNotFoundError: no such repository.
        HubError: the Hub cannot be reached or refuses.
    """
    make = partial(timm.create_model, name, pretrained=pretrained, **arguments)
    return from_hub(name, make) if pretrained else make()


def load_timm(
    folder: Path,
    config: dict[str, Any],
    *,
    num_classes: int | None,
    label_names: Sequence[str] | None,
) -> tuple[nn.Module, Sequence[str] | None, dict[str, Any]]:
    """Load a timm folder.

    Args:
        folder: a local one.
        config: what its config.json holds.
        num_classes: as for `SpecRegModel.from_pretrained`.
        label_names: of the classes; default: those of the folder.

    Returns:
        The network, its label names, and the further arguments of `SpecRegModel`.
    """
    # With its own head, for timm loads others loosely.
    network = timm.create_model(f"local-dir:{folder}", pretrained=True)
    if num_classes is not None:
        network.reset_classifier(num_classes)
    elif label_names is None:
        label_names = timm_labels(config)
        if label_names is not None and len(label_names) != network.num_classes:
            logger.warning(
                "%s: config.json has %d label_names for a head of %d classes, as transformers "
                "leaves them when it fine-tunes: they are left out; give your own as label_names",
                *(folder, len(label_names), network.num_classes),
            )
            label_names = None
    cfg = config["pretrained_cfg"]
    kept = ("crop_pct", "crop_mode", "interpolation")
    data = {
        "input_size": tuple(cfg["input_size"]),
        "pixel_mean": cfg["mean"],
        "pixel_std": cfg["std"],
        "preprocessing": {key: cfg[key] for key in kept if key in cfg},
        "model_args": _but_for_classes(config),  # a fresh head has others
    }
    return network, label_names, data


def _but_for_classes(config: dict[str, Any]) -> dict[str, Any]:
    """The `model_args` of a timm folder without num_classes, which stands beside them."""
    arguments = config.get("model_args") or {}
    return {k: v for k, v in arguments.items() if k != "num_classes"}


def draw_timm(config: dict[str, Any]) -> nn.Module:
    """Make the network that a timm folder's config.json describes, with random weights."""
    head = {"num_classes": config["num_classes"]} if "num_classes" in config else {}
    return timm.create_model(
        config["architecture"],
        **{**(config.get("model_args") or {}), **head},
        pretrained_cfg=config["pretrained_cfg"],
    )


def draw_transformers(config: dict[str, Any]) -> nn.Module:
    """Make the network that a transformers config.json describes, with random weights."""
    from transformers import AutoConfig, AutoModel, AutoModelForImageClassification

    described = AutoConfig.for_model(**config)
    headed = any("ForImageClassification" in a for a in described.architectures or [])
    described.architectures = described.architectures or []
    return (AutoModelForImageClassification if headed else AutoModel).from_config(described)


def load_transformers(
    name_or_config: Any,
    *,
    num_classes: int | None,
    label_names: Sequence[str] | None,
    revision: str | None,
    token: str | None,
) -> tuple[nn.Module, Sequence[str] | None, dict[str, Any]]:
    """Load a transformers model, or create one with random weights from a configuration.

    Args:
        name_or_config: a Hub id or a folder, or a `PretrainedConfig`.
        num_classes: as for `SpecRegModel.from_transformers`.
        label_names: of the classes.
        revision: on the Hub.
        token: for private repositories.

    Returns:
        The network, its label names, and what its image processor does, see `processor_data`.

    Raises:
        FileNotFoundError: neither a folder nor a repository, or no such revision.
        FolderError: it lacks weights or the image processor.
        HubError: the Hub cannot be reached or refuses.
    """
    from transformers import PretrainedConfig

    if isinstance(name_or_config, PretrainedConfig):
        network = _create_transformers(name_or_config, num_classes, label_names)
        return network, label_names if num_classes != 0 else None, {}
    head = {"num_classes": num_classes, "label_names": label_names}
    load = partial(_load_saved, name_or_config, **head, revision=revision, token=token)
    return load() if Path(name_or_config).is_dir() else from_hub(name_or_config, load)


def _load_saved(
    name: str,
    *,
    num_classes: int | None,
    label_names: Sequence[str] | None,
    **where: str | None,
) -> tuple[nn.Module, Sequence[str] | None, dict[str, Any]]:
    """Load a transformers model of a folder or the Hub; see `load_transformers`."""
    from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification

    where = {**where, "trust_remote_code": False}
    config = AutoConfig.from_pretrained(name, **where)
    bare = not any("ForImageClassification" in a for a in config.architectures or [])
    if num_classes == 0 or (num_classes is None and bare):
        network, label_names = _load_headless(name, config, **where), None
    else:
        fresh = {}
        if num_classes:
            fresh = {**class_entries(num_classes, label_names), "ignore_mismatched_sizes": True}
        with _lacking(f"{name} has no safetensors weights, and others are not read"):
            network, info = AutoModelForImageClassification.from_pretrained(
                name, **_WEIGHTS, **fresh, **where
            )
        _check_is_complete(info, name, find_head(network) if fresh else ())
        if fresh:
            renew_head(network)
        else:
            label_names = label_names or transformers_labels(config)
    with _lacking(
        f"{name} has no image processor (preprocessor_config.json), so its pixel normalisation is "
        "not known: save the processor beside the model, with Trainer as processing_class"
    ):
        processor = AutoImageProcessor.from_pretrained(name, **where)
    return network, label_names, processor_data(processor, name)


@contextlib.contextmanager
def _lacking(said: str) -> Iterator[None]:
    """Turn transformers' error for a file that is not there into one that says what is."""
    try:
        yield
    except OSError as error:
        if not is_missing(error):
            raise
        raise FolderError(said) from error


def _create_transformers(
    config: Any, num_classes: int | None, label_names: Sequence[str] | None
) -> nn.Module:
    """A network of a `PretrainedConfig` with random weights."""
    from transformers import AutoModel, AutoModelForImageClassification

    config.architectures = config.architectures or []  # from_config iterates over them
    config.update(_all_patches(config))
    if num_classes == 0:
        config.update(class_entries(0, None))
        network = _headless_class(config).from_config(config, dtype=torch.float32)
        if find_head(network):  # it has no place for none
            network = AutoModel.from_config(config, dtype=torch.float32)
        return network
    if num_classes:
        config.update(class_entries(num_classes, label_names))
    return AutoModelForImageClassification.from_config(config, dtype=torch.float32)


def save_transformers(
    network: nn.Module,
    folder: Path,
    *,
    label_names: Sequence[str] | None,
    data: dict[str, Any],
) -> None:
    """Write a transformers model and its image processor; arguments as for `save_timm`."""
    from transformers import BitImageProcessor, DeiTImageProcessor

    if label_names:
        network.config.update(class_entries(len(label_names), label_names))
    network.save_pretrained(folder)
    _, height, width = data["input_size"]
    # As timm's evaluation transform: resize, then cut the middle.
    resized = [math.floor(edge / data["crop_pct"] + 1e-6) for edge in (height, width)]
    if data["crop_mode"] == "squash":
        maker, size = DeiTImageProcessor, dict(zip(("height", "width"), resized, strict=True))
    else:
        maker, size = BitImageProcessor, {"shortest_edge": min(resized)}
    processor = maker(
        size=size,
        crop_size={"height": height, "width": width},
        do_center_crop=True,
        do_convert_rgb=data["input_size"][0] == 3,
        image_mean=list(data["mean"]),
        image_std=list(data["std"]),
        resample=RESAMPLING[data["interpolation"]],
    )
    processor.save_pretrained(folder)


def _headless_class(config: Any) -> Any:
    """The class whose output is what a head would be fed: an image classifier of no classes.

    A base model may put a pooler of its own there, or leave half of the features out. It serves
    where there is no image classifier.
    """
    from transformers import (
        MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
        AutoModel,
        AutoModelForImageClassification,
    )

    known = type(config) in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING
    return AutoModelForImageClassification if known else AutoModel


def _load_headless(name: Any, config: Any, **where: Any) -> nn.Module:
    """Load a transformers model without a head, nor a pooler that was saved without weights."""
    from transformers import AutoModel

    where = {**where, **_WEIGHTS, **_all_patches(config)}
    labels = class_entries(0, None)
    network, info = _headless_class(config).from_pretrained(name, **labels, **where)
    if find_head(network):
        network, info = AutoModel.from_pretrained(name, **where)
    if any(key.startswith("pooler.") for key in info["missing_keys"]):
        network, info = AutoModel.from_pretrained(name, add_pooling_layer=False, **where)
    _check_is_complete(info, name, ())
    return network


def _all_patches(config: Any) -> dict[str, float]:
    """The entry that keeps a masked autoencoder from masking patches: it does so in evaluation as
    well, other ones at each call.
    """
    return {"mask_ratio": 0.0} if hasattr(config, "mask_ratio") else {}


def _check_is_complete(info: dict[str, Any], name: Any, fresh: Sequence[str]) -> None:
    """Refuse what transformers only warns of: weights that are not in the file are random."""
    lost = [*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])]
    lost = sorted(k for k in lost if not any(k.startswith(f"{head}.") for head in fresh))
    if lost:
        raise FolderError(
            f"{name}: {len(lost)} weights of the network are not in the file, or have another "
            f"shape: {', '.join(lost[:3])}"
        )
