import copy
import re

import pytest

from hf_specreg.robustness.text import number, percent
from hf_specreg.study.result import Study
from hf_specreg.study.tables import sections
from hf_specreg.study.text import to_markdown
from hf_specreg.study.verdict import (
    EASIER,
    HARDER,
    NEITHER,
    UNKNOWN,
    UNMATCHED,
    WITHDRAWN,
    cautions,
    outcome,
    summary,
    verdict,
    verdicts,
)

ABOVE, AROUND, BELOW = (
    {"value": 1.2, "ci": [1.1, 1.3]},
    {"value": 1.02, "ci": [0.95, 1.1]},
    {"value": 0.8, "ci": [0.7, 0.9]},
)
AT_ONE = {"value": 1.1, "ci": [1.0, 1.2]}
HARDLY = {"value": 0.99995, "ci": [0.99993, 0.99997]}  # 1.000 (1.000 to 1.000)
ALONE = {"value": 1.2, "ci": [None, None]}
NOTHING = {"value": None, "ci": [None, None]}


def row_of(content, method="jacobian"):
    return copy.deepcopy(next(row for row in content["table"] if row["method"] == method))


@pytest.mark.parametrize(
    ("plain", "control", "matched", "shown"),
    [
        (ABOVE, ABOVE, True, HARDER),
        (ABOVE, AROUND, True, NEITHER),
        (ABOVE, AT_ONE, True, NEITHER),
        (AROUND, ABOVE, True, NEITHER),
        (AROUND, AROUND, True, NEITHER),
        (ABOVE, ABOVE, False, HARDER),
        (AROUND, ABOVE, False, UNMATCHED),
        (ABOVE, AROUND, False, UNMATCHED),
        (BELOW, AROUND, False, UNMATCHED),
        (BELOW, BELOW, False, EASIER),
        (ABOVE, None, True, UNMATCHED),
        (ABOVE, NOTHING, True, UNMATCHED),
        (ALONE, ALONE, True, NEITHER),
        (BELOW, ABOVE, True, EASIER),
        (ABOVE, BELOW, True, EASIER),
        (ABOVE, BELOW, False, UNMATCHED),
        (AROUND, BELOW, True, EASIER),
        (BELOW, BELOW, True, EASIER),
        (HARDLY, HARDLY, True, NEITHER),
        (BELOW, None, True, UNMATCHED),
        (NOTHING, ABOVE, True, UNKNOWN),
        (None, ABOVE, True, UNKNOWN),
    ],
)
def test_harder_needs_both_intervals_above_one(content, plain, control, matched, shown):
    row = row_of(content)
    row["ratio"] = plain
    row["control"] |= {"ratio": control, "matched": matched}
    assert outcome(row, content) == shown
    said = verdict(row, content)
    assert ("is harder to attack than the plain network at equal accuracy" in said) == (
        shown == HARDER
    )
    assert ("is easier to attack than" in said) == (shown == EASIER)
    assert ("No difference between jacobian at 0.01" in said) == (shown == NEITHER)
    assert ("is not known at equal accuracy" in said) == (shown == UNMATCHED)
    assert ("cannot be said" in said) == (shown == UNKNOWN)


@pytest.mark.parametrize(
    ("over", "shown"),
    [
        (ABOVE, HARDER),
        (AROUND, NEITHER),
        (BELOW, NEITHER),
        (ALONE, HARDER),  # of the networks before intervals were taken
        (None, HARDER),
    ],
)
def test_harder_is_farther_than_the_curve_of_plain_networks_too(content, over, shown):
    row = row_of(content)
    row["ratio"] = row["control"]["ratio"] = ABOVE
    for point in content["frontier"]:
        if (point["method"], point["strength"]) == (row["method"], row["strength"]):
            point["over_plain"] = over
    assert outcome(row, content) == shown
    said = "times that of the line between plain networks at its accuracy on test images"
    assert (said in verdict(row, content)) == (shown == NEITHER)
    row["ratio"] = AROUND  # then it is not the curve that decides
    assert said not in verdict(row, content)


