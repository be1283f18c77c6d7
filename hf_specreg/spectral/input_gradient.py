"""The norm of the loss's gradient with respect to the image as a loss term.

    penalty = strength * mean over images of ||grad_x loss(x, y)||

What that is, and where it is from: `regularizers/input_gradient.py`.
"""

from torch import Tensor

from hf_specreg.spectral.image_penalty import ImagePenalty
from hf_specreg.spectral.regularizers.input_gradient import InputGradientConfig


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
