"""What is trained, and the loss over a batch; the supervised one.

An objective is a module that holds the encoder and whatever else is trained with it. It is called
with images in [0, 1] and labels, and returns the loss, 0-d.
"""

import torch
import torch.nn.functional as F
from timm.data import Mixup
from torch import Tensor, nn

from hf_specreg.data.transforms import AugmentConfig
from hf_specreg.encoders.model import SpecRegModel
from hf_specreg.training.adversarial import AdversarialConfig, adversarial_loss


class Objective(nn.Module):
    """What the objectives share.

    Args:
        encoder: the model that is trained and kept.

    Attributes:
        features: [B, D] each, that the latest loss was computed from, with their graph.
    """

    def __init__(self, encoder: SpecRegModel):
        super().__init__()
        self.encoder = encoder
        self.features: list[Tensor] = []

    def train(self, mode: bool = True) -> "Objective":
        """Set the mode; what is frozen stays in evaluation mode."""
        super().train(mode)
        for module in self.encoder.modules():
            parameters = list(module.parameters())
            if parameters and not any(p.requires_grad for p in parameters):
                module.eval()
        return self

    def after_step(self, progress: float) -> None:
        """Move what follows the weights; called after every optimizer step.

        Args:
            progress: of the whole training, in (0, 1].
        """


class Supervised(Objective):
    """Cross-entropy, with timm's mixup, cutmix and label smoothing.

    Args:
        encoder: with a head.
        augment: mixup, cutmix and label_smoothing are read.
        adversarial: of adversarial images, or not; see `hf_specreg.training.adversarial`.
    """

    def __init__(
        self,
        encoder: SpecRegModel,
        *,
        augment: AugmentConfig,
        adversarial: AdversarialConfig | None = None,
    ):
        super().__init__(encoder)
        self.adversarial = adversarial or AdversarialConfig()
        self.label_smoothing = augment.label_smoothing
        self.mixup = None
        if augment.mixup or augment.cutmix:
            self.mixup = Mixup(
                mixup_alpha=augment.mixup,
                cutmix_alpha=augment.cutmix,
                label_smoothing=augment.label_smoothing,
                num_classes=encoder.num_classes,
            )
        features = self.features  # of the hook, which copies of the encoder share: not self

        def keep(head: nn.Module, inputs: tuple) -> None:
            if head.training and torch.is_grad_enabled():
                features.append(inputs[0].flatten(1))

        encoder.network.get_submodule(encoder.head[0]).register_forward_pre_hook(keep)

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        """Return the mean loss, 0-d; mixup draws from numpy's global random numbers.

        Args:
            images: [B, C, H, W].
            labels: [B].
        """
        self.features.clear()
        smoothing = self.label_smoothing
        if self.mixup is not None:  # it smooths too; in place, and the regularizers' are unmixed
            (images, labels), smoothing = self.mixup(images.clone(), labels), 0.0

        def criterion(logits: Tensor) -> Tensor:
            return F.cross_entropy(logits, labels[: len(logits)], label_smoothing=smoothing)

        if self.adversarial.method == "none":
            return criterion(self.encoder(images))
        return adversarial_loss(self.encoder, criterion, images, self.adversarial)
