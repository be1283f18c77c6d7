"""The penalty and the regularizers under a stock `transformers.Trainer`: a callback, no subclass.

    added = SpecRegCallback(penalty={"strength": 1e-2})
    trainer = Trainer(model, args, train_dataset=images, callbacks=[added])

When an optimizer step begins, the penalty's gradient is put where those of the micro-batches will
be added. So it enters once and whole, whatever the Trainer multiplies or divides its losses by, and
is averaged over processes and clipped with them. A `compute_loss_func` would have to undo those
factors, is called in evaluation too, and switches label smoothing off.

A callback is not told the batch. So for the regularizers a hook on the model looks at the first
micro-batch of a step, and puts their gradient there too.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback

from hf_specreg.encoders.modules import unwrap
from hf_specreg.spectral.gradient import add_gradient, add_gradient_of
from hf_specreg.spectral.penalty import SpectralPenalty
from hf_specreg.spectral.regularizers import RegularizersConfig
from hf_specreg.training.terms import Terms, check_settings, latest, warn_of_burn_ins
from hf_specreg.training.trainer_checkpoints import VECTORS, load_penalty, save_penalty

logger = logging.getLogger(__name__)


class SpecRegCallback(TrainerCallback):
    """Adds the gradient of the spectral penalty and of other regularizers to every optimizer step.

    The Trainer's checkpoints hold the penalty's step and vectors beside its own files; a resumed
    run looks for them in `args.resume_from_checkpoint`, else in the output folder's checkpoint of
    its step. The loss that is logged is without the terms, which are logged beside it: in the
    Trainer's history, and to callbacks that come after this one. The Trainer puts its own reporters
    (`report_to`) before; this moves one behind:

        trainer.add_callback(trainer.pop_callback(TensorBoardCallback))

    From the beginning of a step on it keeps a gradient of the weights that the terms reach.

    Args:
        penalty: arguments of `SpectralPenalty`, such as strength, every, burn_in (in optimizer
            steps) and scope; {}: its defaults; None: no penalty.
        regularizers: their settings, with burn-in in steps. Terms of images are of the first of
            each step's first micro-batch, in float32.
        head: as for `FeatureSpace.of`, for the penalty and the regularizers.
        input_size: likewise.
        pixel_std: by what images were divided when they were normalised, such as
            `processor.image_std`; terms of images must know it.

    Attributes:
        penalty: the SpectralPenalty on the Trainer's model; None without one, or without a Trainer.

    Raises:
        ValueError: nothing is asked for, burn-in or ramp in epochs, `bss` or spectral_norm; when
            there is a Trainer, the head, input size or pixel_std is not known, a term is of more
            images than `per_device_train_batch_size`, weights are sharded (`SpecRegTrainer` takes
            the penalty under FSDP2), or regularizers are on several devices of one process; in a
            step, the model is given no labels, as under label smoothing, or fp16's scaler is not in
            the optimizer, where accelerate puts it.
    """

    def __init__(
        self,
        *,
        penalty: Mapping[str, Any] | None = None,
        regularizers: RegularizersConfig | None = None,
        head: str | Sequence[str] | None = None,
        input_size: tuple[int, int, int] | None = None,
        pixel_std: float | Sequence[float] | None = None,
    ):
        self._settings, self._config = penalty, regularizers or RegularizersConfig()
        check_settings(penalty, self._config, by="SpecRegCallback")
        if self._config.bss.strength:
            raise ValueError("bss is of what the loss is computed from: use SpecRegTrainer for it")
        self._known = {"head": head, "input_size": input_size}
        self._pixel_std = pixel_std
        self._network: nn.Module | None = None
        self._hook: RemovableHandle | None = None
        self._step, self._scale, self._due = 0, 1.0, False
        self._last: dict[str, Tensor] = {}
        self.penalty: SpectralPenalty | None = None

    def on_init_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Make the terms, so that their errors come before any compute is spent."""
        self._attach(args, model)

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, **_: Any
    ) -> None:
        """Begin at the Trainer's step, with the vectors of the checkpoint that it resumed from."""
        self._attach(args, model)
        burn_ins = self._terms.burn_ins
        if self.penalty is not None:
            burn_ins |= {"penalty": self.penalty.burn_in} if self.penalty.strength else {}
            self._resume(args, state)
        warn_of_burn_ins(burn_ins, state.max_steps)
        self._last = {}
        self.on_train_end()
        if self._terms.settings:
            self._hook = self._network.register_forward_pre_hook(self._look, with_kwargs=True)

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Look at batches no longer."""
        if self._hook is not None:
            self._hook.remove()
        self._hook, self._due = None, False

    def on_step_begin(
        self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any
    ) -> None:
        """Put the penalty's gradient where the micro-batches' will be added, and wait for the first
        of these.
        """
        self._step, self._scale = state.global_step, _loss_scale(args, optimizer)
        if self.penalty is not None:
            value = add_gradient(self.penalty, scale=self._scale)
            self._last = latest(self._last, {"penalty": value})
        self._due = True

    @torch.compiler.disable
    def _look(self, network: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Add the gradient of the regularizers on this batch, if it is the first of a step."""
        if not (self._due and network.training and torch.is_grad_enabled()):
            return
        self._due = False  # for the terms run the network too
        images = kwargs.get("pixel_values", args[0] if args else None)
        device = next(network.parameters()).device
        terms = self._terms(images, kwargs.get("labels"), step=self._step, device=device)
        add_gradient_of(sum(terms.values()), network, scale=self._scale)
        self._last = latest(self._last, terms)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict | None = None, **_: Any
    ) -> None:
        """Log the last value of each term that was not 0, in the Trainer's history and to later
        callbacks.
        """
        if logs is not None and "loss" in logs:
            found = {name: float(value) for name, value in self._last.items()}
            logs.update(found)
            state.log_history[-1].update(found)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Write the penalty's step and vectors into the checkpoint."""
        if self.penalty is None:
            return
        *_, folder = _checkpoints(args, state)
        if args.should_save and not folder.is_dir():
            logger.warning(
                "the penalty's vectors are not saved: the Trainer left no checkpoint in %s", folder
            )
        save_penalty(self.penalty, folder, write=args.should_save and folder.is_dir())

    def _attach(self, args: Any, model: nn.Module) -> None:
        """Make the terms, if they are not yet there or are of another model."""
        network = unwrap(model)
        if self._network is network:
            return
        kind = _check_whole_weights(list(self._config.terms()))
        if self._config.terms() and args.n_gpu > 1:
            raise ValueError(
                f"the model is copied to {args.n_gpu} devices in each step, where no gradient can "
                "be put: launch with torchrun or accelerate, which start a process for each"
            )
        if self._settings is not None:
            settings = {"shared": kind.value.startswith("MULTI_"), **self._known}
            self.penalty = SpectralPenalty(model, **settings | dict(self._settings))
        self._terms = Terms(model, self._config, pixel_std=self._pixel_std, **self._known)
        images = args.per_device_train_batch_size
        self._terms.check_micro_batch(images, "per_device_train_batch_size")
        self._network = network

    def _resume(self, args: Any, state: Any) -> None:
        """Go on at the Trainer's step, with the vectors of its checkpoint."""
        self.penalty.step = state.global_step
        if not state.global_step:
            return
        checkpoints = list(_checkpoints(args, state))
        found = [folder for folder in checkpoints if (folder / VECTORS).is_file()]
        folder = (found or checkpoints)[0]
        load_penalty(self.penalty, folder)
        if self.penalty.step != state.global_step:
            logger.warning(
                "%s has the penalty of step %d, and the Trainer is at step %d, from which burn-in "
                "and cadence go on",
                *(folder, self.penalty.step, state.global_step),
            )
            self.penalty.step = state.global_step


