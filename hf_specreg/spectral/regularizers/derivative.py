"""Penalties on J, the Jacobian of a function of one image, such as its features: what they share.

Functions of images must treat each image by itself: put batch norms in evaluation mode, or their
statistics join the derivative.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from hf_specreg.encoders.features import FeatureSpace
from hf_specreg.encoders.modules import evaluating
from hf_specreg.ranges import WHOLE, require
from hf_specreg.spectral.regularizers.term import Compute, RegularizerConfig

Function = Callable[[Tensor], Tensor]  # images [B, ...] -> outputs [B, K]
By = Literal["double_backprop", "finite_difference"]


@dataclass(frozen=True)
class DerivativeConfig(RegularizerConfig):
    """A penalty on the derivative with respect to the image; the mean over images, each by itself.

    Args:
        of: what is differentiated, the "features" or the "logits".
        images: how many of each micro-batch it is taken at, the first; default: all.
    """

    of: Literal["features", "logits"] = "features"
    images: int | None = None

    def __post_init__(self):
        super().__post_init__()
        require(self, "at least 1", "images")
        require(self, WHOLE, "images")

    @property
    def of_encoder(self) -> bool:
        """Whether it is of what comes before the head alone."""
        return self.of == "features"

    def penalty(self, function: Function, images: Tensor) -> Tensor:
        """Return the term, 0-d, of a function of images."""
        raise NotImplementedError

    def term(self, space: FeatureSpace) -> Compute:
        """Return what computes it from a batch, with the network in evaluation mode."""
        function = space.features if self.of == "features" else space.logits

        def compute(images: Tensor, labels: Tensor | None, features: Sequence[Tensor]) -> Tensor:
            with differentiable_twice(space.model):
                return self.penalty(function, images[: self.images])

        return compute


class HardsigmoidByReLU6(TorchFunctionMode):
    """Computes hardsigmoid as relu6(x + 3) / 6, since torch has no second derivative of its own."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        """Call a function of torch's."""
        if func is F.hardsigmoid:
            return F.relu6(args[0] + 3) / 6
        return func(*args, **(kwargs or {}))


@contextmanager
def differentiable_twice(model: nn.Module) -> Iterator[None]:
    """Run the model in evaluation mode, as it can be differentiated twice: uncompiled, with
    attention and hardsigmoid in the one form for that, without the activation checkpointing of
    timm's models (that of transformers' is off in evaluation mode), whose memory is not saved here,
    and without the autocast that accelerate puts into a model's `forward`.
    """
    attributes = [vars(module) for module in model.modules()]
    changes = [(own, "grad_checkpointing", False) for own in attributes]
    changes += [(own, "forward", own.get("_original_forward")) for own in attributes]
    changes = [(own, name, new) for own, name, new in changes if own.get(name) and new is not None]
    before = [own[name] for own, name, _ in changes]
    eager = torch.compiler.set_stance("force_eager")
    with evaluating(model), sdpa_kernel(SDPBackend.MATH), eager, HardsigmoidByReLU6():
        try:
            for own, name, new in changes:
                own[name] = new
            yield
        finally:
            for (own, name, _), old in zip(changes, before, strict=True):
                own[name] = old


def check_differences(model: nn.Module) -> None:
    """Raise ValueError if the model's weights are too coarse for finite differences."""
    coarse = {p.dtype for p in model.parameters()} & {torch.float16, torch.bfloat16}
    if coarse:
        raise ValueError(
            f"finite differences of a model with weights in {coarse.pop()} are noise: keep the "
            "weights in float32 and train under torch.autocast (mixed_precision of recipes)"
        )


def tracked(function: Function, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return images that require a gradient, and the outputs [B, K] for them."""
    images = images.detach().requires_grad_(True)
    with torch.enable_grad():
        return images, function(images).flatten(1)


def pulled_back(outputs: Tensor, images: Tensor, u: Tensor) -> Tensor:
    """Return J^T u for each image, [B, d], with a graph of its own."""
    (gradient,) = torch.autograd.grad(outputs, images, u, create_graph=True)
    return gradient.flatten(1)


def pulled_back_norms(
    function: Function,
    images: Tensor,
    outputs: Tensor,
    u: Tensor,
    *,
    norm: Literal["l2", "l1"] = "l2",
    by: By = "double_backprop",
    step: float = 1e-2,
) -> Tensor:
    """Return ||J^T u|| for each image, [B]; u is held fixed.

    By finite difference it is <u, f(x + h d) - f(x)> / h, where d, J^T u / ||J^T u||_2 or for L1
    its sign, is held fixed: <J^T u, d> = ||J^T u||, but for a term of order h.

    Args:
        function: images [B, ...] -> outputs [B, K].
        images: [B, ...], as `tracked` returns them.
        outputs: [B, K], those of `tracked`.
        u: [B, K].
        norm: "l2" or "l1".
        by: "double_backprop", or "finite_difference", without second derivatives.
        step: h ||d||_2, how far the second image is from the first, L2.
    """
    twice = by == "double_backprop"
    (g,) = torch.autograd.grad(outputs, images, u, create_graph=twice, retain_graph=True)
    g = g.flatten(1)
    if twice:
        return torch.linalg.vector_norm(g, ord=int(norm[1]), dim=1)
    d = F.normalize(g, dim=1) if norm == "l2" else g.sign()
    h = step / d.norm(dim=1).clamp(min=1)  # d is 0 where g is
    return (u * (function(moved(images, h[:, None] * d)) - outputs)).sum(1) / h


def moved(images: Tensor, by: Tensor) -> Tensor:
    """Return images [B, ...] moved by [B, d], without a graph."""
    return images.detach() + by.view_as(images)


def jacobian(function: Function, images: Tensor) -> Tensor:
    """Return J of each image, [B, K, d], row by row."""
    images, outputs = tracked(function, images)
    rows = [
        pulled_back(outputs, images, torch.zeros_like(outputs).index_fill_(1, index, 1.0))
        for index in torch.arange(outputs.shape[1], device=outputs.device)
    ]
    return torch.stack(rows, dim=1)
