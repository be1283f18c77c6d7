"""log ||J^T u|| - log spread: how far the features move, relative to how far they lie apart.

J is the Jacobian of the features Phi with respect to the image, u a unit direction in the feature
space. Where an image has to be moved by eps to get its features over a distance s along u,

    s = eps ||J^T u||, to first order:    log ||J^T u|| - log s = - log eps,

so that the term is minus the mean log of a distance in pixels. No rescaling of the features, of a
head, or of a layer before a norm that takes its statistics from the image itself (layer, group,
instance norm) changes it, and, since s is differentiated too, none has a gradient. A sum of sigma^2
goes down by such rescaling, with no change of the function.

Two displacements delta in the feature space tell a direction, delta / ||delta||, and a distance,
||delta||: to the nearest other image's features, "neighbour", and, of a linear head, to the nearest
decision hyperplane, "margin", with y the predicted class and k the one beyond that hyperplane:

    delta = Phi(x') - Phi(x),    delta = - (z_y - z_k) (w_y - w_k) / ||w_y - w_k||^2.

With "margin" for both the term is log ||J^T (w_y - w_k)|| - log (z_y - z_k). Beside them, "top" is
the direction in which features move most, the top left singular vector of J, and "total" the root
mean square distance of the features from their mean.

In both logarithms 0.01 of the "total" is added: it bounds the gradient of images whose features do
not move, or lie on each other's or on a hyperplane. A shift of all features alike, which a head's
bias absorbs, changes nothing either.

Source: the distance to a hyperplane over the gradient's norm is the first-order distance to the
decision boundary of Elsayed, Krishnan, Mobahi, Regan, Bengio, "Large Margin Deep Networks for
Classification", NeurIPS 2018; the top singular value is that of the feature metric in
arXiv:2405.17181, sec. 4.
"""

import warnings
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_specreg.encoders.features import FeatureSpace
from hf_specreg.ranges import WHOLE, require
from hf_specreg.spectral.precision import full_precision
from hf_specreg.spectral.regularizers.derivative import (
    By,
    Function,
    check_differences,
    differentiable_twice,
    moved,
    pulled_back_norms,
    tracked,
)
from hf_specreg.spectral.regularizers.term import Compute, RegularizerConfig

FLOOR = 1e-2  # of the total spread, in the logarithms
TINY = 1e-12  # where that is 0
ALONE = (
    "a batch of one image adds nothing to the sensitivity, whose spread is among images: "
    "take larger micro-batches if this is not the last of an epoch"
)


