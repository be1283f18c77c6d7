import numpy as np
import pytest
from scipy.stats import binom

from hf_specreg.robustness.statistics import (
    at_half_budget,
    mean,
    paired_difference,
    proportion,
    quantile,
)


def test_half_of_the_budget_is_the_first_place_with_half_of_an_images_own_queries():
    trajectory = np.zeros((3, 4, 2))
    trajectory[0] = [(1, 9), (40, 5), (60, 4), (100, 3)]
    trajectory[1] = [(1, 8), (2, 7), (4, 6), (4, 6)]
    trajectory[2] = [(90, np.inf), (90, np.inf), (90, np.inf), (90, np.inf)]
    assert at_half_budget(trajectory).tolist() == [4, 7, np.inf]


def test_the_interval_of_a_mean_is_that_of_normal_theory():
    values = np.random.default_rng(0).normal(3, 2, 1000)
    estimate = mean(values, seed=0)
    assert estimate["value"] == pytest.approx(values.mean())
    half = 1.96 * values.std() / 1000**0.5
    assert estimate["ci"] == pytest.approx([values.mean() - half, values.mean() + half], abs=0.01)


@pytest.mark.parametrize("n", [10, 20, 40])
def test_the_interval_of_a_mean_covers_the_truth_of_skewed_values_about_95_times_in_100(n):
    """Of percentiles it covers it 87, 91 and 92 times; of BCa 88, 91 and 92 times."""
    rng = np.random.default_rng(1)
    truth, covered = np.exp(0.5**2 / 2), 0
    for trial in range(800):
        low, high = mean(rng.lognormal(0, 0.5, n), seed=trial)["ci"]
        covered += low <= truth <= high
    assert 0.925 < covered / 800 < 0.97


def test_a_few_values_that_differ_from_the_rest_give_a_finite_interval():
    values = np.zeros(100)
    values[:2] = 1
    low, high = mean(values, seed=0)["ci"]
    assert low <= 0.02 <= high
    assert np.isfinite([low, high]).all()


def test_values_that_are_all_the_same_are_not_taken_for_certain():
    assert mean(np.ones(20), seed=0, within=(0, 1)) == {"value": 1.0, "ci": [None, None]}
    low, high = mean(np.array([*np.ones(19), 0.9]), seed=0, within=(0, 1))["ci"]
    assert low < 0.995 < high <= 1


@pytest.mark.parametrize("n", [1, 5, 9])
def test_few_values_have_no_interval(n):
    values = 1.3 * np.ones(n)
    assert mean(values, seed=0) == {"value": pytest.approx(1.3), "ci": [None, None]}
    assert quantile(values, 0.5, seed=0) == {"value": 1.3, "ci": [None, None]}


def test_the_interval_of_a_proportion_is_the_exact_one_also_where_all_images_agree():
    hits = np.zeros(100, bool)
    ends = []
    for count in (0, 1, 2, 50, 100):
        hits[:count] = True
        ends.append(proportion(hits)["ci"])
    # Published tables of the Clopper-Pearson interval.
    expected = [[0, 0.0362], [0.0003, 0.0545], [0.0024, 0.0704], [0.3983, 0.6017], [0.9638, 1]]
    assert np.allclose(ends, expected, atol=1e-4)


def test_infinite_distances_count_in_quantiles():
    values = np.array([1.0, 2.0, np.inf, np.inf, np.inf])
    assert quantile(values, 0.25, seed=0)["value"] == 2
    assert quantile(values, 0.5, seed=0)["value"] is None


def test_the_interval_of_a_median_is_that_of_the_binomial_distribution():
    """A resample's median is at most the k-th value where half of its draws are of the first k."""
    n, ranks = 100, np.arange(1, 101)
    at_most = binom.sf(n / 2 - 1, n, ranks / n)
    expected = [ranks[np.argmax(at_most >= tail)] for tail in (0.025, 0.975)]
    assert expected == [40, 60]
    ends = quantile(ranks.astype(float), 0.5, seed=0)["ci"]
    assert ends == pytest.approx(expected, abs=1)  # resampled 2,000 times


def test_nothing_to_average():
    assert mean(np.array([]), seed=0) == {"value": None, "ci": [None, None]}
    assert proportion(np.array([], bool))["value"] is None


def test_intervals_of_paired_differences_cover_the_truth_as_often_as_they_say():
    rng = np.random.default_rng(0)
    chances = np.array([0.45, 0.25, 0.05, 0.25])  # both, the first, the second, neither
    truth, covered = chances[1] - chances[2], 0
    for _ in range(1000):
        hits, reference = np.array([[1, 1], [1, 0], [0, 1], [0, 0]], bool)[
            rng.choice(4, 60, p=chances)
        ].T
        low, high = paired_difference(hits, reference)["ci"]
        covered += low <= truth <= high
    assert 0.93 < covered / 1000 < 0.98


def test_a_paired_difference_changes_its_sign_with_the_order():
    hits = np.repeat([True, True, False, False], [20, 12, 2, 16])
    reference = np.repeat([True, False, True, False], [20, 12, 2, 16])
    found, back = paired_difference(hits, reference), paired_difference(reference, hits)
    assert found["value"] == pytest.approx(0.2)
    assert found["ci"] == pytest.approx([0.0562, 0.3292], abs=1e-4)  # not so without continuity
    assert back["ci"] == pytest.approx([-end for end in reversed(found["ci"])])
    shuffled = np.random.default_rng(0).permutation(50)  # narrower where pairs agree
    apart = paired_difference(hits, reference[shuffled])["ci"]
    assert found["ci"][1] - found["ci"][0] < apart[1] - apart[0]


@pytest.mark.parametrize("hits", [0, 5, 20])
def test_models_that_agree_on_every_image_may_still_differ(hits):
    same = np.arange(20) < hits
    found = paired_difference(same, same)
    assert found["value"] == 0
    low, high = found["ci"]
    assert -0.3 < low < -0.01
    assert high == pytest.approx(-low)
    assert paired_difference(same[:0], same[:0]) == {"value": None, "ci": [None, None]}
