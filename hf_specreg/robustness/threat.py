"""What an attacker may do: change an image by so much, in a norm, inside the [0, 1] pixel box.

Every eps and every distance of this package is in those units. The normalisation is the model's,
so that the box is the image's.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Norm = Literal["l2", "linf"]
NORMS: tuple[Norm, ...] = ("l2", "linf")
ROUNDING = 1e-4  # by how much of eps a float32 perturbation may exceed it


def distance(images: Tensor, others: Tensor, norm: Norm) -> Tensor:
    """Return the distance of each pair of images [B, C, H, W], [B]."""
    order = {"l2": 2, "linf": torch.inf}[norm]
    return torch.linalg.vector_norm((images - others).flatten(1), ord=order, dim=1)


def in_box(images: Tensor) -> Tensor:
    """Return which images [B, C, H, W] have all their pixels in [0, 1], [B]."""
    return ((images >= 0) & (images <= 1)).flatten(1).all(1)


class AttackResult(NamedTuple):
    """What an attack found for each image of a batch.

    Attributes:
        adversarials: [B, C, H, W] in [0, 1]; the image itself where nothing was found.
        distances: [B], in the attack's norm; 0 where the image was misclassified to begin with, inf
            where nothing was found.
        queries: [B], images classified for each; of a library's attack the batch's mean.
        trajectory: [B, T + 1, 2], float64: queries so far and the best distance so far, at the
            start and after each iteration, or after some; None where the attack does not tell.
        warnings: what the attack's library says against its own result.
    """

    adversarials: Tensor
    distances: Tensor
    queries: Tensor
    trajectory: Tensor | None = None
    warnings: tuple[str, ...] = ()


def joined(results: Sequence[AttackResult]) -> AttackResult:
    """Return the results of several batches, without warnings and all with a trajectory, as one."""
    tensors = zip(*(result[:4] for result in results), strict=True)
    return AttackResult(*(torch.cat(parts) for parts in tensors))
