import numpy as np
import pytest

from hf_specreg.study.ood import ood_auroc


def test_auroc_of_a_hand_case():
    # Gaps of logits, which order probabilities: 3, 1 inside, 2, 0 outside: 3 of 4 pairs in order.
    # Energies: about 3, 11 inside, 22, 20.7 outside: none in order.
    inside, outside = np.array([[3.0, 0], [11, 10]]), np.array([[22.0, 20], [20, 20]])
    assert ood_auroc(inside, outside) == {"max_probability": 0.75, "energy": 0.0}


def test_ties_count_half():
    same = np.array([[1.0, 0, 0], [0, 1, 0]])
    assert ood_auroc(same, same[:1]) == {"max_probability": 0.5, "energy": 0.5}


def test_probabilities_that_round_to_one_are_told_apart():
    inside = np.array([[200.0, 0, 0], [300, 0, 0]], np.float32)
    outside = np.array([[100.0, 0, 0], [-50, 60, 0]], np.float32)
    assert ood_auroc(inside, outside)["max_probability"] == 1
    assert ood_auroc(outside, inside)["max_probability"] == 0


def test_the_energy_sees_what_all_logits_share_and_the_probability_does_not():
    logits = np.random.default_rng(0).integers(-5, 5, (50, 4)).astype(float)
    assert ood_auroc(logits + 100, logits) == {"max_probability": 0.5, "energy": 1.0}


def test_bad_input_is_named():
    logits = np.zeros((2, 3))
    with pytest.raises(ValueError, match="2 and 0 images"):
        ood_auroc(logits, logits[:0])
    with pytest.raises(ValueError, match="NaN"):
        ood_auroc(logits, logits * np.nan)
