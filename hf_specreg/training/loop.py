"""The one training loop: epochs, steps, evaluation and logging, on accelerate; resumed exactly.

What is random is a function of the seed and the place: the data's order and augmentation of
(seed, epoch, index), noise, mixup and dropout of (seed, epoch, batch, process). Weights, optimizer
and the penalty's vectors are in the checkpoint. So a run that is resumed gives the weights of the
uninterrupted one, on the CPU bit for bit.
"""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, skip_first_batches
from accelerate.utils import broadcast, set_seed
from rich.console import Console
from timm.utils import ModelEmaV3
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from hf_specreg.data.transforms import add_noise, derived_seed
from hf_specreg.encoders.checksum import weights_sha256
from hf_specreg.encoders.modules import evaluating
from hf_specreg.spectral.regularizers.rep_spectral import build_penalty
from hf_specreg.spectral.regularizers.term import checked_loss
from hf_specreg.spectral.sharding import whole
from hf_specreg.training.accelerator import build_accelerator
from hf_specreg.training.config import RunConfig
from hf_specreg.training.distributed import averages_gradients, synchronize_batch_norms
from hf_specreg.training.images import build_loaders, with_channels_last
from hf_specreg.training.interruption import CHECK_EVERY, RunStopped, StopSignal, ending_workers
from hf_specreg.training.metrics import (
    DivergedError,
    Score,
    StepLog,
    TrainingResult,
    classification_scores,
    progress_bar,
    start_trackers,
)
from hf_specreg.training.model import prepare_for_training
from hf_specreg.training.objectives import Objective
from hf_specreg.training.optimizer import build_optimizer, build_scheduler
from hf_specreg.training.overfitting import OverfittingCheck
from hf_specreg.training.resume import check_agreement, starting_point
from hf_specreg.training.sharded import Shards, check_statistics, fsdp_settings
from hf_specreg.training.state import RunState, recorded_settings
from hf_specreg.training.terms import Terms


