"""What is done with a chunk of images: classified, attacked, corrupted, looked at for masking."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hf_specreg.data.transforms import derived_seed
from hf_specreg.robustness.attacks import PGD, Attack
from hf_specreg.robustness.classifier import Classifier
from hf_specreg.robustness.corruptions import CORRUPTIONS, SEVERITIES, corrupt

MASKING_IMAGES = 100  # for the gradient-masking check
SHOWN_IMAGES = 6  # whose adversarial twins are kept
CHUNK = 16  # images of a black-box attack, which take long: a chunk is what a resumed run keeps

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Chunk:
    """Images that are worked on together.

    Attributes:
        images: [B, C, H, W] in [0, 1].
        labels: [B].
        seeds: one an image.
        places: of the images among all that are evaluated.
        correct: which are classified as their labels, [B]; None before that is known.
    """

    images: Tensor
    labels: Tensor
    seeds: Sequence[int]
    places: np.ndarray
    correct: Tensor | None = None

    def only(self, chosen: Tensor) -> "Chunk":
        """Return the images that are chosen, bool [B]."""
        seeds = [s for s, k in zip(self.seeds, chosen.tolist(), strict=True) if k]
        places, correct = self.places[chosen.numpy()], self.correct[chosen]
        return Chunk(self.images[chosen], self.labels[chosen], seeds, places, correct)


@dataclass(frozen=True)
class Stage:
    """One thing that is done with all images.

    Attributes:
        run: from a chunk to arrays over its images.
        size: of a chunk.
    """

    run: Callable[[Chunk], Arrays]
    size: int


def make_stages(
    classifier: Classifier,
    attacks: Mapping[str, Attack],
    grid: Mapping[str, Sequence[float]],
    *,
    corruptions: bool,
    masking: bool,
    batch_size: int,
) -> dict[str, Stage]:
    """Return what is done after the clean images are classified, by name.

    Args:
        classifier: what is attacked.
        attacks: by name.
        grid: the eps of each norm.
        corruptions: measure accuracy under corruptions.
        masking: look for masked gradients.
        batch_size: images worked on at once.
    """
    stages = {}
    for name, attack in attacks.items():
        size = min(CHUNK, batch_size) if attack.black_box else batch_size
        stages[name] = Stage(_attacked(classifier, attack, grid[attack.norm]), size)
    if corruptions:
        stages["corruptions"] = Stage(lambda chunk: _corrupted(classifier, chunk), batch_size)
    if masking:
        eps = max(grid["l2"])
        stages["masking"] = Stage(lambda chunk: _masking(classifier, chunk, eps), batch_size)
    return stages


def clean(classifier: Classifier, chunk: Chunk) -> Arrays:
    """Classify the images: the one judgement of what is correct, for all that comes after."""
    logits, correct, invalid = classifier.judge(chunk.images, chunk.labels)
    return {
        "logits": logits.numpy(),
        "labels": chunk.labels.numpy(),
        "correct": correct.numpy(),
        "invalid": invalid.numpy(),
        "digest": digests(chunk.images, chunk.labels),
    }


def digests(images: Tensor, labels: Tensor) -> np.ndarray:
    """Return the hash of each image with its label, uint8 [B, 32]."""
    found = [
        hashlib.sha256(image.numpy().tobytes() + bytes(str(int(label)), "ascii")).digest()
        for image, label in zip(images, labels, strict=True)
    ]
    return np.frombuffer(b"".join(found), np.uint8).reshape(len(found), -1)


def _attacked(
    classifier: Classifier, attack: Attack, eps: Sequence[float]
) -> Callable[[Chunk], Arrays]:
    """How an attack's chunk is done; images that are wrong already have distance 0."""

    def run(chunk: Chunk) -> Arrays:
        count, known = len(chunk.images), chunk.correct.numpy()  # a torch mask of one is an index
        arrays: Arrays = {
            "distances": np.zeros(count, np.float32),
            "queries": np.zeros(count, np.int64),
        }
        if not known.any():
            return arrays
        own = chunk.only(chunk.correct)
        result = attack.run(classifier, own.images, own.labels, seeds=own.seeds, eps=eps)
        arrays["distances"][known] = result.distances.cpu().numpy()
        arrays["queries"][known] = result.queries.cpu().numpy()
        if result.warnings:
            arrays["warnings"] = np.array(result.warnings)
        if result.trajectory is not None:
            arrays["trajectory"] = np.zeros((count, *result.trajectory.shape[1:]))
            arrays["trajectory"][known] = result.trajectory.numpy()
        if chunk.places[0] == 0:
            arrays["shown"] = own.images[:SHOWN_IMAGES].numpy()
            arrays["twins"] = result.adversarials[:SHOWN_IMAGES].cpu().numpy()
        return arrays

    return run


def _corrupted(classifier: Classifier, chunk: Chunk) -> Arrays:
    """Which images are still classified correctly under each corruption and severity."""
    hits = np.zeros((len(chunk.images), len(CORRUPTIONS), len(SEVERITIES)), bool)
    for i, kind in enumerate(CORRUPTIONS):
        for j, severity in enumerate(SEVERITIES):
            keys = [derived_seed(s, i, j) for s in chunk.seeds]
            changed = corrupt(chunk.images, kind, severity, seeds=keys)
            hits[:, i, j] = classifier.judge(changed, chunk.labels)[1].numpy()
    return {"hits": hits}


def _masking(classifier: Classifier, chunk: Chunk, eps: float) -> Arrays:
    """On the first images: do steps help PGD, does it win unbounded, are there gradients?"""
    chosen = chunk.correct & torch.from_numpy(chunk.places < MASKING_IMAGES)
    known = chosen.numpy()
    keys = ("looked", "stands_10", "stands_100", "stands_unbounded", "no_gradient")
    arrays = {key: np.zeros(len(known), bool) for key in keys}
    if not known.any():
        return arrays
    arrays["looked"] = known
    own = chunk.only(chosen)
    x, y = own.images.to(classifier.device), own.labels.to(classifier.device)
    for key, attack, e in (
        ("stands_10", PGD(norm="l2", steps=10), eps),
        ("stands_100", PGD(norm="l2", steps=100), eps),
        ("stands_unbounded", PGD(norm="linf", steps=100), 1.0),
    ):
        found = attack.run(classifier, x, y, seeds=own.seeds, eps=[e])
        arrays[key][known] = found.distances.isinf().cpu().numpy()
    x.requires_grad_(True)
    with torch.enable_grad():
        logits = classifier(x)
        rivals = logits.scatter(1, y[:, None], -torch.inf).max(1).values
        margin = (logits.gather(1, y[:, None])[:, 0] - rivals).sum()
        (gradient,) = torch.autograd.grad(margin, x)
    arrays["no_gradient"][known] = (gradient.flatten(1) == 0).all(1).cpu().numpy()
    return arrays
