"""mean lambda_max(J^T J) at the data, of the metric that the features pull back."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_specreg.ranges import require
from hf_specreg.spectral.regularizers.derivative import (
    DerivativeConfig,
    Function,
    pulled_back,
    tracked,
)


def top_metric_eigenvalue(
    function: Function,
    images: Tensor,
    *,
    iterations: int = 5,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return the mean over images of lambda_max(J^T J), by power iteration on K dimensions.

    u <- J J^T u / ||J J^T u||, then lambda = ||J^T u||^2; its gradient is taken at that u.

    Args:
        function: images [B, ...] -> outputs [B, K].
        images: [B, ...].
        iterations: of the power method.
        generator: of the first u.

    Source: arXiv:2405.17181, sec. 4, where it is computed for the feature metric.
    """
    images, outputs = tracked(function, images)
    u = torch.randn(outputs.shape, generator=generator, device=outputs.device).to(outputs)
    # J v is the derivative with respect to u of <v, J^T u>, which is linear in u.
    dual = torch.zeros_like(outputs, requires_grad=True)
    pulled = pulled_back(outputs, images, dual)
    for _ in range(iterations):
        v = pulled_back(outputs, images, nn.functional.normalize(u, dim=1)).detach()
        (u,) = torch.autograd.grad(pulled, dual, v, retain_graph=True)
    u = nn.functional.normalize(u, dim=1).detach()
    return pulled_back(outputs, images, u).square().sum(1).mean()


@dataclass(frozen=True)
class MetricEigenvalueConfig(DerivativeConfig):
    """Top eigenvalue of the feature metric J^T J at the data.

    Args:
        iterations: steps of the power method.
    """

    iterations: int = 5

    def __post_init__(self):
        super().__post_init__()
        require(self, "at least 1", "iterations")

    def penalty(self, function: Function, images: Tensor) -> Tensor:
        """Return `top_metric_eigenvalue`."""
        return top_metric_eigenvalue(function, images, iterations=self.iterations)
