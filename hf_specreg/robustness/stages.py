"""What is done with a chunk of images: classified, attacked, corrupted, looked at for masking."""

import hashlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from hf_specreg.data.transforms import derived_seed
from hf_specreg.robustness.attacks import PGD, Attack
from hf_specreg.robustness.classifier import Classifier
from hf_specreg.robustness.corruptions import CORRUPTIONS, SEVERITIES, corrupt

MASKING_IMAGES = 100  # for the gradient-masking check
SHOWN_IMAGES = 6  # whose adversarial twins are kept

Stage = Callable[[Tensor, Tensor, list[int], np.ndarray], dict[str, np.ndarray]]


def make_stages(
    classifier: Classifier,
    attacks: Mapping[str, Attack],
    grid: Mapping[str, Sequence[float]],
    corruptions: bool,
    masking_check: bool,
) -> dict[str, Stage]:
    """What is done with a chunk, by name: (images, labels, seeds, places) -> arrays.

    `places` are the images' places among those that are evaluated.
    """

    def clean(images, labels, seeds, places):
        logits, correct, invalid = classifier.judge(images, labels)
        digests = [
            hashlib.sha256(image.numpy().tobytes() + bytes(str(int(label)), "ascii")).digest()
            for image, label in zip(images, labels, strict=True)
        ]
        return {
            "logits": logits.numpy(),
            "labels": labels.numpy(),
            "correct": correct.numpy(),
            "invalid": invalid.numpy(),
            "digest": np.frombuffer(b"".join(digests), np.uint8).reshape(len(images), -1),
        }

    def attacked(attack: Attack) -> Stage:
        def stage(images, labels, seeds, places):
            _, known, _ = classifier.judge(images, labels)
            count = len(images)
            distances, queries = np.zeros(count, np.float32), np.zeros(count, np.int64)
            arrays = {}
            if known.any():
                own = [s for s, k in zip(seeds, known.tolist(), strict=True) if k]
                result = attack.run(
                    classifier, images[known], labels[known], seeds=own, eps=grid[attack.norm]
                )
                distances[known] = result.distances.cpu().numpy()
                queries[known] = result.queries.cpu().numpy()
                if result.warnings:
                    arrays["warnings"] = np.array(result.warnings)
                if result.trajectory is not None:
                    trajectory = np.zeros((count, *result.trajectory.shape[1:]))
                    trajectory[known] = result.trajectory.numpy()
                    arrays["trajectory"] = trajectory
                if places[0] == 0:
                    arrays["shown"] = images[known][:SHOWN_IMAGES].numpy()
                    arrays["twins"] = result.adversarials[:SHOWN_IMAGES].cpu().numpy()
            return {"distances": distances, "queries": queries, **arrays}

        return stage

    def corrupted(images, labels, seeds, places):
        hits = np.zeros((len(images), len(CORRUPTIONS), len(SEVERITIES)), bool)
        for i, kind in enumerate(CORRUPTIONS):
            for j, severity in enumerate(SEVERITIES):
                keys = [derived_seed(s, i, j) for s in seeds]
                changed = corrupt(images, kind, severity, seeds=keys)
                hits[:, i, j] = classifier.judge(changed, labels)[1].numpy()
        return {"hits": hits}

    def masking(images, labels, seeds, places):
        """On the first images: do steps help PGD, does it win unbounded, are there gradients?"""
        count = len(images)
        _, known, _ = classifier.judge(images, labels)
        known &= torch.from_numpy(places < MASKING_IMAGES)
        arrays = {
            k: np.zeros(count, bool)
            for k in ("looked", "stands_10", "stands_100", "stands_unbounded", "no_gradient")
        }
        if known.any():
            arrays["looked"] = known.numpy()
            x, y = images[known].to(classifier.device), labels[known].to(classifier.device)
            own = [s for s, k in zip(seeds, known.tolist(), strict=True) if k]
            largest = max(grid["l2"])
            for key, attack, e in (
                ("stands_10", PGD(norm="l2", steps=10), largest),
                ("stands_100", PGD(norm="l2", steps=100), largest),
                ("stands_unbounded", PGD(norm="linf", steps=100), 1.0),
            ):
                found = attack.run(classifier, x, y, seeds=own, eps=[e])
                arrays[key][known] = found.distances.isinf().cpu().numpy()
            x.requires_grad_(True)
            with torch.enable_grad():
                logits = classifier(x)
                rivals = logits.scatter(1, y[:, None], -torch.inf).max(1).values
                margin = (logits.gather(1, y[:, None])[:, 0] - rivals).sum()
                (gradient,) = torch.autograd.grad(margin, x)
            arrays["no_gradient"][known] = (gradient.flatten(1) == 0).all(1).cpu().numpy()
        return arrays

    stages: dict[str, Stage] = {"clean": clean}
    stages |= {attack: attacked(a) for attack, a in attacks.items()}
    if corruptions:
        stages["corruptions"] = corrupted
    if masking_check:
        stages["masking"] = masking
    return stages
