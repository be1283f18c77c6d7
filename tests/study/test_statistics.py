import numpy as np
import pytest
from scipy import stats

from hf_specreg.robustness.statistics import proportion
from hf_specreg.study.statistics import Paired, mean_over_seeds, over_seeds

NONE = {"value": None, "ci": [None, None]}


def distances(seeds: int, n: int, of_seed: float = 0.1) -> tuple[np.ndarray, ...]:
    """Distances and correctness of a method, then of a reference, with the images in common."""
    rng = np.random.default_rng(0)
    image, found = rng.normal(0, 0.5, n), []
    for _ in range(2):
        seed, noise = rng.normal(0, of_seed, (seeds, 1)), rng.normal(0, 0.3, (seeds, n))
        found += [np.exp(image + seed + noise), rng.random((seeds, n)) < 0.9]
    return tuple(found)


def test_the_interval_of_a_seeds_part_plus_an_images_part_is_welchs():
    rng = np.random.default_rng(0)
    seed, image = rng.normal(0, 0.2, 4), rng.normal(1, 1, 30)
    estimate = mean_over_seeds(seed[:, None] + image)
    welch = stats.ttest_ind(seed, -image, equal_var=False)
    assert estimate["value"] == pytest.approx(seed.mean() + image.mean())
    assert estimate["ci"] == pytest.approx(list(welch.confidence_interval()))


def test_of_one_seed_only_images_vary():
    values = np.random.default_rng(0).normal(1, 1, (1, 40))
    expected = stats.ttest_1samp(values[0], 0).confidence_interval()
    assert mean_over_seeds(values)["ci"] == pytest.approx(list(expected))
    low, high = Paired(*distances(1, 40)).ratio()["ci"]
    assert 0 < low < high


def test_of_equal_images_only_seeds_vary():
    values = np.array([1.0, 2.0, 4.0])
    expected = list(stats.ttest_1samp(values, 0).confidence_interval())
    assert over_seeds(values) == {"value": values.mean(), "ci": pytest.approx(expected)}
    assert mean_over_seeds(values[:, None].repeat(20, 1))["ci"] == pytest.approx(expected)


def test_the_error_of_a_ratio_is_that_of_resampled_seeds_and_images():
    own, correct, reference, reference_correct = distances(40, 200)
    pairs, rng = correct & reference_correct, np.random.default_rng(0)
    seeds, images = (rng.multinomial(n, np.ones(n) / n, 2000) for n in own.shape)
    top, bottom = ((seeds @ (x * pairs) * images).sum(1) for x in (own, reference))
    low, high = Paired(own, correct, reference, reference_correct).ratio()["ci"]
    assert [low, high] == pytest.approx(list(np.quantile(top / bottom, [0.025, 0.975])), rel=0.01)


def test_a_ratio_and_a_difference_of_a_hand_case_leave_out_what_was_not_found():
    own = np.array([[1.0, 2, np.inf, 5], [3, 4, 6, 7]])
    reference = np.array([[2.0, 1, 1, 9], [1, np.inf, 2, 9]])
    correct = np.array([[True, True, True, False], [True] * 4])
    other = np.array([[True] * 4, [True, True, True, False]])
    pair = own, correct, reference, other
    assert Paired(*pair).compared.tolist() == [[1, 1, 0, 0], [1, 0, 1, 0]]
    assert (correct & other & ~Paired(*pair).compared).sum() == 2
    assert Paired(*pair).ratio() == {"value": (1 + 2 + 3 + 6) / (2 + 1 + 1 + 2), "ci": [None, None]}
    assert Paired(*pair).difference() == {"value": (-1 + 1 + 2 + 4) / 4, "ci": [None, None]}
    assert Paired(*pair).signs() == [0, 1]
    assert Paired(*pair[2:], *pair[:2]).signs() == [0, -1]


@pytest.mark.parametrize("seeds", [1, 3])
def test_equal_networks_have_ratio_one_without_doubt(seeds):
    own, correct, *_ = distances(seeds, 50)
    pair = own, correct, own, correct
    assert Paired(*pair).ratio() == {"value": 1.0, "ci": [1.0, 1.0]}
    assert Paired(*pair).difference() == {"value": 0.0, "ci": [None, None]}
    assert Paired(*pair).signs() == [0] * seeds


def test_a_ratio_turned_round_is_its_reciprocal_and_scales_with_distances():
    own, correct, reference, other = distances(3, 50)
    found = Paired(own, correct, reference, other).ratio()
    back = Paired(reference, other, own, correct).ratio()
    assert back["value"] == pytest.approx(1 / found["value"])
    assert back["ci"] == pytest.approx([1 / end for end in reversed(found["ci"])])
    twice = Paired(2 * own, correct, reference, other).ratio()
    assert twice["ci"] == pytest.approx([2 * end for end in found["ci"]])


