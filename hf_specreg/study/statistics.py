"""Means, ratios and differences over seeds and images, each with a 95 % interval.

Seeds and images are crossed: every network, of S seeds, gets the same n images. What an estimate
would be with other seeds and with other images varies by both, so its squared error is taken as

    var(u_1., ..., u_S.) / S + var(u_.1, ..., u_.n) / n,

the means of a seed and of an image over the other, u being the estimate linearised: each (seed,
image) pair's part in its deviation. The interval is Student's, with the degrees of freedom of Welch
and Satterthwaite: S - 1 = 2 of three seeds that differ much, n - 1 where only images do. Ratios
have it on log scale; fractions of true values have the binomial interval of as many independent
images as have this error (Korn, Graubard), which has a width also where all agree. With one seed
only images vary. Fewer than 10 images give no interval.

Percentiles of resampled seeds and images (Owen's pigeonhole bootstrap) estimate the same variance,
without the factor S / (S - 1) and Student's quantiles, which few seeds need: of 1,000 simulated
means over 3 seeds and 200 images they cover the truth in 79 to 96 of 100, over 5 in 84 to 96, less
the more seeds differ. These intervals cover it in 92 to 97 (means), 92 to 99 (ratios and
proportions): above 95 where seeds hardly matter, since what is neither a seed's nor an image's
doing is in both terms (python benchmarks/coverage.py).

Sources: Owen, "The pigeonhole bootstrap", Annals of Applied Statistics 2007; Satterthwaite,
Biometrics Bulletin 1946; Korn, Graubard, "Confidence intervals for proportions with small expected
number of positive counts estimated from survey data", Survey Methodology 1998.
"""

from dataclasses import dataclass

import numpy as np
from scipy.stats import norm, t

from hf_specreg.robustness.statistics import (
    FEWEST,
    NOTHING,
    TAILS,
    Estimate,
    binomial_interval,
)


@dataclass(frozen=True)
class Paired:
    """The distances of two methods' networks, of the same seeds and images.

    Args:
        distances: [S, n], inf where nothing was found.
        correct: bool [S, n], whether the image is classified correctly.
        reference_distances: [S, n], of the method that the first is compared with.
        reference_correct: bool [S, n].

    Raises:
        ValueError: other shapes, or not the same.
    """

    distances: np.ndarray
    correct: np.ndarray
    reference_distances: np.ndarray
    reference_correct: np.ndarray

    def __post_init__(self):
        _require_pairs(*vars(self).values())

    @property
    def compared(self) -> np.ndarray:
        """Which (seed, image) pairs are, bool [S, n]: both networks classify the image correctly,
        and an adversarial image was found for both. A mean without the farthest images is too
        small: say how many are missing.
        """
        return self._correct & self._found.all(0)

    @property
    def unpaired(self) -> np.ndarray:
        """Which pairs are left out to the one network's harm, bool [S, n]: both classify the image
        correctly, and an adversarial image was found for one.
        """
        return self._correct & (self._found[0] != self._found[1])

    @property
    def _correct(self) -> np.ndarray:
        return self.correct & self.reference_correct

    @property
    def _found(self) -> np.ndarray:
        return np.isfinite([self.distances, self.reference_distances])

    def _totals(self) -> np.ndarray:
        """Both distances of the pairs that are compared, 0 elsewhere: [2, S, n]."""
        return np.where(self.compared, [self.distances, self.reference_distances], 0.0)

    def ratio(self) -> Estimate:
        """Return the mean distance over the reference's."""
        total, reference = self._totals()
        if not reference.any():
            return dict(NOTHING)
        ratio, u = _linearised(total, reference)
        if ratio == 0 or _few(self.compared):
            return {"value": ratio, "ci": [None, None]}
        error, df = _error(u)
        ends = [float(ratio * np.exp(t.ppf(q, df) * error / ratio)) for q in TAILS]
        return {"value": ratio, "ci": ends}

    def difference(self) -> Estimate:
        """Return the mean distance minus the reference's."""
        total, reference = self._totals()
        return mean_over_seeds(total - reference, self.compared)

    def signs(self) -> list[int]:
        """Return for each seed 1 where the mean distance is larger than the reference's, -1 where
        it is smaller, 0 where it is neither.
        """
        total, reference = self._totals()
        return [int(sign) for sign in np.sign((total - reference).sum(1))]


