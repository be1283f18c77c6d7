import sys

import pytest
import torch
from torch import nn

from hf_specreg.robustness.attacks import ATTACKS, MissingPackageError, describe, make_attacks
from hf_specreg.robustness.classifier import Classifier
from hf_specreg.robustness.text import strength
from hf_specreg.robustness.threat import distance, in_box

SHAPE = (1, 4, 4)
QUICK = {"autoattack-l2": {"attacks": ("apgd-ce", "fab")}, "autoattack-linf": {}}


class Linear:
    """A linear classifier whose distances to the boundary are known."""

    def __init__(self, classes, *, count=12, seed=0):
        generator = torch.Generator().manual_seed(seed)
        layer = nn.Linear(16, classes)
        layer.weight.data = torch.randn(classes, 16, generator=generator)
        layer.bias.data = torch.zeros(classes)
        layer.bias.data -= layer.weight.data @ torch.full((16,), 0.5)
        self.net = nn.Sequential(nn.Flatten(), layer)
        self.images = 0.4 + 0.2 * torch.rand(count, *SHAPE, generator=generator)
        with torch.no_grad():
            logits = self.net(self.images)
        self.labels = logits.argmax(1)
        self.classifier = Classifier(self.net)
        gaps = layer.weight.data[self.labels][:, None] - layer.weight.data
        margins = logits.gather(1, self.labels[:, None]) - logits
        others = torch.arange(classes) != self.labels[:, None]
        self.truth = {
            norm: torch.where(others, margins / gaps.norm(dim=2, p=dual), torch.inf).min(1).values
            for norm, dual in (("l2", 2), ("linf", 1))
        }

    def attack(self, name, *, eps=(), **settings):
        attack = make_attacks({name: settings})[name]
        seeds = list(range(len(self.images)))
        return attack.run(self.classifier, self.images, self.labels, seeds=seeds, eps=eps)


@pytest.fixture(scope="module")
def linear():
    return Linear(4)


@pytest.mark.parametrize("name", ATTACKS)
def test_no_attack_beats_the_truth_leaves_the_box_or_claims_what_is_not_adversarial(linear, name):
    attack = ATTACKS[name]
    truth = linear.truth[attack.norm]
    grid = [truth.median().item() * f for f in (0.5, 1.0, 2.0, 4.0)]
    result = linear.attack(name, eps=grid, **QUICK.get(name, {}))
    found = result.distances.isfinite()
    assert found.any()
    assert (result.distances >= truth * (1 - 1e-3)).all()
    assert in_box(result.adversarials).all()
    predicted = linear.classifier.predict(result.adversarials)
    assert ((predicted != linear.labels) == found).all()
    measured = distance(linear.images, result.adversarials, attack.norm)
    assert (measured[found] <= result.distances[found] * (1 + 1e-3)).all()
    assert (result.queries > 0).all()


@pytest.mark.parametrize("name", [n for n, a in ATTACKS.items() if a.minimum_distance])
def test_attacks_of_minimum_distance_come_within_two_percent(name):
    """Of two classes: among several, a search may stay at the boundary where it started."""
    linear = Linear(2, count=24)
    ratio = linear.attack(name).distances / linear.truth[ATTACKS[name].norm]
    assert ratio.mean() < 1.02


@pytest.mark.parametrize("name", ["pgd-l2", "pgd-linf", "autoattack-l2", "autoattack-linf"])
def test_robust_accuracy_at_fixed_eps_is_the_closed_form(name):
    linear = Linear(2, count=40)
    truth = linear.truth[ATTACKS[name].norm]
    # Between the truths of neighbouring images, so that rounding does not decide.
    ordered = truth.sort().values
    grid = [(ordered[i] + ordered[i + 1]).item() / 2 for i in (5, 15, 25, 35)]
    found = linear.attack(name, eps=grid).distances
    for e in grid:
        assert ((found > e) == (truth > e)).all()


def test_pgd_starts_again_on_the_images_that_still_stand_alone():
    linear = Linear(2)
    grid = [linear.truth["l2"].sort().values[5:7].mean().item()]  # half of the images are farther

    def attacked(restarts):
        before = linear.classifier.queries
        found = linear.attack("pgd-l2", eps=grid, restarts=restarts).distances
        return found, linear.classifier.queries - before

    (once, queries), (thrice, all_queries) = attacked(1), attacked(3)
    assert torch.equal(once.isinf(), linear.truth["l2"] > grid[0])
    assert torch.equal(once, thrice)
    assert all_queries - queries == 2 * 6 * (50 + 1)


@pytest.mark.parametrize("classes", [2, 3, 4])
def test_autoattack_works_with_few_classes(classes):
    linear = Linear(classes, count=4)
    eps = 2 * linear.truth["l2"].max().item()
    assert linear.attack("autoattack-l2", eps=[eps]).distances.isfinite().all()


