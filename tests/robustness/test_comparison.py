import copy

import numpy as np
import pytest

from hf_specreg import RobustnessReport
from hf_specreg.robustness.schema import ReportError


def with_distances(report, name, distances):
    """The report, of a model whose images are all classified correctly and that far by tangent."""
    content = copy.deepcopy(report.content)
    content["model"]["id"] = name
    content["attacks"] = {"tangent": content["attacks"]["tangent"]}
    content |= {"nearest": [], "flags": []}
    images = {
        **report.images,
        "correct": np.ones(content["n"], bool),
        "tangent/distances": distances.astype(np.float32),
    }
    return RobustnessReport(content, images)


def test_a_comparison_is_paired_on_images_that_all_classify_correctly(reports):
    comparison = RobustnessReport.compare(reports)
    both = reports[0].images["correct"] & reports[1].images["correct"]
    assert comparison.paired == both.sum()
    first, second = comparison.rows
    assert [first["model"], second["model"]] == ["plain", "weaker"]
    distances = [r.images["tangent/distances"][both].astype(float) for r in reports]
    assert first["difference"] is None
    assert second["difference"]["value"] == pytest.approx((distances[1] - distances[0]).mean())
    low, high = second["difference"]["ci"]
    paired_width = high - low
    low, high = second["mean"]["ci"]
    assert paired_width < high - low  # what pairing is for
    table = comparison.to_markdown()
    assert f"on the {comparison.paired} that all models classify correctly" in table
    assert "| L2 | 0.25 |" in table


def test_reports_of_other_images_or_settings_are_not_compared(reports):
    other = copy.deepcopy(reports[1])
    other.content["data"]["sha256"] = "0" * 64
    with pytest.raises(ReportError, match="plain and weaker have other data sha256"):
        RobustnessReport.compare([reports[0], other])
    other = copy.deepcopy(reports[1])
    other.content["attacks"]["tangent"]["settings"]["iterations"] = 6
    with pytest.raises(ReportError, match="tangent was run with other settings"):
        RobustnessReport.compare([reports[0], other])
    with pytest.raises(ReportError, match="two reports or more"):
        RobustnessReport.compare(reports[:1])
    bare = RobustnessReport(reports[1].content)
    with pytest.raises(ReportError, match=r"per-image results .* are missing"):
        RobustnessReport.compare([reports[0], bare])


def test_robust_accuracy_is_compared_under_the_attacks_that_all_models_faced(reports):
    strong, weak = copy.deepcopy(reports)
    eps = strong.content["worst_case"][0]["eps"]
    del weak.content["attacks"]["tangent"]
    points = RobustnessReport.compare([strong, weak]).robust_accuracy
    assert [(p["norm"], p["eps"]) for p in points] == [
        (p["norm"], p["eps"]) for p in strong.content["worst_case"]
    ]
    images = strong.images
    stands = images["correct"] & (images["pgd-l2/distances"] > eps)
    assert points[0]["models"][0]["value"] == pytest.approx(stands.mean())
    assert points[0]["models"][0]["difference"] is None
    others = weak.images["correct"] & (weak.images["pgd-l2/distances"] > eps)
    gain = points[0]["models"][1]["difference"]["value"]
    assert gain == pytest.approx(others.mean() - stands.mean())


def test_models_of_the_same_name_are_told_apart(reports):
    comparison = RobustnessReport.compare([reports[0], reports[0]])
    assert comparison.names == ["plain (1)", "plain (2)"]


def test_a_model_for_which_less_was_found_is_not_easier_to_attack(reports):
    before = np.random.default_rng(0).lognormal(0, 0.3, 100)
    after = np.where(np.arange(100) < 50, before - 0.05, np.inf)
    both = [with_distances(reports[0], n, d) for n, d in (("old", before), ("new", after))]
    comparison = RobustnessReport.compare(both)
    _, row = comparison.rows
    assert (row["found"], row["farther"], row["nearer"]) == (50, 50, 50)
    assert row["mean"]["value"] is row["difference"]["value"] is None
    assert row["median"]["value"] == pytest.approx(np.sort(after)[49])
    verdict = comparison.verdicts[0][0]
    assert verdict.startswith("Whether new is harder to attack than old cannot be said")
    assert "farther on 50 and nearer on 50 of the same 100 images" in verdict
    assert "(for 50 and 0 nothing was found, which is farthest)" in verdict


