"""mean ||grad_x loss(x, y)|| at the data, by Drucker and LeCun 1992: how fast the loss can grow.

A perturbation of length eps in L2, or in Linf, adds to the loss at most eps times the L2, or the
L1, norm of its gradient, to first order.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_specreg.encoders.features import FeatureSpace
from hf_specreg.ranges import WHOLE, require
from hf_specreg.spectral.regularizers.derivative import (
    By,
    Function,
    check_differences,
    differentiable_twice,
    pulled_back_norms,
    tracked,
)
from hf_specreg.spectral.regularizers.term import Compute, RegularizerConfig


def input_gradient_norm(
    function: Function,
    images: Tensor,
    labels: Tensor,
    *,
    norm: Literal["l2", "l1"] = "l2",
    by: By = "double_backprop",
    step: float = 1e-2,
) -> Tensor:
    """Return the mean over images of ||g||, of g = grad_x of the cross-entropy at the true class.

    By finite difference it is (loss(x + h d) - loss(x)) / h, see `pulled_back_norms`.

    Args:
        function: images [B, ...] -> logits [B, K].
        images: [B, ...] in [0, 1], so that g is per [0, 1] pixel.
        labels: [B], the true classes.
        norm: "l2" or "l1".
        by: "double_backprop", or "finite_difference", without second derivatives.
        step: h ||d||_2, how far the second loss is from the first, L2 in [0, 1] pixels.

    Raises:
        ValueError: there are fewer than 2 logits.

    Source: Drucker, LeCun, "Improving Generalization Performance Using Double Backpropagation",
    IEEE Transactions on Neural Networks 3, 1992; Ross, Doshi-Velez, "Improving the Adversarial
    Robustness and Interpretability of Deep Neural Networks by Regularizing their Input Gradients",
    AAAI 2018; the difference: Finlay, Oberman, "Scaleable input gradient regularization for
    adversarial robustness", arXiv:1905.11468. They square the norm; it is not squared in
    Rodriguez-Munoz et al., "Characterizing Model Robustness via Natural Input Gradients",
    arXiv:2409.20139, which finds it to act with smooth activations far more than with ReLU.
    """

    def losses(images: Tensor) -> Tensor:
        logits = function(images)
        check_classes(logits.shape[1:].numel())
        return F.cross_entropy(logits, labels, reduction="none")[:, None]

    images, values = tracked(losses, images)
    each = torch.ones_like(values)
    return pulled_back_norms(losses, images, values, each, norm=norm, by=by, step=step).mean()


def check_classes(outputs: int) -> None:
    """Raise ValueError if a head has so few outputs that its cross-entropy is 0."""
    if outputs < 2:
        raise ValueError(
            f"the input gradient is of the cross-entropy, so of 2 classes or more, and this head "
            f"has {outputs} output: take SensitivityPenalty (regularizers.sensitivity), which is "
            "of no labels"
        )


@dataclass(frozen=True)
class InputGradientConfig(RegularizerConfig):
    """Norm of the loss's gradient with respect to the image (Drucker, LeCun 1992; Ross, Doshi-Velez
    2018).

    Args:
        norm: "l2", or "l1", against perturbations in Linf.
        by: "double_backprop", or "finite_difference", without second derivatives (Finlay, Oberman
            2019).
        step: of the finite difference, L2 in [0, 1] pixels.
        images: how many of each micro-batch it is taken at, the first; default: all.
    """

    norm: Literal["l2", "l1"] = "l2"
    by: By = "double_backprop"
    step: float = 1e-2
    images: int | None = None

    of_labels: ClassVar[bool] = True
    of_encoder: ClassVar[bool] = False

    def __post_init__(self):
        super().__post_init__()
        require(self, "positive", "step")
        require(self, "at least 1", "images")
        require(self, WHOLE, "images")

    def term(self, space: FeatureSpace) -> Compute:
        """Return `input_gradient_norm` of a batch, with the network in evaluation mode: batch norms
        use their running statistics.

        Raises:
            ValueError: the head has fewer than 2 outputs; or, when it is computed, by finite
                differences of weights in half precision.
        """
        heads = [space.network.get_submodule(name) for name in space.head]
        check_classes(sum(getattr(head, "out_features", 2) for head in heads))

        def compute(images: Tensor, labels: Tensor, features: Sequence[Tensor]) -> Tensor:
            if self.by == "finite_difference":
                check_differences(space.model)
            images, labels = images[: self.images], labels[: self.images]
            settings = {"norm": self.norm, "by": self.by, "step": self.step}
            no_autocast = torch.autocast(images.device.type, enabled=False)
            with differentiable_twice(space.model), no_autocast:
                return input_gradient_norm(space.logits, images, labels, **settings)

        return compute