def test_a_gain_that_the_final_attacks_do_not_show_is_said_to_be_so(content):
    row = next(r for r in content["table"] if r["method"] == "jacobian")
    row["ratio"] = row["control"]["ratio"] = ABOVE
    content["final"].append(again := {**row, "ratio": ABOVE})
    assert "jacobian at 0.01 (" not in summary(content)[0]
    for doubtful in ({"ratio": AROUND}, {"control": {**row["control"], "ratio": AROUND}}):
        content["final"][-1] = {**again, **doubtful}
        assert "jacobian at 0.01 (the final attacks do not show it)" in summary(content)[0]


def test_what_is_not_known_at_equal_accuracy_is_said_everywhere_with_its_remedy(content):
    row = next(row for row in content["table"] if row["method"] == "jacobian")
    row["ratio"], row["control"] = BELOW, {**row["control"], "ratio": ABOVE, "matched": False}
    listed = [said for said in summary(content) if "jacobian" in said]
    assert listed == ["Not known at equal accuracy: jacobian at 0.01."]
    assert "stopped_epochs whose accuracy is nearer would decide" in verdict(row, content)
    equal = sections(content)["distances"]
    shown = {r[0]: r[equal.header.index("verdict")] for r in equal.rows}
    assert shown["jacobian"] == UNMATCHED
    assert shown["none"] == ""
    assert {outcome(row, content) for row in content["table"][1:]} == set(shown.values()) - {""}
    assert "verdict" not in sections(content)["final"].header


def test_a_verdict_that_is_withdrawn_is_so_everywhere_with_the_reason(content):
    row = next(row for row in content["table"] if row["method"] == "jacobian")
    row["ratio"] = row["control"]["ratio"] = ABOVE
    assert outcome(row, content) == HARDER
    row |= {"withdrawn": ["gradients look masked (jacobian 0.01, seed 1)"], "unpaired_images": 7}
    assert outcome({**row, "ratio": None}, content) == UNKNOWN
    content = Study(content).content
    listed = [said for said in summary(content) if "jacobian" in said]
    assert listed == ["Withdrawn, since something speaks against the distances: jacobian at 0.01."]
    said = verdict(row, content)
    assert said.startswith(
        "The verdict on jacobian at 0.01 is withdrawn: gradients look masked (jacobian 0.01, seed 1"
    )
    assert "harder" not in said
    text = to_markdown(content)
    assert f"| 870, 7 left out | {WITHDRAWN} |" in text
    assert said in text


def test_a_method_is_easier_than_what_its_interval_says(content):
    row = row_of(content)
    row["ratio"], row["control"]["ratio"] = ABOVE, BELOW
    assert "easier to attack than the plain network stopped at its accuracy:" in verdict(
        row, content
    )
    row["ratio"] = BELOW
    assert "than the plain network and the plain network stopped at its acc" in verdict(
        row, content
    )
    row["control"]["ratio"] = AROUND
    said = verdict(row, content)
    assert "easier to attack than the plain network: the mean" in said
    assert "0.800 (0.700 to 0.900) times that of the plain network (nearer)" in said
    row["control"] = None
    said = verdict(row, content)
    assert "not compared with the plain network stopped at its accuracy" in said


def test_the_sentence_says_what_else_weakens_it(content):
    row = row_of(content)
    row["seeds"] = 1
    row["accuracy_difference"] = {"value": -0.02, "ci": [-0.03, -0.01]}
    row["control"]["matched"] = False
    said = verdict(row, content)
    assert "one seed, so nothing is known of the spread between trainings" in said
    assert "-2.0 points (-3.0 to -1.0), more than the 0.5 points that were allowed" in said
    assert "(farther), which is less accurate; accuracy -2.0 points" in said


@pytest.mark.parametrize(
    ("own", "shown"),
    [
        (0.85, HARDER),  # between the control and the network trained to the end
        (0.95, UNMATCHED),  # between that one and one that was better before
        (0.98, HARDER),  # above all
        (0.79, UNMATCHED),  # below the control
    ],
)
def test_a_method_that_lies_between_plain_networks_is_held_to_both(content, own, shown):
    row = row_of(content)
    row["ratio"] = row["control"]["ratio"] = ABOVE
    row["control"] |= {"matched": False, "strength": 8}

    def point(method, strength, accuracy):
        return {
            **{"method": method, "strength": strength},
            "validation": {"accuracy": {"value": accuracy}},
        }

    content["frontier"] = [
        point("none", None, 0.9),
        point("stopped earlier", 8, 0.8),
        point("stopped earlier", 12, 0.97),
        point("stopped earlier", 16, None),  # not done with any seed
        point(row["method"], row["strength"], own),
    ]
    assert outcome(row, content) == shown


