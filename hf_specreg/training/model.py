"""The model that a run trains, and its settings."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import timm
import torch
from transformers import CONFIG_MAPPING, AutoConfig

from hf_specreg.encoders.fused import fuse_norms
from hf_specreg.encoders.load import near_names
from hf_specreg.encoders.model import SpecRegModel
from hf_specreg.encoders.pinned import initialize_pinned, pin_norms
from hf_specreg.spectral.regularizers import RegularizersConfig
from hf_specreg.spectral.regularizers.spectral_norm import normalize_spectra


@dataclass(frozen=True)
class ModelConfig:
    """Which encoder.

    Args:
        name: the model: of timm ("resnet18", "hf-hub:org/name"); or for transformers a Hub id or
            folder if pretrained, else a model type ("vit"); or of a saved encoder a Hub id or
            folder.
        library: where the name is from: "timm", "transformers", or "saved" for an encoder that this
            package saved or published: its weights, with a fresh head.
        revision: branch, tag or commit of a Hub id; for timm it is part of the name ("@v1").
        pretrained: start from published weights.
        input_size: channels, height and width of the images, [C, H, W]; default: the model's.
        args: further arguments of `timm.create_model`, or of the transformers configuration if not
            pretrained.
        norms: what becomes of batch norms: "unchanged"; "pinned", constant in training as in
            evaluation, of pretrained and saved encoders with their own statistics, of fresh ones
            with mean 0 and variance 1 and Fixup's start; or "fused" into the linear maps before
            them, and pinned, of encoders that are not fresh.
    """

    name: str = "resnet18_cifar"
    library: Literal["timm", "transformers", "saved"] = "timm"
    revision: str | None = None
    pretrained: bool = False
    input_size: tuple[int, int, int] | None = None
    args: dict[str, Any] = field(default_factory=dict)
    norms: Literal["unchanged", "pinned", "fused"] = "unchanged"

    def __post_init__(self):
        if self.norms == "fused" and not self.has_weights:
            raise ValueError(
                "model.norms 'fused' is for pretrained and saved encoders: a fresh one has nothing "
                "to fuse, take 'pinned'"
            )

    @property
    def has_weights(self) -> bool:
        """Whether it starts from weights of a training."""
        return self.pretrained or self.library == "saved"


def build_model(config: ModelConfig, label_names: Sequence[str]) -> SpecRegModel:
    """Create the model with a head for these classes; without one where there are none."""
    head = {"num_classes": len(label_names), "label_names": label_names or None}
    if config.library == "saved":
        if config.args:
            raise ValueError("model.args are not for a saved encoder")
        return SpecRegModel.from_pretrained(
            config.name, revision=config.revision, input_size=config.input_size, **head
        )
    shared = {**head, "input_size": config.input_size}
    if config.library == "timm":
        if ":" not in config.name and not timm.is_model(config.name):
            raise _unknown(config.name, timm.list_models(), "timm")
        return SpecRegModel.from_timm(
            config.name, pretrained=config.pretrained, **shared, **config.args
        )
    if config.pretrained:
        if config.args:
            raise ValueError("model.args are for transformers models that are not pretrained")
        return SpecRegModel.from_transformers(config.name, revision=config.revision, **shared)
    if config.name not in CONFIG_MAPPING:
        raise _unknown(config.name, CONFIG_MAPPING.keys(), "transformers")
    return SpecRegModel.from_transformers(
        AutoConfig.for_model(config.name, **config.args), **shared
    )


def _unknown(name: str, known: Collection[str], library: str) -> ValueError:
    """The error for a model that a library does not have, with near names."""
    return ValueError(f"model.name ({name!r}) is no model of {library}{near_names(name, known)}")


def build_encoder(
    config: ModelConfig, label_names: Sequence[str], regularizers: RegularizersConfig
) -> SpecRegModel:
    """Create what a run trains: the model, in float32 whatever its weights are stored in, with its
    batch norms as is wanted, and under spectral normalisation if that is.
    """
    encoder = build_model(config, label_names).float()
    if config.norms == "fused":
        fuse_norms(encoder)
    elif config.norms == "pinned":
        pin_norms(encoder) if config.has_weights else initialize_pinned(encoder)
    if regularizers.spectral_norm:
        normalize_spectra(encoder)
    return encoder


def prepare_for_training(
    model: SpecRegModel, *, channels_last: bool = False, compiled: bool = False
) -> None:
    """Freeze what has no part in the output; change the layout and compile if that is wanted.

    Args:
        model: on its device; changed in place, its parameters' names and values are not.
        channels_last: put kernels in torch.channels_last.
        compiled: have torch compile its call, for each shape anew, so that a run that is resumed
            computes as the uninterrupted one.
    """
    freeze_unused(model)
    if channels_last:
        model.to(memory_format=torch.channels_last)
    if compiled:
        model.compile(dynamic=False)


def freeze_unused(model: SpecRegModel) -> None:
    """Freeze parameters that the output does not depend on, such as mask tokens.

    They would get no gradient, and DistributedDataParallel waits for all of them.
    """
    model.eval()
    images = torch.zeros(2, *model.input_size, device=model.pixel_mean.device)
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise ValueError("every parameter of the model is frozen: there is nothing to train")
    gradients = torch.autograd.grad(model(images).sum(), parameters, allow_unused=True)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        if gradient is None:
            parameter.requires_grad_(False)
