"""How far a point lies beyond the curve of accuracy and distance of the plain network."""

import numpy as np
import pytest

from hf_specreg.study.frontier import over_curve

ALL = np.ones((2, 40), bool)


def place(accuracy, distance, correct=ALL):
    return accuracy, np.broadcast_to(np.asarray(distance, float), (2, 40)), correct


CURVE = [place(0.9, 1.0), place(0.8, 1.5)]


@pytest.mark.parametrize(
    ("accuracy", "expected"),
    [(0.8, 2 / 1.5), (0.85, 2 / 1.25), (0.875, 2 / 1.125), (0.9, 2.0), (0.95, 2.0), (0.79, None)],
)
def test_the_curve_is_straight_between_its_points_flat_above_and_nothing_below(accuracy, expected):
    over = over_curve(place(accuracy, 2.0), CURVE)
    assert over is None if expected is None else over["value"] == pytest.approx(expected)


def test_images_that_any_of_the_networks_gets_wrong_or_keeps_are_left_out():
    wrong = ALL.copy()
    wrong[:, 0] = False
    far = np.full((2, 40), 2.0)
    far[:, :3] = 100.0, np.inf, 100.0
    ends = [place(0.8, 1.5, wrong), place(0.9, np.where(np.arange(40) == 2, np.inf, 1.0))]
    assert over_curve(place(0.85, far), ends)["value"] == pytest.approx(2 / 1.25)
    at_the_end = over_curve(place(0.8, far), ends)  # of the other end nothing counts
    assert at_the_end["value"] == pytest.approx((37 * 2 + 100) / (38 * 1.5))


def test_its_interval_is_that_of_the_paired_ratio():
    rng = np.random.default_rng(0)
    reference = rng.lognormal(size=(2, 40))
    over = over_curve(place(0.9, 1.3 * reference), [place(0.9, reference)])
    assert over["ci"] == pytest.approx([1.3, 1.3])
    apart = rng.lognormal(size=(2, 40))
    low, high = over_curve(place(0.9, apart), [place(0.9, reference)])["ci"]
    assert low < apart.mean() / reference.mean() < high


def test_without_a_plain_network_there_is_no_curve():
    assert over_curve(place(0.9, 1.0), []) is None