@pytest.mark.parametrize(("swap", "word"), [(False, "harder"), (True, "easier")])
def test_who_is_harder_to_attack_is_decided_by_images_where_nothing_was_found_for_some(
    reports, swap, word
):
    near = np.random.default_rng(0).lognormal(0, 0.3, 100)
    far = np.where(np.arange(100) < 67, near + 0.1, near - 0.1)
    far[:5] = near[:2] = np.inf  # two ties
    models = [with_distances(reports[0], n, d) for n, d in (("near", near), ("far", far))]
    verdict = RobustnessReport.compare(models[::-1] if swap else models).verdicts[0][0]
    subject, reference = ("near", "far") if swap else ("far", "near")
    assert verdict.startswith(f"{subject} is {word} to attack than {reference}: ")
    assert f"farther on {33 if swap else 65} and nearer on {65 if swap else 33}" in verdict


def test_a_bare_majority_of_the_images_shows_nothing(reports):
    near = np.random.default_rng(0).lognormal(0, 0.3, 100)
    far = np.where(np.arange(100) < 57, near + 0.1, near - 0.1)
    far[:5] = near[:2] = np.inf
    models = [with_distances(reports[0], n, d) for n, d in (("near", near), ("far", far))]
    verdict = RobustnessReport.compare(models).verdicts[0][0]
    assert verdict.startswith("No difference between far and near is shown")
    assert "farther on 55 and nearer on 43" in verdict


@pytest.mark.parametrize("swap", [False, True])
def test_nothing_is_said_where_attacks_found_nothing_for_many_images(reports, swap):
    near = np.random.default_rng(0).lognormal(0, 0.3, 100)
    failed = np.where(np.arange(100) < 6, np.inf, near + 0.1)
    models = [with_distances(reports[0], n, d) for n, d in (("near", near), ("failed", failed))]
    verdict = RobustnessReport.compare(models[::-1] if swap else models).verdicts[0][0]
    assert "cannot be said, where the attacks found nothing for more than 5 % of a m" in verdict
    assert f"(for {'0 and 6' if swap else '6 and 0'} nothing was found" in verdict
    assert "er to attack than" in verdict.partition("cannot be said")[0]
    assert "er to attack than" not in verdict.partition("cannot be said")[2]


def test_nothing_is_said_where_attacks_have_not_converged(reports):
    before = np.random.default_rng(0).lognormal(0, 0.3, 100)
    models = [with_distances(reports[0], n, d) for n, d in (("a", before), ("b", before + 0.1))]
    steps = models[1].images["tangent/trajectory"] = models[1].images["tangent/trajectory"].copy()
    for late, says in ((1.04, False), (1.06, True), (np.inf, True)):
        steps[:, :-1, 1] = (late * (before + 0.1))[:, None]
        comparison = RobustnessReport.compare(models)
        assert comparison.nearest[1]["converged"] != says
        verdict = comparison.verdicts[0][0]
        assert verdict.startswith("Whether b is harder") == says
        assert ("cannot be said, where the attacks on b have not converged" in verdict) == says
        assert "are 0.100 (0.100 to 0.100) farther on average" in verdict


def test_models_without_a_correct_image_in_common_are_not_compared(reports):
    before = np.random.default_rng(0).lognormal(0, 0.3, 100)
    a, b = (with_distances(reports[0], name, before) for name in "ab")
    a.images["correct"][:50] = b.images["correct"][50:] = False
    verdict = RobustnessReport.compare([a, b]).verdicts[0][0]
    assert verdict.endswith("cannot be said: no image is classified correctly by all models.")


def test_where_something_was_found_for_all_the_mean_difference_decides(reports):
    before = np.random.default_rng(0).lognormal(0, 0.3, 100)
    models = [with_distances(reports[0], n, d) for n, d in (("a", before), ("b", before + 0.1))]
    comparison = RobustnessReport.compare(models)
    low, high = comparison.nearest[1]["difference"]["ci"]
    assert 0.099 < low <= high < 0.101
    assert (
        "b is harder to attack than a: in L2 the nearest adversarial images that tangent found "
        in (comparison.verdicts[0][0])
    )
    assert "are 0.100 (0.100 to 0.100) farther on average" in comparison.verdicts[0][0]


@pytest.mark.parametrize(("swap", "less", "harder"), [(0, "less", "harder"), (1, "more", "easier")])
def test_at_another_accuracy_farther_is_not_said_to_be_harder(reports, swap, less, harder):
    before = np.random.default_rng(0).lognormal(0, 0.3, 100)
    a, b = (with_distances(reports[0], n, d) for n, d in (("a", before), ("b", before + 0.1)))
    b.images["correct"][:40] = False
    comparison = RobustnessReport.compare([b, a] if swap else [a, b])
    verdict, both = comparison.verdicts[0][0], ("a", "b") if swap else ("b", "a")
    assert verdict.startswith(f"{both[0]} is {less} accurate than {both[1]} by 40.0 points (")
    assert f"whether it is {harder} to attack at equal accuracy is not known (`hf-sp" in verdict
    assert f"{'nearer' if swap else 'farther'} on average, on the same 60 images" in verdict
    assert f"is {harder} to attack than" not in verdict


