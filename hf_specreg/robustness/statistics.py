"""Aggregates of per-image results, each with a 95 % interval by the bootstrap over images.

Percentile intervals of 2,000 resamples. Where all images agree the bootstrap has nothing to vary
and would claim certainty; there the interval of a proportion ends at the exact binomial
(Clopper-Pearson) bound.

Source: Efron, Tibshirani, "An Introduction to the Bootstrap", 1993, ch. 13.
"""

from collections.abc import Callable

import numpy as np

LEVEL = 0.95
RESAMPLES = 2000
_AT_ONCE = 2_000_000  # numbers of one block of resamples

Estimate = dict[str, float | list[float | None] | None]


def proportion(hits: np.ndarray, *, seed: int) -> Estimate:
    """Return the fraction of true values, with its interval."""
    estimate = mean(hits.astype(float), seed=seed)
    n = len(hits)
    beyond = 1 - ((1 - LEVEL) / 2) ** (1 / n) if n else None
    if n and not hits.any():
        estimate["ci"] = [0.0, beyond]
    elif n and hits.all():
        estimate["ci"] = [1 - beyond, 1.0]
    return estimate


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
