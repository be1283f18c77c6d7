"""The penalties on the derivative with respect to the image, for a loop of one's own.

    InputGradientPenalty   strength * mean ||grad_x loss(x, y)||
    SensitivityPenalty     strength * mean [log ||J^T u|| - log spread], J = dPhi / dx

What they are and where they are from stands in `regularizers/`, one a file; here is when they
enter, with what strength, and what a run that is resumed needs of them.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hf_specreg.encoders.features import FeatureSpace
from hf_specreg.encoders.pixels import in_pixels
from hf_specreg.spectral.precision import full_precision
from hf_specreg.spectral.regularizers.input_gradient import InputGradientConfig
from hf_specreg.spectral.regularizers.sensitivity import SensitivityConfig
from hf_specreg.spectral.regularizers.term import (
    BURN_INS,
    Compute,
    Regularizer,
    RegularizerConfig,
    check_batch,
    of_its_model,
    warn_of_frozen,
)


class ImagePenalty:
    """A term of images beside the loss, called once per optimizer step.

    It is of a batch's first images (`images`), with the model in evaluation mode, whatever mode it
    is in: batch norms use their running statistics and leave them as they are; call it after the
    model's own pass in training, which would change them under a gradient that is still to come.
    Images are what the model takes, and derivatives per [0, 1] pixel (`pixel_std`). They run in
    float32, uncompiled and, of timm's models, without activation checkpointing; checkpointing in
    code of your own is not differentiated twice. With gradient accumulation, call it in one of the
    micro-batches only, as `SpectralPenalty`; with several processes each has its own images.

    Args:
        model: a timm model, a transformers vision model, a `SpecRegModel`, or any module together
            with `head`; also inside DistributedDataParallel or torch.compile. Or a `FeatureSpace`.
        strength: what the term is multiplied by.
        burn_in: the first `burn_in` calls give 0.
        ramp: calls after the burn-in in which the strength rises linearly from 0.
        input_size: (C, H, W) of the images; default: the model's own configuration.
        head: dotted name or names of the head, () for a model that is all encoder; default: found
            for timm and transformers.
        pixel_std: by what the images were divided when they were normalised, in [0, 1] pixels, a
            number or one of each channel, such as `processor.image_std` of transformers; default:
            of a timm model what its `pretrained_cfg` says, with a warning if the first images are
            in [0, 1] all the same (1 says so), of a `SpecRegModel` nothing, since it takes images
            in [0, 1]. Other models must say it.
        seed: of what is random; torch's own random numbers are left alone.
        **settings: those of `kind`, and `every`.

    Attributes:
        kind: how its settings are called in recipes.
        settings: all of them, as recipes have them.
        step: how many times it was called.

    Raises:
        ValueError: a setting is out of range, the head, the input size or the pixel_std is not
            known, or the term is of labels and there is no head of two outputs or more; in a call,
            the images are integers, the first batch has fewer than were asked for, or labels are
            not there or are no classes.
        RuntimeError: it is called where no gradient is recorded.
    """

    kind: ClassVar[type[RegularizerConfig]]
    __reduce_ex__ = of_its_model

    def __init__(
        self,
        model: nn.Module | FeatureSpace,
        *,
        strength: float,
        burn_in: int = 0,
        ramp: int = 0,
        input_size: tuple[int, int, int] | None = None,
        head: str | Sequence[str] | None = None,
        pixel_std: float | Sequence[float] | None = None,
        seed: int = 0,
        **settings: Any,
    ):
        for name in sorted({*BURN_INS, "ramp_epochs"} & set(settings)):
            own = "ramp" if name == "ramp_epochs" else "burn_in"
            raise ValueError(f"{name} is of recipes: pass {own}, which counts calls")
        self.settings = self.kind(strength, burn_in_steps=burn_in, **settings)
        self.space = FeatureSpace.of(model, head=head, input_size=input_size)
        self._in_pixels = in_pixels(self.space, pixel_std)
        if self.kind.of_labels and not self.space.head:
            raise ValueError(
                f"{type(self).__name__} is of labels, and this encoder has no head to tell them: "
                "take SensitivityPenalty"
            )
        self.seed = seed
        self.step = 0
        self._least = settings.get("images") or 1  # that were asked for
        self._generator = torch.Generator()
        every, compute = self.settings.every, self._compute()
        self._term = Regularizer(
            type(self).__name__, strength, every, burn_in, False, compute, ramp=ramp
        )

    @property
    def strength(self) -> float:
        """What the term is multiplied by; it may be set between steps.

        Raises:
            ValueError: set to what is negative or no number.
        """
        return self.settings.strength

    @strength.setter
    def strength(self, value: float) -> None:
        self.settings = replace(self.settings, strength=value)
        self._term = replace(self._term, strength=value)

    def _compute(self) -> Compute:
        """Return the term, of which `_generator` decides what is random."""
        return self.settings.term(self._in_pixels)

    @torch.compiler.disable  # the count of steps must not be compiled in
    def _at(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """Count a step; return the penalty, 0-d: 0 in burn-in, at strength 0, between cadences."""
        name = type(self).__name__
        check_batch(name, images, labels, of_labels=self.kind.of_labels)
        self._in_pixels.model.check(images)
        if len(images) < self._least:
            raise ValueError(
                f"{name} is of {self._least} images, and the first batch has {len(images)}: pass "
                f"larger batches, or images={len(images)} when it is made"
            )
        self._least = 1  # the rest of an epoch may be smaller
        step, self.step = self.step, self.step + 1
        if not self._term.due(step):
            return full_precision(images.new_zeros(()))
        warn_of_frozen(name, self.settings, self.space)
        # Of the place in the training, so that the count is all that there is to resume from.
        self._generator.manual_seed(self.seed + step)
        return self._term(self._in_pixels.model.pixels(images), labels, (), step=step)

    def state_dict(self) -> dict[str, int]:
        """Return the count: with it, a resumed run goes on bit for bit."""
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Take over the count."""
        self.step = state["step"]


