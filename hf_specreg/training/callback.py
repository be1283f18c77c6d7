"""The spectral penalty under a stock `transformers.Trainer`: a callback, and no subclass.

    penalty = SpectralPenaltyCallback(strength=1e-2)
    trainer = Trainer(model, args, train_dataset=images, callbacks=[penalty])

When an optimizer step begins, the penalty's gradient is put where those of the micro-batches will
be added. So it enters once and whole, whatever the Trainer multiplies or divides its losses by, and
is averaged over processes and clipped with them. A `compute_loss_func` would have to undo those
factors, is called in evaluation too, and switches label smoothing off.
"""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import TrainerCallback

from hf_specreg.encoders.blueprint import read_json
from hf_specreg.encoders.formats import write_json
from hf_specreg.encoders.modules import unwrap
from hf_specreg.spectral.gradient import add_gradient
from hf_specreg.spectral.penalty import SpectralPenalty
from hf_specreg.training.terms import warn_of_burn_ins

VECTORS, COUNT = "penalty.safetensors", "penalty.json"

logger = logging.getLogger(__name__)


class SpectralPenaltyCallback(TrainerCallback):
    """Adds the gradient of strength * sum of sigma^2 up to the features to every optimizer step.

    The Trainer's checkpoints hold the penalty's step and vectors beside its own files; a resumed
    run looks for them in `args.resume_from_checkpoint`, else in the output folder's checkpoint of
    its step. The loss that is logged is without the penalty, which is logged beside it: in the
    Trainer's history, and to callbacks that come after this one. The Trainer puts its own reporters
    (`report_to`) before; this moves one behind:

        trainer.add_callback(trainer.pop_callback(TensorBoardCallback))

    From the beginning of a step on it keeps a gradient of the penalised weights.

    Args:
        penalty: of `SpectralPenalty`, such as strength, every, burn_in (in optimizer steps), scope,
            head and input_size.

    Attributes:
        penalty: the SpectralPenalty on the Trainer's model; None before there is a Trainer.

    Raises:
        ValueError: the model's head or input size is not known, see `SpectralPenalty`; weights are
            sharded, which `SpecRegTrainer` takes under FSDP2; or, in a step, fp16's scaler is not
            in the optimizer, where accelerate puts it.
    """

    def __init__(self, **penalty: Any):
        self._settings = penalty
        self._last = torch.zeros(())
        self.penalty: SpectralPenalty | None = None

    def on_init_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Make the penalty, so that its errors come before any compute is spent."""
        self._attach(model)

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, **_: Any
    ) -> None:
        """Begin at the Trainer's step, with the vectors of the checkpoint that it resumed from."""
        self._attach(model)
        if self.penalty.strength:
            warn_of_burn_ins({"penalty": self.penalty.burn_in}, state.max_steps)
        self._last = torch.zeros(())
        self.penalty.step = state.global_step
        if state.global_step:
            checkpoints = list(_checkpoints(args, state))
            found = [folder for folder in checkpoints if (folder / VECTORS).is_file()]
            folder = (found or checkpoints)[0]
            load_penalty(self.penalty, folder)
            if self.penalty.step != state.global_step:
                logger.warning(
                    "%s has the penalty of step %d, and the Trainer is at step %d, from which "
                    "burn-in and cadence go on",
                    *(folder, self.penalty.step, state.global_step),
                )
                self.penalty.step = state.global_step

    def on_step_begin(
        self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any
    ) -> None:
        """Put the penalty's gradient where the micro-batches' will be added."""
        value = add_gradient(self.penalty, scale=loss_scale(args, optimizer))
        self._last = torch.where(value != 0, value, self._last.to(value.device))

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict | None = None, **_: Any
    ) -> None:
        """Log the last penalty that was not 0, in the Trainer's history and to later callbacks."""
        if logs is not None and "loss" in logs:
            logs["penalty"] = float(self._last)
            state.log_history[-1]["penalty"] = logs["penalty"]

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Write the penalty's step and vectors into the checkpoint."""
        *_, folder = _checkpoints(args, state)
        if args.should_save and not folder.is_dir():
            logger.warning(
                "the penalty's vectors are not saved: the Trainer left no checkpoint in %s", folder
            )
        save_penalty(self.penalty, folder, write=args.should_save and folder.is_dir())

    def _attach(self, model: nn.Module) -> None:
        """Make the penalty, if it is not yet there or is on another model."""
        network = unwrap(model)
        if self.penalty is not None and self.penalty.space.network is network:
            return
        kind = check_whole_weights("penalty")
        shared = {"shared": kind.value.startswith("MULTI_")}
        self.penalty = SpectralPenalty(model, **shared | self._settings)


def loss_scale(args: Any, optimizer: Any) -> float:
    """Return what fp16 multiplies gradients by; 1 in other precisions.

    Args:
        args: of the Trainer.
        optimizer: of accelerate's, or any.

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


def check_whole_weights(what: str) -> DistributedType:
    """Return how accelerate distributes; raise ValueError if it shards the weights.

    Args:
        what: the callback puts beside them: "penalty" or "regularizers".
    """
    kind = AcceleratorState().distributed_type
    if kind in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        sharded = "SpecRegTrainer with FSDP2, or " if what == "penalty" else ""
        raise ValueError(
            f"the callback puts gradients beside whole weights, which {kind.value} shards: use "
            f"{sharded}DistributedDataParallel"
        )
    return kind


def save_penalty(penalty: SpectralPenalty, folder: Path, *, write: bool) -> None:
    """Put the penalty's step and vectors into a checkpoint of the Trainer's.

    All processes must call it, for they share the layers out.

    Args:
        penalty: of the training.
        folder: of the checkpoint.
        write: whether this process does.
    """
    state = penalty.state_dict()
    if write:
        save_file(state.pop("vectors"), folder / VECTORS)
        write_json(folder / COUNT, state)


def load_penalty(penalty: SpectralPenalty, folder: Path) -> None:
    """Take over the step and vectors of a checkpoint; warn where it has none."""
    if not (folder / VECTORS).is_file():
        logger.warning(
            "%s has no %s, as those of Trainer and of save_only_model: the penalty's vectors "
            "start anew, so this run does not go on exactly as the one that was stopped",
            *(folder, VECTORS),
        )
        return
    state = read_json(folder / COUNT)
    penalty.load_state_dict({**state, "vectors": load_file(folder / VECTORS)})


def _checkpoints(args: Any, state: Any) -> Iterator[Path]:
    """Where the checkpoint of this step may be; the last is where the Trainer writes it."""
    given = args.resume_from_checkpoint
    if given and Path(given).is_dir():
        yield Path(given)
    yield Path(args.output_dir) / f"checkpoint-{state.global_step}"
