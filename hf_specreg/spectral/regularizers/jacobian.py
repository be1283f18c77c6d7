"""mean ||J||_F^2 at the data, by Hoffman et al. 2019."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from hf_specreg.ranges import require
from hf_specreg.spectral.regularizers.derivative import (
    DerivativeConfig,
    Function,
    jacobian,
    pulled_back,
    tracked,
)


def jacobian_norm(
    function: Function,
    images: Tensor,
    *,
    projections: int | None = 1,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return the mean over images of ||J||_F^2, exactly or by random projections.

    For u uniform on the unit sphere of K dimensions, K E ||J^T u||^2 = ||J||_F^2.

    Args:
        function: images [B, ...] -> outputs [B, K].
        images: [B, ...].
        projections: n, backward passes; None: exact, in K.
        generator: of the projections.

    Source: Hoffman, Roberts, Yaida, "Robust Learning with Jacobian Regularization",
    arXiv:1908.02729.
    """
    if projections is None:
        return jacobian(function, images).square().sum((1, 2)).mean()
    images, outputs = tracked(function, images)
    total = outputs.new_zeros(())
    for _ in range(projections):
        u = torch.randn(outputs.shape, generator=generator, device=outputs.device)
        u = nn.functional.normalize(u.to(outputs), dim=1)
        total = total + pulled_back(outputs, images, u).square().sum(1).mean()
    return outputs.shape[1] * total / projections


@dataclass(frozen=True)
class JacobianConfig(DerivativeConfig):
    """Frobenius norm of the Jacobian (Hoffman et al. 2019).

    Args:
        projections: random projections, a backward pass each; null: exact, in as many as outputs.
    """

    of: Literal["features", "logits"] = "logits"
    projections: int | None = 1

    def __post_init__(self):
        super().__post_init__()
        require(self, "at least 1", "projections")

    def penalty(self, function: Function, images: Tensor) -> Tensor:
        """Return `jacobian_norm`."""
        return jacobian_norm(function, images, projections=self.projections)
