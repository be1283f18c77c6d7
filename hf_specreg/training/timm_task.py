"""timm's training tasks with the spectral penalty and the other regularizers in their loss.

    task = regularize_task(ClassificationTask(model, criterion), penalty={"strength": 1e-2})

A task is timm's forward pass and loss (`timm.task`); its train.py calls one for each micro-batch,
divides the loss by their number, and says by `update_ema` that an optimizer step is done. Terms of
the weights are in each micro-batch whole, so that they enter the step once and whole. The penalty
is computed once an optimizer step; its gradient is kept and given to each micro-batch.
"""

import contextlib
import logging
import weakref
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from timm.loss import BinaryCrossEntropy, PolyBinaryCrossEntropy
from timm.task import TrainingTask
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from hf_specreg.encoders.modules import unwrap, without_trainers
from hf_specreg.spectral.penalty import SpectralPenalty
from hf_specreg.spectral.regularizers import RegularizersConfig
from hf_specreg.spectral.regularizers.term import checked_loss
from hf_specreg.training.terms import Terms, check_settings

logger = logging.getLogger(__name__)
STATE = "specreg"
BINARY = (nn.BCELoss, nn.BCEWithLogitsLoss, BinaryCrossEntropy, PolyBinaryCrossEntropy)


def regularize_task(
    task: TrainingTask,
    *,
    penalty: Mapping[str, Any] | None = None,
    regularizers: RegularizersConfig | None = None,
    head: str | Sequence[str] | None = None,
    input_size: tuple[int, int, int] | None = None,
    pixel_std: float | Sequence[float] | None = None,
) -> TrainingTask:
    """Let a task of timm add the penalty and other regularizers to its loss, in place.

    Call it when the task has been made, before it resumes, makes its average of weights, is
    compiled or prepared for several processes, and freeze what shall be frozen before. The task
    stays what it was in all else; what it returns has a "penalty" and each regularizer by name
    beside the "loss", which contains them. Its checkpoint (`task_state`) has the step and the
    penalty's vectors. In evaluation mode it adds nothing.

    An optimizer step begins when `update_ema` was called, whose count it follows, or else when an
    optimizer of torch that holds one of the weights has stepped, or a weight was changed in place.
    So a step that fp16's scaler skips counts as in timm's train.py, and in a loop that does not
    call `update_ema` only where the optimizer is fused, and skips it itself. A gradient of the
    penalised weights is kept.

    Args:
        task: of timm; its model is a timm network on normalised images, or a `SpecRegModel`.
        penalty: arguments of `SpectralPenalty`, such as strength, every, burn_in (in optimizer
            steps) and scope; {}: its defaults; None: no penalty. Each process computes all of it,
            for timm saves checkpoints from one alone.
        regularizers: their settings, with burn-in in steps; terms of the data are per [0, 1]
            pixel, as in the recipes, outside autocast, and of a micro-batch. `input_gradient` is
            of the cross-entropy, whatever the task's own loss adds to that. `bss` looks at what the
            head is fed by a hook, which compiled code has if the task makes the model's first pass
            in training mode.
        head: as for `FeatureSpace.of`, for the penalty and the regularizers.
        input_size: likewise.
        pixel_std: by what the images were divided when they were normalised, as for
            `InputGradientPenalty`; default: what the network's `pretrained_cfg` says.

    Returns:
        The task.

    Raises:
        ValueError: it is no task of timm or was regularized before, nothing is asked for, burn-in
            or ramp in epochs, `penalty` is shared or has a head or an input size of its own,
            spectral_norm is on, a term of the cross-entropy beside a binary loss, or the head, the
            input size or pixel_std is not known; in a step, a term of the data where NaFlex feeds
            patches, or of labels that are no classes.
    """
    config = regularizers or RegularizersConfig()
    _check_task(task)
    check_settings(penalty, config, by="regularize_task")
    if (penalty or {}).get("shared"):
        raise ValueError("timm saves from one process alone: the penalty cannot be shared")
    _check_loss(config, task)
    model, known = without_trainers(task.get_eval_model()), {"head": head, "input_size": input_size}
    made = None if penalty is None else SpectralPenalty(model, **known, **penalty)
    terms = Terms(model, config, pixel_std=pixel_std, **known)  # the last that may be refused
    task.__class__ = type(f"Regularized{type(task).__name__}", (_Regularized, type(task)), {})
    task._regularize(unwrap(model), made, terms)
    return task