def sensitivity(
    function: Function,
    images: Tensor,
    *,
    direction: Literal["top", "neighbour", "margin"] = "top",
    spread: Literal["total", "neighbour", "margin"] = "total",
    head: nn.Linear | None = None,
    power_steps: int = 1,
    by: By = "double_backprop",
    step: float = 1e-2,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return the mean over images of log ||J^T u|| - log spread, 0-d.

    The directions are held fixed, and the spread is not. So the gradient is the value's own for
    "margin", and for "top" once the power steps have converged; for "neighbour" the turning of the
    direction itself is left out.

    Args:
        function: images [B, ...] -> features [B, D], of each image by itself.
        images: [B, ...] in [0, 1], at least 2.
        direction: u.
        spread: what ||J^T u|| is compared with.
        head: for "margin", of at least two classes; it gets no gradient. y is the predicted class.
        power_steps: of "top", each a backward and a forward pass.
        by: how ||J^T u|| is derived; see `pulled_back_norms`.
        step: of finite differences, L2 in [0, 1] pixels; the power steps take them always.
        generator: of the first u of "top".

    Raises:
        ValueError: there are fewer than 2 images.
    """
    if len(images) < 2:
        raise ValueError(f"a spread is of 2 images or more, and there are {len(images)}")
    images, features = tracked(function, images)
    if direction == "top":
        u = torch.randn(features.shape, generator=generator).to(features)
        u = power_method(function, images, features, u, iterations=power_steps, step=step)
    else:
        u = F.normalize(displacement(features, direction, head), dim=1).detach()
    norms = pulled_back_norms(function, images, features, u, by=by, step=step)
    # Of centred features, since the head's bias absorbs what all have in common.
    total = torch.linalg.vector_norm(features - features.mean(0)) / len(features) ** 0.5
    distances = total
    if spread != "total":
        distances = torch.linalg.vector_norm(displacement(features, spread, head), dim=1)
    floor = FLOOR * total + TINY
    # A finite difference can be below 0.
    return ((norms.clamp(min=0) + floor).log() - (distances + floor).log()).mean()


def power_method(
    function: Function,
    images: Tensor,
    features: Tensor,
    u: Tensor,
    *,
    iterations: int,
    step: float,
) -> Tensor:
    """Return the top left singular vector of J at each image, [B, D], without a graph.

    u <- J v / ||J v|| with v = J^T u / ||J^T u||: a backward pass and, for J v, the difference
    of the features at x + step v.

    Args:
        function: images [B, ...] -> features [B, D].
        images: [B, ...], as `tracked` returns them.
        features: [B, D], those of `tracked`.
        u: [B, D], the first.
        iterations: how many.
        step: L2 in [0, 1] pixels.
    """
    for _ in range(iterations):
        (v,) = torch.autograd.grad(features, images, u, retain_graph=True)
        v = F.normalize(v.flatten(1), dim=1)
        with torch.no_grad():
            u = function(moved(images, step * v)) - features
    return F.normalize(u, dim=1)


def displacement(
    features: Tensor, to: Literal["neighbour", "margin"], head: nn.Linear | None = None
) -> Tensor:
    """Return from each feature to the nearest other one, or hyperplane of the head, [B, D].

    Args:
        features: [B, D], differentiated.
        to: "neighbour" or "margin".
        head: for "margin"; not differentiated.
    """
    if to == "neighbour":
        with torch.no_grad():
            exact = "donot_use_mm_for_euclid_dist"
            apart = torch.cdist(features, features, compute_mode=exact).fill_diagonal_(torch.inf)
        return features[apart.argmin(1)] - features
    weight = head.weight.detach().to(features)
    bias = None if head.bias is None else head.bias.detach().to(features)
    logits = F.linear(features, weight, bias)
    top, y = logits.max(1)
    with torch.no_grad():
        apart = torch.cdist(weight[y], weight).clamp(min=TINY)
        k = ((top[:, None] - logits) / apart).scatter(1, y[:, None], torch.inf).argmin(1)
    normal = weight[y] - weight[k]
    gap = top - logits.gather(1, k[:, None]).squeeze(1)
    return -(gap / normal.square().sum(1).clamp(min=TINY))[:, None] * normal


@dataclass(frozen=True)
class SensitivityConfig(RegularizerConfig):
    """Sensitivity of the features relative to their spread; see `hf_specreg.SensitivityPenalty`.

    Args:
        direction: in the feature space: "top", which moves most; "neighbour", to the nearest other
            of the images; "margin", to the head's nearest decision hyperplane.
        spread: "total", the features' root mean square distance from their mean; "neighbour" or
            "margin", each feature's distance to that. Default: the direction's own, of "top"
            "total".
        images: how many of each micro-batch it is taken at, the first, among which neighbours and
            spread are too.
        power_steps: of "top".
        by: "double_backprop", or "finite_difference", without second derivatives.
        step: of finite differences, L2 in [0, 1] pixels.
    """

    direction: Literal["top", "neighbour", "margin"] = "top"
    spread: Literal["total", "neighbour", "margin"] | None = None
    images: int = 16
    power_steps: int = 1
    by: By = "double_backprop"
    step: float = 1e-2

    def __post_init__(self):
        super().__post_init__()
        require(self, "at least 2", "images")
        require(self, WHOLE, "images")
        require(self, "not negative", "power_steps")
        require(self, "positive", "step")

    def term(self, space: FeatureSpace, *, generator: torch.Generator | None = None) -> Compute:
        """Return `sensitivity` of a batch, with the network in evaluation mode: batch norms use
        their running statistics. Of a single image, which has no spread, it is 0, with a warning.

        Args:
            space: of the model.
            generator: of random numbers, on the CPU; default: torch's own.

        Raises:
            ValueError: it is of a margin, and the head is not one linear layer; or, when it is
                computed, finite differences are taken of weights in half precision.
        """
        spread = self.spread or ("total" if self.direction == "top" else self.direction)
        head = linear_head(space) if "margin" in (self.direction, spread) else None

        def features(images: Tensor) -> Tensor:
            return full_precision(space.features(images))

        steps = self.power_steps if self.direction == "top" else 0

        def compute(images: Tensor, *_) -> Tensor:
            if steps or self.by == "finite_difference":
                check_differences(space.model)
            images = images[: self.images]
            if len(images) < 2:
                warnings.warn(ALONE, stacklevel=2)
                return full_precision(images.new_zeros(()))
            no_autocast = torch.autocast(images.device.type, enabled=False)
            with differentiable_twice(space.model), no_autocast:
                return sensitivity(
                    features,
                    images,
                    direction=self.direction,
                    spread=spread,
                    head=head,
                    power_steps=self.power_steps,
                    by=self.by,
                    step=self.step,
                    generator=generator,
                )

        return compute


def linear_head(space: FeatureSpace) -> nn.Linear:
    """Return the head of a model.

    Raises:
        ValueError: it has none, or not one linear layer of at least two classes.
    """
    head = [space.network.get_submodule(name) for name in space.head]
    if len(head) != 1 or not isinstance(head[0], nn.Linear) or head[0].out_features < 2:
        raise ValueError(
            f"the sensitivity's 'margin' is of a head that is one linear layer of 2 classes or "
            f"more, and that of {type(space.network).__name__} is {head}: take direction "
            "'top' or 'neighbour'"
        )
    return head[0]
