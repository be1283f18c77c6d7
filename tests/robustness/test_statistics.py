import numpy as np
import pytest

from hf_specreg.robustness.statistics import mean, paired_difference, proportion, quantile


def test_the_interval_of_a_mean_is_that_of_normal_theory():
    values = np.random.default_rng(0).normal(3, 2, 1000)
    estimate = mean(values, seed=0)
    assert estimate["value"] == pytest.approx(values.mean())
    half = 1.96 * values.std() / 1000**0.5
    assert estimate["ci"] == pytest.approx([values.mean() - half, values.mean() + half], abs=0.01)


def test_the_interval_of_a_mean_covers_the_truth_about_95_times_in_100():
    rng = np.random.default_rng(1)
    covered = 0
    for trial in range(200):
        low, high = mean(rng.exponential(1, 80), seed=trial)["ci"]
        covered += low <= 1 <= high
    assert 0.88 <= covered / 200 <= 0.99


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
