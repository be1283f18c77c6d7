"""How far the probabilities of a classifier are from how often it is right.

ECE = sum_b (n_b / N) |acc(b) - conf(b)|, over bins b of the largest probability (Guo, Pleiss, Sun,
Weinberger, "On Calibration of Modern Neural Networks", ICML 2017); NLL = -mean log p_y; the Brier
score = mean sum_k (p_k - [k = y])^2 (Brier, Monthly Weather Review 1950), in [0, 2]; and the
temperature T of softmax(z / T) that has the smallest NLL (Guo et al.).

All of it in float64 and from log-probabilities: scikit-learn's log_loss cuts probabilities to what
the type can hold, and gives 36 where logits (0, 1000) of class 0 cost 1000.
"""

import numpy as np
from scipy.optimize import brentq
from scipy.special import log_softmax, softmax

BINS = 15
COLDEST, HOTTEST = 0.01, 100.0  # temperatures


def calibration(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Return "ece", "nll" and "brier".

    Args:
        logits: [N, K], finite.
        labels: [N], in 0..K-1; classes may be absent.

    Raises:
        ValueError: no images, other shapes, logits that are not finite, labels out of range.
    """
    return {
        "ece": ece(logits, labels),
        "nll": nll(logits, labels),
        "brier": brier(logits, labels),
    }


def ece(logits: np.ndarray, labels: np.ndarray, *, bins: int = BINS) -> float:
    """Return the expected calibration error of logits [N, K], in [0, 1].

    The bins ((b - 1) / bins, b / bins] of the largest probability have equal width. Raises as
    calibration does.
    """
    logits, labels = _checked(logits, labels)
    predicted = logits.argmax(1)
    top = softmax(logits, axis=1)[np.arange(len(labels)), predicted]
    which = np.clip(np.ceil(top * bins).astype(int) - 1, 0, bins - 1)
    gaps = np.bincount(which, weights=(predicted == labels) - top)
    return float(np.abs(gaps).sum() / len(labels))


def nll(logits: np.ndarray, labels: np.ndarray) -> float:
    """Return the mean negative log-likelihood of logits [N, K], in nats; raises as calibration."""
    logits, labels = _checked(logits, labels)
    return float(-log_softmax(logits, axis=1)[np.arange(len(labels)), labels].mean())


def brier(logits: np.ndarray, labels: np.ndarray) -> float:
    """Return the Brier score over all classes of logits [N, K]; raises as calibration does."""
    logits, labels = _checked(logits, labels)
    error = softmax(logits, axis=1)
    error[np.arange(len(labels)), labels] -= 1
    return float((error**2).sum(1).mean())


def temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """Return the T in [0.01, 100] for which softmax(logits / T) has the smallest NLL.

    The NLL is convex in 1 / T, so its only minimum is where its slope there, mean of
    sum_k p_k z_k - z_y, is zero; log T is searched for it. Where every image is classified
    correctly there is none, and T is 1: nothing is known of how sure to be. It is 100 where logits
    say less than nothing about labels. Take T of validation images. Raises as calibration does.
    """
    logits, labels = _checked(logits, labels)
    logits = logits - logits.max(1, keepdims=True)
    of_labels = logits[np.arange(len(labels)), labels].mean()

    def slope(log_t: float) -> float:
        p = softmax(logits / np.exp(log_t), axis=1)
        return (p * logits).sum(1).mean() - of_labels

    low, high = np.log(COLDEST), np.log(HOTTEST)
    if slope(low) <= 0:
        return 1.0
    if slope(high) >= 0:
        return HOTTEST
    return float(np.exp(brentq(slope, low, high)))


def _checked(logits: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    logits, labels = np.asarray(logits, np.float64), np.asarray(labels)
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or not len(labels):
        raise ValueError(
            f"logits {logits.shape} and labels {labels.shape} must be [N, K] and [N], N at least 1"
        )
    if not np.isfinite(logits).all():
        raise ValueError("logits must be finite: the network has diverged")
    if labels.min() < 0 or labels.max() >= logits.shape[1]:
        raise ValueError(
            f"labels {labels.min()} to {labels.max()} must be in 0..{logits.shape[1] - 1}"
        )
    return logits, labels
