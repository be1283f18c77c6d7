"""sum ||W W^T - I|| of the layers' weights, by Bansal et al. 2018."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from hf_specreg.encoders.features import FeatureSpace
from hf_specreg.ranges import require
from hf_specreg.spectral.maps import linear_maps
from hf_specreg.spectral.regularizers.term import Compute, RegularizerConfig


def orthogonality(
    weights: Iterable[Tensor],
    *,
    iterations: int = 2,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return sum ||W W^T - I|| (largest absolute eigenvalue), from below, by power iteration.

    Kernels are reshaped to matrices of a row an output channel. Where that has more rows than
    columns, it is W^T W - I: the other can never be 0.

    Args:
        weights: [out, ...] each.
        iterations: of the power method.
        generator: of its first vectors.

    Source: Bansal, Chen, Wang, "Can We Gain More from Orthogonality Regularizations in Training
    Deep CNNs?", NeurIPS 2018: the spectral restricted isometry property, SRIP.
    """
    total = torch.zeros(())
    for weight in weights:
        matrix = weight.flatten(1)
        if matrix.shape[0] > matrix.shape[1]:
            matrix = matrix.T
        eye = torch.eye(len(matrix), dtype=weight.dtype, device=weight.device)
        excess = matrix @ matrix.T - eye
        v = torch.randn(len(matrix), generator=generator, device=weight.device).to(weight)
        with torch.no_grad():
            for _ in range(iterations):
                v = nn.functional.normalize(excess @ v, dim=0)
        total = total.to(weight) + torch.linalg.vector_norm(excess @ v)
    return total


@dataclass(frozen=True)
class OrthogonalityConfig(RegularizerConfig):
    """||W W^T - I|| of the layers before the features (SRIP, Bansal et al. 2018).

    Args:
        iterations: steps of the power method.
    """

    iterations: int = 2

    of_weights: ClassVar[bool] = True

    def __post_init__(self):
        super().__post_init__()
        require(self, "at least 1", "iterations")

    def term(self, space: FeatureSpace) -> Compute:
        """Return `orthogonality` of the linear maps before the features."""
        operators = [operator for _, operator in linear_maps(space)]

        def compute(*_) -> Tensor:
            weights = [operator.effective_weight() for operator in operators]
            return orthogonality(weights, iterations=self.iterations)

        return compute
