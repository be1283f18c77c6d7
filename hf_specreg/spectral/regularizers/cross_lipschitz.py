"""mean over l, m of ||grad f_l - grad f_m||^2 at the data, by Hein and Andriushchenko 2017."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from hf_specreg.spectral.regularizers.derivative import DerivativeConfig, Function, jacobian


def cross_lipschitz(function: Function, images: Tensor) -> Tensor:
    """Return the mean over images of 1 / K^2 sum_{l, m} ||grad f_l - grad f_m||^2.

    Args:
        function: images [B, ...] -> logits [B, K]; K backward passes.
        images: [B, ...].

    Source: Hein, Andriushchenko, "Formal Guarantees on the Robustness of a Classifier against
    Adversarial Manipulation", NeurIPS 2017, eq. 5.
    """
    gradients = jacobian(function, images)
    classes = gradients.shape[1]
    # sum_{l, m} ||g_l - g_m||^2 = 2 K sum_l ||g_l||^2 - 2 ||sum_l g_l||^2
    own, common = gradients.square().sum((1, 2)), gradients.sum(1).square().sum(1)
    return (2 * classes * own - 2 * common).mean() / classes**2


@dataclass(frozen=True)
class CrossLipschitzConfig(DerivativeConfig):
    """Differences of the logits' gradients (Hein, Andriushchenko 2017)."""

    of: Literal["features", "logits"] = "logits"

    def penalty(self, function: Function, images: Tensor) -> Tensor:
        """Return `cross_lipschitz`."""
        return cross_lipschitz(function, images)
