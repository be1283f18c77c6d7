"""Losses over a batch.

An objective is called with the model, images [B, C, H, W] in [0, 1] and labels [B].
"""

from collections.abc import Callable

import torch.nn.functional as F
from timm.data import Mixup
from torch import Tensor, nn

from hf_specreg.training.config import AugmentConfig

Objective = Callable[[nn.Module, Tensor, Tensor], Tensor]


class Supervised:
    """Cross-entropy, with timm's mixup, cutmix and label smoothing.

    Args:
        num_classes: of the head.
        augment: mixup, cutmix and label_smoothing are read.
    """

    def __init__(self, num_classes: int, *, augment: AugmentConfig):
        self.label_smoothing = augment.label_smoothing
        self.mixup = None
        if augment.mixup or augment.cutmix:
            self.mixup = Mixup(
                mixup_alpha=augment.mixup,
                cutmix_alpha=augment.cutmix,
                label_smoothing=augment.label_smoothing,
                num_classes=num_classes,
            )

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        """Return the mean loss, 0-d; mixup draws from numpy's global random numbers."""
        if self.mixup is None:
            return F.cross_entropy(model(images), labels, label_smoothing=self.label_smoothing)
        images, targets = self.mixup(images, labels)
        return F.cross_entropy(model(images), targets)
