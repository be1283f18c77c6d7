"""Each strength as a point of accuracy and distance, held to the plain network's curve.

The plain network, trained for fewer and for more epochs, goes along a curve from low accuracy and
large distance to high accuracy and small distance. A point beyond this curve is a gain.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from hf_specreg.robustness.statistics import Estimate
from hf_specreg.study.choice import Attacked, Key, Results
from hf_specreg.study.config import STOPPED
from hf_specreg.study.measure import SPLITS
from hf_specreg.study.statistics import Paired, mean_over_seeds

Content = dict[str, Any]


def frontier(results: Results) -> list[Content]:
    """Return a point a method and strength: accuracy and distance on validation and on test images,
    and the distance over the curve's at the same test accuracy.
    """
    return [_point(results, key) for key in results.keys]


def mean_distance(found: Attacked) -> Estimate:
    """Return the mean over the correct images for which an adversarial one was found."""
    known = found.correct & np.isfinite(found.distances)
    return mean_over_seeds(np.where(known, found.distances, 0.0), known, within=(0, np.inf))


def over_curve(
    own: tuple[float, np.ndarray, np.ndarray],
    curve: Sequence[tuple[float, np.ndarray, np.ndarray]],
) -> Estimate | None:
    """Return the mean distance over the curve's at the same accuracy, of the same seeds and images.

    Between two points of the curve an image's distance is taken as linear in accuracy; above the
    most accurate one it is that one's. Accuracies are taken as known: their errors are not in the
    interval.

    Args:
        own: accuracy; distances [S, n], inf where nothing was found; correct, bool [S, n].
        curve: the same of each point.

    Returns:
        None where there is no curve, or it nowhere is as inaccurate.
    """
    accuracy, distances, correct = own
    points = sorted(curve, key=lambda point: point[0])
    if not points or accuracy < points[0][0]:
        return None
    low = max((p for p in points if p[0] <= accuracy), key=lambda point: point[0])
    high = next((p for p in points if p[0] > accuracy), low)
    share = (accuracy - low[0]) / (high[0] - low[0]) if high is not low else 0.0
    between = low[1] if share == 0 else (1 - share) * low[1] + share * high[1]
    return Paired(distances, correct, between, low[2] & high[2]).ratio()


def _point(results: Results, key: Key) -> Content:
    every = [results.status(cell) for cell in results.cells_of(key, done=False)]
    entry: Content = {"method": key[0], "strength": key[1], "seeds": every.count("done")}
    entry["diverged"] = every.count("diverged")
    for split in SPLITS:
        nothing = {"value": None, "ci": [None, None]}
        entry[split] = {"accuracy": nothing, "distance": nothing}
        if entry["seeds"]:
            entry[split] = {
                "accuracy": mean_over_seeds(results.answers(key, split)),
                "distance": mean_distance(results.attacked(key, split)),
            }
    return {**entry, "over_plain": _over_plain(results, key)}


def _over_plain(results: Results, key: Key) -> Estimate | None:
    plain = [results.plain, *(k for k in results.keys if k[0] == STOPPED)]
    if key in plain or not results.whole(key):
        return None
    places = [_place(results, k) for k in (key, *plain) if results.whole(k)]
    return over_curve(places[0], places[1:])


def _place(results: Results, key: Key) -> tuple[float, np.ndarray, np.ndarray]:
    found = results.attacked(key, "test")
    return float(results.answers(key, "test").mean()), found.distances, found.correct
