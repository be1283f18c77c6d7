"""Squared distance of the weights from where training began, by Li et al. 2018."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_specreg.encoders.features import FeatureSpace
from hf_specreg.ranges import require
from hf_specreg.spectral.regularizers.term import Compute, RegularizerConfig


def l2_sp(
    parameters: Mapping[str, Tensor],
    start: Mapping[str, Tensor],
    *,
    alpha: float = 0.1,
    beta: float = 0.01,
) -> Tensor:
    """Return alpha / 2 ||w - w_0||^2 + beta / 2 ||w_new||^2.

    Args:
        parameters: of the model, by name.
        start: those that were pretrained, as they were; the rest, the head, is w_new.
        alpha: of the parameters in `start`.
        beta: of the others.

    Raises:
        ValueError: a name or a shape of `start` is not among the parameters.

    Source: Li, Grandvalet, Davoine, "Explicit Inductive Bias for Transfer Learning with
    Convolutional Networks", ICML 2018.
    """
    for name, value in start.items():
        if name not in parameters or parameters[name].shape != value.shape:
            raise ValueError(f"no parameter {name} of shape {tuple(value.shape)} to keep near")
    terms = [
        beta / 2 * p.square().sum()
        if name not in start
        else alpha / 2 * (p - start[name].detach().to(p)).square().sum()
        for name, p in parameters.items()
    ]
    return torch.stack(terms).sum()


@dataclass(frozen=True)
class L2SPConfig(RegularizerConfig):
    """Distance of the encoder's weights from where training began (Li et al. 2018).

    Args:
        strength: alpha, of the weights before the features; 0: off.
        head: beta, of the head's weights, relative to alpha (the authors take alpha 0.1 and beta
            0.01).
    """

    head: float = 0.1

    of_weights: ClassVar[bool] = True
    of_encoder: ClassVar[bool] = False

    def __post_init__(self):
        super().__post_init__()
        require(self, "not negative", "head")

    def term(self, space: FeatureSpace) -> Compute:
        """Return `l2_sp` of the weights that are trained, from a copy of them as they are now."""
        trained = {n: p for n, p in space.network.named_parameters() if p.requires_grad}
        start = {n: p.detach().clone() for n, p in trained.items() if not space.of_head(n)}
        return lambda *_: l2_sp(trained, start, alpha=1.0, beta=self.head)
