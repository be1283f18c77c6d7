"""From a configuration to what it names: model, images, loaders, penalty, optimizer."""

import ctypes
import logging
import os
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import DistributedType
from timm.optim import create_optimizer_v2, param_groups_layer_decay
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset, IterableDataset
from transformers import AutoConfig

from hf_specreg.data.datasets import ImageSplits, place
from hf_specreg.data.images import LabelledImages, StreamedImages, collate
from hf_specreg.data.transforms import (
    VIEWS,
    derived_seed,
    evaluation_transform,
    training_transform,
    two_view_transform,
)
from hf_specreg.encoders.model import SpecRegModel
from hf_specreg.spectral.penalty import SpectralPenalty
from hf_specreg.training.config import ModelConfig, OptimizerConfig, RunConfig
from hf_specreg.training.distributed import averages_gradients
from hf_specreg.training.interruption import ignore_sigterm
from hf_specreg.training.metrics import installed_trackers
from hf_specreg.training.objectives import Objective
from hf_specreg.training.regularizers import normalize_spectra

logger = logging.getLogger(__name__)
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h
MALLOC_SETTINGS = ("TRIM_THRESHOLD", "TOP_PAD", "MMAP_THRESHOLD", "MMAP_MAX")
LIBRARIES = ("torch", "timm", "transformers", "datasets", "accelerate", "hf-specreg")


def build_encoder(config: RunConfig, label_names: Sequence[str]) -> SpecRegModel:
    """Create what the run trains: the model, in float32 whatever its weights are stored in, and
    under spectral normalisation if that is wanted.
    """
    encoder = build_model(config.model, label_names).float()
    if config.regularizers.spectral_norm:
        normalize_spectra(encoder)
    return encoder


def build_model(config: ModelConfig, label_names: Sequence[str]) -> SpecRegModel:
    """Create the model with a head for these classes; without one where there are none."""
    head = {"num_classes": len(label_names), "label_names": label_names or None}
    if config.library == "saved":
        if config.args or config.input_size:
            raise ValueError("model.args and model.input_size are not for a saved encoder")
        return SpecRegModel.from_pretrained(config.name, revision=config.revision, **head)
    shared = {**head, "input_size": config.input_size}
    if config.library == "timm":
        return SpecRegModel.from_timm(
            config.name, pretrained=config.pretrained, **shared, **config.args
        )
    if config.pretrained:
        if config.args:
            raise ValueError("model.args are for transformers models that are not pretrained")
        return SpecRegModel.from_transformers(config.name, revision=config.revision, **shared)
    return SpecRegModel.from_transformers(
        AutoConfig.for_model(config.name, **config.args), **shared
    )


def build_accelerator(config: RunConfig) -> Accelerator:
    """Return accelerate's state of the run: devices, processes, precision, trackers. On the CPU,
    this process keeps from then on what memory it frees.

    Raises:
        ValueError: it was launched in a way that the training loop cannot work in.
    """
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        gradient_accumulation_steps=config.accumulation,
        dataloader_config=DataLoaderConfiguration(
            use_seedable_sampler=True, data_seed=derived_seed(config.seed)
        ),
        log_with=installed_trackers(config.log_with),
        project_dir=config.output_dir,
    )
    check_processes(accelerator, launched=int(os.environ.get("WORLD_SIZE", "1")))
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    return accelerator


def keep_freed_memory() -> None:
    """Have glibc keep for the next step what this one frees, in all of this process.

    By default it gives the activations of a step back to the system as soon as the top of the heap
    is free, to fault them in again, page by page, in the next: a tenth of a small network's step.
    The price is that the process stays as large as it ever was. Does nothing with another C
    library, or where the environment sets such a threshold of malloc already.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    said = any(f"MALLOC_{name}_" in os.environ for name in MALLOC_SETTINGS)
    said |= "glibc.malloc." in os.environ.get("GLIBC_TUNABLES", "")
    if mallopt is not None and not said and mallopt(M_MMAP_MAX, 0):  # all from the heap,
        mallopt(M_TRIM_THRESHOLD, -1)  # which never shrinks


def check_processes(accelerator: Accelerator, *, launched: int) -> None:
    """Raise ValueError, with what can be done instead, if the processes are not one training with
    whole weights.
    """
    kind = accelerator.distributed_type
    if kind != DistributedType.NO and not averages_gradients(accelerator):
        raise ValueError(
            f"the recipes train with DistributedDataParallel, not with {kind.value}: launch them "
            "with --multi_gpu (distributed_type: MULTI_GPU). For FSDP2 add SpectralPenalty to a "
            "loop of your own, before fully_shard, or use SpecRegTrainer"
        )
    if accelerator.num_processes < launched:
        raise ValueError(
            f"{launched} processes were launched, but each takes itself for the only one and would "
            "train the same: on CPUs set ACCELERATE_USE_CPU=true and launch with --multi_gpu, or "
            "with torchrun"
        )


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


def build_loaders(
    splits: tuple[Dataset, Dataset, Dataset], config: RunConfig, processes: int
) -> tuple[list[DataLoader], int]:
    """Return loaders of the train, validation and test images, and the steps of an epoch.

    Raises:
        ValueError: the batch size does not fit the processes, the data or mixup.
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
    train, *held_out = splits
    stream = isinstance(train, IterableDataset)
    if not stream and len(train) < config.batch_size:
        raise ValueError(
            f"batch_size ({config.batch_size}) exceeds the {len(train)} training images"
        )
    shared = {
        "num_workers": config.data.num_workers,
        "collate_fn": collate,
        "worker_init_fn": ignore_sigterm,
    }
    order = {} if stream else {"shuffle": True}
    loader = DataLoader(train, micro_batch, drop_last=True, **order, **shared)
    steps = config.steps_per_epoch or len(loader) // parts
    return [loader, *(DataLoader(i, config.eval_batch_size, **shared) for i in held_out)], steps


