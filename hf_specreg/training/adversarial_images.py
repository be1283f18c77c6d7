"""Adversarial images for a training loop of one's own."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_specreg.encoders.features import FeatureSpace
from hf_specreg.encoders.pixels import in_pixels
from hf_specreg.spectral.regularizers.term import check_batch
from hf_specreg.training.adversarial import AdversarialConfig, crafting, perturbed


class AdversarialImages:
    """Moves the first images of each batch to where the cross-entropy is larger, within eps.

    Train on what it returns, in the place of the batch:

        adversarial = AdversarialImages(model, eps=0.5, images=8)  # of each batch
        loss = criterion(model(adversarial(images, labels)), labels)

    A part of the batch is enough for most of the gain (`docs/results.md`, cifar10): one step costs
    a forward and a backward pass over the images that are moved. They are moved as
    `adversarial.method: pgd` of recipes moves them, from a random start, with the model as it is
    but in evaluation mode. It changes nothing of the model, and draws from torch's random numbers.

    Args:
        model: a classifier, as for `SpectralPenalty`.
        eps: how far an image is moved at most, in [0, 1] pixels.
        images: how many of each batch are moved, the first; default: all.
        norm: of eps, "l2" or "linf".
        steps: of projected gradient ascent.
        head: as for `FeatureSpace.of`, of a model of your own.
        input_size: (C, H, W), likewise.
        pixel_std: by what images were divided when they were normalised; see `ImagePenalty`. Images
            that were may leave the range of pixels, by less than eps.
        **settings: step_size and batch_norm of `AdversarialConfig`.

    Raises:
        ValueError: a setting is out of range, or the head, the input size or the pixel_std is not
            known; in a call, as for `InputGradientPenalty`.

    Source: Madry et al. 2018; of one step Wong, Rice, Kolter 2020.
    """

    def __init__(
        self,
        model: nn.Module | FeatureSpace,
        *,
        eps: float,
        images: int | None = None,
        norm: str = "l2",
        steps: int = 1,
        head: str | Sequence[str] | None = None,
        input_size: tuple[int, int, int] | None = None,
        pixel_std: float | Sequence[float] | None = None,
        **settings: Any,
    ):
        self.settings = AdversarialConfig("pgd", norm, eps, steps, images=images, **settings)
        space = FeatureSpace.of(model, head=head, input_size=input_size)
        if not space.head:
            raise ValueError(
                "AdversarialImages is of labels, and this encoder has no head for them"
            )
        self._in_pixels = in_pixels(space, pixel_std)

    @torch.compiler.disable
    @torch.enable_grad()
    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        """Return the batch with its first images moved, detached.

        Args:
            images: [B, C, H, W], as the model takes them: in [0, 1] for a `SpecRegModel`.
            labels: [B], the true classes, int64.
        """
        check_batch(type(self).__name__, images, labels, of_labels=True)
        model, first = self._in_pixels.model, images[: self.settings.images]
        model.check(images)
        labels = labels[: len(first)]

        def loss(pixels: Tensor) -> Tensor:
            return F.cross_entropy(self._in_pixels.logits(pixels), labels)

        with crafting(model, self.settings):
            moved = perturbed(loss, model.pixels(first), self.settings)
        return torch.cat([model.as_taken(moved).to(images), images[len(first) :]])