class Gray(nn.Module):
    """Pictures of 0.5 alone are of class 0."""

    def forward(self, images):
        away = (images - 0.5).abs().flatten(1).sum(1)
        return torch.stack([0.01 - away, 0 * away], dim=1)


@pytest.mark.parametrize(
    ("size", "fits"),
    [((24, 24), False), ((32, 30), False), ((28, 20), False), ((20, 28), True), ((32, 32), True)],
    ids=str,
)
def test_autoattack_leaves_square_out_where_its_tiles_do_not_fit(size, fits):
    images, labels = torch.full((2, 1, *size), 0.5), torch.zeros(2, dtype=torch.long)

    def attack(name, *parts):
        run = make_attacks({name: {"attacks": parts}})[name].run
        return run(Classifier(Gray()), images, labels, seeds=[0, 1], eps=[0.1])

    left_out = f"square was left out: its first tiles do not fit {size[0]}x{size[1]} pixels"
    found = attack("autoattack-l2", "square", "apgd-ce")
    assert found.distances.isfinite().all()
    assert (left_out in found.warnings) != fits
    assert attack("autoattack-linf", "square").distances.isfinite().all()
    if not fits:
        with pytest.raises(ValueError, match="it is the only attack of"):
            attack("autoattack-l2", "square")


def test_autoattack_names_an_attack_that_needs_more_classes():
    with pytest.raises(ValueError, match="DLR loss, which needs more than 2"):
        Linear(2).attack("autoattack-l2", eps=[0.1], attacks=("apgd-ce", "apgd-t"))


@pytest.mark.parametrize("name", ATTACKS)
def test_a_single_logit_is_a_binary_classifier(name):
    linear = Linear(2, count=4)
    layer = nn.Linear(16, 1)
    weight, bias = linear.net[1].weight.data, linear.net[1].bias.data
    layer.weight.data, layer.bias.data = (weight[1] - weight[0])[None], (bias[1] - bias[0])[None]
    linear.classifier = Classifier(nn.Sequential(nn.Flatten(), layer))
    truth = linear.truth[ATTACKS[name].norm]
    found = linear.attack(name, eps=[2 * truth.max().item()], **QUICK.get(name, {}))
    assert found.distances.isfinite().all()


class Constant(nn.Module):
    """Always the same class, or NaN."""

    def __init__(self, value=1.0):
        super().__init__()
        self.value = value

    def forward(self, images):
        zero = 0 * images.flatten(1).sum(1, keepdim=True)
        return torch.cat([zero + self.value, zero, zero, zero], dim=1)


@pytest.mark.parametrize("value", [1.0, torch.nan], ids=["constant", "nan"])
@pytest.mark.parametrize("name", ATTACKS)
def test_an_unbreakable_model_ends_every_attack_with_nothing_found(name, value):
    linear = Linear(4, count=3)
    linear.classifier = Classifier(Constant(value))
    linear.labels = torch.zeros(3, dtype=torch.long)
    result = linear.attack(name, eps=[0.1], **QUICK.get(name, {}))
    assert result.distances.isinf().all()
    assert torch.equal(result.adversarials, linear.images)


class Plateau(nn.Module):
    """Black pictures are of class 1, all others of class 0; there is no gradient."""

    def forward(self, images):
        black = (images.flatten(1).sum(1) < 1).float()
        return torch.stack([1 - black, black], dim=1) + 0 * images.flatten(1).sum(1, keepdim=True)


@pytest.mark.parametrize("name", ["cw-l2", "deepfool-l2"])
def test_the_black_image_that_a_library_gives_up_with_is_not_found_by_it(name):
    linear = Linear(2, count=3)
    linear.classifier, linear.labels = Classifier(Plateau()), torch.zeros(3, dtype=torch.long)
    settings = {"cw-l2": {"steps": 20, "binary_search_steps": 2}}.get(name, {})
    assert linear.attack(name, **settings).distances.isinf().all()


@pytest.mark.parametrize("scale", [1, 300])
def test_pgd_does_not_stand_still_where_a_model_is_confident(scale):
    linear = Linear(2, count=12)
    eps = (1.2 * linear.truth["l2"]).tolist()
    layer = linear.net[1]
    with torch.no_grad():
        layer.weight.mul_(scale), layer.bias.mul_(scale)
        margins = linear.net(linear.images).diff(dim=1).abs()
    near = margins[:, 0] < 60  # of larger ones the gradient is 0 in float32
    assert scale == 1 or (margins[near] > 35).sum() >= 3
    assert linear.attack("pgd-l2", eps=eps).distances[near].isfinite().all()


