"""The configuration of a run: frozen dataclasses, every default visible here, checked before any
compute is spent.

A YAML file holds the same keys; the command line overrides them (`--penalty.strength 0.1`). Unknown
keys are errors.
"""

import json
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

# What a run that is resumed may change: it has no part in the weights.
MAY_CHANGE = (
    "output_dir",
    "log_every",
    "log_with",
    "eval_batch_size",
    "checkpoint.",
    "data.num_workers",
)


@dataclass(frozen=True)
class DataConfig:
    """Which images.

    Args:
        source: "digits" (embedded), a local folder, or a Hub id.
        revision: branch, tag or commit on the Hub.
        image_column: default: the one with the Image feature.
        label_column: default: the one with the ClassLabel feature.
        validation_fraction: held out of the training split for each of validation and test that is
            missing.
        split_seed: of those cuts; it is not the run's seed, so that runs of several seeds are
            tested on the same images.
        ignore_splits: splits of the source not to use, such as an unlabelled test split.
        train_samples: use that many of the (once shuffled) training images; the first ones of a
            stream; default: all.
        streaming: read from the Hub while training instead of downloading first.
        in_memory: decode once and keep; default: if it fits into 2 GiB.
        skip_unreadable: leave out images that cannot be read, instead of stopping.
        num_workers: processes that load images; 0: the training process.
    """

    source: str = "digits"
    revision: str | None = None
    image_column: str | None = None
    label_column: str | None = None
    validation_fraction: float = 0.1
    split_seed: int = 0
    ignore_splits: tuple[str, ...] = ()
    train_samples: int | None = None
    streaming: bool = False
    in_memory: bool | None = None
    skip_unreadable: bool = False
    num_workers: int = 0


@dataclass(frozen=True)
class AugmentConfig:
    """How training images are varied.

    Args:
        kind: "none"; "crop_flip", shifts by up to 4 pixels and mirroring; or "timm",
            `timm.data.create_transform`.
        options: of `timm.data.create_transform`, for "timm".
        mixup: alpha of timm's mixup; 0: off.
        cutmix: alpha of timm's cutmix; 0: off.
        label_smoothing: in [0, 1).
    """

    kind: Literal["none", "crop_flip", "timm"] = "none"
    options: dict[str, Any] = field(default_factory=dict)
    mixup: float = 0.0
    cutmix: float = 0.0
    label_smoothing: float = 0.0


@dataclass(frozen=True)
class ModelConfig:
    """Which encoder.

    Args:
        name: of timm ("resnet18", "hf-hub:org/name"); or for transformers a Hub id or folder if
            pretrained, else a model type ("vit"); or of a saved encoder a Hub id or folder.
        library: "timm", "transformers", or "saved" for an encoder that this package saved or
            published: its weights, with a fresh head.
        pretrained: start from published weights.
        input_size: [C, H, W]; default: the model's.
        args: further arguments of `timm.create_model`, or of the transformers configuration if not
            pretrained.
    """

    name: str = "resnet18_cifar"
    library: Literal["timm", "transformers", "saved"] = "timm"
    pretrained: bool = False
    input_size: tuple[int, int, int] | None = None
    args: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class PenaltyConfig:
    """The spectral penalty: strength * sum of sigma^2; see `hf_specreg.SpectralPenalty`.

    Args:
        strength: lambda; 0 trains the baseline.
        scope: "features" (rep-spectral) or "all" (ll-spectral, with the head).
        every: one optimizer step in `every` has the penalty.
        burn_in_epochs: epochs without it at first; may be a fraction. Not together with
            `burn_in_steps`.
        burn_in_steps: optimizer steps without it at first.
        power_iterations: of each use; one is a product with W or W^T, in turn.
        split_qkv: penalise stacked q, k and v each.
        skip: dotted names of modules to leave out.
    """

    strength: float = 1e-2
    scope: Literal["features", "all"] = "features"
    every: int = 1
    burn_in_epochs: float | None = None
    burn_in_steps: int | None = None
    power_iterations: int = 1
    split_qkv: bool = True
    skip: tuple[str, ...] = ()

    def __post_init__(self):
        if self.burn_in_epochs is not None and self.burn_in_steps is not None:
            raise ValueError("give penalty.burn_in_epochs or penalty.burn_in_steps, not both")
        for name in ("burn_in_epochs", "burn_in_steps", "strength"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"penalty.{name} ({getattr(self, name)}) must not be negative")

    def burn_in(self, steps_per_epoch: int) -> int:
        """Return the burn-in in optimizer steps."""
        if self.burn_in_epochs is not None:
            return round(self.burn_in_epochs * steps_per_epoch)
        return self.burn_in_steps or 0


