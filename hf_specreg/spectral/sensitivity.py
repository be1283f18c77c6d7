"""The sensitivity of a model's features as a loss term.

    penalty = strength * mean over images of [log ||J^T u|| - log spread]

with J the Jacobian of the features with respect to the image and u a direction in the feature
space. What that is, and which rescalings leave it as it is: `regularizers/sensitivity.py`.
"""

from torch import Tensor

from hf_specreg.spectral.image_penalty import ImagePenalty
from hf_specreg.spectral.regularizers.sensitivity import SensitivityConfig
from hf_specreg.spectral.regularizers.term import Compute


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
