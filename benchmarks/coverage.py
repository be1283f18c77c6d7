"""How often the 95 % intervals over seeds and images cover the truth, by simulation.

    python benchmarks/coverage.py [--trials 1000]

Distances are exp(seed + image + noise), normal with standard deviations s, 0.5 and 0.3, of 200
images: s is about by how much a training's mean distance differs from another's. Of a ratio both
networks have the images in common, and each pair counts with chance 0.9. A hit is seed + image +
noise below the value that a share of 0.84 or 0.98 is below. Beside the intervals of
hf_specreg.study.statistics stand the percentiles of resampled seeds and images (Owen's pigeonhole
bootstrap).
"""

import argparse

import numpy as np
from results import record
from scipy.stats import norm

from hf_specreg.robustness.statistics import TAILS, Estimate
from hf_specreg.study.statistics import Paired, mean_over_seeds

IMAGES, OF_IMAGE, NOISE, COUNTED = 200, 0.5, 0.3, 0.9
SEEDS, OF_SEED = (1, 3, 5), (0.0, 0.03, 0.1, 0.3)
FARTHER, SHARES, RESAMPLES = 1.3, (0.84, 0.98), 500


def pigeonhole(values: np.ndarray, rng: np.random.Generator) -> Estimate:
    """Return the mean of values [S, n] with percentiles of resampled seeds and images."""
    seeds, images = (rng.multinomial(n, np.ones(n) / n, RESAMPLES) / n for n in values.shape)
    means = (seeds @ values * images).sum(1)
    return {"value": values.mean(), "ci": list(np.quantile(means, TAILS))}


def simulated(seeds: int, of_seed: float, rng: np.random.Generator) -> dict[str, bool]:
    """Return whether each interval of one simulated study covers the truth."""
    image = rng.normal(0, OF_IMAGE, IMAGES)

    def drawn() -> np.ndarray:
        seed, noise = rng.normal(0, of_seed, (seeds, 1)), rng.normal(0, NOISE, (seeds, IMAGES))
        return seed + image + noise

    own, reference = drawn(), drawn()
    variance = of_seed**2 + OF_IMAGE**2 + NOISE**2
    counted, all_of_them = rng.random(own.shape) < COUNTED, np.ones(own.shape, bool)
    pair = FARTHER * np.exp(own), counted, np.exp(reference), all_of_them
    found = {
        "mean": (mean_over_seeds(np.exp(own)), np.exp(variance / 2)),
        "mean, percentiles": (pigeonhole(np.exp(own), rng), np.exp(variance / 2)),
        "ratio": (Paired(*pair).ratio(), FARTHER),
    }
    for share in SHARES:
        hits = own < norm.ppf(share) * variance**0.5
        found[f"share {share}"] = mean_over_seeds(hits), share
    return {name: e["ci"][0] <= truth <= e["ci"][1] for name, (e, truth) in found.items()}


def main() -> None:
    """Simulate, print and write down."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=1000)
    trials = parser.parse_args().trials
    rng, rows, names = np.random.default_rng(0), [], []
    for seeds in SEEDS:
        for of_seed in OF_SEED:
            covered = [simulated(seeds, of_seed, rng) for _ in range(trials)]
            names = list(covered[0])
            shares = [f"{np.mean([c[name] for c in covered]):.1%}" for name in names]
            rows.append([str(seeds), str(of_seed), *shares])
    record(
        "How often intervals over seeds and images cover the truth",
        ["seeds", "s", *names],
        rows,
        f"{trials} simulated studies of {IMAGES} images; s: standard deviation of the log distance "
        "between trainings. One seed says nothing of other seeds, and its intervals do not try to. "
        f"Percentiles: of {RESAMPLES} resamples of seeds and images.",
    )


if __name__ == "__main__":
    main()
