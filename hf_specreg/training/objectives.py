"""Losses over a batch. An objective is called with the model, images [B, C, H, W] in [0, 1] and labels [B]."""

from collections.abc import Callable

import torch.nn.functional as F
from timm.data import Mixup
from torch import Tensor, nn

from hf_specreg.data.transforms import seeded
from hf_specreg.training.config import AugmentConfig

Objective = Callable[..., Tensor]


class Supervised:
    """Cross-entropy, with timm's mixup, cutmix and label smoothing.

    Args:
        num_classes: of the head.
        augment: mixup, cutmix and label_smoothing are read.
        seed: of what is mixed, together with the key of the call.
    """

    def __init__(self, num_classes: int, *, augment: AugmentConfig, seed: int = 0):
        self.seed = seed
        self.label_smoothing = augment.label_smoothing
        self.mixup = None
        if augment.mixup or augment.cutmix:
            self.mixup = Mixup(
                mixup_alpha=augment.mixup,
                cutmix_alpha=augment.cutmix,
                label_smoothing=augment.label_smoothing,
                num_classes=num_classes,
            )

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor, *, key: tuple[int, ...]) -> Tensor:
        """Return the mean loss, 0-d; what is mixed depends on (seed, *key) alone."""
        if self.mixup is None:
            return F.cross_entropy(model(images), labels, label_smoothing=self.label_smoothing)
        with seeded(self.seed, *key):
            images, targets = self.mixup(images, labels)
        return F.cross_entropy(model(images), targets)
