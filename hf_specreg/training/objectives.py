"""What is trained, and the loss over a batch: supervised, and four self-supervised methods.

An objective is a module that holds the encoder and whatever else is trained with it. It is called
with images in [0, 1] and labels, and returns the loss, 0-d. Losses that compare images with each
other see the embeddings of all processes; with accumulation, those of a micro-batch.

    barlow-twins  sum_i (1 - C_ii)^2 + lambda sum_{i != j} C_ij^2, C the views' cross-correlation
    simclr        cross-entropy of finding the other view among all others, by cosine / temperature
    vicreg        25 invariance + 25 variance + covariance
    byol          1 - cosine of the prediction with a slowly following teacher's embedding

Losses and projection heads are lightly's (extra `ssl`). They are computed in float32 also under
mixed precision.
"""

import copy
import math
from importlib import import_module
from types import ModuleType

import torch
import torch.nn.functional as F
from timm.data import Mixup
from torch import Tensor, nn

from hf_specreg.encoders.model import SpecRegModel
from hf_specreg.encoders.modules import evaluating
from hf_specreg.spectral.operators import full_precision
from hf_specreg.training.config import AugmentConfig, SelfSupervisedConfig
from hf_specreg.training.distributed import gathered


class Objective(nn.Module):
    """What the objectives share.

    Args:
        encoder: the model that is trained and kept.
        keep_batch_norm: leave the encoder's batch norms in evaluation mode, with the statistics
            that they have.

    Attributes:
        features: [B, D] each, that the latest loss was computed from, with their graph.
    """

    def __init__(self, encoder: SpecRegModel, *, keep_batch_norm: bool = False):
        super().__init__()
        self.encoder = encoder
        self.keep_batch_norm = keep_batch_norm
        self.features: list[Tensor] = []

    def train(self, mode: bool = True) -> "Objective":
        """Set the mode; what is frozen stays in evaluation mode."""
        super().train(mode)
        for module in self.encoder.modules():
            parameters = list(module.parameters())
            frozen = parameters and not any(p.requires_grad for p in parameters)
            kept = self.keep_batch_norm and isinstance(module, nn.modules.batchnorm._BatchNorm)
            if frozen or kept:
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
        keep_batch_norm: see `Objective`.
    """

    def __init__(
        self, encoder: SpecRegModel, *, augment: AugmentConfig, keep_batch_norm: bool = False
    ):
        super().__init__(encoder, keep_batch_norm=keep_batch_norm)
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
        if self.mixup is None:
            logits = self.encoder(images)
            return F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
        images, targets = self.mixup(images, labels)
        return F.cross_entropy(self.encoder(images), targets)


class SelfSupervised(Objective):
    """Two views of each image shall have embeddings that agree, or that predict each other.

    Args:
        encoder: without a head; the projector on it is thrown away after the training.
        config: the method and its settings.

    Raises:
        ValueError: the encoder has a head.
        ImportError: lightly is not installed.

    Source: Zbontar et al. 2021 (Barlow Twins), Chen et al. 2020 (SimCLR), Bardes et al. 2022
    (VICReg), Grill et al. 2020 (BYOL).
    """

    def __init__(self, encoder: SpecRegModel, config: SelfSupervisedConfig):
        super().__init__(encoder)
        if encoder.head:
            raise ValueError("self-supervision trains an encoder without a head: num_classes=0")
        self.config = config
        loss, heads = lightly("loss"), lightly("models.modules.heads")
        width = feature_width(encoder)
        sizes = (width, config.projector_hidden, config.projector_out)
        self.predictor = self.teacher = None
        if config.method == "barlow-twins":
            self.projector = heads.BarlowTwinsProjectionHead(*sizes)
            self.criterion = loss.BarlowTwinsLoss(lambda_param=config.off_diagonal)
        elif config.method == "simclr":
            self.projector = heads.SimCLRProjectionHead(*sizes)
            self.criterion = loss.NTXentLoss(temperature=config.temperature)
        elif config.method == "vicreg":
            self.projector = heads.VICRegProjectionHead(*sizes)
            self.criterion = loss.VICRegLoss()
        else:
            self.projector = heads.BYOLProjectionHead(*sizes)
            self.predictor = heads.BYOLPredictionHead(sizes[2], sizes[1], sizes[2])
            self.criterion = loss.NegativeCosineSimilarity()
            teacher = nn.ModuleList([encoder, self.projector])
            self.teacher = copy.deepcopy(teacher).requires_grad_(False)

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        """Return the loss, 0-d.

        Args:
            images: [B, 2, C, H, W], two views.
            labels: [B]; not read.
        """
        views = images.unbind(1)
        self.features = [self.encoder(view) for view in views]
        embeddings = [self.projector(features) for features in self.features]
        with torch.autocast(images.device.type, enabled=False):
            if self.teacher is None:
                return self.criterion(*(gathered(full_precision(z)) for z in embeddings))
        encoder, projector = self.teacher
        with torch.no_grad():
            targets = [projector(encoder(view)) for view in reversed(views)]
        predictions = [self.predictor(z) for z in embeddings]
        with torch.autocast(images.device.type, enabled=False):
            terms = [
                1 + self.criterion(full_precision(p), full_precision(z))
                for p, z in zip(predictions, targets, strict=True)
            ]
            return torch.stack(terms).mean()

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        """Move the teacher towards the encoder, ever more slowly (Grill et al. 2020, sec. 3.2)."""
        if self.teacher is None:
            return
        slack = (1 - self.config.teacher_momentum) * (math.cos(math.pi * progress) + 1) / 2
        student = nn.ModuleList([self.encoder, self.projector])
        lightly("models.utils").update_momentum(student, self.teacher, 1 - slack)


def lightly(module: str) -> ModuleType:
    """Import a module of lightly's.

    Raises:
        ImportError: it is not installed; says how.
    """
    try:
        return import_module(f"lightly.{module}")
    except ModuleNotFoundError as error:
        raise ImportError(
            "self-supervision needs lightly: pip install 'hf-specreg[ssl]'"
        ) from error


@torch.no_grad()
def feature_width(encoder: SpecRegModel) -> int:
    """Return D, the number of features."""
    parameter = next(encoder.parameters())
    with evaluating(encoder):
        images = torch.zeros(1, *encoder.input_size, device=parameter.device)
        return encoder.features(images).shape[1]