def test_a_model_that_is_more_accurate_and_farther_is_harder_to_attack(reports):
    before = np.random.default_rng(0).lognormal(0, 0.3, 100)
    a, b = (with_distances(reports[0], n, d) for n, d in (("a", before), ("b", before + 0.1)))
    a.images["correct"][:40] = False
    assert (
        RobustnessReport.compare([a, b]).verdicts[0][0].startswith("b is harder to attack than a")
    )
    assert (
        RobustnessReport.compare([b, a]).verdicts[0][0].startswith("a is easier to attack than b")
    )


def test_few_images_are_no_proof_of_equal_accuracy(reports):
    before = np.random.default_rng(0).lognormal(0, 0.3, 100)
    a, b = (with_distances(reports[0], n, d) for n, d in (("a", before), ("b", before + 0.1)))
    b.images["correct"][:3] = a.images["correct"][3:6] = False
    verdict = RobustnessReport.compare([a, b]).verdicts[0][0]
    assert verdict.startswith("b is harder to attack than a: ")
    a.images["correct"][3] = True
    verdict, *_, accuracy = RobustnessReport.compare([a, b]).verdicts[0]
    assert verdict.startswith("b is less accurate than a by 1.0 points (-")
    assert accuracy.endswith(" %: -1.0 points (-6.7 to +4.4).")


def test_the_verdict_is_of_the_nearest_that_any_attack_found(reports):
    """An attack that does worse on one model does not make it harder to attack."""
    weak = copy.deepcopy(reports[0])
    weak.content["model"]["id"] = "weak"
    weak.images["tangent/distances"] = 3 * weak.images["tangent/distances"]
    strong = copy.deepcopy(reports[0])
    for report in (strong, weak):
        report.content["flags"] = []
    comparison = RobustnessReport.compare([strong, weak])
    assert comparison.rows[1]["difference"]["ci"][0] > 0.3
    nearest = np.minimum(weak.images["tangent/distances"], weak.images["pgd-l2/distances"])
    stated = comparison.distances[1]
    assert stated["attack"] == "nearest of tangent and pgd-l2"
    found = nearest[weak.images["correct"]]
    assert stated["median"]["value"] == np.quantile(found, 0.5, method="inverted_cdf")
    assert "that tangent and pgd-l2 found" in comparison.verdicts[0][0]


def test_attacks_at_other_eps_do_not_count_among_the_nearest(reports):
    other = copy.deepcopy(reports[1])
    for point in other.content["attacks"]["pgd-l2"]["robust_accuracy"]:
        point["eps"] *= 2
    comparison = RobustnessReport.compare([reports[0], other])
    assert {row["attack"] for row in comparison.nearest} == {"tangent"}
    assert len(comparison.distances) == 2


def test_it_is_said_in_what_evaluations_differ(reports):
    assert RobustnessReport.compare(reports).flags == []
    other = copy.deepcopy(reports[1])
    other.content |= {"batch_size": 7, "device": "A100, float32"}
    other.content["versions"]["torch"] = "9.9"
    flags = RobustnessReport.compare([reports[0], other]).flags
    assert [flag.split(" (")[0] for flag in flags] == [
        "the evaluations differ in batch sizes: libraries' attacks draw random numbers by batch",
        "the evaluations differ in devices or types of weights: sums are rounded in other ways",
        "the evaluations differ in versions of libraries",
    ]
    assert "(plain: 64; weaker: 7)" in flags[0]
    assert "weaker: torch 9.9)" in flags[2]
    assert "numpy" not in flags[2]
    assert f"- {flags[0]}" in RobustnessReport.compare([reports[0], other]).to_markdown()


def test_the_number_of_comparisons_is_stated(reports):
    comparison = RobustnessReport.compare([*reports, reports[0]])
    stated = [row for row in comparison.distances if row["difference"]]
    points = [model for point in comparison.robust_accuracy for model in point["models"][1:]]
    assert (len(stated), len(points)) == (4, 12)
    assert comparison.caution.startswith("16 comparisons with plain (1) are stated")
    assert comparison.caution in comparison.to_markdown()