def test_a_control_that_was_not_stopped_is_named_as_what_it_is(content):
    row = row_of(content)
    row["control"]["strength"] = 60
    row["ratio"] = row["control"]["ratio"] = BELOW
    assert "is easier to attack than the plain network: the mean" in verdict(row, content)
    row["ratio"] = row["control"]["ratio"] = ABOVE
    said = verdict(row, content)
    assert "the one trained to the end is nearest to its accuracy" in said
    assert "harder to attack" in said


def test_every_method_gets_one_sentence(content):
    said = verdicts(content)
    names = [name for name in content["methods"] if name not in ("none", "stopped earlier")]
    assert len(said) == len(names)
    assert "cross-Lipschitz is not compared at equal accuracy: no strength loses" in said[-1]
    for sentence in said:
        assert sentence.endswith(".")


def test_the_numbers_of_the_tables_are_those_of_the_content(content):
    text = to_markdown(content)
    for part in ("table", "final"):
        for row in content[part]:
            for shown in (percent(row["accuracy"]), number(row["distance"])):
                assert f"| {shown} |" in text
            if row["ratio"]:
                assert number(row["ratio"]) in text
                assert f"| {''.join('-0+'[sign + 1] for sign in row['signs'])} |" in text
                assert number(row["control"]["ratio"]) in text
            for point in row["robust_accuracy"]:
                assert f"| {percent(point)} |" in text
            assert percent(row["calibration"]["ece"]) in text
            assert percent(row["calibrated"]["ece"]) in text
            for score in (row["ood_auroc"] or {}).values():
                assert number(score) in text
    for point in content["frontier"]:
        shown = f"| {percent(point['test']['accuracy'])} | {number(point['test']['distance'])} |"
        assert shown in text
    assert text.count(" (chosen) |") == sum(e["strength"] is not None for e in content["chosen"])


def test_what_was_tried_and_what_failed_is_told(content):
    text = to_markdown(content)
    for said in (
        content["command"],
        "fmn-l2 (steps 100, restarts 1) and tangent (iterations 40), on 200 test images",
        "20,000 train, 1,200 validation, 10,000 test images",
        "- seeds: 0, 1, 2",
        "16 paired comparisons are stated; each holds at 95 % by itself",
        "| ll-spectral | 1 | 0 | diverged | the loss was NaN at step 120 |",
        "| jacobian | 1 | 2 | missing |  |",
        "| cross-Lipschitz | none | no strength loses at most 0.5 points: the least loses 4.9 |",
        "| ll-spectral | 1 | 0, 3 diverged | none | none | none | none |",
        f"- {content['flags'][0]}",
    ):
        assert said in text, said


def test_a_grid_that_may_be_too_small_is_told_once(content):
    for entry in content["chosen"]:
        if entry["method"] in ("rep-spectral", "jacobian", "ll-spectral"):
            entry["strength"] = {"rep-spectral": 1.0, "jacobian": 0.001, "ll-spectral": 0.1}[
                entry["method"]
            ]
        elif entry["method"] != "metric eigenvalue":
            entry["strength"] = None
    content["methods"]["metric eigenvalue"]["strengths"] = [0.01]
    edge, alone = cautions(content)[-2:]
    assert edge == (
        "chosen at the edge of the strengths that were tried, beyond which others may be farther: "
        "rep-spectral at 1 (above); jacobian at 0.001 (below)"
    )
    assert alone == "one strength alone, so that others may be farther: metric eigenvalue"
    content["flags"] += [edge, alone]  # as a study says itself
    text = to_markdown(content)
    assert text.count(edge) == text.count(alone) == 1


def test_what_was_not_looked_at_is_said(content):
    for row in content["table"][1:]:
        row["withdrawn"] = []
    sound = cautions(content)
    del content["table"][-1]["withdrawn"]
    content["attacks"]["final"] = content["attacks"]["cells"]
    unlooked, unconfirmed = [said for said in cautions(content) if said not in sound]
    assert "whether the attacks speak against these distances was not looked at" in unlooked
    assert unconfirmed.endswith("no other confirms the distances")


