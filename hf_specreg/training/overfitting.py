"""Whether a training on adversarial images of one step overfits that step."""

import logging
from dataclasses import replace
from itertools import islice

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset

from hf_specreg.spectral.precision import full_precision
from hf_specreg.training.adversarial import PGD_STEPS, AdversarialConfig, crafting, perturbed
from hf_specreg.training.features import evaluation_loader
from hf_specreg.training.metrics import Score

logger = logging.getLogger(__name__)
CHECKED = 300  # validation images, at most
DROP = 0.2  # by which accuracy falls under PGD where Wong et al. stop the training


class OverfittingCheck:
    """Beside a score: the accuracy under the one step that is trained with, and under PGD.

    FGSM's training can overfit its one step: accuracy under the step stays or rises while that
    under PGD falls to 0. It is warned of once, where accuracy under PGD (10 steps of the same eps)
    is less than half of that under the step, and lower by 20 points or more; 20 points is what Wong
    et al. stop a training at. The images are 300 at most, spread evenly over the set.

    Args:
        score: what else is said of the encoder.
        config: of the training; it is of one step.

    Source: Wong, Rice, Kolter, "Fast is better than free: Revisiting adversarial training",
    ICLR 2020, sec. 5.4.
    """

    def __init__(self, score: Score, config: AdversarialConfig):
        self.score = score
        self.step = config
        self.pgd = replace(config, method="pgd", steps=PGD_STEPS, step_size=None)
        self.said = False

    def __call__(
        self, encoder: nn.Module, loader: DataLoader, accelerator: Accelerator
    ) -> dict[str, float]:
        """Return the score, with "fgsm_accuracy" and "pgd_accuracy"."""
        scores = self.score(encoder, loader, accelerator)
        some = evaluation_loader(_some(loader.dataset), accelerator, batch_size=50)
        step, pgd = (_robust_accuracy(encoder, some, accelerator, c) for c in (self.step, self.pgd))
        if pgd < step / 2 and step - pgd >= DROP and not self.said:
            self.said = True
            if accelerator.is_main_process:
                logger.warning(
                    "catastrophic overfitting: accuracy is %.1f %% under the FGSM step that is "
                    "trained with and %.1f %% under %d PGD steps of the same eps. Train anew with "
                    "adversarial.method pgd, or a smaller adversarial.step_size or eps",
                    *(100 * step, 100 * pgd, PGD_STEPS),
                )
        return {**scores, "fgsm_accuracy": step, "pgd_accuracy": pgd}


def _some(images: Dataset) -> Dataset:
    if isinstance(images, IterableDataset):
        return list(islice(images, CHECKED))
    return Subset(images, range(0, len(images), -(-len(images) // CHECKED)))


def _robust_accuracy(
    encoder: nn.Module, loader: DataLoader, accelerator: Accelerator, config: AdversarialConfig
) -> float:
    right = []
    for images, labels in loader:
        with accelerator.autocast():
            standing = _standing(encoder, images.float() / 255, labels, config)
        right.append(accelerator.gather_for_metrics(standing))
    return torch.cat(right).float().mean().item()


def _standing(
    encoder: nn.Module, images: Tensor, labels: Tensor, config: AdversarialConfig
) -> Tensor:
    """Which images are classified as their labels when they are moved, [B]."""
    with crafting(encoder, config):
        moved = perturbed(
            lambda x: F.cross_entropy(full_precision(encoder(x)), labels), images, config
        )
    with torch.no_grad():
        return encoder(moved).argmax(1) == labels
