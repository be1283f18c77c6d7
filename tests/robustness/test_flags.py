from types import SimpleNamespace

import numpy as np

from hf_specreg.robustness.flags import flags

TANGENT = SimpleNamespace(norm="l2", black_box=True, minimum_distance=True)
PGD = SimpleNamespace(norm="l2", black_box=False, minimum_distance=False)
GRID = {"l2": [0.5, 1.0], "linf": [0.1]}


def flags_of(tangent, pgd, half=None, stands=None):
    """The flags of 100 images, all classified correctly, at these distances; with half of its
    queries, tangent's were `half`; `stands`: which withstand the PGD that looks for masking.
    """
    results = {
        "clean": {"correct": np.ones(100, bool), "invalid": np.zeros(100, bool)},
        "tangent": {"distances": np.asarray(tangent, float)},
        "pgd-l2": {"distances": np.asarray(pgd, float)},
    }
    if half is not None:
        steps = np.zeros((100, 3, 2))
        steps[:, :, 0] = [0, 5, 10]
        steps[:, :, 1] = np.stack([np.full(100, np.inf), half, tangent], axis=1)
        results["tangent"]["trajectory"] = steps
    if stands is not None:
        looked, none = np.ones(100, bool), np.zeros(100, bool)
        masking = dict.fromkeys(("stands_10", "stands_unbounded", "no_gradient"), none)
        results["masking"] = {**masking, "looked": looked, "stands_100": stands}
    return flags(results, {"tangent": TANGENT, "pgd-l2": PGD}, GRID)


def test_a_black_box_attack_that_misses_what_gradients_find_is_not_converged():
    far = np.where(np.arange(100) < 41, 1.2, 0.9)
    (flag,) = flags_of(far, np.ones(100))
    assert flag.startswith(
        "not converged: at eps 1 (l2) white-box attacks break 41 of 100 images for which tangent"
    )


def test_distances_beyond_the_eps_of_the_grid_are_compared_at_their_median():
    (flag,) = flags_of(np.full(100, 2.6), np.linspace(1.1, 1.9, 100))
    assert flag.startswith("not converged: at eps 1.5 (l2) white-box attacks break 50 of 100")
    assert flags_of(np.full(100, 1.4), np.full(100, 1.4)) == []
    assert flags_of(np.full(100, 1.4), np.full(100, np.inf)) == []


def test_a_white_box_attack_that_misses_what_classes_find_points_at_masked_gradients():
    (flag,) = flags_of(np.full(100, 0.9), np.where(np.arange(100) < 6, np.inf, 1.0))
    assert flag.startswith("gradient masking: at eps 1 (l2) black-box attacks break 6 of 100")


def test_a_white_box_attack_that_is_merely_short_is_no_sign_of_masked_gradients():
    found, short = np.full(100, 0.9), np.where(np.arange(100) < 40, np.inf, 1.0)
    (flag,) = flags_of(found, short, stands=np.zeros(100, bool))
    assert flag.startswith("not converged: at eps 1 (l2) black-box attacks break 40 of 100 images ")
    assert flag.endswith("the white-box attacks are too short, give pgd-l2 more steps")
    masked = flags_of(found, short, stands=np.arange(100) < 8)
    assert masked[0].startswith("gradient masking: at eps 1 (l2) black-box attacks break 40 of 100")


def test_a_few_images_between_the_attacks_are_no_flag():
    few = np.arange(100) < 5
    assert flags_of(np.where(few, 1.2, 0.9), np.where(few[::-1], np.inf, 1.0)) == []


def test_images_for_which_nothing_was_found_are_counted():
    tangent = np.where(np.arange(100) < 3, np.inf, 0.9)
    (flag,) = flags_of(tangent, np.ones(100))
    assert flag.startswith("tangent found no adversarial image for 3 of 100")


def test_distances_that_fell_in_the_second_half_of_the_queries_are_not_converged():
    near = np.full(100, 0.9)
    assert flags_of(near, np.ones(100), half=1.04 * near) == []
    (flag,) = flags_of(near, np.ones(100), half=1.2 * near)
    assert flag.startswith(
        "not converged: the mean distance of tangent was 1.08 with half of its queries and is 0.9 "
    )
    late = np.where(np.arange(100) < 9, np.inf, near)
    (flag,) = flags_of(near, np.ones(100), half=late)
    assert flag.startswith("not converged: tangent found nothing for 9 of 100 images with half")
