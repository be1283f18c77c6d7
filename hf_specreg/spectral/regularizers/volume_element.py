"""mean 1/2 log det of the metric that the features pull back, by Zavatone-Veth et al. 2023."""

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_specreg.spectral.regularizers.derivative import DerivativeConfig, Function, jacobian


def volume_element(function: Function, images: Tensor, *, damping: float = 1e-6) -> Tensor:
    """Return the mean over images of 1/2 log det of the metric that the features pull back.

    Of J [K, d], where K < d, the metric J^T J has no more than K eigenvalues that are not 0: the
    determinant is over those, that of J J^T, in float64: where features lie in a plane, as after a
    layer norm, float32 cannot tell its smallest eigenvalue from rounding.

    Args:
        function: images [B, ...] -> features [B, K]; K backward passes.
        images: [B, ...], of d numbers each.
        damping: added to every eigenvalue, so that features that do not move have a logarithm.

    Source: Zavatone-Veth, Yang, Rubinfien, Pehlevan, "Neural networks learn to magnify areas near
    decision boundaries", arXiv:2301.11375.
    """
    rows = jacobian(function, images)
    dtype, rows = rows.dtype, rows.double()
    if rows.shape[1] > rows.shape[2]:
        rows = rows.mT
    gram = rows @ rows.mT
    eye = torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)
    return torch.linalg.slogdet(gram + damping * eye).logabsdet.mean().to(dtype) / 2


@dataclass(frozen=True)
class VolumeElementConfig(DerivativeConfig):
    """1/2 log det of the feature metric (Zavatone-Veth et al. 2023)."""

    def penalty(self, function: Function, images: Tensor) -> Tensor:
        """Return `volume_element`."""
        return volume_element(function, images)