class InputGradientPenalty(ImagePenalty):
    """strength * mean norm of the cross-entropy's gradient with respect to the image, as a term.

    Call it once per optimizer step and add what it returns to the loss:

        penalty = InputGradientPenalty(model, strength=0.05, images=8)
        loss = criterion(model(images), labels) + penalty(images, labels)

    What it is of, its arguments and its state are those of `ImagePenalty`; further ones are `norm`,
    `images`, `by` and `step` of `InputGradientConfig`. A part of the batch is enough, such as 8
    images of 128 (`docs/results.md`, cifar10). It costs a forward and a backward pass over those
    images, and in `loss.backward()` the derivative of both; by finite differences two forward
    passes and a backward one.
    """

    kind = InputGradientConfig

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        """Count a step and return the penalty, 0-d and differentiable; 0 in burn-in and between
        cadences.

        Args:
            images: [B, C, H, W], as the model expects them: in [0, 1] for a `SpecRegModel`.
            labels: [B], the true classes, int64. Images with -100, which the cross-entropy ignores,
                count in the mean with a gradient of 0.

        Raises:
            ValueError, RuntimeError: as for `ImagePenalty`.
        """
        return self._at(images, labels)


class SensitivityPenalty(ImagePenalty):
    """strength * mean of log ||J^T u|| - log spread over images, as a loss term; no labels.

    Call it once per optimizer step and add what it returns to the loss:

        penalty = SensitivityPenalty(model, strength=0.1)
        loss = criterion(model(images), labels) + penalty(images)

    What it is of, its arguments and its state are those of `ImagePenalty`; further ones are
    `direction`, `spread`, `images`, `power_steps`, `by` and `step` of `SensitivityConfig`.

    It costs passes over the images: by double backprop a forward and a backward pass, and in
    `loss.backward()` the derivative of both; by finite differences a second forward pass in the
    place of second derivatives. Each power step of "top" adds a backward and a forward pass. The
    head gets no gradient from it.

    Raises:
        ValueError: as for `ImagePenalty`, or a "margin" is asked for of a head that is not one
            linear layer.
    """

    kind = SensitivityConfig

    def _compute(self) -> Compute:
        return self.settings.term(self._in_pixels, generator=self._generator)

    def __call__(self, images: Tensor) -> Tensor:
        """Count a step and return the penalty, 0-d and differentiable; 0 in burn-in and between
        cadences, and with a warning of a single image, which has no spread.

        Args:
            images: [B, C, H, W], as the model expects them: in [0, 1] for a `SpecRegModel`.

        Raises:
            ValueError, RuntimeError: as for `ImagePenalty`.
        """
        return self._at(images)