def _check_task(task: Any) -> None:
    """Raise ValueError for what is no task, or one that has a penalty already."""
    if not isinstance(task, TrainingTask):
        raise ValueError(
            f"a {type(task).__name__} is no task of timm: make one first, such as "
            "ClassificationTask(model, criterion)"
        )
    if isinstance(task, _Regularized):
        raise ValueError("this task has been regularized before: make a new one")


def _check_loss(config: RegularizersConfig, task: TrainingTask) -> None:
    """Raise ValueError for terms of another loss than the task's own."""
    criterion = getattr(task, "criterion", None)
    binary = getattr(task, "multi_label", False) or isinstance(criterion, BINARY)
    for name, settings in config.terms().items():
        if binary and settings.of_labels:
            raise ValueError(
                f"{name} is of the cross-entropy, and this task's loss is "
                f"{type(criterion).__name__}: leave {name} out, or train by cross-entropy"
            )


class _Regularized(TrainingTask):
    """What `regularize_task` puts before a task's class."""

    def _regularize(
        self, network: nn.Module, penalty: SpectralPenalty | None, terms: Terms
    ) -> None:
        self._network = [network]  # in a list, lest it be a module of the task once more
        self.penalty, self._terms = penalty, terms
        self._step, self._next, self._seen = 0, 0, None
        self._value, self._gradients, self._weights = torch.zeros(()), (), ()
        # A fused optimizer, or one that writes to `.data`, leaves a weight's version as it was.
        hook = register_optimizer_step_post_hook(partial(_note_step, weakref.ref(self)))
        weakref.finalize(self, hook.remove)

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Return what the task returns, with the regularizers in its loss and beside it."""
        training = self.get_trainable_module().training and torch.is_grad_enabled()
        with self._terms.watching() if training else contextlib.nullcontext([]) as features:
            result = super().forward(input, target)
        if not training:
            return result
        self._begin_step()
        terms = {}
        if self.penalty is not None:
            terms["penalty"] = _Known.apply(self._value, self._gradients, *self._weights)
        loss = checked_loss(result["loss"], type(self).__name__)
        terms |= self._terms(input, target, features, step=self._step, device=loss.device)
        added = {name: term.detach() for name, term in terms.items()}
        return {**result, "loss": sum(terms.values(), loss), **added}

    def _begin_step(self) -> None:
        """Compute the penalty and its gradient, if an optimizer step has begun."""
        parameters = list(self._network[0].parameters())
        seen = [p._version for p in parameters]
        if seen == self._seen:
            return
        self._seen, self._step = seen, self._next
        self._next += 1
        if self.penalty is None:
            return
        self.penalty.step = self._step
        value = self.penalty()
        self._value, self._weights, self._gradients = value.detach(), (), ()
        if value.requires_grad:
            weights = [p for p in parameters if p.requires_grad]
            found = torch.autograd.grad(value, weights, allow_unused=True)
            pairs = [pair for pair in zip(weights, found, strict=True) if pair[1] is not None]
            self._weights, self._gradients = zip(*pairs, strict=True)

    def update_ema(self, step: int | None = None) -> None:
        """Update the average of weights, if any; an optimizer step is done."""
        super().update_ema(step)
        self._next = self._next if step is None else step
        self._seen = None

    def get_task_state(self, module: nn.Module | None = None, ema: bool = False) -> dict[str, Any]:
        """Return the task's own state, with the step and the penalty's vectors."""
        state = super().get_task_state(module, ema)
        if ema:
            return state
        penalty = {"penalty": self.penalty.state_dict()} if self.penalty else {}
        return {**state, STATE: {"step": self._next, **penalty}}

    def load_task_state(
        self,
        state: dict[str, Any] | None,
        strict: bool = True,
        module: nn.Module | None = None,
        ema: bool = False,
    ) -> None:
        """Take over the task's own state; without the penalty's, its vectors start anew."""
        super().load_task_state(state, strict, module, ema)
        if ema:
            return
        own = (state or {}).get(STATE, {})
        self._next, self._seen = own.get("step", 0), None
        if "penalty" in own and self.penalty:
            self.penalty.load_state_dict(own["penalty"])
        elif self.penalty:
            logger.warning("the checkpoint has no state of the penalty: its vectors start anew")


@torch.compiler.disable
def _note_step(of: weakref.ref[_Regularized], optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """Have a task begin a step, once an optimizer of one of its network's weights has stepped."""
    task = of()
    stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if task is not None and any(id(p) in stepped for p in task._network[0].parameters()):
        task._seen = None


class _Known(torch.autograd.Function):
    """A value whose gradient is known, for several backward passes."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: Sequence[Tensor], *weights: Tensor) -> Tensor:
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *(gradient * upstream.to(gradient) for gradient in ctx.gradients)