def _loss_scale(args: Any, optimizer: Any) -> float:
    """What fp16 multiplies gradients by; 1 in other precisions.

    Raises:
        ValueError: fp16's scaler is not in the optimizer.
    """
    scaler = getattr(optimizer, "scaler", None)
    if args.fp16 and scaler is None:
        raise ValueError(
            f"{type(optimizer).__name__} has no scaler of fp16, by which the gradient must be "
            "multiplied: train in bf16, or use SpecRegTrainer"
        )
    return scaler.get_scale() if scaler else 1.0


def _check_whole_weights(terms: Sequence[str]) -> DistributedType:
    """Return how accelerate distributes; raise ValueError if it shards the weights.

    Args:
        terms: the regularizers, which no Trainer here takes beside shards.
    """
    kind = AcceleratorState().distributed_type
    if kind in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        sharded = "" if terms else "SpecRegTrainer with FSDP2, or "
        raise ValueError(
            f"the callback puts gradients beside whole weights, which {kind.value} shards: use "
            f"{sharded}DistributedDataParallel"
        )
    return kind


def _checkpoints(args: Any, state: Any) -> Iterator[Path]:
    """Where the checkpoint of this step may be; the last is where the Trainer writes it."""
    given = args.resume_from_checkpoint
    if given and Path(given).is_dir():
        yield Path(given)
    yield Path(args.output_dir) / f"checkpoint-{state.global_step}"