def test_images_in_common_make_pairs_narrower():
    own, correct, reference, other = distances(3, 200, of_seed=0)
    low, high = Paired(own, correct, reference, other).difference()["ci"]
    order = np.random.default_rng(1).permutation(200)
    apart = Paired(own, correct, reference[:, order], other[:, order]).difference()["ci"]
    assert high - low < 0.8 * (apart[1] - apart[0])


def test_proportions_that_all_agree_have_the_interval_of_the_images():
    for value in (False, True):
        hits = np.full((3, 40), value)
        assert mean_over_seeds(hits) == proportion(hits[0])


def test_a_proportion_of_one_seed_or_of_equal_seeds_is_that_of_the_images():
    hits = np.random.default_rng(0).random((1, 500)) < 0.98
    expected = proportion(hits[0])["ci"]
    assert mean_over_seeds(hits)["ci"] == pytest.approx(expected, abs=2e-3)
    assert mean_over_seeds(hits.repeat(4, 0))["ci"] == pytest.approx(expected, abs=2e-3)


def test_a_proportion_is_no_surer_than_of_independent_pairs_and_less_sure_where_seeds_differ():
    rng = np.random.default_rng(0)
    hits = rng.random((5, 200)) < 0.9
    low, high = mean_over_seeds(hits)["ci"]
    alone = proportion(hits.ravel())["ci"]
    assert low <= alone[0] < alone[1] <= high
    apart = mean_over_seeds(rng.random((5, 200)) < np.array([[0.7], [0.8], [0.9], [0.95], [1]]))
    assert apart["ci"][1] - apart["ci"][0] > 2 * (high - low)
    assert 0 < apart["ci"][0] < apart["ci"][1] <= 1


@pytest.mark.parametrize(("seeds", "of_seed"), [(3, 0.0), (3, 0.3), (5, 0.1)])
def test_intervals_cover_the_truth_about_95_times_in_100(seeds, of_seed):
    rng, covered = np.random.default_rng(0), 0
    for _ in range(2000):
        image, noise = rng.normal(1, 0.5, 100), rng.normal(0, 0.3, (seeds, 100))
        low, high = mean_over_seeds(image + noise + rng.normal(0, of_seed, (seeds, 1)))["ci"]
        covered += low <= 1 <= high
    assert 0.91 < covered / 2000 < 0.98


def test_an_interval_is_cut_to_what_a_mean_can_be():
    values = np.linspace(0.9, 1, 3)[:, None].repeat(20, 1)
    low, high = mean_over_seeds(values, within=(0, 1))["ci"]
    assert low < 0.9
    assert high == 1


def test_few_images_and_one_seed_have_no_interval():
    assert mean_over_seeds(np.ones((3, 9))) == {"value": 1.0, "ci": [None, None]}
    mask = np.arange(20) < 9
    assert mean_over_seeds(np.ones((3, 20)), mask & np.ones((3, 1), bool))["ci"] == [None, None]
    assert over_seeds(np.array([2.0])) == {"value": 2.0, "ci": [None, None]}


def test_answers_that_all_agree_have_no_interval_of_their_difference():
    assert mean_over_seeds(np.zeros((3, 100))) == {"value": 0.0, "ci": [None, None]}
    low, high = mean_over_seeds(np.zeros((3, 100), bool))["ci"]
    assert low == 0 < high


def test_nothing_to_average_or_not_of_all():
    values, nowhere = np.ones((2, 20)), np.zeros((2, 20), bool)
    assert mean_over_seeds(values, nowhere) == NONE
    assert Paired(values, nowhere, values, ~nowhere).ratio() == NONE
    assert Paired(values, nowhere, values, ~nowhere).difference() == NONE
    assert mean_over_seeds(np.where(np.arange(20) < 1, np.inf, values)) == NONE
    assert over_seeds(np.array([1.0, np.nan])) == over_seeds(np.array([])) == NONE


def test_other_images_or_seeds_are_refused():
    own, correct, reference, other = distances(3, 20)
    with pytest.raises(ValueError, match="same seeds and images"):
        Paired(own, correct, reference[:1], other[:1]).ratio()
    with pytest.raises(ValueError, match="same seeds and images"):
        mean_over_seeds(own[0])


def test_left_out_is_where_something_was_found_for_one_of_two_that_are_right():
    own = np.array([[1.0, np.inf, 1.0, np.inf, np.inf]])
    other = np.array([[1.0, 1.0, np.inf, np.inf, 1.0]])
    right, wrong_last = np.ones((1, 5), bool), np.array([[True, True, True, True, False]])
    pair = own, right, other, wrong_last
    assert Paired(*pair).unpaired.tolist() == [[False, True, True, False, False]]
    assert Paired(*pair).compared.tolist() == [[True, False, False, False, False]]
