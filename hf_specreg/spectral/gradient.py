"""The penalty's gradient by itself, for loops that leave no place in their loss for a term."""

import torch
from torch import Tensor, nn

from hf_specreg.spectral.penalty import SpectralPenalty


def add_gradient(penalty: SpectralPenalty, *, scale: float = 1.0) -> Tensor:
    """Count a step and add the penalty's gradient to `.grad` of the weights.

    For a hook of somebody else's loop: call it once per optimizer step, when no backward pass is
    under way. Hooks on the weights, such as those by which DistributedDataParallel averages, do not
    see it: after their averaging every process must add the whole gradient, so the penalty must not
    be `shared`; before it, either way does.

    Args:
        penalty: on the model that is trained.
        scale: of the gradients that are there, such as fp16's loss scale.

    Returns:
        The penalty, 0-d, unscaled and without a graph; 0 in burn-in and between cadences.
    """
    value = penalty()
    add_gradient_of(value, penalty.space.network, scale=scale)
    return value.detach()


def add_gradient_of(value: Tensor, network: nn.Module, *, scale: float = 1.0) -> None:
    """Add the gradient of a value, 0-d, to `.grad` of a network's weights, as `add_gradient`."""
    if value.requires_grad:
        weights = [w for w in network.parameters() if w.requires_grad]
        gradients = torch.autograd.grad(value, weights, allow_unused=True)
        with torch.no_grad():
            for weight, gradient in zip(weights, gradients, strict=True):
                if gradient is None:
                    continue
                if weight.grad is None:
                    weight.grad = gradient * scale
                else:  # in place: it may be a view into a bucket
                    weight.grad.add_(gradient, alpha=scale)
