"""Where a run stands, and its way to a checkpoint and back: weights and their average, optimizer,
the penalty's warm vectors, the counts; and the model that it gives.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from rich.console import Console
from safetensors.torch import load_file, save_file
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import nn
from torch.optim import Optimizer

from hf_specreg.data.datasets import place
from hf_specreg.encoders.model import SpecRegModel
from hf_specreg.spectral.penalty import SpectralPenalty
from hf_specreg.training.checkpoints import (
    CheckpointError,
    latest_checkpoint,
    naming_the_last_good,
    read_progress,
    replace_folder,
    save_checkpoint,
)
from hf_specreg.training.config import RunConfig
from hf_specreg.training.metrics import DivergedError, MetricsFile
from hf_specreg.training.objectives import Objective
from hf_specreg.training.sharded import FILE, Shards


def recorded_settings(config: RunConfig) -> dict[str, Any]:
    """Return a run's settings as `specreg.json` has them, where a folder is written as one."""
    settings = config.as_dict()
    settings["data"]["source"] = place(config.data.source)
    settings["model"]["name"] = place(config.model.name)
    return settings


@dataclass
class RunState:
    """Where a run stands.

    Args:
        config: of the run.
        accelerator: of the run; holds the weights and the optimizer.
        console: to say on what has changed since a checkpoint.
        objective: with the encoder and what else is trained, not wrapped; where weights are
            sharded the copy that they are collected in.
        penalty: with its vectors.
        optimizer: prepared.
        scheduler: of its rates, by optimizer steps.
        ema: the encoder's averaged weights, if any.
        metadata: what `specreg.json` shall say.
        start_sha256: of the encoder's first weights, where the run keeps near them.
        shards: the weights that are trained, where they are sharded.

    Attributes:
        step: optimizer steps done.
        best_accuracy: of all evaluations so far; -1 before the first.
        metrics: of the last evaluation.
    """

    config: RunConfig
    accelerator: Accelerator
    console: Console
    objective: Objective
    penalty: SpectralPenalty
    optimizer: Optimizer
    scheduler: Scheduler
    ema: ModelEmaV3 | None
    metadata: dict[str, Any]
    start_sha256: str | None = None
    shards: Shards | None = None
    step: int = 0
    best_accuracy: float = -1.0
    metrics: dict[str, float] = field(default_factory=dict)

    @property
    def output(self) -> Path:
        """The run's folder."""
        return Path(self.config.output_dir)

    @property
    def model(self) -> SpecRegModel:
        """The encoder with its averaged weights, if any."""
        return self.ema.module if self.ema else self.objective.encoder

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Put the averaged weights, if any, where those that are trained are, which the penalty
        measures; and back afterwards.
        """
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def _exchange(self) -> None:
        if self.ema is None:
            return
        ours, averaged = self.objective.encoder, self.ema.module
        for of in (nn.Module.parameters, nn.Module.buffers):
            for own, other in zip(of(ours), of(averaged), strict=True):
                own.data, other.data = other.data, own.data

    @cached_property
    def metrics_file(self) -> MetricsFile:
        """What was measured, line by line."""
        return MetricsFile(self.output / "metrics.jsonl")

    @property
    def conditions(self) -> dict[str, Any]:
        """What is in effect besides the configuration, and has a part in the bits."""
        return {
            "mixed_precision": self.accelerator.mixed_precision,
            "device": self.accelerator.device.type,
            "processes": self.accelerator.num_processes,
        }

    @property
    def fingerprints(self) -> dict[str, str]:
        """Of the contents of the splits, by name; none of streams."""
        return self.metadata.get("data", {}).get("fingerprints", {})

    def advance(self) -> None:
        """Count an optimizer step, which was taken; average the weights and set the next rate."""
        self.step += 1
        self.scheduler.step_update(self.step)
        if self.ema is not None:
            self.ema.update(self.objective.encoder, step=self.step)

    def begin(self) -> None:
        """Start a new run in the output folder.

        Raises:
            CheckpointError: it cannot be written.
        """
        try:
            self.output.mkdir(parents=True, exist_ok=True)
            self.metrics_file.path.write_text("")
        except OSError as error:
            raise CheckpointError(f"output_dir {self.output} cannot be written: {error}") from error

    def load(self, checkpoint: Path) -> tuple[int, int]:
        """Go on from a checkpoint; return its epoch and the batch within.

        Raises:
            CheckpointError: the precision is another, the images, or the encoder that the run began
                with.
        """
        progress = read_progress(checkpoint)
        self._check_conditions(checkpoint, progress.get("conditions", {}))
        self._check_images(checkpoint, progress.get("fingerprints", {}))
        if self.start_sha256 != progress.get("start_sha256"):
            raise CheckpointError(
                f"{self.config.model.name} is no longer the encoder that the run of {checkpoint} "
                "began with, and regularizers.l2_sp keeps the weights near it: give it back, or "
                "name its commit as model.revision"
            )
        self._load_weights(checkpoint)
        vectors = load_file(checkpoint / "penalty.safetensors")
        self.penalty.load_state_dict({**progress["penalty"], "vectors": vectors})
        if self.ema is not None:
            self.ema.module.load_state_dict(load_file(checkpoint / "ema.safetensors"))
        self.step = progress["step"]
        self.best_accuracy = progress["best_accuracy"]
        self.metrics = progress["metrics"]
        self.scheduler.step_update(self.step)
        if self.accelerator.is_main_process:
            self.metrics_file.cut_after(self.step)
        return progress["epoch"], progress["batch"]

    def _load_weights(self, checkpoint: Path) -> None:
        state = checkpoint / "state"
        if (state / FILE).is_file() != (self.shards is not None):
            there = "whole" if self.shards else "sharded"
            raise CheckpointError(
                f"{checkpoint} is of a run with {there} weights: go on with it as it was launched"
            )
        if self.shards:
            self.shards.load(self.optimizer, state)
        else:
            self.accelerator.load_state(str(state))

    def _check_conditions(self, checkpoint: Path, before: dict[str, Any]) -> None:
        changed = {
            name: (before[name], now)
            for name, now in self.conditions.items()
            if name in before and before[name] != now
        }
        if "mixed_precision" in changed:
            there, here = changed["mixed_precision"]
            raise CheckpointError(
                f"{checkpoint} was trained with mixed_precision {there!r}, and {here!r} is in "
                f"effect, by the configuration or accelerate's: set mixed_precision to {there!r}"
            )
        for name, (there, here) in changed.items():
            self.console.print(
                f"{checkpoint} was trained with {name} {there}, and goes on with {here}: the "
                "weights will not be those of an uninterrupted run, bit for bit"
            )

    def _check_images(self, checkpoint: Path, before: dict[str, str]) -> None:
        changed = [
            name
            for name, content in self.fingerprints.items()
            if before.get(name, content) != content
        ]
        if changed:
            raise CheckpointError(
                f"{self.config.data.source} holds other images or labels than the run of "
                f"{checkpoint} began with, in {' and '.join(changed)}: give those back, or start "
                "the run anew"
            )

    def save(self, epoch: int, batch: int) -> None:
        """Write a checkpoint to go on from at a batch of an epoch; all processes must call it.

        Raises:
            DivergedError: a weight is not finite.
            CheckpointError: the disk is full or read-only.
        """
        self.collect()
        self.check_weights()
        self.accelerator.wait_for_everyone()
        folder = self.output / "checkpoints"
        state = folder / ".state"
        with naming_the_last_good(folder, self.step):
            if self.shards:
                self.shards.save(self.optimizer, state)
            else:
                self.accelerator.save_state(str(state))
        penalty = self.penalty.state_dict()  # by all processes, which share the layers out
        self.accelerator.wait_for_everyone()
        if not self.accelerator.is_main_process:
            return
        vectors = penalty.pop("vectors")

        def write(into: Path) -> None:
            state.rename(into / "state")
            save_file(vectors, into / "penalty.safetensors")
            if self.ema is not None:
                averaged = self.ema.module.state_dict()
                averaged = {name: tensor.contiguous() for name, tensor in averaged.items()}
                save_file(averaged, into / "ema.safetensors")
            self._write_model(into / "model")

        progress = {
            "step": self.step,
            "epoch": epoch,
            "batch": batch,
            "penalty": penalty,
            "best_accuracy": self.best_accuracy,
            "metrics": self.metrics,
            "config": self.config.as_dict(),
            "conditions": self.conditions,
            "start_sha256": self.start_sha256,
            "fingerprints": self.fingerprints,
        }
        save_checkpoint(folder, self.step, progress, write, keep=self.config.checkpoint.keep)

    def collect(self) -> None:
        """Gather the weights in the model where they are sharded; all processes must call it."""
        if self.shards:
            self.shards.collect()

    def save_model(self, folder: Path) -> None:
        """Write the model, of weights that were collected, in the place of one that may be there.

        Raises:
            DivergedError: a weight is not finite.
        """
        self.check_weights()
        replace_folder(folder, self._write_model)

    def _write_model(self, folder: Path) -> None:
        measured = {k: self.metrics_file.mean(k) for k in ("penalty_share", "images_per_second")}
        progress = {"step": self.step, "metrics": self.metrics, **measured}
        model = self.model
        model.metadata = {**self.metadata, **progress}
        model.save_pretrained(folder)

    def check_weights(self) -> None:
        """Raise DivergedError if a weight is not finite."""
        for name, tensor in self.objective.state_dict().items():
            if tensor.is_floating_point() and not tensor.isfinite().all():
                raise self.diverged(f"{name} is not finite after step {self.step}")

    def check_finite(self, what: str, values: Mapping[str, float]) -> None:
        """Raise DivergedError if something that was measured of the encoder is not finite, which
        its weights may be still; `what` comes before its name.
        """
        for name, value in values.items():
            if not math.isfinite(value):
                raise self.diverged(f"the {what}{name} is {value} after step {self.step}")

    def diverged(self, what: object) -> DivergedError:
        """Return an error that names the last good checkpoint and what to do."""
        return DivergedError(
            f"{what}; the last good checkpoint is "
            f"{latest_checkpoint(self.output / 'checkpoints')}. Lower optimizer.lr or "
            "penalty.strength, or look at that batch"
        )
