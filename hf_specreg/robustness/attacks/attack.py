"""What an attack is, and how what it returns is checked.

Attacks of minimum distance find the nearest adversarial image that they can; attacks at fixed eps
are run over a grid of eps, upwards, each on the images that still stand, and their distance is the
smallest eps at which an image fell. Whatever a library returns is classified again here, and
counts only if it is adversarial, in the [0, 1] box and within eps.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

from hf_specreg.robustness.classifier import Classifier
from hf_specreg.robustness.threat import ROUNDING, AttackResult, Norm, distance, in_box

VARIANT = {"variant": True}  # metadata of a setting that, unless it is None, makes another attack


class Attack(Protocol):
    """An attack with its settings, which are the fields of its dataclass.

    Attributes:
        norm: of its distances.
        black_box: it asks for predicted classes only.
        minimum_distance: it looks for the nearest adversarial image; else for one within eps.
        package: what it needs beside this one; None: nothing.
    """

    norm: Norm
    black_box: bool
    minimum_distance: bool
    package: str | None

    def run(
        self,
        classifier: Classifier,
        images: Tensor,
        labels: Tensor,
        *,
        seeds: Sequence[int],
        eps: Sequence[float],
    ) -> AttackResult:
        """Attack images [B, C, H, W] in [0, 1] that are classified as their labels [B].

        Args:
            classifier: what is attacked.
            images: the images.
            labels: their classes.
            seeds: one an image.
            eps: the grid, for attacks at fixed eps.
        """


def over_grid(
    at: Callable[[Tensor, Tensor, float], Tensor],
    classifier: Classifier,
    images: Tensor,
    labels: Tensor,
    seeds: Sequence[int],
    eps: Sequence[float],
    norm: Norm,
) -> AttackResult:
    """Run an attack at every eps, upwards, on the images that still stand."""
    images, labels = images.to(classifier.device), labels.to(classifier.device)
    adversarials = images.clone()
    distances = torch.full((len(images),), torch.inf, device=images.device)
    queries = torch.zeros_like(labels)
    for e in sorted(eps):
        standing = distances.isinf()
        if not standing.any():
            break
        before = classifier.queries
        with seeded(seeds, classifier), classifier.as_it_comes():
            found = at(images[standing], labels[standing], e)
        queries[standing] += (classifier.queries - before) // int(standing.sum())
        result = checked(
            classifier, images[standing], labels[standing], found, queries[standing], norm
        )
        within = result.distances <= e * (1 + ROUNDING)
        fallen = standing.nonzero()[within, 0]
        adversarials[fallen] = result.adversarials[within]
        distances[fallen] = e
    return AttackResult(adversarials, distances, queries)


def checked(
    classifier: Classifier,
    images: Tensor,
    labels: Tensor,
    found: Tensor,
    queries: Tensor,
    norm: Norm,
) -> AttackResult:
    """Keep what is adversarial and a picture; the rest counts as not found."""
    found = found.detach()
    valid = in_box(found) & (classifier.predict(found.nan_to_num()) != labels)
    adversarials = torch.where(valid[:, None, None, None], found, images)
    distances = torch.where(valid, distance(images, adversarials, norm), torch.inf)
    return AttackResult(adversarials, distances, queries)


@contextmanager
def seeded(seeds: Sequence[int], classifier: Classifier) -> Iterator[None]:
    """Draw from a stream of this batch's own, and leave the global one as it was."""
    devices = [classifier.device] if classifier.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seeds[0])
        yield
