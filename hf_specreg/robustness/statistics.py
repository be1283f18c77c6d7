"""Aggregates of per-image results with 95 % intervals.

Means and quantiles: 2,000 bootstrap resamples of the images, none for fewer than 10 images. Means
have studentised intervals: on few and skewed distances the percentiles of resampled means are too
near to each other (for 10 log-normal values 87 of 100 cover the truth, studentised 93). Quantiles
have percentiles. Proportions: the exact binomial (Clopper-Pearson) interval, because the bootstrap
of a proportion has nothing to vary where all images agree, and claims certainty there; for the same
reason differences of paired proportions have Newcombe's, and means of equal values no interval.

Sources: Efron, Tibshirani, "An Introduction to the Bootstrap", 1993, ch. 12 and 13; Clopper,
Pearson, Biometrika 1934; Newcombe, "Improved confidence intervals for the difference between
binomial proportions based on paired data", Statistics in Medicine 1998.
"""

from collections.abc import Iterator

import numpy as np
from scipy.stats import beta, norm

LEVEL = 0.95
TAILS = ((1 - LEVEL) / 2, (1 + LEVEL) / 2)
RESAMPLES = 2000
FEWEST = 10  # values that a mean's or a quantile's interval is made of
METHODS = {
    "level": LEVEL,
    "means": "studentised bootstrap",
    "quantiles": "percentile bootstrap",
    "proportions": "Clopper-Pearson",
    "resamples": RESAMPLES,
    "fewest": FEWEST,
}
_LEAST_SPREAD = 0.1  # of the values' spread; no resample's is taken for less, which may be none
_AT_ONCE = 2_000_000  # numbers of one block of resamples

Estimate = dict[str, float | list[float | None] | None]
NOTHING: Estimate = {"value": None, "ci": [None, None]}  # nothing to average, or not of all


def proportion(hits: np.ndarray) -> Estimate:
    """Return the fraction of true values among hits, bool [n], with its interval."""
    if not len(hits):
        return dict(NOTHING)
    low, high = binomial_interval(np.array(hits.sum()), len(hits))
    return {"value": float(hits.mean()), "ci": [float(low), float(high)]}


def binomial_interval(hits: np.ndarray, n: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the ends of the exact interval of `hits` of `n`, elementwise; both may be fractions,
    as effective sample sizes are.
    """
    tail = (1 - LEVEL) / 2
    low = np.where(hits > 0, beta.ppf(tail, np.where(hits > 0, hits, 1), n - hits + 1), 0.0)
    high = np.where(hits < n, beta.ppf(1 - tail, hits + 1, np.where(hits < n, n - hits, 1)), 1.0)
    return low, high


def paired_difference(hits: np.ndarray, reference: np.ndarray) -> Estimate:
    """Return the difference of two proportions of the same images, bool [n] each, with its
    interval: Wilson's of each, put together by how far they agree (Newcombe's method 10). It has a
    width also where all images agree.
    """
    n = len(hits)
    if not n:
        return dict(NOTHING)
    p, q = hits.mean(), reference.mean()
    (p_low, p_high), (q_low, q_high) = (_wilson(x.sum(), n) for x in (hits, reference))
    both, neither = (hits & reference).sum(), (~hits & ~reference).sum()
    agreement = both * neither - (hits & ~reference).sum() * (~hits & reference).sum()
    if agreement > 0:
        agreement = max(agreement - n / 2, 0)  # continuity
    spread = float(n) ** 2 * np.sqrt(p * (1 - p) * q * (1 - q))
    phi = agreement / spread if spread else 0.0

    def reach(down: float, up: float) -> float:
        return np.sqrt(max(down**2 - 2 * phi * down * up + up**2, 0))

    low = p - q - reach(p - p_low, q_high - q)
    high = p - q + reach(p_high - p, q - q_low)
    return {"value": float(p - q), "ci": [float(low), float(high)]}


def _wilson(hits: int, n: int) -> tuple[float, float]:
    z = norm.ppf((1 + LEVEL) / 2)
    middle = (hits + z**2 / 2) / (n + z**2)
    half = z * np.sqrt(hits * (n - hits) / n + z**2 / 4) / (n + z**2)
    return middle - half, middle + half


def mean(
    values: np.ndarray, *, seed: int, within: tuple[float, float] = (-np.inf, np.inf)
) -> Estimate:
    """Return the mean of finite values [n], with its studentised interval; none for n < 10, nor of
    values that are all the same.

    Args:
        values: the values.
        seed: of the resamples.
        within: what a mean can be, which the interval is cut to.
    """
    if not len(values):
        return dict(NOTHING)
    value, spread = values.mean(), values.std()
    if len(values) < FEWEST or values.min() == values.max():
        return {"value": float(value), "ci": [None, None]}
    around, found = values - value, []
    for index in _resamples(len(values), seed):
        own = around[index]
        middle = own.mean(1)
        found.append(middle / np.maximum(own.std(1), _LEAST_SPREAD * spread))
    high, low = np.quantile(np.concatenate(found), TAILS)
    ends = np.clip([value - end * spread for end in (low, high)], *within)
    return {"value": float(value), "ci": [float(end) for end in ends]}


def at_half_budget(trajectory: np.ndarray) -> np.ndarray:
    """Return the best distance that an attack had found of each image when it had made half of
    what queries it made for it, or the first iteration's end after that, [n].

    Args:
        trajectory: [n, T + 1, 2], queries so far and the best distance so far.
    """
    queries, distances = trajectory[:, :, 0], trajectory[:, :, 1]
    first = (2 * queries >= queries[:, -1:]).argmax(1)
    return np.take_along_axis(distances, first[:, None], 1)[:, 0]


def quantile(values: np.ndarray, q: float, *, seed: int) -> Estimate:
    """Return a quantile of values [n], with its interval, none for n < 10; infinite values count as
    larger than any other.
    """
    if not len(values):
        return dict(NOTHING)

    def of(x: np.ndarray) -> np.ndarray:
        return np.quantile(x, q, axis=-1, method="inverted_cdf")

    if len(values) < FEWEST:
        return {"value": _plain(of(values)), "ci": [None, None]}
    found = np.concatenate([of(values[index]) for index in _resamples(len(values), seed)])
    ends = np.quantile(found, TAILS, method="inverted_cdf")
    return {"value": _plain(of(values)), "ci": [_plain(end) for end in ends]}


def _resamples(n: int, seed: int) -> Iterator[np.ndarray]:
    """The places of the values in each resample, in blocks [b, n]."""
    rng = np.random.default_rng(seed)
    block = max(1, _AT_ONCE // n)
    for first in range(0, RESAMPLES, block):
        yield rng.integers(0, n, (min(block, RESAMPLES - first), n))


def _plain(number: float) -> float | None:
    """JSON has no infinity: None is "beyond what was found"."""
    return float(number) if np.isfinite(number) else None
