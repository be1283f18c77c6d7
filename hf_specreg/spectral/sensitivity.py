"""The sensitivity of a model's features as a loss term, with its life cycle.

    penalty = strength * mean over images of [log ||J^T u|| - log spread]

with J the Jacobian of the features by the image and u a direction in the feature space. What that
is, and which rescalings leave it as it is: `regularizers/sensitivity.py`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_specreg.encoders.features import FeatureSpace
from hf_specreg.spectral.precision import full_precision
from hf_specreg.spectral.regularizers.sensitivity import SensitivityConfig
from hf_specreg.spectral.regularizers.term import Regularizer


class SensitivityPenalty:
    """strength * mean of log ||J^T u|| - log spread over images, as a loss term; no labels.

    Call it once per optimizer step and add what it returns to the loss:

        penalty = SensitivityPenalty(model, strength=0.1)
        loss = criterion(model(images), labels) + penalty(images)

    It is of a batch's first images (`images`), in evaluation mode: batch norms use their running
    statistics and leave them as they are. It costs passes over them: by double backprop a forward
    and a backward pass, and in `loss.backward()` the derivative of both; by finite differences a
    second forward pass in the place of second derivatives. Each power step of "top" adds a backward
    and a forward pass. They run uncompiled and, of timm's models, without activation checkpointing;
    checkpointing in code of your own is not derived twice. The head gets no gradient from it. The
    arithmetic is that of the weights, also under autocast. With gradient accumulation, call it in
    one of the micro-batches only, as `SpectralPenalty`; with several processes each has its own
    images.

    Args:
        model: a timm model, a transformers vision model, a `SpecRegModel`, or any module together
            with `head`; also inside DistributedDataParallel or torch.compile. Or a `FeatureSpace`.
        strength: what the mean is multiplied by.
        burn_in: the first `burn_in` calls give 0.
        ramp: calls after the burn-in in which the strength rises linearly from 0.
        input_size: (C, H, W) of the images; default: the model's own configuration.
        head: dotted name or names of the head, () for a model that is all encoder; default: found
            for timm and transformers.
        seed: of the first directions; torch's own random numbers are left alone.
        **settings: `every`, `direction`, `spread`, `images`, `power_steps`, `by` and `step`, as
            `SensitivityConfig` describes them.

    Attributes:
        settings: all of it, as recipes have it under `regularizers.sensitivity`.
        step: how many times it was called.

    Raises:
        ValueError: a setting is out of range, the head or the input size is not known, or a
            "margin" is asked for of a head that is not one linear layer.
    """

    def __init__(
        self,
        model: nn.Module | FeatureSpace,
        *,
        strength: float,
        burn_in: int = 0,
        ramp: int = 0,
        input_size: tuple[int, int, int] | None = None,
        head: str | Sequence[str] | None = None,
        seed: int = 0,
        **settings: Any,
    ):
        self.settings = SensitivityConfig(strength, burn_in_steps=burn_in, **settings)
        if ramp < 0 or self.settings.ramp_epochs:
            raise ValueError(f"ramp ({ramp}) counts calls, at least 0; ramp_epochs is of recipes")
        self.space = FeatureSpace.of(model, head=head, input_size=input_size)
        self.seed = seed
        self.step = 0
        self._generator = torch.Generator()
        self._term = Regularizer(
            "sensitivity",
            strength,
            self.settings.every,
            burn_in,
            of_weights=False,
            compute=self.settings.term(self.space, generator=self._generator),
            ramp=ramp,
        )

    @torch.compiler.disable  # the count of steps must not be compiled in
    def __call__(self, images: Tensor) -> Tensor:
        """Count a step and return the penalty, 0-d and differentiable; 0 in burn-in and between
        cadences.

        Args:
            images: [B, C, H, W], as the model expects them: in [0, 1] for a `SpecRegModel`.

        Raises:
            ValueError: there are fewer than 2 images.
        """
        step, self.step = self.step, self.step + 1
        if not self._term.due(step):
            return full_precision(images.new_zeros(()))
        # Of the place in the training, so that the count is all that there is to resume from.
        self._generator.manual_seed(self.seed + step)
        return self._term(images, None, (), step=step)

    def __reduce_ex__(self, protocol: int) -> None:
        raise TypeError(
            "a penalty belongs to its model and cannot be copied or pickled: make one for the "
            "other model, and give it the state_dict() of this one"
        )

    def state_dict(self) -> dict[str, int]:
        """Return the count: with it, a resumed run goes on bit for bit."""
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Take over the count."""
        self.step = state["step"]