def build_penalty(
    model: SpecRegModel, config: RunConfig, steps_per_epoch: int, *, shared: bool = False
) -> SpectralPenalty:
    """Return the penalty; with strength 0 it only measures."""
    settings = config.penalty
    return SpectralPenalty(
        model,
        strength=settings.strength,
        scope=settings.scope,
        every=settings.every,
        burn_in=settings.burn_in(steps_per_epoch, config.epochs),
        renew_every=settings.renew_every,
        lanczos_steps=settings.lanczos_steps,
        split_qkv=settings.split_qkv,
        fold_norm=settings.fold_norm,
        skip=settings.skip,
        input_size=model.input_size,
        shared=shared,
        seed=config.seed,
    )


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


def build_optimizer(objective: Objective, config: OptimizerConfig) -> Optimizer:
    """Return timm's optimizer, with no weight decay on biases, norms and what else the network
    names. A group's `lr_scale` is applied by the scheduler.

    Raises:
        ValueError: layer_decay for a network that is not timm's.
    """
    fractions = _rate_fractions(objective.encoder, config)
    network = objective.encoder.network
    named = network.no_weight_decay() if hasattr(network, "no_weight_decay") else ()
    exempt = {id(p) for name, p in network.named_parameters() if name in named}
    groups: dict[tuple[float, float], list] = {}
    for name, parameter in objective.named_parameters():
        if parameter.requires_grad:
            plain = parameter.ndim <= 1 or name.endswith(".bias") or id(parameter) in exempt
            key = fractions.get(id(parameter), 1.0), 0.0 if plain else config.weight_decay
            groups.setdefault(key, []).append(parameter)
    return create_optimizer_v2(
        [
            {"params": parameters, "lr_scale": fraction, "weight_decay": decay}
            for (fraction, decay), parameters in groups.items()
        ],
        opt=config.opt,
        lr=config.lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        **({"betas": config.betas} if config.betas else {}),
    )


def _rate_fractions(encoder: SpecRegModel, config: OptimizerConfig) -> dict[int, float]:
    """The learning rate of the encoder's parameters, but for the head's, as a fraction, by id."""
    network, fractions = encoder.network, {}
    if config.layer_decay is not None:
        if not hasattr(network, "group_matcher"):
            raise ValueError(
                f"optimizer.layer_decay needs a timm network that says its layers' order, which "
                f"{type(network).__name__} does not: use optimizer.encoder_lr"
            )
        for group in param_groups_layer_decay(network, layer_decay=config.layer_decay):
            fractions |= {id(p): group["lr_scale"] for p in group["params"]}
    return {
        id(p): config.encoder_lr * fractions.get(id(p), 1.0)
        for name, p in network.named_parameters()
        if not encoder.of_head(name)
    }


def build_scheduler(optimizer: Optimizer, config: RunConfig, steps_per_epoch: int) -> Scheduler:
    """Return timm's schedule by optimizer steps, at step 0; it applies each group's `lr_scale`."""
    settings = config.optimizer
    constant = settings.sched == "none"
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched="step" if constant else settings.sched,
        num_epochs=config.epochs,
        warmup_epochs=settings.warmup_epochs,
        warmup_lr=0.0,
        min_lr=settings.min_lr,
        decay_milestones=list(settings.decay_milestones),
        decay_rate=1.0 if constant else settings.decay_rate,
        decay_epochs=settings.decay_epochs,
        step_on_epochs=False,
        updates_per_epoch=steps_per_epoch,
    )
    scheduler.step_update(0)
    return scheduler


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
