"""Batch spectral shrinkage: the smallest singular values of a batch's features, Chen et al. 2019.

It is of the micro-batch as a whole, and so depends on its size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_specreg.encoders.features import FeatureSpace
from hf_specreg.ranges import require
from hf_specreg.spectral.regularizers.term import Compute, RegularizerConfig


def batch_spectral_shrinkage(features: Tensor, *, k: int = 1) -> Tensor:
    """Return the sum of the k smallest squared singular values of a batch's features.

    Args:
        features: [B, D].
        k: how many.

    Raises:
        ValueError: the matrix has fewer than k.

    Source: Chen, Wang, Fu, Long, Wang, "Catastrophic Forgetting Meets Negative Transfer: Batch
    Spectral Shrinkage for Safe Transfer Learning", NeurIPS 2019.
    """
    if not 1 <= k <= min(features.shape):
        raise ValueError(f"features {tuple(features.shape)} do not have {k} singular values")
    features = features.to(torch.promote_types(features.dtype, torch.float32))  # not in half
    return torch.linalg.svdvals(features)[-k:].square().sum()


@dataclass(frozen=True)
class BSSConfig(RegularizerConfig):
    """Batch spectral shrinkage: small singular values of the features (Chen et al. 2019).

    Args:
        k: how many singular values, the smallest.
    """

    k: int = 1

    of_features: ClassVar[bool] = True

    def __post_init__(self):
        super().__post_init__()
        require(self, "at least 1", "k")

    def term(self, _: FeatureSpace) -> Compute:
        """Return the mean over the features that the training itself computed: no second pass."""

        def compute(images: Tensor, labels: Tensor | None, features: Sequence[Tensor]) -> Tensor:
            return torch.stack([batch_spectral_shrinkage(f, k=self.k) for f in features]).mean()

        return compute
