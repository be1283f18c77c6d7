"""How well a classifier's logits tell images of its data from images of another set.

Scores, larger inside: the largest softmax probability (Hendrycks, Gimpel, "A Baseline for Detecting
Misclassified and Out-of-Distribution Examples in Neural Networks", ICLR 2017), as its log-odds,
which order images alike and do not saturate at 1; the negative energy logsumexp(z) (Liu, Wang,
Owens, Li, "Energy-based Out-of-distribution Detection", NeurIPS 2020).
"""

import numpy as np
from scipy.special import logsumexp
from sklearn.metrics import roc_auc_score


def ood_auroc(inside: np.ndarray, outside: np.ndarray) -> dict[str, float]:
    """Return the AUROC of telling both apart by "max_probability" and by "energy".

    It is the chance that an image from inside has the larger score, ties counting half: 1 for a
    perfect score, 0.5 for a blind one, less where the other set looks more familiar.

    Args:
        inside: logits [N, K] of the test images, K at least 2.
        outside: logits [M, K] of the other images.

    Raises:
        ValueError: a set is empty, the logits are not finite.
    """
    logits = np.concatenate([inside, outside]).astype(np.float64)
    is_inside = np.arange(len(logits)) < len(inside)
    if is_inside.all() or not is_inside.any():
        raise ValueError(f"{len(inside)} and {len(outside)} images: both sets need one at least")
    scores = {"max_probability": _top_log_odds(logits), "energy": logsumexp(logits, axis=1)}
    return {name: float(roc_auc_score(is_inside, score)) for name, score in scores.items()}


def _top_log_odds(logits: np.ndarray) -> np.ndarray:
    """Return log(p / (1 - p)) of the largest probability p, [N]."""
    ordered = np.sort(logits, axis=1)
    return -logsumexp(ordered[:, :-1] - ordered[:, -1:], axis=1)