def mean_over_seeds(
    values: np.ndarray,
    mask: np.ndarray | None = None,
    *,
    within: tuple[float, float] = (-np.inf, np.inf),
) -> Estimate:
    """Return the mean over all (seed, image) pairs; none where one of them is infinite.

    Args:
        values: [S, n]; where they are bool, the interval is one of a proportion. Pass differences
            of bools as numbers.
        mask: bool [S, n], the pairs that count; all by default.
        within: what a mean can be, which the interval is cut to.

    Raises:
        ValueError: other shapes, or not the same.
    """
    mask = np.ones(values.shape, bool) if mask is None else mask
    _require_pairs(values, mask)
    if not mask.any() or not np.isfinite(values[mask]).all():
        return dict(NOTHING)
    mean, u = _linearised(np.where(mask, values, 0).astype(float), mask.astype(float))
    if _few(mask):
        return {"value": mean, "ci": [None, None]}
    error, df = _error(u)
    if error == 0 and values.dtype != bool:  # all alike, of which no width can be told
        return {"value": mean, "ci": [None, None]}
    if values.dtype == bool:
        size = _independent_images(mean, error, df, mask)
        low, high = binomial_interval(np.array(mean * size), size)
        return {"value": mean, "ci": [float(low), float(high)]}
    ends = np.clip([mean + t.ppf(q, df) * error for q in TAILS], *within)
    return {"value": mean, "ci": [float(end) for end in ends]}


def over_seeds(values: np.ndarray, *, within: tuple[float, float] = (-np.inf, np.inf)) -> Estimate:
    """Return the mean of a number that each seed has one of, values [S], with Student's interval,
    cut to what it can be; none for one seed.
    """
    values = np.asarray(values, float)
    if not len(values) or not np.isfinite(values).all():
        return dict(NOTHING)
    mean, n = values.mean(), len(values)
    if n == 1:
        return {"value": float(mean), "ci": [None, None]}
    error = values.std(ddof=1) / n**0.5
    ends = np.clip([mean + t.ppf(q, n - 1) * error for q in TAILS], *within)
    return {"value": float(mean), "ci": [float(end) for end in ends]}


def _require_pairs(*arrays: np.ndarray) -> None:
    shapes = [array.shape for array in arrays]
    if len(set(shapes)) > 1 or len(shapes[0]) != 2:
        named = ", ".join(map(str, shapes))
        raise ValueError(f"shapes {named} must all be [S, n], of the same seeds and images")


def _linearised(numerator: np.ndarray, denominator: np.ndarray) -> tuple[float, np.ndarray]:
    """Return sum(numerator) / sum(denominator), and what each pair adds to its error, [S, n]."""
    value = numerator.sum() / denominator.sum()
    return float(value), (numerator - value * denominator) / denominator.mean()


def _error(u: np.ndarray) -> tuple[float, float]:
    """Return the standard error of the mean of u [S, n], and its degrees of freedom."""
    margins = [u.mean(1), u.mean(0)] if len(u) > 1 else [u[0]]
    parts = np.array([margin.var(ddof=1) / len(margin) for margin in margins])
    freedom = np.array([len(margin) - 1 for margin in margins])
    square = parts.sum()
    return square**0.5, square**2 / (parts**2 / freedom).sum() if square else np.inf


def _independent_images(p: float, error: float, df: float, mask: np.ndarray) -> float:
    """Return of how many independent images a proportion p would have this error."""
    if error == 0:  # all agree: images that seeds answer alike are one
        return float(mask.any(0).sum())
    size = p * (1 - p) / error**2 * (norm.ppf(TAILS[1]) / t.ppf(TAILS[1], df)) ** 2
    return min(size, float(mask.sum()))


def _few(mask: np.ndarray) -> bool:
    return mask.any(0).sum() < FEWEST
