"""The configuration of a run: frozen dataclasses, every default visible here, checked before any
compute is spent.

A YAML file holds the same keys; the command line overrides them (`--penalty.strength 0.1`). Unknown
keys are errors.
"""

import json
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from timm.optim import get_optimizer_info

from hf_specreg.data.datasets import DataConfig
from hf_specreg.data.transforms import VIEWS, AugmentConfig
from hf_specreg.training.regularizers import (
    BURN_INS,
    PenaltyConfig,
    RegularizersConfig,
    require,
)

SCHEDULES = ("none", "cosine", "tanh", "poly", "step", "multistep")
# What a run that is resumed may change: it has no part in the weights.
MAY_CHANGE = (
    "output_dir",
    "log_every",
    "log_with",
    "eval_batch_size",
    "checkpoint.",
    "data.num_workers",
    "data.in_memory",
    "ssl.neighbours",
    "ssl.bank",
    "probe.",
    "report.",
)


@dataclass(frozen=True)
class ModelConfig:
    """Which encoder.

    Args:
        name: of timm ("resnet18", "hf-hub:org/name"); or for transformers a Hub id or folder if
            pretrained, else a model type ("vit"); or of a saved encoder a Hub id or folder.
        library: "timm", "transformers", or "saved" for an encoder that this package saved or
            published: its weights, with a fresh head.
        revision: of a Hub id: branch, tag or commit; for timm it is part of the name ("@v1").
        pretrained: start from published weights.
        input_size: [C, H, W]; default: the model's.
        args: further arguments of `timm.create_model`, or of the transformers configuration if not
            pretrained.
    """

    name: str = "resnet18_cifar"
    library: Literal["timm", "transformers", "saved"] = "timm"
    revision: str | None = None
    pretrained: bool = False
    input_size: tuple[int, int, int] | None = None
    args: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class OptimizerConfig:
    """timm's optimizer and schedule.

    Args:
        opt: name for `timm.optim.create_optimizer_v2`.
        lr: at the end of the warm-up.
        encoder_lr: rate of all but the head, as a fraction of `lr`.
        layer_decay: rate of a layer as a fraction of that of the next one; timm networks only;
            default: the same for all.
        momentum: of optimizers that have one, such as sgd.
        betas: of optimizers that have them, such as adamw; default: the optimizer's own.
        weight_decay: not on biases and norms.
        clip_grad: largest norm of the gradient, loss and penalty together; default: not clipped.
        sched: name for `timm.scheduler.create_scheduler_v2` ("cosine", "tanh", "poly", "multistep",
            "step"), or "none", a constant rate after the warm-up.
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
    encoder_lr: float = 1.0
    layer_decay: float | None = None
    momentum: float = 0.9
    betas: tuple[float, float] | None = None
    weight_decay: float = 5e-4
    clip_grad: float | None = None
    sched: str = "cosine"
    warmup_epochs: int = 0
    min_lr: float = 0.0
    decay_milestones: tuple[int, ...] = ()
    decay_rate: float = 0.1
    decay_epochs: int = 30
    ema_decay: float | None = None

    def __post_init__(self):
        require(self, "not negative", "lr", "encoder_lr", "weight_decay", "clip_grad")
        require(self, "in [0, 1]", "layer_decay", "ema_decay")
        if self.sched not in SCHEDULES:
            raise ValueError(
                f"optimizer.sched ({self.sched!r}) must be one of {', '.join(SCHEDULES)}: "
                "schedules go by steps here, without a metric"
            )
        known = get_optimizer_info(self.opt.lower().removeprefix("lookahead_"))
        if self.betas and not known.has_betas:
            raise ValueError(f"optimizer.betas are not for {self.opt}")


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
        sync_batch_norm: take the statistics of batch norms over all processes.
        deterministic: use only algorithms of which two runs give the same bits, on a GPU too, or
            stop where there is none.
        log_every: optimizer steps between log lines.
        log_with: accelerate's trackers, such as "tensorboard"; metrics.jsonl is always written.
        data: the images.
        augment: their variation.
        model: the encoder.
        penalty: the spectral penalty.
        regularizers: what it is compared with, or summed with.
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
    sync_batch_norm: bool = False
    deterministic: bool = False
    log_every: int = 50
    log_with: tuple[str, ...] = ()
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    penalty: PenaltyConfig = field(default_factory=PenaltyConfig)
    regularizers: RegularizersConfig = field(default_factory=RegularizersConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)

    def __post_init__(self):
        for name in ("epochs", "batch_size", "accumulation", "eval_batch_size", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} ({getattr(self, name)}) must be at least 1")
        if self.seed < 0:
            raise ValueError(f"seed ({self.seed}) must not be negative")
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

        bss = self.regularizers.bss
        if bss.strength and bss.k > self.batch_size // self.accumulation:
            raise ValueError(
                f"regularizers.bss.k ({bss.k}) exceeds the images of a micro-batch "
                f"({self.batch_size // self.accumulation})"
            )
        if self.augment.kind in VIEWS and type(self) is RunConfig:
            raise ValueError(
                f"augment.kind {self.augment.kind!r} gives two views: for self-supervision only"
            )

    def as_dict(self) -> dict[str, Any]:
        """Return nested dictionaries, for JSON and trackers."""
        return asdict(self)


@dataclass(frozen=True)
class SelfSupervisedConfig:
    """A self-supervised method; `hf_specreg.training.objectives` has the losses.

    Args:
        method: which.
        projector_hidden: width of the projector, which is thrown away after the training.
        projector_out: width of the embeddings.
        off_diagonal: lambda of Barlow Twins.
        temperature: of SimCLR.
        teacher_momentum: of BYOL's teacher at first; 1 at the end.
        neighbours: images that vote on a class in the online measure of the features.
        bank: training images that the neighbours are drawn from.
    """

    method: Literal["barlow-twins", "simclr", "vicreg", "byol"] = "barlow-twins"
    projector_hidden: int = 256
    projector_out: int = 256
    off_diagonal: float = 5e-3
    temperature: float = 0.07
    teacher_momentum: float = 0.99
    neighbours: int = 20
    bank: int = 5000

    def __post_init__(self):
        require(self, "at least 1", "projector_hidden", "projector_out", "neighbours", "bank")
        require(self, "positive", "temperature")
        require(self, "not negative", "off_diagonal")
        require(self, "in [0, 1]", "teacher_momentum")


@dataclass(frozen=True)
class ProbeConfig:
    """Classifiers on frozen, un-augmented features.

    Args:
        images: of the training split, that they learn from; default: all.
        l2: of the logistic regression: its loss is mean cross-entropy + l2 / 2 ||W||^2.
        epochs: of the linear probe, AdamW with a cosine schedule.
        lr: of the linear probe.
    """

    images: int | None = None
    l2: float = 1e-4
    epochs: int = 50
    lr: float = 1e-2

    def __post_init__(self):
        require(self, "at least 1", "images", "epochs")
        require(self, "positive", "l2", "lr")


@dataclass(frozen=True)
class ReportConfig:
    """The robustness reports that a recipe ends with; see `hf_specreg.evaluate_robustness`.

    Args:
        attacks: from a name to its settings.
        eps: where robust accuracy is stated, in [0, 1] pixels.
        samples: test images, drawn by the run's seed; 0: no report.
    """

    attacks: dict[str, dict[str, Any]] = field(default_factory=lambda: {"tangent": {}})
    eps: tuple[float, ...] = (0.25, 0.5, 1.0)
    samples: int = 0

    def __post_init__(self):
        require(self, "not negative", "samples")


@dataclass(frozen=True)
class SelfSupervisedRunConfig(RunConfig):
    """A self-supervised training run.

    All of `RunConfig`, with the statistics of batch norms taken over all processes, views by
    lightly, and where nothing is said of the burn-in, the penalty in the last tenth of the training
    (Yang et al., arXiv:2405.17181).

    Args:
        ssl: the method.
        probe: the classifiers on the trained features.
        report: their robustness.
    """

    output_dir: str = "runs/ssl"
    sync_batch_norm: bool = True
    augment: AugmentConfig = field(default_factory=lambda: AugmentConfig(kind="simclr"))
    ssl: SelfSupervisedConfig = field(default_factory=SelfSupervisedConfig)
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    report: ReportConfig = field(default_factory=ReportConfig)

    def __post_init__(self):
        super().__post_init__()
        if self.augment.kind not in VIEWS:
            raise ValueError(
                f"augment.kind ({self.augment.kind!r}) must give two views: one of {VIEWS}"
            )
        if self.augment.mixup or self.augment.cutmix or self.augment.label_smoothing:
            raise ValueError("mixup, cutmix and label_smoothing need labels: set them to 0")
        if self.data.streaming:
            raise ValueError("the probes read the training images again: data.streaming must be no")
        if all(getattr(self.penalty, name) is None for name in BURN_INS):
            object.__setattr__(self, "penalty", replace(self.penalty, burn_in_fraction=0.9))


@dataclass(frozen=True)
class TransferConfig:
    """What of a pretrained encoder is trained on new data.

    Args:
        train: "head", a linear probe; "all"; or "lora", low-rank updates of the linear layers
            (extra `lora`).
        head: it starts "fresh", or as the logistic "probe" on the frozen features, which distorts
            them less (Kumar et al., ICLR 2022).
        frozen_stages: of "all": the first so many stages are kept as they are.
        keep_batch_norm: batch norms keep the statistics that they were pretrained with.
        lora_rank: of "lora".
        lora_targets: of "lora": the names of linear layers, or their endings; default: all before
            the features.
    """

    train: Literal["head", "all", "lora"] = "all"
    head: Literal["fresh", "probe"] = "fresh"
    frozen_stages: int = 0
    keep_batch_norm: bool = False
    lora_rank: int = 8
    lora_targets: tuple[str, ...] = ()

    def __post_init__(self):
        require(self, "not negative", "frozen_stages")
        require(self, "at least 1", "lora_rank")


@dataclass(frozen=True)
class TransferRunConfig(RunConfig):
    """A transfer to other data: all of `RunConfig`, and what is transferred.

    Args:
        transfer: what is trained.
        probe: the classifier on the frozen features, before.
        report: robustness before, of the probe, and after.
    """

    output_dir: str = "runs/transfer"
    model: ModelConfig = field(default_factory=lambda: ModelConfig("runs/model", "saved"))
    transfer: TransferConfig = field(default_factory=TransferConfig)
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    report: ReportConfig = field(default_factory=lambda: ReportConfig(samples=100))

    def __post_init__(self):
        super().__post_init__()
        if self.data.streaming:
            raise ValueError("the probe reads the training images again: data.streaming must be no")
        if self.model.library != "saved" and not self.model.pretrained:
            raise ValueError(
                f"model.name ({self.model.name!r}) has random weights, so there is nothing to "
                "transfer: set model.library to saved, or model.pretrained"
            )
        if self.transfer.train != "all" and self.transfer.frozen_stages:
            raise ValueError("transfer.frozen_stages is for transfer.train 'all'")
        whole = self.transfer == replace(self.transfer, train="all", head="fresh", frozen_stages=0)
        if self.regularizers.spectral_norm and not whole:
            raise ValueError(
                "regularizers.spectral_norm changes all weights before the features, so it is for "
                "transfer.train 'all' with a fresh head and no frozen stages"
            )
        if self.transfer.train == "lora" and self.regularizers.l2_sp.strength:
            raise ValueError(
                "regularizers.l2_sp keeps trained weights near where they began, and LoRA's begin "
                "at 0: use optimizer.weight_decay"
            )


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
