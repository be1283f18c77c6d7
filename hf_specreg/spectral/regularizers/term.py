"""A term beside the loss: when it enters, with what strength, and what computes it.

Terms of the weights count once an optimizer step. Terms of the data are of a micro-batch, as the
loss is.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, NoReturn

import torch
from torch import Tensor

from hf_specreg.encoders.features import FeatureSpace
from hf_specreg.ranges import WHOLE, require, require_choices

# images, labels, features -> 0-d
Compute = Callable[[Tensor, Tensor | None, Sequence[Tensor]], Tensor]
CLASSES = (torch.int64, torch.uint8)  # of a label, as the cross-entropy takes them
BURN_INS = ("burn_in_epochs", "burn_in_steps", "burn_in_fraction")


def checked_loss(value: Tensor, name: str) -> Tensor:
    """Return what is to be added to a loss.

    Args:
        value: 0-d, of a floating point type.
        name: of what gave it.

    Raises:
        ValueError: it is not that.
    """
    if not isinstance(value, Tensor) or value.ndim or not value.is_floating_point():
        what = type(value).__name__
        if isinstance(value, Tensor):
            what = f"{value.dtype} of shape {tuple(value.shape)}"
        raise ValueError(
            f"{name} gave {what}, and a term of a loss is a 0-d tensor of a floating point type: "
            "take the mean over images, in float32"
        )
    return value


@dataclass(frozen=True)
class RegularizerConfig:
    """A term beside the loss, and when it enters.

    Args:
        strength: what the term is multiplied by; 0: off.
        every: one optimizer step in `every` has the term.
        burn_in_epochs: epochs without the term at first; may be a fraction.
        burn_in_steps: optimizer steps without the term at first.
        burn_in_fraction: part of the whole training without the term at first, in [0, 1]. Of the
            three, one at most.
        ramp_epochs: epochs after the burn-in in which the strength rises from 0; may be a fraction.

    Attributes:
        of_weights: it is of the weights; else of the data.
        of_labels: it is of the data and their labels.
        of_features: it is of the features that the loss was computed from, and of no images.
        of_encoder: it is of what comes before the head, which gets no gradient from it.
    """

    strength: float = 0.0
    every: int = 1
    burn_in_epochs: float | None = None
    burn_in_steps: int | None = None
    burn_in_fraction: float | None = None
    ramp_epochs: float = 0.0

    of_weights: ClassVar[bool] = False
    of_labels: ClassVar[bool] = False
    of_features: ClassVar[bool] = False
    of_encoder: ClassVar[bool] = True

    def __post_init__(self):
        given = [name for name in BURN_INS if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"give one of {given}, not several")
        require(self, "not negative", "strength", "ramp_epochs", *BURN_INS)
        require(self, "in [0, 1]", "burn_in_fraction")
        require(self, "at least 1", "every")
        require(self, WHOLE, "every", "burn_in_steps")
        require_choices(self)

    def burn_in(self, steps_per_epoch: int, epochs: int) -> int:
        """Return the burn-in in optimizer steps."""
        if self.burn_in_epochs is not None:
            return round(self.burn_in_epochs * steps_per_epoch)
        if self.burn_in_fraction is not None:
            return round(self.burn_in_fraction * steps_per_epoch * epochs)
        return self.burn_in_steps or 0

    def begins(self, epochs: int, steps_per_epoch: int | None = None) -> bool:
        """Whether a training of so many epochs goes on after the burn-in; where the steps of an
        epoch are not known, as far as can be said.
        """
        if steps_per_epoch is None:
            return (self.burn_in_epochs or 0) < epochs and (self.burn_in_fraction or 0) < 1
        return self.burn_in(steps_per_epoch, epochs) < epochs * steps_per_epoch

    def ramp(self, steps_per_epoch: int) -> int:
        """Return the optimizer steps after the burn-in in which the strength rises from 0."""
        return round(self.ramp_epochs * steps_per_epoch)


@dataclass(frozen=True)
class Regularizer:
    """A term beside the loss.

    Attributes:
        name: in the configuration and the log.
        strength: what it is multiplied by.
        every: one optimizer step in `every` has it.
        burn_in: optimizer steps without it at first.
        of_weights: it counts once an optimizer step; else it is of a micro-batch.
        compute: the term itself.
        ramp: optimizer steps after the burn-in in which the strength rises linearly from 0.
    """

    name: str
    strength: float
    every: int
    burn_in: int
    of_weights: bool
    compute: Compute
    ramp: int = 0

    def __post_init__(self):
        require(self, "not negative", "burn_in", "ramp")
        require(self, WHOLE, "every", "burn_in", "ramp")

    def due(self, step: int) -> bool:
        """Whether it enters the optimizer step after `step` others."""
        is_turn = step >= self.burn_in and (step - self.burn_in) % self.every == 0
        return is_turn and self.strength_at(step) > 0

    def strength_at(self, step: int) -> float:
        """Return the strength in the optimizer step after `step` others."""
        risen = (step - self.burn_in) / self.ramp if self.ramp else 1
        return self.strength * min(max(risen, 0), 1)

    def __call__(
        self,
        images: Tensor,
        labels: Tensor | None,
        features: Sequence[Tensor],
        *,
        step: int | None = None,
    ) -> Tensor:
        """Return strength * the term, 0-d and differentiable.

        Args:
            images: [B, C, H, W] in [0, 1], but for noise on them.
            labels: [B], the classes of these images; None where no term is of them.
            features: [B, D] each, that the loss was computed from, with their graph.
            step: optimizer steps before this one; default: the ramp is over.

        Raises:
            ValueError: the term is not 0-d, or not of a floating point type.
        """
        strength = self.strength if step is None else self.strength_at(step)
        return strength * checked_loss(self.compute(images, labels, features), self.name)


def warn_of_frozen(name: str, settings: RegularizerConfig, space: FeatureSpace) -> None:
    """Warn where a term is of the encoder alone, and all of it is frozen.

    Args:
        name: of the term, in the warning.
        settings: of the term.
        space: of the model.
    """
    named = space.network.named_parameters()
    if settings.of_encoder and not any(p.requires_grad for n, p in named if not space.of_head(n)):
        warnings.warn(
            f"no weight that {name} is of requires a gradient, so that it costs time and changes "
            "nothing: leave it out while they are frozen, or set its strength to 0",
            stacklevel=3,
        )


def check_batch(name: str, images: Tensor, labels: Tensor | None, *, of_labels: bool) -> None:
    """Raise if a term of the data cannot be taken of a batch, without waiting for the device.

    Args:
        name: of the term, in the error.
        images: [B, C, H, W], floating point.
        labels: [B], classes; asked for `of_labels` only.
        of_labels: whether the term is of the labels.

    Raises:
        RuntimeError: no gradient is recorded here.
        ValueError: there are no images, they are integers, or the labels are not there or no
            classes.
    """
    check_recorded(name)
    if not len(images):
        raise ValueError(f"{name} is of images, and this batch has none: leave empty batches out")
    if not images.is_floating_point():
        raise ValueError(
            f"{name} is of images as the model takes them, in floating point, and these are "
            f"{images.dtype}: divide pixels of 0 to 255 by 255, and normalise them where the "
            "model does not"
        )
    if not of_labels:
        return
    if labels is None:
        raise ValueError(f"{name} is of the labels: pass those of the images as labels")
    if labels.dtype not in CLASSES or labels.shape != images.shape[:1]:
        raise ValueError(
            f"{name} is of one class an image, {len(images)} labels of int64, and these are "
            f"{tuple(labels.shape)} of {labels.dtype}: convert them with .long(), or pass those "
            "from before mixup"
        )


def check_recorded(name: str, instead: str = "") -> None:
    """Raise RuntimeError where no gradient is recorded, as in a validation by the training's loss.

    Args:
        name: of the term.
        instead: what to do there.
    """
    if not torch.is_grad_enabled():
        raise RuntimeError(
            f"{name} would be a loss term without a gradient under torch.no_grad or "
            f"torch.inference_mode: call it in training only{instead}"
        )


def of_its_model(penalty: object, protocol: int) -> NoReturn:
    """Refuse to copy or pickle a penalty: its `__reduce_ex__`."""
    raise TypeError(
        "a penalty belongs to its model and cannot be copied or pickled: make one for the "
        "other model, and give it the state_dict() of this one"
    )
