import numpy as np
import pytest
from scipy.special import log_softmax, softmax
from sklearn.metrics import log_loss

from hf_specreg.robustness.calibration import brier, calibration, ece, nll, temperature


def calibrated(n: int = 40_000, k: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """Logits, and labels drawn by their softmax."""
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, (n, k))
    return logits, (softmax(logits, 1).cumsum(1) < rng.random((n, 1))).sum(1)


def test_labels_drawn_by_the_probabilities_have_an_ece_near_zero():
    logits, labels = calibrated()
    assert ece(logits, labels) < 0.01
    assert ece(4 * logits, labels) > 0.1


def test_ece_of_a_hand_case():
    # 0.9 right, 0.9 wrong: |1 - 1.8| / 4; 0.6 right twice: |2 - 1.2| / 4.
    p = np.array([[0.9, 0.1], [0.9, 0.1], [0.6, 0.4], [0.4, 0.6]])
    assert ece(np.log(p), np.array([0, 1, 0, 1])) == pytest.approx(0.8 / 4 + 0.8 / 4)
    assert ece(np.log(p), np.array([0, 1, 0, 1]), bins=1) == pytest.approx(0)


@pytest.mark.parametrize(("logit", "expected"), [(0.0, 0.5), (1000.0, 1.0)])
def test_probabilities_at_the_ends_of_bins_count(logit, expected):
    assert ece(np.array([[logit, 0.0]]), np.array([1])) == expected


def test_nll_and_brier_of_a_hand_case():
    p, labels = np.array([[0.5, 0.3, 0.2], [0.1, 0.8, 0.1]]), np.array([0, 2])
    assert nll(np.log(p), labels) == pytest.approx(-np.log([0.5, 0.1]).mean())
    first, second = 0.25 + 0.09 + 0.04, 0.01 + 0.64 + 0.81
    assert brier(np.log(p), labels) == pytest.approx((first + second) / 2)


def test_nll_is_scikit_learns_also_where_a_class_is_absent():
    logits, labels = calibrated(500)
    logits, labels = logits[labels != 3], labels[labels != 3]
    expected = log_loss(labels, softmax(logits, 1), labels=range(5))
    assert nll(logits, labels) == pytest.approx(expected)


def test_sure_and_wrong_costs_what_the_logits_say():
    logits = np.array([[0.0, 1000.0], [0.0, 1000.0]], np.float32)
    assert calibration(logits, np.array([0, 1])) == {"ece": 0.5, "nll": 500.0, "brier": 1.0}


@pytest.mark.parametrize("factor", [0.2, 1.0, 2.0, 50.0])
def test_temperature_undoes_a_factor_of_the_logits(factor):
    logits, labels = calibrated()
    found = temperature(factor * logits, labels)
    assert found == pytest.approx(factor, rel=0.02)
    assert found == pytest.approx(factor * temperature(logits, labels))


def test_temperature_has_the_smallest_nll():
    logits, labels = calibrated(300)
    found = temperature(3 * logits, labels)
    grid = np.exp(np.linspace(np.log(0.01), np.log(100), 500))
    losses = [-log_softmax(3 * logits / t, 1)[np.arange(len(labels)), labels].mean() for t in grid]
    assert nll(3 * logits / found, labels) <= min(losses)


def test_temperature_is_one_or_bounded_where_no_best_one_exists():
    logits, _ = calibrated(200)
    assert temperature(logits, logits.argmax(1)) == 1.0
    assert temperature(1e6 * logits, logits.argmax(1)) == 1.0
    assert temperature(logits, logits.argmin(1)) == 100
    assert temperature(1e6 * logits, logits.argmin(1)) == 100


@pytest.mark.parametrize(
    ("logits", "labels", "match"),
    [
        (np.zeros((2, 3)), np.array([0, 3]), "labels 0 to 3"),
        (np.zeros((2, 3)), np.array([-1, 0]), "labels -1 to 0"),
        (np.zeros((2, 3)), np.array([0]), "must be"),
        (np.zeros((0, 3)), np.zeros(0, int), "at least 1"),
        (np.full((1, 3), np.nan), np.array([0]), "finite"),
    ],
)
def test_bad_input_is_named(logits, labels, match):
    with pytest.raises(ValueError, match=match):
        calibration(logits, labels)
    with pytest.raises(ValueError, match=match):
        temperature(logits, labels)
