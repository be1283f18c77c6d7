"""Which strength of a method is compared, and with which plain network."""

import numpy as np
import pytest

from hf_specreg.study.choice import Attacked, Results
from hf_specreg.study.config import STOPPED, MethodConfig
from tests.study.small import cells, folder, study

METHODS = {
    "none": MethodConfig(),
    "a": MethodConfig("penalty.strength", (0.1, 0.2, 0.3)),
}
ACCURACY = {("none", None): 0.900, (STOPPED, 1): 0.880, (STOPPED, 2): 0.893, (STOPPED, 3): 0.897}
DISTANCE = {None: 1.0, 0.1: 1.1, 0.2: 1.3, 0.3: 1.5}  # on validation images


class Found(Results):
    """What a study might have found, by method and strength."""

    def __init__(self, config, accuracy, diverged=()):
        super().__init__(cells(config), folder(config))
        self.accuracy = {**ACCURACY, **{("a", s): a for s, a in accuracy.items()}}
        for cell in self.cells:
            status = "diverged" if (cell.strength, cell.seed) in diverged else "done"
            self.records[cell.name] = {"status": status}

    def values(self, key, *path):
        assert path == ("validation", "accuracy")
        return np.full(2, self.accuracy[key])

    def attacked(self, key, split, seeds=None):
        """On test images the order is the reverse."""
        distance = DISTANCE[key[1]] if split == "validation" else 2 - DISTANCE[key[1]]
        return Attacked(np.full((2, 20), distance), np.ones((2, 20), bool), [])


@pytest.fixture
def chosen(tmp_path):
    """Of accuracies by strength, what is chosen."""

    def choose(accuracy, diverged=()):
        config = study(tmp_path, methods=METHODS, stopped_epochs=(1, 2, 3), accuracy_margin=0.005)
        found = Found(config, accuracy, diverged)
        (choice,) = found.choices()
        return choice, found

    return choose


def test_the_farthest_of_those_within_the_margin_is_chosen(chosen):
    choice, found = chosen({0.1: 0.901, 0.2: 0.895, 0.3: 0.8949})
    assert choice.strength == 0.2
    assert "the farthest on validation images of the 2 of 3 strengths" in choice.reason
    assert {(c.method, c.strength) for c in found.chosen()} == {
        ("none", None),
        ("a", 0.2),
        (STOPPED, 2),  # its control, for the final attacks to be compared with
    }


def test_none_is_chosen_where_all_lose_more_and_the_least_loss_is_said(chosen):
    choice, found = chosen({0.1: 0.88, 0.2: 0.87, 0.3: 0.5})
    assert choice.strength is None
    assert "no strength loses at most 0.5 points of accuracy: the least that one loses is 2" in (
        choice.reason
    )
    assert {c.method for c in found.chosen()} == {"none"}


def test_a_strength_that_diverged_with_one_seed_is_not_chosen(chosen):
    choice, _ = chosen({0.1: 0.9, 0.2: 0.9, 0.3: 0.9}, diverged=[(0.3, 1)])
    assert choice.strength == 0.2


def test_what_is_still_to_be_done_is_not_what_diverged(chosen):
    _, found = chosen({0.1: 0.9, 0.2: 0.9, 0.3: 0.9}, diverged=[(2, 1)])
    assert found.unfinished(STOPPED) == []
    lost = next(cell for cell in found.cells if (cell.method, cell.strength) == (STOPPED, 3))
    found.records[lost.name] = None
    assert found.unfinished(STOPPED) == [(STOPPED, 3)]
    assert found.unfinished("a") == []


@pytest.mark.parametrize(
    ("accuracy", "control", "matched"),
    [
        (0.896, 3, True),
        (0.895, 2, True),  # of two as near the less accurate one
        (0.899, None, True),
        (0.900, None, True),
        (0.950, None, True),  # no plain network is as good
    ],
)
def test_the_control_is_the_plain_network_whose_accuracy_is_nearest(
    accuracy, control, matched, chosen
):
    choice, found = chosen({0.1: 0.5, 0.2: 0.5, 0.3: accuracy})
    assert (choice.control, choice.matched) == (control, matched)
    key = (STOPPED, control) if control else ("none", None)
    assert found.control(choice) == key
    assert key in {(cell.method, cell.strength) for cell in found.chosen()}


@pytest.mark.parametrize(
    ("accuracy", "control", "matched"),
    [
        (0.938, 3, True),
        (0.932, 3, False),
        (0.915, 2, False),
        (0.909, None, True),
        (0.990, 3, True),
    ],
)
def test_plain_networks_that_were_better_before_the_end_are_compared_with_too(
    accuracy, control, matched, chosen, monkeypatch
):
    monkeypatch.setitem(ACCURACY, (STOPPED, 2), 0.921)
    monkeypatch.setitem(ACCURACY, (STOPPED, 3), 0.940)
    monkeypatch.setitem(ACCURACY, ("none", None), 0.905)
    choice, _ = chosen({0.1: 0.5, 0.2: 0.5, 0.3: accuracy})
    assert (choice.control, choice.matched) == (control, matched)