@pytest.mark.parametrize("scale", [1, 1e4, 1e-20])
@pytest.mark.parametrize("name", ["fmn-l2", "fmn-linf"])
def test_fmn_finds_the_closed_form_whatever_the_scale_of_the_logits(name, scale):
    linear = Linear(2, count=24)
    layer = linear.net[1]
    with torch.no_grad():
        layer.weight.mul_(scale), layer.bias.mul_(scale)
    result = linear.attack(name)
    truth = linear.truth[ATTACKS[name].norm]
    assert ((result.distances / truth - 1).abs() < 0.01).all()
    start, half, full = result.trajectory[:, :, 1].unbind(1)
    assert start.isinf().all()
    assert (half >= full).all()
    assert torch.equal(full.float(), result.distances)
    queries = result.trajectory[:, :, 0]
    assert (2 * queries[:, 1] >= queries[:, 2]).all()


@pytest.mark.parametrize("name", ["fmn-l2", "fmn-linf"])
def test_fmn_finds_the_nearest_of_several_classes_by_its_runs(name):
    linear = Linear(6, count=24)
    truth = linear.truth[ATTACKS[name].norm]
    once = linear.attack(name, runs=1).distances / truth
    thrice = linear.attack(name).distances / truth
    assert once.max() > 1.02
    assert (thrice < 1.01).all()


def test_fmn_finds_the_same_where_all_distances_are_a_hundredth():
    class Ellipsoid(nn.Module):
        """Class 1 within; its longest axis is ten times its shortest."""

        def __init__(self, zoom):
            super().__init__()
            self.zoom, self.curvatures = zoom, torch.logspace(0.5, 2.5, 16)

        def forward(self, images):
            offsets = self.zoom * (images - 0.5).flatten(1)
            outside = (self.curvatures * offsets.square()).sum(1) - 1
            return torch.stack([outside, torch.zeros_like(outside)], 1)

    offsets = torch.randn(24, *SHAPE, generator=torch.Generator().manual_seed(0))
    found = []
    for zoom in (1, 100):
        model, labels = Ellipsoid(zoom), torch.zeros(24, dtype=torch.long)
        beyond = 1 + model(0.5 + offsets / zoom)[:, 0]  # 1 at the boundary
        images = 0.5 + offsets * (1.3 / beyond.sqrt())[:, None, None, None] / zoom
        attack = make_attacks({"fmn-l2": {"steps": 20, "runs": 1}})["fmn-l2"]
        result = attack.run(Classifier(model), images, labels, seeds=range(24))
        found.append(zoom * result.distances)
    torch.testing.assert_close(found[0], found[1], rtol=2e-3, atol=0)
    assert found[0].isfinite().all()


@pytest.mark.parametrize("name", ["fmn-l2", "fmn-linf"])
def test_fmn_crosses_the_boundary_where_the_box_holds_most_of_the_gradient_back(name):
    linear = Linear(2, count=24)
    linear.images[:, :, 1:] = linear.images[:, :, 1:].round()
    linear.labels = linear.classifier.predict(linear.images)
    found = linear.attack(name, steps=300).distances.isfinite()
    opposite = linear.net[1].weight[1 - linear.labels] > linear.net[1].weight[linear.labels]
    farthest = opposite.float().reshape(-1, *SHAPE)
    assert torch.equal(found, linear.classifier.predict(farthest) != linear.labels)


@pytest.mark.parametrize("error", [AssertionError, ValueError])
def test_images_that_foolbox_gives_up_keep_the_nearest_point_and_are_counted(
    linear, monkeypatch, error
):
    foolbox = pytest.importorskip("foolbox")
    plain = linear.attack("hopskipjump", iterations=6)
    original, calls = foolbox.attacks.HopSkipJumpAttack._binary_search, []

    def stop_after_four(self, *arguments):
        calls.append(1)
        if len(calls) % 5 == 0:
            raise error("1 of 12 starting_points are not adversarial")
        return original(self, *arguments)

    monkeypatch.setattr(foolbox.attacks.HopSkipJumpAttack, "_binary_search", stop_after_four)
    found = linear.attack("hopskipjump", iterations=6)
    monkeypatch.undo()
    started = linear.attack("hopskipjump", iterations=1)
    assert plain.warnings == ()
    assert found.warnings == (
        f"foolbox gave {len(linear.images)} images up before the last iteration",
    )
    assert found.distances.mean() < started.distances.mean()


@pytest.mark.parametrize("name", ["pgd-l2", "hopskipjump", "autoattack-l2"])
def test_attacks_do_not_move_the_global_random_numbers_and_repeat(linear, name):
    before = torch.get_rng_state()
    settings = {"hopskipjump": {"iterations": 3}, **QUICK}.get(name, {})
    results = [linear.attack(name, eps=[0.05, 0.1], **settings).distances for _ in range(2)]
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(*results)