class TrainingLoop:
    """Trains an objective's encoder, with the spectral penalty and other regularizers added.

    Args:
        objective: the loss over a batch, with the encoder and what else is trained.
        train_images: of (uint8 image [C, H, W], label), or of two views [2, C, H, W].
        validation_images: of the same, to choose the best epoch by.
        test_images: of the same, evaluated once at the end.
        config: of the run.
        accelerator: of the run, where it exists already; default: a new one.
        score: (encoder, loader, accelerator) -> what is said of the encoder after an epoch and at
            the end, "accuracy" among it.
        metadata: what else `specreg.json` shall say, such as the data and versions.
    """

    def __init__(
        self,
        objective: Objective,
        train_images: Dataset,
        validation_images: Dataset,
        test_images: Dataset,
        config: RunConfig,
        *,
        accelerator: Accelerator | None = None,
        score: Score = classification_scores,
        metadata: dict[str, Any] | None = None,
    ):
        self.config = config
        one_step = config.adversarial.one_step and objective.encoder.head
        self.score = OverfittingCheck(score, config.adversarial) if one_step else score
        self.output = Path(config.output_dir)
        self.accelerator = accelerator or build_accelerator(config)
        self.console = Console(stderr=True, quiet=not self.accelerator.is_main_process)
        self.train_images = train_images
        loaders, self.steps_per_epoch = build_loaders(
            (train_images, validation_images, test_images),
            config,
            self.accelerator.num_processes,
            pin_memory=self.accelerator.device.type == "cuda",
        )
        self.plain = objective.to(self.accelerator.device)
        self.encoder = objective.encoder
        layout = {"channels_last": config.channels_last, "compiled": config.compile}
        prepare_for_training(self.encoder, **layout)
        if config.sync_batch_norm and self.accelerator.num_processes > 1:
            synchronize_batch_norms(objective)
        length = {"steps_per_epoch": self.steps_per_epoch, "epochs": config.epochs}
        settings = fsdp_settings(self.accelerator)
        shared = averages_gradients(self.accelerator) and not settings
        self.penalty = build_penalty(
            self.encoder, config.penalty, **length, seed=config.seed, shared=shared
        )
        self.regularizers = Terms(self.encoder, config.regularizers, **length)
        self.regularizers.check_micro_batch(loaders[0].batch_size, "batch_size")
        start_sha256 = weights_sha256(self.encoder) if config.regularizers.l2_sp.strength else None
        if settings:
            check_statistics(self.penalty)
        shards = Shards(objective, self.accelerator, settings) if settings else None
        optimizer = build_optimizer(objective, config.optimizer)
        scheduler = build_scheduler(optimizer, config.optimizer, **length)
        prepare = shards.prepare if shards else partial(self.accelerator.prepare, objective)
        self.objective, self.optimizer, self.loader, self.validation, self.test = prepare(
            optimizer, *loaders
        )
        self.state = RunState(
            *(config, self.accelerator, self.console),
            shards.whole if shards else objective,
            *(self.penalty, self.optimizer, scheduler),
            # Of weights that are the same on all processes, as they are once prepared.
            ema=ModelEmaV3(self.encoder, decay=d) if (d := config.optimizer.ema_decay) else None,
            metadata={**(metadata or {}), **length, "config": recorded_settings(config)},
            start_sha256=start_sha256,
            shards=shards,
        )
        self.steps = StepLog(self.accelerator.device)

    def run(self, *, resume: bool = False) -> TrainingResult:
        """Train to the end, from the latest checkpoint if `resume`.

        Raises:
            CheckpointError: the output folder holds another run, or no whole checkpoint of this
                one, or the processes see different ones.
            DivergedError: a loss, a score or a sigma became NaN or infinite; says where, and which
                checkpoint is the last good one.
            RunStopped: SIGTERM came; there is a checkpoint of the step that was then done.
        """
        checkpoint = starting_point(self.config, resume=resume)
        check_agreement(checkpoint, self.accelerator)
        if resume and checkpoint is None:
            self.console.print(f"{self.output} has no checkpoint yet: the run begins anew")
        if checkpoint is None:
            self.state.begin()
            epoch, batch = 0, 0
        else:
            epoch, batch = self.state.load(checkpoint)
            self.console.print(f"resuming from {checkpoint}: step {self.state.step}, epoch {epoch}")
        start_trackers(self.accelerator, self.config.tracker, self.config.as_dict())
        total = self.config.epochs * self.steps_per_epoch
        self.console.print(
            f"{self.output}: {self.config.epochs} epochs of {self.steps_per_epoch} steps on "
            f"{self.accelerator.device}; step by step in metrics.jsonl",
            soft_wrap=True,
        )
        with progress_bar(self.console) as self.progress, StopSignal() as self.told_to_stop:
            self.task = self.progress.add_task("training", total=total, completed=self.state.step)
            with ending_workers(self.loader, self.validation):
                while epoch < self.config.epochs:
                    self._train_epoch(epoch, batch)
                    epoch, batch = epoch + 1, 0
                    self._end_epoch(epoch)
        scores = self.evaluate("test", self.test)
        self.state.metrics |= {f"test_{name}": score for name, score in scores.items()}
        self._log({"epoch": self.config.epochs, **self.state.metrics})
        folder = self.output / "model"
        if self.accelerator.is_main_process:
            self.state.save_model(folder)
        self.accelerator.wait_for_everyone()  # a process that leaves early can keep the others
        for tracker in self.accelerator.trackers:
            tracker.finish()
        return TrainingResult(folder, self.state.metrics, self.state.step)

    def _train_epoch(self, epoch: int, first_batch: int) -> None:
        self.objective.train()
        self.steps.restart()
        self.loader.set_epoch(epoch)
        if hasattr(self.train_images, "set_epoch"):
            self.train_images.set_epoch(epoch)
        loader = skip_first_batches(self.loader, first_batch) if first_batch else self.loader
        if first_batch:
            loader.set_epoch(epoch)
        last = self.steps_per_epoch * self.config.accumulation
        batch = first_batch - 1
        with ending_workers(*([loader] if first_batch else [])):
            for batch, (images, labels) in enumerate(loader, first_batch):
                if batch >= last:
                    break
                with self.accelerator.accumulate(self.objective):
                    self._train_batch(epoch, batch, images, labels)
                if self.accelerator.sync_gradients:
                    self._end_step(epoch, batch)
        if batch + 1 < last:
            raise ValueError(
                f"epoch {epoch} ended after {batch + 1} of {last} batches: the stream is shorter "
                f"than steps_per_epoch ({self.steps_per_epoch}) says"
            )

    def _train_batch(self, epoch: int, batch: int, images: Tensor, labels: Tensor) -> None:
        set_seed(derived_seed(self.config.seed, epoch, batch, self.accelerator.process_index))
        images = add_noise(images.float() / 255, self.config.augment.noise)
        if self.config.channels_last:
            images = with_channels_last(images)
        with self.accelerator.autocast():
            loss = checked_loss(self.objective(images, labels), type(self.plain).__name__)
        penalty = loss.new_zeros(())
        if self.accelerator.sync_gradients and self.penalty.strength:
            self.penalty.step = self.state.step  # it has counted a step that fp16's scaler skipped
            with self.steps.penalty_time():
                penalty = self.penalty()
            self.steps.count_backward(penalty, loss)
        terms = self.regularizers(
            images[:, 0] if images.ndim == 5 else images,
            labels,
            self.plain.features,
            step=self.state.step,
            device=loss.device,
            last=self.accelerator.sync_gradients,
        )
        divisor = self.config.accumulation  # by which accelerate divides what it is given
        total = loss + penalty * divisor
        self.accelerator.backward(sum(self.regularizers.entering(terms, of_weights=divisor), total))
        terms |= self._clip(loss)
        self.optimizer.step()
        self.optimizer.zero_grad()
        seen = len(images) * self.accelerator.num_processes
        terms = {"loss": loss, "penalty": penalty, **terms}
        self.steps.add(self.state.step + 1, epoch, batch, images=seen, **terms)

    def _clip(self, loss: Tensor) -> dict[str, Tensor]:
        """Clip the gradient's norm. Return what it was, and the factor that clipping put on the
        gradient, of which the penalty's is a part; both 0 where no step is due, or where fp16's
        scaler will leave the step out.
        """
        limit, norm = self.config.optimizer.clip_grad, loss.new_zeros(())
        if not limit:
            return {}
        if not self.accelerator.sync_gradients:
            return {"gradient_norm": norm, "clipped_to": norm}
        norm = whole(self.accelerator.clip_grad_norm_(self.objective.parameters(), limit))
        clipped_to = (limit / norm).clamp(max=1)
        return {
            "gradient_norm": norm.nan_to_num(0, 0, 0),
            "clipped_to": clipped_to.nan_to_num(0, 0, 0),
        }

    def _end_step(self, epoch: int, batch: int) -> None:
        if self.accelerator.optimizer_step_was_skipped:  # fp16's scaler found it infinite
            return
        self.state.advance()
        step = self.state.step
        self.plain.after_step(step / (self.config.epochs * self.steps_per_epoch))
        self.progress.update(self.task, completed=step)
        if step % self.config.log_every == 0:
            self._log_training(epoch)
        due = (every := self.config.checkpoint.every_steps) and step % every == 0
        if due:
            self._save_checkpoint(epoch, batch + 1)
        alone = self.accelerator.num_processes == 1
        if (alone or step % CHECK_EVERY == 0) and self._told_to_stop():
            self._stop(None if due else (epoch, batch + 1))

    def _told_to_stop(self) -> bool:
        """Whether SIGTERM came, to any of the processes, which must all ask."""
        if self.accelerator.num_processes == 1:  # without waiting for the device, at every step
            return self.told_to_stop.came
        came = torch.tensor([self.told_to_stop.came], device=self.accelerator.device)
        return bool(self.accelerator.gather(came).any())

    def _stop(self, unsaved: tuple[int, int] | None) -> None:
        """Leave with a checkpoint; `unsaved` is the place to write one of, if there is none yet."""
        if unsaved:
            self._save_checkpoint(*unsaved)
        self.console.print(
            f"stopped by SIGTERM with a checkpoint of step {self.state.step}: go on with --resume"
        )
        for tracker in self.accelerator.trackers:
            tracker.finish()
        self.accelerator.wait_for_everyone()  # a process that fails early has the others killed
        raise RunStopped

    def _end_epoch(self, epochs_done: int) -> None:
        self._log_training(epochs_done - 1)
        last = epochs_done == self.config.epochs
        if last or epochs_done % self.config.eval_every_epochs == 0:
            self._measure(epochs_done)
        due = last or epochs_done % self.config.checkpoint.every_epochs == 0
        if due:
            self._save_checkpoint(epochs_done, 0)
        if self._told_to_stop():
            self._stop(None if due else (epochs_done, 0))

    def _measure(self, epochs_done: int) -> None:
        """Say how good the encoder is and how large its sigmas are; keep the best."""
        scores = self.evaluate("validation", self.validation)
        with self.state.averaged():
            sigmas = self.penalty.sigmas()
        self.state.check_finite("sigma of ", sigmas)
        top = sorted(sigmas.items(), key=lambda item: -item[1])[:3]
        self.state.metrics = {
            **{f"validation_{k}": v for k, v in scores.items()},
            "sum_sigma2": sum(s**2 for s in sigmas.values()),
            **{f"sigma/{name}": sigma for name, sigma in top},
        }
        self._log({"epoch": epochs_done, **self.state.metrics})
        said = ", ".join(f"{k.replace('_', ' ')} {v:.4g}" for k, v in scores.items())
        self.console.print(
            f"epoch {epochs_done}/{self.config.epochs}, validation: {said}; sum of sigma^2 "
            f"{self.state.metrics['sum_sigma2']:.4g}, largest sigma {top[0][1]:.4g} ({top[0][0]})",
            soft_wrap=True,
        )
        better = scores["accuracy"] > self.state.best_accuracy
        self.state.best_accuracy = max(self.state.best_accuracy, scores["accuracy"])
        if better and self.accelerator.is_main_process:
            self.state.save_model(self.output / "best")

    def _save_checkpoint(self, epoch: int, batch: int) -> None:
        self._log_training(epoch)  # a NaN must not get into a checkpoint
        self.state.save(epoch, batch)

    @torch.no_grad()
    def evaluate(self, split: str, loader: DataLoader) -> dict[str, float]:
        """Return what `score` says of the encoder, or of its averaged weights, if any; raise
        DivergedError where it is not finite.
        """
        self.state.collect()
        encoder = self.state.model.to(self.accelerator.device)
        for buffer in encoder.buffers():  # each process has its own statistics of batch norms
            buffer.copy_(broadcast(buffer))
        with evaluating(encoder), torch.compiler.set_stance("force_eager"):
            scores = self.score(encoder, loader, self.accelerator)
        if self.state.shards:
            encoder.cpu()
        self.state.check_finite(f"{split} ", scores)
        return scores

    def _log_training(self, epoch: int) -> None:
        """Log the steps since the last time, having looked for a NaN among them."""
        if not self.steps:
            return
        try:
            summary = self.steps.summary(self.accelerator.gather)
        except DivergedError as error:
            raise self.state.diverged(error) from error
        rates = [group["lr"] for group in self.optimizer.param_groups]
        self._log({"epoch": epoch, "lr": max(rates), **summary})

    def _log(self, values: dict[str, Any]) -> None:
        self.accelerator.log(values, step=self.state.step)
        if self.accelerator.is_main_process:
            self.state.metrics_file.append(self.state.step, values)
