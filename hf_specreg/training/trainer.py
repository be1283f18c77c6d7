"""SpecRegTrainer: `transformers.Trainer` with the spectral penalty and other regularizers added to
the loss.

    trainer = SpecRegTrainer(model, args, train_dataset=images, penalty={"strength": 1e-2})

With k micro-batches an optimizer step the penalty enters the last of them, whole, and terms of the
data enter each by a k-th. The Trainer divides losses by k unless the model or `compute_loss_func`
has scaled them itself; where it does, they are multiplied by k before.

A SpecRegModel, which maps images in [0, 1] to logits, is trained by cross-entropy.
"""

import shutil
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainerCallback

from hf_specreg.encoders.download import PROCESSOR_FILE, RUN_FILE
from hf_specreg.encoders.formats import write_json
from hf_specreg.encoders.model import SpecRegModel
from hf_specreg.encoders.modules import unwrap
from hf_specreg.spectral.penalty import SpectralPenalty
from hf_specreg.spectral.regularizers import RegularizersConfig
from hf_specreg.training.classifier import Classifier
from hf_specreg.training.distributed import averages_gradients
from hf_specreg.training.terms import Terms, check_settings, latest, warn_of_burn_ins
from hf_specreg.training.trainer_checkpoints import (
    load_network,
    load_penalty,
    save_penalty,
    save_unless_plain,
    stored_names,
)