def test_how_it_was_made_says_the_settings_of_all_cells_as_a_command_line_has_them(content):
    content["settings"] = {"base": "a.yaml", "settings": {"epochs": 3, "penalty": {"every": 4}}}
    text = to_markdown(content)
    assert "- recipe: supervised, a.yaml\n" in text
    assert "- settings of all cells: epochs 3, penalty.every 4\n" in text


def test_every_row_is_as_long_as_its_header(content):
    content["table"][1]["control"] = content["table"][1]["step_time"] = None
    content["chosen"][1]["reason"] = "a | b"
    next(c for c in content["cells"] if c["status"] == "diverged")["reason"] = "one\ntwo | three"
    content["table"][2] |= {"ratio": None, "signs": None, "ood_auroc": None}
    for section in sections(content).values():
        for row in section.rows:
            assert len(row) == len(section.header)
            assert all(isinstance(cell, str) for cell in row)
            assert not any(re.search("[|\n]", cell) for cell in row)


def test_methods_are_compared_directly_and_what_speaks_against_it_stands_beside(content):
    sound, open_pair = content["pairs"]
    sound |= {"ratio": ABOVE, "signs": [1, 1, -1], "withdrawn": [], "unpaired_images": 0}
    between = sections(content)["pairs"]
    assert between.header == (
        ["method", "against", "accuracy", "ratio", "seeds", "images", "withdrawn"]
    )
    first, second = between.rows
    assert first[0].startswith("rep-spectral at ")
    assert first[3:] == ["1.200 (1.100 to 1.300), farther", "++-", "862", ""]
    assert open_pair["strengths"][1] is None
    assert second[1:] == ["cross-Lipschitz", "", "not chosen", "", "", ""]
    sound |= {"withdrawn": ["gradients look masked (a, seed 0)"], "unpaired_images": 3}
    (row, _) = sections(content)["pairs"].rows
    assert row[3:] == [
        "1.200 (1.100 to 1.300)",
        "++-",
        "862, 3 left out",
        "gradients look masked (a, seed 0)",
    ]
    del content["pairs"]  # a study of before
    assert "pairs" not in sections(Study(content).content)


def test_nearer_is_written_beside_a_ratio_that_excludes_one(content):
    content["table"][1]["ratio"] = BELOW
    assert "| 0.800 (0.700 to 0.900), nearer |" in to_markdown(content)
    content["table"][1]["ratio"] = AROUND
    assert "| 1.020 (0.950 to 1.100) |" in to_markdown(content)


def test_a_study_of_one_seed_says_that_it_is(content):
    content["seeds"] = [0]
    assert "95 % intervals, over images of one training alone." in to_markdown(content)


def test_a_study_of_nothing_yet_is_still_told(content):
    for part in ("cells", "frontier", "chosen", "table", "final"):
        content[part] = []
    content["data"] |= {"train": None, "validation": None, "test": None}
    del content["methods"][content["stopped"]]
    Study(content)
    text = to_markdown(content)
    assert "## Methods" in text
    assert "## At equal accuracy" not in text


def test_every_strength_is_held_to_the_plain_networks_curve_at_its_accuracy(content):
    content["frontier"][-1]["over_plain"] = {"value": 1.5, "ci": [1.2, 1.9]}
    content["frontier"][-2]["over_plain"] = None
    shown = sections(content)["frontier"]
    over = [row[shown.header.index("over stopped")] for row in shown.rows]
    assert over[-2:] == ["", "1.500 (1.200 to 1.900), farther"]


def test_every_strength_has_its_mean_robust_accuracy_at_each_eps(content):
    point = next(p for p in content["frontier"] if p["seeds"] > 1)
    done = [
        cell
        for cell in content["cells"]
        if (cell["method"], cell["strength"]) == (point["method"], point["strength"])
    ]
    for cell, value in zip(done, (0.1, 0.3, 0.8), strict=True):
        for one in cell["test"]["robust_accuracy"]:
            one["value"] = value - 0.01 * one["eps"]
    shown = sections(content)["frontier"]
    row = dict(zip(shown.header, shown.rows[content["frontier"].index(point)], strict=True))
    for eps in content["eps"]["l2"]:
        assert row[f"robust at L2 {eps:g}"] == f"{40 - eps:.1f} %"
