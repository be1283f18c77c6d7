"""How good features are while an encoder without a head learns: neighbours, collapse.

Features are [N, D], of un-augmented images.
"""

import logging
import math

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from hf_specreg.encoders.model import SpecRegModel
from hf_specreg.training.features import collect_features, features_of
from hf_specreg.training.self_supervision import lightly

logger = logging.getLogger(__name__)
COLLAPSED_DEVIATION, COLLAPSED_RANK = 0.02, 2.0


def knn_accuracy(
    bank: tuple[Tensor, Tensor],
    queries: tuple[Tensor, Tensor],
    *,
    neighbours: int = 20,
    temperature: float = 0.07,
) -> float:
    """Return the accuracy of a vote of the nearest features, weighted by exp(cosine / temperature).

    Args:
        bank: features [M, D] and labels [M].
        queries: features [N, D] and labels [N].
        neighbours: that vote; all of a smaller bank.
        temperature: of the weights.

    Source: Wu et al., "Unsupervised Feature Learning via Non-Parametric Instance Discrimination",
    CVPR 2018, sec. 3.4.
    """
    predict = lightly("utils.benchmarking").knn_predict
    directions, classes = F.normalize(bank[0], dim=1).T, int(bank[1].max()) + 1
    votes = {"knn_k": min(neighbours, len(bank[0])), "knn_t": temperature}
    right = 0
    for features, labels in zip(queries[0].split(1000), queries[1].split(1000), strict=True):
        features = F.normalize(features, dim=1)
        predicted = predict(features, directions, bank[1], classes, **votes)[:, 0]
        right += predicted.eq(labels).sum().item()
    return right / len(queries[0])


def feature_deviation(features: Tensor) -> float:
    """Return sqrt(D) times the mean standard deviation of the normalised features' entries.

    About 1 for directions spread evenly over the sphere, 0 where all are the same.

    Args:
        features: [N, D].

    Source: Chen, He, "Exploring Simple Siamese Representation Learning", CVPR 2021, sec. 4.1.
    """
    deviation = lightly("utils.debug").std_of_l2_normalized(features)
    return (deviation * features.shape[1] ** 0.5).item()


def effective_rank(features: Tensor) -> float:
    """Return exp of the entropy of the centred features' normalised singular values, 1 to D.

    Features that do not vary at all have effective rank 1, those that are not finite NaN.

    Args:
        features: [N, D].

    Source: Roy, Vetterli, "The effective rank", EUSIPCO 2007; Garrido et al., "RankMe", ICML 2023,
    which does not centre. Centred, a constant does not count as a direction.
    """
    if not features.isfinite().all():
        return math.nan
    centred = (features - features.mean(0)).double()
    gram = centred.T @ centred if len(centred) > centred.shape[1] else centred @ centred.T
    sigmas = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()
    noise = torch.finfo(features.dtype).eps * features.double().norm()
    if sigmas[-1] <= noise:
        return 1.0
    shares = sigmas / sigmas.sum()
    return torch.special.entr(shares).sum().exp().item()


class NeighbourScores:
    """What is said of an encoder without a head after each epoch of a self-supervised training.

    A collapsed encoder, one whose features say next to nothing of the image, is warned of.

    Args:
        bank: of (uint8 image, label), un-augmented training images.
        neighbours: that vote.
        batch_size: images a process and batch.
        num_workers: that load the bank.
    """

    def __init__(self, bank: Dataset, *, neighbours: int, batch_size: int, num_workers: int = 0):
        self.bank = bank
        self.neighbours = neighbours
        self.loading = {"batch_size": batch_size, "num_workers": num_workers}

    def __call__(
        self, encoder: SpecRegModel, loader: DataLoader, accelerator: Accelerator
    ) -> dict[str, float]:
        """Return the neighbours' accuracy, deviation and effective rank of the features, whether
        they have collapsed, and how many images.
        """
        bank = features_of(encoder, self.bank, accelerator, **self.loading)
        queries = collect_features(encoder, loader, accelerator)
        deviation, rank = feature_deviation(queries[0]), effective_rank(queries[0])
        collapsed = deviation < COLLAPSED_DEVIATION or rank < COLLAPSED_RANK
        if collapsed and accelerator.is_main_process:
            logger.warning(
                "the features have collapsed: their deviation is %.2g (1 is spread evenly, below "
                "%g collapsed), their effective rank %.3g (below %g collapsed). Lower the learning "
                "rate or penalty.strength, or take a larger batch",
                *(deviation, COLLAPSED_DEVIATION, rank, COLLAPSED_RANK),
            )
        return {
            "accuracy": knn_accuracy(bank, queries, neighbours=self.neighbours),
            "feature_deviation": deviation,
            "effective_rank": rank,
            "collapsed": float(collapsed),
            "images": len(queries[0]),
        }
