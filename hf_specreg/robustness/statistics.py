"""Aggregates of per-image results, each with a 95 % interval.

Means and quantiles: percentile intervals of 2,000 bootstrap resamples of the images. Proportions:
the exact binomial (Clopper-Pearson) interval, because the bootstrap of a proportion has nothing to
vary where all images agree, and claims certainty there.

Sources: Efron, Tibshirani, "An Introduction to the Bootstrap", 1993, ch. 13; Clopper, Pearson,
Biometrika 1934.
"""

from collections.abc import Callable

import numpy as np
from scipy.stats import beta

LEVEL = 0.95
RESAMPLES = 2000
_AT_ONCE = 2_000_000  # numbers of one block of resamples

Estimate = dict[str, float | list[float | None] | None]


def proportion(hits: np.ndarray) -> Estimate:
    """Return the fraction of true values, with its interval."""
    if not len(hits):
        return {"value": None, "ci": [None, None]}
    low, high = binomial_interval(np.array(hits.sum()), len(hits))
    return {"value": float(hits.mean()), "ci": [float(low), float(high)]}


def binomial_interval(hits: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the ends of the exact interval of `hits` of `n`, elementwise."""
    tail = (1 - LEVEL) / 2
    low = np.where(hits > 0, beta.ppf(tail, np.maximum(hits, 1), n - hits + 1), 0.0)
    high = np.where(hits < n, beta.ppf(1 - tail, hits + 1, np.maximum(n - hits, 1)), 1.0)
    return low, high


def mean(values: np.ndarray, *, seed: int) -> Estimate:
    """Return the mean, with its interval."""
    return _estimate(values, lambda x: x.mean(-1), seed)


def quantile(values: np.ndarray, q: float, *, seed: int) -> Estimate:
    """Return a quantile, with its interval; infinite values count as larger than any other."""
    return _estimate(values, lambda x: np.quantile(x, q, axis=-1, method="inverted_cdf"), seed)


def _estimate(values: np.ndarray, statistic: Callable, seed: int) -> Estimate:
    if not len(values):
        return {"value": None, "ci": [None, None]}
    rng = np.random.default_rng(seed)
    found, n = [], len(values)
    block = max(1, _AT_ONCE // n)
    for first in range(0, RESAMPLES, block):
        index = rng.integers(0, n, (min(block, RESAMPLES - first), n))
        found.append(statistic(values[index]))
    tails = (1 - LEVEL) / 2, (1 + LEVEL) / 2
    ends = np.quantile(np.concatenate(found), tails, method="inverted_cdf")
    return {"value": _plain(statistic(values)), "ci": [_plain(end) for end in ends]}


def _plain(number: float) -> float | None:
    """JSON has no infinity: None is "beyond what was found"."""
    return float(number) if np.isfinite(number) else None
