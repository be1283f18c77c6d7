"""A verdict is withdrawn where an attack, and not the network, may have made its distances."""

from types import SimpleNamespace

import numpy as np
import pytest

from hf_specreg.robustness.flags import MASKED
from hf_specreg.study.choice import Attacked, Choice
from hf_specreg.study.config import STOPPED
from hf_specreg.study.doubts import doubts, is_contradicted, is_converged

PLAIN, OWN, CONTROL = ("none", None), ("a", 0.1), (STOPPED, 3)
FARTHER, NEARER, NEITHER = (
    {"value": 1.2, "ci": [1.1, 1.3]},
    {"value": 0.8, "ci": [0.7, 0.9]},
    {"value": 0.99, "ci": [0.9, 1.1]},
)


def report(distances, half, flags=()):
    """Of an attack that had found `half` at half of its 4 queries."""
    steps = np.stack(np.broadcast_arrays(np.inf, half, half, half, distances), 1)
    queries = np.broadcast_to(np.arange(5.0), steps.shape)
    return SimpleNamespace(
        content={"attacks": {"fmn-l2": {"norm": "l2", "distance": {}}}, "flags": list(flags)},
        images={"fmn-l2/trajectory": np.stack([queries, steps], 2)},
    )


def attacked(half=1.0, missing=0, flags=()):
    """Two trainings of 40 images; `half`: of the distance, at half the budget."""
    distances = np.full((2, 40), 2.0)
    distances[0, :missing] = np.inf
    found = [report(own, half * own, flags) for own in distances]
    return Attacked(distances, np.ones((2, 40), bool), found)


class Found:
    """What a study found, by method and strength and by split."""

    plain = PLAIN

    def __init__(self, test, final=None, unfinished=()):
        self.splits = {"test": test, "final": final or {}}
        self.keys_unfinished = unfinished

    def unfinished(self, method):
        return [key for key in self.keys_unfinished if key[0] == method]

    def has(self, key, split):
        return key in self.splits[split]

    def attacked(self, key, split, seeds=None):
        return self.splits[split][key]

    def cells_of(self, key):
        return [SimpleNamespace(label=f"{key[0]} {key[1]}, seed 0", key=key)]

    def reports(self, cell):
        return [
            r
            for found in self.splits.values()
            if cell.key in found
            for r in found[cell.key].reports
        ]

    def control(self, choice):
        return PLAIN if choice.control is None else (STOPPED, choice.control)


def row(ratio=FARTHER, unpaired=0, control=FARTHER):
    of_control = {"ratio": control, "unpaired_images": 0}
    return {"ratio": ratio, "unpaired_images": unpaired, "control": of_control}


CHOICE = Choice("a", 0.1, "", control=3, matched=True)
SOUND = {PLAIN: attacked(), OWN: attacked(), CONTROL: attacked()}


def test_a_verdict_on_sound_distances_stands():
    final = row({"value": 1.01, "ci": [0.9, 1.1]})
    assert doubts(Found(SOUND, SOUND), CHOICE, row(), final) == []
    assert doubts(Found(SOUND), CHOICE, row(), None) == []


def test_a_nearer_plain_network_that_is_not_done_withdraws_it():
    (said,) = doubts(Found(SOUND, unfinished=[(STOPPED, 4), (STOPPED, 5)]), CHOICE, row(), None)
    assert said.startswith("the plain networks stopped at 4 and 5 epochs are not done with all")
    assert doubts(Found(SOUND, unfinished=[("b", 4)]), CHOICE, row(), None) == []


def test_images_that_are_compared_for_one_of_both_alone_withdraw_it_and_are_counted():
    (said,) = doubts(Found(SOUND), CHOICE, row(unpaired=3), None)
    assert "for 3 images, over all seeds, something was found for it or for the plain" in said
    other = row()
    other["control"]["unpaired_images"] = 2
    (said,) = doubts(Found(SOUND), CHOICE, other, None)
    assert "for 2 images" in said
    assert "for the plain network stopped, and not for both" in said


@pytest.mark.parametrize(
    ("key", "name"), [(OWN, "it"), (PLAIN, "the plain network"), (CONTROL, "the plain network st")]
)
def test_distances_that_still_fall_or_masked_gradients_of_any_network_withdraw_it(key, name):
    late = {**SOUND, key: attacked(half=1.1)}
    (said,) = doubts(Found(late), CHOICE, row(), None)
    assert f"the attacks on {name}" in said
    assert "have not converged: more steps are needed" in said
    flag = f"{MASKED}: PGD does not improve with steps"
    masked = {**SOUND, key: attacked(flags=[flag])}
    (said,) = doubts(Found(SOUND, masked), CHOICE, row(), None)
    assert said == f"gradients look masked ({key[0]} {key[1]}, seed 0)"


def test_images_that_no_attack_moves_over_the_border_withdraw_it_where_they_are_many():
    few = {**SOUND, PLAIN: attacked(missing=4), OWN: attacked(missing=4)}  # of 80
    assert doubts(Found(few), CHOICE, row(), None) == []
    many = {**SOUND, PLAIN: attacked(missing=5), OWN: attacked(missing=5)}
    (said,) = doubts(Found(many), CHOICE, row(), None)
    assert "for more than 5 % of those of it and the plain network: these are the farthest" in said


def test_an_attack_has_converged_when_the_second_half_of_its_budget_finds_little():
    assert is_converged(attacked(half=1.04))
    assert not is_converged(attacked(half=1.06))
    assert not is_converged(attacked(half=np.inf))
    silent = attacked(half=2.0)
    for one in silent.reports:
        one.images.clear()
    assert is_converged(silent)  # it does not tell
    assert is_converged(attacked(missing=3))  # what is not found is told elsewhere


def test_the_final_attacks_withdraw_what_they_turn_round():
    found = Found(SOUND, SOUND)
    (said,) = doubts(found, CHOICE, row(), row(NEARER))
    assert "the other way round: 0.800 times the distance of the plain network, by those" in said
    (said,) = doubts(found, CHOICE, row(), row(control=NEITHER))
    assert "0.990 times the distance of the plain network stopped" in said
    assert not is_contradicted(NEITHER, {"value": 1.01, "ci": [0.9, 1.1]})  # nothing was said
    assert is_contradicted({"value": 1.01, "ci": [0.9, 1.1]}, NEARER)
    assert not is_contradicted(FARTHER, {"value": None, "ci": [None, None]})
