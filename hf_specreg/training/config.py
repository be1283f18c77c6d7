"""The configuration of a run: its parts' settings put together, and what of them does not fit.

Each record stands beside what it sets, with every default visible, and is checked before any
compute is spent. A YAML file holds the same keys; the command line overrides them
(`--penalty.strength 0.1`). Unknown keys are errors.
"""

import math
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from hf_specreg.data.datasets import DataConfig
from hf_specreg.data.transforms import VIEWS, AugmentConfig
from hf_specreg.ranges import require
from hf_specreg.spectral.regularizers import RegularizersConfig
from hf_specreg.spectral.regularizers.rep_spectral import PenaltyConfig
from hf_specreg.spectral.regularizers.term import BURN_INS, RegularizerConfig
from hf_specreg.training.adversarial import AdversarialConfig
from hf_specreg.training.checkpoints import CheckpointConfig
from hf_specreg.training.metrics import TrackerConfig, flat_settings
from hf_specreg.training.model import ModelConfig
from hf_specreg.training.optimizer import OptimizerConfig
from hf_specreg.training.probe import ProbeConfig
from hf_specreg.training.report import ReportConfig
from hf_specreg.training.self_supervision import SelfSupervisedConfig
from hf_specreg.training.transfer import TransferConfig


@dataclass(frozen=True)
class RunConfig:
    """A supervised training run.

    Args:
        output_dir: folder for checkpoints, metrics and the trained model.
        epochs: passes over the training split.
        steps_per_epoch: optimizer steps that are called an epoch of a stream, which does not know
            its length.
        batch_size: images an optimizer step, over all processes and accumulated micro-batches.
        accumulation: micro-batches an optimizer step.
        eval_batch_size: images a process and batch in evaluation.
        eval_every_epochs: epochs between two validations and measures of every sigma; there is one
            after the last.
        seed: decides the weights, data order, augmentation and the penalty's vectors.
        mixed_precision: "no", "bf16" or "fp16"; default: what accelerate is configured to.
        sync_batch_norm: take the statistics of batch norms over all processes.
        deterministic: use only algorithms of which two runs give the same bits, on a GPU too, or
            stop where there is none.
        channels_last: keep the encoder's weights and the images of training in
            torch.channels_last, which can be faster for convolutions. Up to rounding the results
            are the same, but for dropout on maps, which then draws in that order. What is saved is
            contiguous. Not for strided 1x1 convolutions of fewer than 8 channels on CPUs without
            AVX-512, where oneDNN writes outside of its memory (oneDNN's issue 6035).
        compile: have torch compile the encoder's passes in training, once for each size of batch,
            by its default backend, which on a CPU needs a C++ compiler. Up to rounding and the
            random numbers of dropout the results are the same; names in what is saved are. What is
            differentiated twice, evaluations and sigma are computed uncompiled. Not with
            regularizers.spectral_norm.
        log_every: optimizer steps between log lines.
        log_with: accelerate's trackers, such as "tensorboard"; metrics.jsonl is always written.
        tracker: what the trackers are started with.
        data: the images.
        augment: the variation of the images.
        model: the encoder.
        penalty: the spectral penalty.
        regularizers: what the penalty is compared with, or summed with.
        adversarial: adversarial training.
        optimizer: the optimizer and its schedule.
        checkpoint: what is kept.
    """

    output_dir: str = "runs/supervised"
    epochs: int = 10
    steps_per_epoch: int | None = None
    batch_size: int = 128
    accumulation: int = 1
    eval_batch_size: int = 500
    eval_every_epochs: int = 1
    seed: int = 0
    mixed_precision: Literal["no", "bf16", "fp16"] | None = None
    sync_batch_norm: bool = False
    deterministic: bool = False
    channels_last: bool = False
    compile: bool = False
    log_every: int = 50
    log_with: tuple[str, ...] = ()
    tracker: TrackerConfig = field(default_factory=TrackerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    penalty: PenaltyConfig = field(default_factory=PenaltyConfig)
    regularizers: RegularizersConfig = field(default_factory=RegularizersConfig)
    adversarial: AdversarialConfig = field(default_factory=AdversarialConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)

    def __post_init__(self):
        require(self, "at least 1", "epochs", "batch_size", "accumulation", "log_every")
        require(self, "at least 1", "eval_batch_size", "eval_every_epochs", "steps_per_epoch")
        require(self, "not negative", "seed")
        for name, value in flat_settings(self.as_dict()).items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{name} ({value}) must be finite")
        unused = sorted(set(self.tracker.init_kwargs) - set(self.log_with))
        if unused:
            raise ValueError(
                f"tracker.init_kwargs are of {unused}, which log_with {self.log_with} does not name"
            )
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

        if self.optimizer.warmup_epochs > self.epochs:
            raise ValueError(
                f"optimizer.warmup_epochs ({self.optimizer.warmup_epochs}) must be at most the "
                f"{self.epochs} epochs of the training"
            )
        self.check_burn_ins(self.steps_per_epoch)
        if self.compile and self.regularizers.spectral_norm:
            raise ValueError(
                "compile does not take weights that regularizers.spectral_norm computes at each "
                "pass: set one of the two to no"
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

    @property
    def terms(self) -> dict[str, RegularizerConfig]:
        """All that is summed with the loss, by its key."""
        penalty = {"penalty": self.penalty} if self.penalty.strength else {}
        return penalty | {f"regularizers.{n}": t for n, t in self.regularizers.terms().items()}

    def check_burn_ins(self, steps_per_epoch: int | None = None) -> None:
        """Raise ValueError if a term would begin only when the training is over.

        Args:
            steps_per_epoch: optimizer steps; default: not known, so that burn_in_steps may be any.
        """
        steps = f" of {steps_per_epoch} steps" if steps_per_epoch else ""
        for key, term in self.terms.items():
            if not term.begins(self.epochs, steps_per_epoch):
                name = next(n for n in BURN_INS if getattr(term, n) is not None)
                raise ValueError(
                    f"{key}.{name} ({getattr(term, name)}) leaves the term no step of "
                    f"{self.epochs} epochs{steps}: lower it, or set {key}.strength to 0"
                )

    def as_dict(self) -> dict[str, Any]:
        """Return nested dictionaries, for JSON and trackers; without what trackers are started
        with, which may hold keys that are nobody else's.
        """
        settings = asdict(self)
        del settings["tracker"]
        return settings


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
        if named := [name for name, r in self.regularizers.terms().items() if r.of_labels]:
            raise ValueError(f"regularizers {named} need labels: set their strength to 0")
        self.adversarial.check_takes_views()
        if self.data.streaming:
            raise ValueError("the probes read the training images again: data.streaming must be no")
        if all(getattr(self.penalty, name) is None for name in BURN_INS):
            object.__setattr__(self, "penalty", replace(self.penalty, burn_in_fraction=0.9))


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
        idle = [key for key, term in self.terms.items() if term.of_encoder]
        if self.transfer.train == "head" and idle:
            raise ValueError(
                f"transfer.train 'head' leaves the encoder as it is, which is all that {idle} are "
                "of: set their strength to 0"
            )
