"""Self-supervised objectives: two views of an image have embeddings that agree, or predict others.

    barlow-twins  sum_i (1 - C_ii)^2 + lambda sum_{i != j} C_ij^2, C the views' cross-correlation
    simclr        cross-entropy of finding the other view among all others, by cosine / temperature
    vicreg        25 invariance + 25 variance + covariance
    byol          1 - cosine of the prediction with a slowly following teacher's embedding

Losses and projection heads are lightly's (extra `ssl`). The losses are computed in float32 also
under mixed precision. Those that compare images with each other see the embeddings of all
processes; with accumulation, those of a micro-batch.

With an adversary (ACL's simplest form, Jiang et al. 2020: one adversarial view and one that is not)
the first view is moved to where the loss of both is large, by fgsm or pgd, and the loss of the
moved view and the other is trained. BYOL's teacher is held fixed meanwhile.
"""

import copy
import math
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor, nn

from hf_specreg.encoders.model import SpecRegModel
from hf_specreg.encoders.modules import evaluating
from hf_specreg.ranges import require
from hf_specreg.spectral.precision import full_precision
from hf_specreg.training.adversarial import AdversarialConfig, crafting, perturbed
from hf_specreg.training.distributed import gathered
from hf_specreg.training.objectives import Objective


@dataclass(frozen=True)
class SelfSupervisedConfig:
    """A self-supervised method; `hf_specreg.training.objectives` has the losses.

    Args:
        method: loss and heads: "barlow-twins", "simclr", "vicreg" or "byol".
        projector_hidden: width of the projector, which is thrown away after the training.
        projector_out: width of the embeddings.
        off_diagonal: lambda of Barlow Twins, the weight of the off-diagonal correlations.
        temperature: what SimCLR divides cosines by.
        teacher_momentum: momentum of BYOL's teacher at first; 1 at the end.
        neighbours: images that vote on a class in the online measure of the features.
        bank: training images that the neighbours are drawn from.
    """

    method: Literal["barlow-twins", "simclr", "vicreg", "byol"] = "barlow-twins"
    projector_hidden: int = 256
    projector_out: int = 256
    off_diagonal: float = 5e-3
    temperature: float = 0.07
    teacher_momentum: float = 0.99
    neighbours: int = 20
    bank: int = 5000

    def __post_init__(self):
        require(self, "at least 1", "projector_hidden", "projector_out", "neighbours", "bank")
        require(self, "positive", "temperature")
        require(self, "not negative", "off_diagonal")
        require(self, "in [0, 1]", "teacher_momentum")


class SelfSupervised(Objective):
    """Two views of each image shall have embeddings that agree, or that predict each other.

    Args:
        encoder: without a head; the projector on it is thrown away after the training.
        config: the method and its settings.
        adversarial: whether and how the first view is made adversarial.

    Raises:
        ValueError: the encoder has a head, or the adversarial method needs one.
        ImportError: lightly is not installed.

    Source: Zbontar et al. 2021 (Barlow Twins), Chen et al. 2020 (SimCLR), Bardes et al. 2022
    (VICReg), Grill et al. 2020 (BYOL), Jiang et al. 2020 (adversarial contrastive learning).
    """

    def __init__(
        self,
        encoder: SpecRegModel,
        config: SelfSupervisedConfig,
        *,
        adversarial: AdversarialConfig | None = None,
    ):
        super().__init__(encoder)
        self.adversarial = adversarial or AdversarialConfig()
        self.adversarial.check_takes_views()
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
        first, second = images.unbind(1)
        if self.adversarial.method != "none":
            with crafting(self, self.adversarial):
                first = perturbed(lambda x: self._loss(x, second), first, self.adversarial)
        return self._loss(first, second)

    def _loss(self, *views: Tensor) -> Tensor:
        self.features = [self.encoder(view) for view in views]
        embeddings = [self.projector(features) for features in self.features]
        device = views[0].device.type
        with torch.autocast(device, enabled=False):
            if self.teacher is None:
                return self.criterion(*(gathered(full_precision(z)) for z in embeddings))
        encoder, projector = self.teacher
        with torch.no_grad():
            targets = [projector(encoder(view)) for view in reversed(views)]
        predictions = [self.predictor(z) for z in embeddings]
        with torch.autocast(device, enabled=False):
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
        raise ImportError("self-supervision needs lightly: install the extra ssl") from error


@torch.no_grad()
def feature_width(encoder: SpecRegModel) -> int:
    """Return D, the number of features."""
    parameter = next(encoder.parameters())
    with evaluating(encoder):
        images = torch.zeros(1, *encoder.input_size, device=parameter.device)
        return encoder.features(images).shape[1]