class SpecRegTrainer(Trainer):
    """`transformers.Trainer` with the spectral penalty and other regularizers added to the loss.

    Takes what Trainer takes, and saves what Trainer saves: `from_pretrained` of the model's class,
    AutoModelForImageClassification and SpecRegModel load it. It takes a SpecRegModel too, whose
    "pixel_values" are in [0, 1], and saves what its `save_pretrained` does. Checkpoints hold the
    penalty's step and vectors, so that a resumed run goes on as if it had not stopped. All terms
    are logged beside the loss, which contains them.

    Args:
        model: a transformers model or a SpecRegModel; of a timm network make one by
            `SpecRegModel.from_timm`.
        args: of Trainer, after its model.
        penalty: arguments of `SpectralPenalty`, such as strength, every, burn_in (in optimizer
            steps) and scope; {}: its defaults; None: no penalty.
        regularizers: their settings, with burn-in in steps. Terms of the data are of the first
            images of each micro-batch, in float32 under bf16 and fp16; `input_gradient` is of the
            cross-entropy, whatever the loss adds to that.
        head: as for `FeatureSpace.of`, for the penalty and the regularizers.
        input_size: likewise.
        pixel_std: by what images were divided when they were normalised, which terms of images
            need of a transformers model: `processor.image_std`.
        kwargs: of Trainer.

    Attributes:
        penalty: the SpectralPenalty on the model that is trained; None without one.

    Raises:
        ValueError: nothing is asked for, burn-in or ramp in epochs, or spectral_norm; the model's
            head, input size or pixel_std is not known; a term is of more images than
            `per_device_train_batch_size`; the model is a timm network; or weights will be sharded
            in a way that hides them, by FSDP1 or DeepSpeed's ZeRO-3, beside regularizers by FSDP2
            too. In a step: labels are missing or no classes; see `InputGradientPenalty`.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        *args: Any,
        penalty: Mapping[str, Any] | None = None,
        regularizers: RegularizersConfig | None = None,
        head: str | Sequence[str] | None = None,
        input_size: tuple[int, int, int] | None = None,
        pixel_std: float | Sequence[float] | None = None,
        **kwargs: Any,
    ):
        self._settings, self._config = penalty, regularizers or RegularizersConfig()
        check_settings(penalty, self._config, by="SpecRegTrainer")
        self._known = {"head": head, "input_size": input_size}
        self._pixel_std = pixel_std
        self._own_loss = kwargs.get("compute_loss_func") is not None
        super().__init__(self._as_trainer_takes_it(model), *args, **kwargs)
        self._regularized: nn.Module | None = None
        self._last: dict[str, Tensor] = {}
        self._best: dict[int, int | None] = {}  # by the step at which it was loaded, that of it
        if self.model_init is None:
            self._regularize()  # its errors come before any compute is spent
        self.add_callback(_FromTheStart(self))

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """Return a new model of `model_init`, as Trainer takes it."""
        return self._as_trainer_takes_it(super().call_model_init(trial))

    def _as_trainer_takes_it(self, model: nn.Module | None) -> nn.Module | None:
        if isinstance(model, SpecRegModel):
            return Classifier(model)
        if hasattr(model, "pretrained_cfg") and not self._own_loss:
            raise ValueError(
                f"Trainer calls its model with pixel_values and labels, which timm's "
                f"{type(model).__name__} does not take: give SpecRegModel(model, input_size=..., "
                "pixel_mean=..., pixel_std=...), whose images are in [0, 1]"
            )
        return model

    @property
    def _trained(self) -> nn.Module:
        """What the user gave."""
        return self.model.model if isinstance(self.model, Classifier) else self.model

    @property
    def penalty(self) -> SpectralPenalty | None:
        """On the model that is trained; `model_init` makes a new one for each trial."""
        self._regularize()
        return self._penalty

    def _regularize(self) -> None:
        """Make the penalty and the regularizers, if there are none of this model."""
        network = unwrap(self._trained)
        if self._regularized is network:
            return
        _check_shards(
            self.accelerator,
            ours=isinstance(self.model, Classifier),
            terms=list(self._config.terms()),
        )
        self._penalty = None
        if self._settings is not None:
            settings = {"shared": averages_gradients(self.accelerator), **self._known}
            self._penalty = SpectralPenalty(self._trained, **settings | dict(self._settings))
        self._terms = Terms(self._trained, self._config, pixel_std=self._pixel_std, **self._known)
        images = self.args.per_device_train_batch_size
        self._terms.check_micro_batch(images, "per_device_train_batch_size")
        self._regularized = network

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return Trainer's loss, in a training step with the terms of the micro-batch."""
        training = model.training
        given = inputs.get("pixel_values"), inputs.get("labels")  # which Trainer may take out
        with self._terms.watching() if training else nullcontext([]) as features:
            loss, outputs = super().compute_loss(
                model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch
            )
        if training:
            loss = sum(self._entering(given, features, loss, num_items_in_batch), loss)
        return (loss, outputs) if return_outputs else loss

    def _entering(
        self,
        given: tuple[Tensor, Tensor | None],
        features: Sequence[Tensor],
        loss: Tensor,
        num_items_in_batch: Tensor | int | None,
    ) -> list[Tensor]:
        """The terms as they are added to the loss of a micro-batch."""
        last, divisor = self.accelerator.sync_gradients, self._divisor(num_items_in_batch)
        terms = self._terms(
            *given, features, step=self.state.global_step, device=loss.device, last=last
        )
        shares = {
            "of_weights": divisor,
            "of_data": divisor / self.current_gradient_accumulation_steps,
        }
        entering = self._terms.entering(terms, **shares)
        if self.penalty is not None and last:
            terms["penalty"] = self.penalty().to(loss.device)
            entering.append(terms["penalty"] * divisor)
        self._last = latest(self._last, terms)
        return entering

    def _divisor(self, num_items_in_batch: Tensor | int | None) -> int:
        """What the Trainer is about to divide the loss by."""
        scaled = getattr(self, "loss_is_scaled_for_ga", None)  # newer than transformers 5.17
        if scaled is None:
            by_model = self.model_accepts_loss_kwargs and num_items_in_batch is not None
            scaled = by_model or self.compute_loss_func is not None
        return 1 if scaled else self.current_gradient_accumulation_steps

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with the last value of each term that was not 0 beside the loss."""
        if "loss" in logs:
            logs = {**logs, **{name: float(value) for name, value in self._last.items()}}
        super().log(logs, start_time)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        ours = isinstance(self.model, Classifier)
        config = getattr(self.model, "config", None)
        if hasattr(config, "label_names"):  # TimmWrapper would write those that it was loaded with
            config.label_names = list(config.id2label.values())
        super()._save(output_dir, {} if ours else state_dict)
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            if ours:
                self._trained.save_pretrained(folder)
            config = {**self._method(), "seed": self.args.seed}
            step = self._best.get(self.state.global_step, self.state.global_step)
            metadata = {"config": config, "step": step}
            if ours and self._trained.metadata:
                metadata["before"] = self._trained.metadata
            write_json(folder / RUN_FILE, metadata)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Push weights with what belongs to them: Trainer takes them and config.json alone."""
        if self.is_world_process_zero():
            for name in (RUN_FILE, PROCESSOR_FILE):
                if (path := Path(checkpoint_folder) / name).is_file():
                    shutil.copy(path, self.args.output_dir)
        super()._push_from_checkpoint(checkpoint_folder)

    def _method(self) -> dict[str, Any]:
        """What `specreg.json` says of the penalty and the regularizers."""
        penalty, terms = self.penalty, self._terms.settings.items()
        names = ("strength", "scope", "every", "renew_every", "lanczos_steps")
        names += ("fold_norm", "fold_gradient")
        settings = {"strength": 0.0, "scope": "features"}
        if penalty is not None:
            settings = {name: getattr(penalty, name) for name in names}
            settings |= {"burn_in_steps": penalty.burn_in, "ramp_steps": penalty.ramp}
            settings["skip"] = list(self._settings.get("skip", ()))
            settings["split_qkv"] = self._settings.get("split_qkv", True)
        regularizers = {name: asdict(of) for name, of in terms}
        return {"penalty": settings, **({"regularizers": regularizers} if regularizers else {})}

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if isinstance(self.model, Classifier):
            load_network(unwrap(self._trained), Path(resume_from_checkpoint))
            return
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._load_renamed(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        self._best[self.state.global_step] = self.state.best_global_step
        if isinstance(self.model, Classifier):
            load_network(unwrap(self._trained), Path(self.state.best_model_checkpoint))
            return
        super()._load_best_model()
        if self.state.best_model_checkpoint:
            self._load_renamed(self.state.best_model_checkpoint)

    def _load_renamed(self, folder: str) -> None:
        """Load weights whose names `save_pretrained` turned back into those of older checkpoints.

        Trainer takes the names in the file as they are and, with a warning, leaves a ViT's blocks
        as they were (huggingface/transformers#43701).
        """
        network = unwrap(self.model)
        if self.is_fsdp_enabled or not isinstance(network, PreTrainedModel):
            return  # its shards are loaded by their own names
        names = stored_names(Path(folder))
        if names - set(network.state_dict()):
            load_network(network, Path(folder))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.penalty is not None:
            save_penalty(self.penalty, Path(output_dir), write=self.args.should_save)
        ours = isinstance(self.model, Classifier | PreTrainedModel)
        if ours and self.args.should_save and not self.is_fsdp_enabled:
            save_unless_plain(unwrap(self._trained), Path(output_dir))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self.penalty is not None:
            load_penalty(self.penalty, Path(checkpoint))


class _FromTheStart(TrainerCallback):
    """Burn-in and cadence are of a training: a second one begins them again. Warns of a burn-in
    that is not over when the training is.
    """

    def __init__(self, trainer: SpecRegTrainer):
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        penalty, burn_ins = self.trainer.penalty, self.trainer._terms.burn_ins
        if penalty is not None:
            penalty.step = state.global_step
            burn_ins |= {"penalty": penalty.burn_in} if penalty.strength else {}
        warn_of_burn_ins(burn_ins, state.max_steps)
        self.trainer._last = {}


def _check_shards(
    accelerator: Accelerator, *, ours: bool = False, terms: Sequence[str] = ()
) -> None:
    """Raise ValueError if weights are sharded otherwise than by FSDP2, or at all those of a
    SpecRegModel, which saves whole ones, or beside regularizers, which see whole ones.
    """
    kind = accelerator.distributed_type
    if terms and kind == DistributedType.FSDP:
        raise ValueError(
            f"{terms} are of whole weights, which FSDP shards: use DistributedDataParallel"
        )
    if ours and kind == DistributedType.FSDP:
        raise ValueError("a SpecRegModel is not saved from shards: train its .network under FSDP")
    fsdp1 = kind == DistributedType.FSDP and not accelerator.is_fsdp2
    deepspeed = kind == DistributedType.DEEPSPEED
    if fsdp1 or (deepspeed and accelerator.deepspeed_plugin.zero_stage == 3):
        raise ValueError(
            f"the penalty does not see weights that {'FSDP1' if fsdp1 else 'ZeRO-3'} shards: use "
            "FSDP2 (fsdp_version 2 in accelerate's configuration or fsdp_config), "
            "DistributedDataParallel, or ZeRO-2"
        )