def test_unknown_attacks_and_settings_are_named():
    with pytest.raises(ValueError, match=r"no attack 'fgsm'; there are tangent, "):
        make_attacks(["fgsm"])
    with pytest.raises(ValueError, match=r"pgd-l2 has no settings \['step'\]; it has .*steps"):
        make_attacks({"pgd-l2": {"step": 3}})
    with pytest.raises(ValueError, match=r"no settings \['norm'\]"):
        make_attacks({"pgd-l2": {"norm": "linf"}})
    with pytest.raises(ValueError, match=r"pgd-l2: restarts \(0\) must be positive"):
        make_attacks({"pgd-l2": {"restarts": 0}})
    with pytest.raises(ValueError, match=r"tangent: tolerance \(0.0\) must be positive"):
        make_attacks({"tangent": {"tolerance": 0.0}})
    with pytest.raises(ValueError, match=r"low_frequencies \(1.5\) must be in \(0, 1\]"):
        make_attacks({"tangent": {"low_frequencies": 1.5}})
    with pytest.raises(ValueError, match=r"attacks \['apgd'\] are none of AutoAttack's: apgd-ce"):
        make_attacks({"autoattack-l2": {"attacks": ["apgd-ce", "apgd"]}})
    with pytest.raises(ValueError, match=r"attacks \('pgd-l2'\) must be a list of names"):
        make_attacks("pgd-l2")


@pytest.mark.parametrize(
    ("name", "setting", "value", "rule"),
    [
        ("pgd-l2", "steps", "1e2", "an integer"),
        ("pgd-l2", "steps", 2.5, "an integer"),
        ("pgd-l2", "steps", True, "an integer"),
        ("pgd-l2", "steps", None, "an integer"),
        ("pgd-l2", "relative_stepsize", "0.1", "a number"),
        ("tangent", "max_queries", 10.5, "an integer"),
        ("tangent", "authors_compatible", 1, "True or False"),
        ("autoattack-l2", "attacks", "square", "a list of names"),
    ],
)
def test_a_setting_of_another_kind_is_named_before_anything_runs(name, setting, value, rule):
    with pytest.raises(ValueError, match=rf"{name}: {setting} \({value!r}\) must be {rule}"):
        make_attacks({name: {setting: value}})
    make_attacks({"tangent": {"max_queries": None, "tolerance": 1}, "pgd-l2": {"steps": 3}})


def test_a_variant_is_stated_where_it_is_on():
    plain, variant = (
        describe(make_attacks({"tangent": settings})["tangent"])
        for settings in ({}, {"low_frequencies": 0.25})
    )
    assert variant == {**plain, "low_frequencies": 0.25}
    assert "low_frequencies" not in plain
    assert strength("tangent", variant) == "iterations 40, low frequencies 0.25"


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        ("pgd-l2", {}, "steps 50, restarts 1"),
        ("pgd-l2", {"relative_stepsize": 1e-6}, "steps 50, restarts 1, relative stepsize 1e-06"),
        ("tangent", {"initial_probes": 1}, "iterations 40, initial probes 1"),
        ("autoattack-l2", {"attacks": ["fab"]}, "attacks fab"),
        ("autoattack-l2", {}, "standard"),
    ],
)
def test_settings_that_make_an_attack_weak_are_named(name, settings, said):
    assert strength(name, describe(make_attacks({name: settings})[name])) == said


def test_an_attack_that_is_not_known_is_named_by_what_is_common():
    assert strength("old", {"steps": 3, "stepsize": 0.1}) == "steps 3"


def test_a_missing_library_is_named_before_anything_runs(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "foolbox", None)
    with pytest.raises(
        MissingPackageError, match=r"pgd-l2 needs foolbox: install the extra attacks"
    ):
        make_attacks(["pgd-l2"])


def test_autoattack_leaves_the_debugger_alone_and_passes_its_warnings_on():
    class Rounded(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, images):
            return self.net((10 * images).round() / 10 + 0 * images)

    def tracer(frame, event, argument):
        return None

    linear = Linear(4)
    linear.classifier = Classifier(Rounded(linear.net))
    linear.labels = linear.classifier.predict(linear.images)
    before = sys.gettrace()
    sys.settrace(tracer)
    try:
        result = linear.attack("autoattack-l2", eps=[0.05], attacks=("apgd-t",))
        assert sys.gettrace() is tracer
    finally:
        sys.settrace(before)
    assert any("zero gradient" in message for message in result.warnings)
    assert not any("flags_doc" in message for message in result.warnings)