@dataclass(frozen=True)
class OptimizerConfig:
    """timm's optimizer and schedule.

    Args:
        opt: name for `timm.optim.create_optimizer_v2`.
        lr: at the end of the warm-up.
        momentum: or the first beta.
        weight_decay: not on biases and norms.
        clip_grad: largest norm of the gradient, loss and penalty together; default: not clipped.
        sched: name for `timm.scheduler.create_scheduler_v2` ("cosine", "multistep", "step"), or
            "none", a constant rate.
        warmup_epochs: of the learning rate, linear from 0.
        min_lr: at the end of the schedule.
        decay_milestones: epochs, for "multistep".
        decay_rate: for "multistep" and "step".
        decay_epochs: for "step".
        ema_decay: keep an exponential moving average of the weights, evaluate and save it; default:
            off.
    """

    opt: str = "sgd"
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    clip_grad: float | None = None
    sched: str = "cosine"
    warmup_epochs: int = 0
    min_lr: float = 0.0
    decay_milestones: tuple[int, ...] = ()
    decay_rate: float = 0.1
    decay_epochs: int = 30
    ema_decay: float | None = None


@dataclass(frozen=True)
class CheckpointConfig:
    """What is kept.

    Args:
        every_epochs: a checkpoint after so many epochs.
        every_steps: and one after so many optimizer steps; default: none within an epoch.
        keep: so many of the latest; the best by validation accuracy is kept beside them.
    """

    every_epochs: int = 1
    every_steps: int | None = None
    keep: int = 2

    def __post_init__(self):
        if self.keep < 1 or self.every_epochs < 1 or (self.every_steps or 1) < 1:
            raise ValueError("checkpoint.every_epochs, every_steps and keep must be at least 1")


@dataclass(frozen=True)
class RunConfig:
    """A supervised training run.

    Args:
        output_dir: where checkpoints, metrics and the trained model go.
        epochs: over the training split.
        steps_per_epoch: for streams, which do not know their length.
        batch_size: images an optimizer step, over all processes and accumulated micro-batches.
        accumulation: micro-batches an optimizer step.
        eval_batch_size: images a process and batch.
        seed: of weights, data order, augmentation and the penalty's vectors.
        mixed_precision: "no", "bf16" or "fp16"; default: what accelerate is configured to.
        log_every: optimizer steps between log lines.
        log_with: accelerate's trackers, such as "tensorboard"; metrics.jsonl is always written.
        data: the images.
        augment: their variation.
        model: the encoder.
        penalty: the regularizer.
        optimizer: the optimizer and its schedule.
        checkpoint: what is kept.
    """

    output_dir: str = "runs/supervised"
    epochs: int = 10
    steps_per_epoch: int | None = None
    batch_size: int = 128
    accumulation: int = 1
    eval_batch_size: int = 500
    seed: int = 0
    mixed_precision: Literal["no", "bf16", "fp16"] | None = None
    log_every: int = 50
    log_with: tuple[str, ...] = ()
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    penalty: PenaltyConfig = field(default_factory=PenaltyConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)

    def __post_init__(self):
        for name in ("epochs", "batch_size", "accumulation", "eval_batch_size", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} ({getattr(self, name)}) must be at least 1")
        if self.seed < 0:
            raise ValueError(f"seed ({self.seed}) must not be negative")
        if self.optimizer.sched == "plateau":
            raise ValueError("optimizer.sched 'plateau' needs a metric; schedules here go by steps")
        if self.data.streaming and not self.steps_per_epoch:
            raise ValueError(
                "steps_per_epoch is needed for a stream, which does not know its length"
            )
        if self.steps_per_epoch and not self.data.streaming:
            raise ValueError("steps_per_epoch is for streams; other data knows its length")
        if self.data.streaming and self.data.num_workers:
            raise ValueError("a stream is read by one process: data.num_workers must be 0")
        if self.data.streaming and self.augment.kind == "crop_flip":
            raise ValueError(
                "augment.kind 'crop_flip' needs the whole set: use 'timm' for a stream"
            )

    def as_dict(self) -> dict[str, Any]:
        """Return nested dictionaries, for JSON and trackers."""
        return asdict(self)


def changes_of_the_run(before: dict[str, Any], config: RunConfig) -> list[str]:
    """Return the settings that differ from those of a saved run, but for those that may."""
    now = json.loads(json.dumps(config.as_dict()))
    found = differences(before, now)
    return [difference for difference in found if not difference.startswith(MAY_CHANGE)]


def differences(a: dict[str, Any], b: dict[str, Any], prefix: str = "") -> list[str]:
    """Return the dotted keys in which two configurations differ."""
    found = []
    for key in sorted(set(a) | set(b)):
        x, y = a.get(key), b.get(key)
        if isinstance(x, dict) and isinstance(y, dict):
            found += differences(x, y, f"{prefix}{key}.")
        elif (list(x) if isinstance(x, tuple) else x) != (list(y) if isinstance(y, tuple) else y):
            found.append(f"{prefix}{key}: {x!r} and {y!r}")
    return found
