import pytest
import torch
from torch import nn

from hf_specreg.robustness.attacks import ATTACKS, make_attacks
from hf_specreg.robustness.classifier import Classifier, ClassifierError, frozen
from hf_specreg.robustness.evaluate import Measures, Plan
from hf_specreg.robustness.prediction import Passes, Prediction, Problem, passes, predict
from tests.tiny import images, tiny


@pytest.fixture(scope="module")
def case():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.GELU(), nn.Flatten(), nn.Linear(144, 3))
    classifier = Classifier(net)
    pictures = torch.rand(4, 1, 8, 8)
    return classifier, pictures, classifier.predict(pictures)


@pytest.mark.parametrize(
    ("name", "settings", "exactly"),
    [
        ("pgd-l2", {"steps": 3, "restarts": 2}, True),
        ("fmn-l2", {"steps": 4}, True),
        ("deepfool-l2", {"steps": 3}, True),
        ("cw-l2", {"steps": 3, "binary_search_steps": 2}, False),
        ("autoattack-l2", {"attacks": ["square"]}, False),
        ("tangent", {"iterations": 6}, False),
        ("hopskipjump", {"iterations": 6}, False),
    ],
)
def test_the_passes_are_those_that_an_attack_makes(case, name, settings, exactly):
    classifier, pictures, labels = case
    attack = make_attacks({name: settings})[name]
    before = classifier.queries
    with frozen(classifier):
        attack.run(classifier, pictures, labels, seeds=range(4), eps=[1e-4])
    made = (classifier.queries - before) / 4
    expected = passes(attack, Problem(classes=3, eps=1, pixels=64)).forward
    assert expected == pytest.approx(made, rel=0 if exactly else 0.1)


@pytest.mark.parametrize("name", ATTACKS)
def test_the_passes_of_every_attack_are_known(name):
    assert passes(ATTACKS[name], Problem(classes=10, eps=3, pixels=64)).forward >= 1


def test_an_attack_whose_passes_are_not_known_is_named():
    with pytest.raises(ValueError, match="passes of object are not known"):
        passes(object(), Problem(classes=10, eps=3, pixels=64))


def test_a_limit_of_queries_bounds_the_passes():
    attack = make_attacks({"tangent": {"max_queries": 500}})["tangent"]
    assert passes(attack, Problem(10, 3, 150_528)) == Passes(500, 0)


def test_the_time_is_the_passes_times_what_one_takes():
    prediction = Prediction(5, 4, "cpu", 0.5, 2.0, {"pgd-l2": (5, Passes(30, 10))})
    assert prediction.seconds("pgd-l2") == 5 * (30 * 0.5 + 10 * 2.0)
    assert "| pgd-l2 | 5 | 30 | 10 | 2.9 minutes |" in prediction.to_markdown()


def test_a_prediction_measures_passes_and_attacks_nothing():
    model, pictures = tiny(), images(6)
    plan = Plan.of(["pgd-l2", "tangent"], None, 0, 4, Measures(corruptions=True))
    prediction = predict(model, (pictures, torch.zeros(6).long()), plan=plan, samples=5)
    assert prediction.images == 5
    assert set(prediction.stages) == {"clean", "pgd-l2", "tangent", "corruptions", "masking"}
    assert prediction.forward > 0
    assert prediction.stages["pgd-l2"][1].backward == 3 * 50
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("shape", "label", "message"),
    [((3, 8, 8), 0, "cannot be run on images"), ((1, 8, 8), 9, "labels go from 9 to 9")],
)
def test_a_dry_run_refuses_what_the_evaluation_would(case, shape, label, message):
    plan = Plan.of(["tangent"], None, 0, 4, Measures(pixels=False))
    data = torch.rand(4, *shape), torch.full((4,), label)
    with pytest.raises(ClassifierError, match=message):
        predict(case[0].model, data, plan=plan)
