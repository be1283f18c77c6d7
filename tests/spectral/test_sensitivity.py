"""log ||J^T u|| - log spread: closed forms, the explicit Jacobian, laws; and as a penalty."""

import copy
import warnings

import pytest
import torch
from torch import nn

from hf_specreg import FeatureSpace, SensitivityPenalty
from hf_specreg.spectral.regularizers import RegularizersConfig, build_regularizers
from hf_specreg.spectral.regularizers.derivative import tracked
from hf_specreg.spectral.regularizers.input_gradient import InputGradientConfig
from hf_specreg.spectral.regularizers.sensitivity import (
    SensitivityConfig,
    displacement,
    power_method,
    sensitivity,
)
from tests.tiny import images, tiny

WAYS = pytest.mark.parametrize("by", ["double_backprop", "finite_difference"])
DIRECTIONS = pytest.mark.parametrize("direction", ["top", "neighbour", "margin"])


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def smooth():
    """The features of a smooth network in float64, a head of three classes, and images."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(8, 7), nn.Tanh(), nn.Linear(7, 4)).double()
    return net, nn.Linear(4, 3).double(), torch.rand(6, 2, 2, 2, dtype=torch.float64)


def norm_of(features):
    return features.square().sum(1).mean().sqrt()


def softened(norms, distances, features):
    floor = norm_of(features - features.mean(0)) / 100
    return ((norms + floor).log() - (distances + floor).log()).mean()


def of(net, x, direction, head=None, **settings):
    """The value with the direction's own spread, all but exactly."""
    spread = "total" if direction == "top" else direction
    exact = {"power_steps": 60, "step": 1e-6, "generator": seeded()}
    settings = {"spread": spread, "head": head, **exact, **settings}
    return sensitivity(net, x, direction=direction, **settings)


@WAYS
def test_of_a_linear_encoder_it_is_the_log_of_sigma_over_the_spread(by):
    weight = torch.randn(4, 8, dtype=torch.float64, generator=seeded(1))
    x = torch.rand(6, 8, dtype=torch.float64, generator=seeded(2))
    features = x @ weight.T
    sigma = torch.linalg.svdvals(weight)[0]
    spread = norm_of(features - features.mean(0))
    found = of(lambda x: x @ weight.T, x, "top", by=by)
    torch.testing.assert_close(found, softened(sigma, spread, features), rtol=1e-6, atol=1e-6)


@WAYS
def test_towards_a_neighbour_it_is_minus_the_log_of_the_distance_that_moves_features_there(by):
    weight = torch.randn(4, 8, dtype=torch.float64, generator=seeded(1))
    x = torch.rand(6, 8, dtype=torch.float64, generator=seeded(2))
    features = x @ weight.T
    apart = (features[:, None] - features).norm(dim=2)
    nearest = (apart + 1e9 * torch.eye(6)).argmin(1)
    delta = features[nearest] - features
    norms = (delta @ weight).norm(dim=1) / delta.norm(dim=1)
    found = of(lambda x: x @ weight.T, x, "neighbour", by=by)
    expected = softened(norms, apart[range(6), nearest], features)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@WAYS
@pytest.mark.parametrize("bias", [True, False])
def test_the_margin_is_to_the_nearest_hyperplane_of_the_predicted_class(bias, by):
    torch.manual_seed(0)
    head = nn.Linear(4, 5, bias=bias).double()
    weight = torch.randn(4, 8, dtype=torch.float64)
    x = torch.rand(6, 8, dtype=torch.float64)
    features = x @ weight.T
    logits, norms, distances = head(features), [], []
    for z in logits:
        y = z.argmax()
        normals = {k: head.weight[y] - head.weight[k] for k in range(5) if k != y}
        k = min(normals, key=lambda k: (z[y] - z[k]) / normals[k].norm())
        norms.append((normals[k] @ weight).norm() / normals[k].norm())
        distances.append((z[y] - z[k]) / normals[k].norm())
    expected = softened(torch.stack(norms), torch.stack(distances), features).detach()
    found = of(lambda x: x @ weight.T, x, "margin", head, by=by)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    on_hyperplane = head(features + displacement(features, "margin", head)).topk(2).values
    torch.testing.assert_close(on_hyperplane[:, 0], on_hyperplane[:, 1])


@WAYS
@DIRECTIONS
def test_value_and_gradient_are_those_of_the_explicit_jacobian(smooth, direction, by):
    net, head, x = smooth
    jacobian = torch.func.vmap(torch.func.jacrev(lambda x: net(x[None])[0]))(x).flatten(2)
    features = net(x)
    if direction == "top":
        u = torch.linalg.svd(jacobian.detach())[0][:, :, 0]
        distances = norm_of(features - features.mean(0))
    else:
        delta = displacement(features, direction, head)
        distances = delta.norm(dim=1)
        u = (delta / distances[:, None]).detach()
    norms = torch.einsum("bk,bkd->bd", u, jacobian).norm(dim=1)
    expected = softened(norms, distances, features)
    found = of(net, x, direction, head, by=by)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    weights = [p for name, p in net.named_parameters() if name != "3.bias"]
    gradients = torch.autograd.grad(found, weights)
    for gradient, reference in zip(gradients, torch.autograd.grad(expected, weights), strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-4, atol=1e-5)
    assert all(g.norm() > 1e-3 for g in gradients)


@WAYS
@pytest.mark.parametrize("direction", ["top", "margin"])
def test_its_gradient_by_the_weights_is_the_values_own(smooth, direction, by):
    net, head, x = smooth
    names = [name for name, _ in net.named_parameters()]

    def function(*values):
        weights = dict(zip(names, values, strict=True))

        def features(x):
            return torch.func.functional_call(net, weights, (x,))

        return of(features, x[:3], direction, head, by=by, step=1e-5, power_steps=20)

    inputs = [p.detach().clone().requires_grad_(True) for p in net.parameters()]
    assert torch.autograd.gradcheck(function, inputs, eps=1e-5, atol=5e-5)


@DIRECTIONS
def test_no_rescaling_changes_it_or_has_a_gradient(direction):
    """Of a layer before a norm, of the features, of the head."""
    torch.manual_seed(0)
    first, last = nn.Linear(8, 7, bias=False), nn.Linear(7, 4, bias=False)
    norm = nn.LayerNorm(7, eps=1e-12)
    net = nn.Sequential(nn.Flatten(), first, norm, nn.GELU(), last).double()
    head = nn.Linear(4, 3, bias=False).double()
    x = torch.rand(6, 2, 2, 2, dtype=torch.float64)
    before = of(net, x, direction, head)
    gradients = torch.autograd.grad(before, [first.weight, last.weight])
    for layer, gradient in zip([first, last], gradients, strict=True):
        assert gradient.norm() > 1e-2
        assert abs((gradient * layer.weight).sum()) < 1e-6
    for layer in (first, last, head):
        with torch.no_grad():
            layer.weight.mul_(10)
        torch.testing.assert_close(of(net, x, direction, head), before, rtol=1e-6, atol=1e-6)


@DIRECTIONS
def test_a_shift_of_all_features_that_the_heads_bias_absorbs_changes_nothing(smooth, direction):
    net, head, x = smooth
    before = of(net, x, direction, head)
    (gradient,) = torch.autograd.grad(before, net[3].bias)
    if direction != "margin":  # without its head, a shift moves the features to hyperplanes
        torch.testing.assert_close(gradient, torch.zeros(4, dtype=torch.float64), rtol=0, atol=1e-6)
    with torch.no_grad():
        net[3].bias += 5
        head.bias -= head.weight.sum(1) * 5
    torch.testing.assert_close(of(net, x, direction, head), before, rtol=1e-6, atol=1e-6)


def test_a_few_power_steps_find_the_top_direction(smooth):
    net, _, x = smooth
    jacobian = torch.func.vmap(torch.func.jacrev(lambda x: net(x[None])[0]))(x).flatten(2)
    sigma = torch.linalg.svdvals(jacobian)[:, 0]
    pixels, features = tracked(net, x)
    start = torch.randn(features.shape, generator=seeded(), dtype=torch.float64)
    found = []
    for iterations in (0, 1, 2, 8):
        u = power_method(net, pixels, features, start, iterations=iterations, step=1e-5)
        assert not u.requires_grad
        norms = torch.einsum("bk,bkd->bd", u, jacobian).norm(dim=1)
        assert (norms <= sigma * (1 + 1e-6)).all()
        found.append((norms / sigma).mean().item())
    assert found == sorted(found)
    assert found[1] > 0.8
    assert found[-1] > 0.99


@WAYS
@DIRECTIONS
@pytest.mark.parametrize("case", ["coincide", "do not move"])
def test_gradients_are_finite_where_features(direction, by, case):
    encoder, x = tiny(), images()
    if case == "coincide":
        x = x[:1].expand_as(x)
    else:
        nn.init.zeros_(encoder.network.hidden.weight)
    for spread in ("total", "neighbour", "margin"):
        penalty = SensitivityPenalty(encoder, strength=1, direction=direction, spread=spread, by=by)
        value = penalty(x)
        value.backward()
        assert value.isfinite()
        assert all(p.grad.isfinite().all() for p in encoder.parameters() if p.grad is not None)


@DIRECTIONS
@pytest.mark.parametrize("name", ["resnet20_cifar", "vit_tiny_patch16_224"])
def test_a_model_is_left_as_it_was_but_for_gradients_before_its_head(name, direction):
    encoder = tiny(name, drop_rate=0.5).train()
    buffers = {n: b.clone() for n, b in encoder.named_buffers()}
    random = torch.get_rng_state()
    SensitivityPenalty(encoder, strength=1, direction=direction)(images()).backward()
    assert torch.equal(torch.get_rng_state(), random)
    assert all(module.training for module in encoder.modules())
    assert all(torch.equal(buffers[n], b) for n, b in encoder.named_buffers())
    of_head = {f"network.{n}" for n, _ in encoder.network.named_parameters() if "head" in n}
    of_head |= {"network.fc.weight", "network.fc.bias"}
    for n, p in encoder.named_parameters():
        assert (p.grad is None) == (n in of_head), n
        assert p.grad is None or p.grad.isfinite().all()


def test_the_recipes_term_is_the_same_as_the_penalty():
    encoder = tiny()
    config = RegularizersConfig(sensitivity=SensitivityConfig(0.5, direction="margin", images=3))
    (term,) = build_regularizers(encoder, config, steps_per_epoch=10, epochs=4)
    found = term(images(), None, [])
    penalty = SensitivityPenalty(encoder, strength=0.5, direction="margin", images=3)
    torch.testing.assert_close(penalty(images()), found, rtol=0, atol=0)
    torch.testing.assert_close(penalty(images()[:3]), found, rtol=0, atol=0)
    network = encoder.eval().requires_grad_(False)
    head = network.network.get_submodule(network.head[0])
    features = FeatureSpace.of(network).features
    direct = sensitivity(features, images()[:3], direction="margin", spread="margin", head=head)
    torch.testing.assert_close(found, 0.5 * direct)
    assert RegularizersConfig().terms() == {}


def test_of_a_frozen_encoder_it_says_that_it_changes_nothing():
    encoder = tiny()
    penalty = SensitivityPenalty(encoder, strength=1)
    penalty(images()).backward()
    for name, parameter in encoder.network.named_parameters():
        parameter.requires_grad_(encoder.of_head(name))
    with pytest.warns(UserWarning, match="no weight that SensitivityPenalty is of requires a grad"):
        penalty(images())
    encoder.requires_grad_(True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        penalty(images())


def test_its_schedule_counts_calls():
    settings = {"strength": 2.0, "direction": "neighbour"}
    penalty = SensitivityPenalty(tiny(), burn_in=2, every=3, ramp=6, **settings)
    whole = SensitivityPenalty(tiny(), **settings)(images()).item()
    found = [penalty(images()).item() / whole for _ in range(9)]
    assert found == pytest.approx([0, 0, 0, 0, 0, 0.5, 0, 0, 1])
    assert penalty.step == 9
    config = SensitivityConfig(2.0, ramp_epochs=0.5)
    assert config.ramp(steps_per_epoch=20) == 10


def test_with_its_state_it_goes_on_exactly_and_its_seed_decides_the_start():
    encoder = tiny(hidden_features=40)
    settings = {"strength": 1.0, "power_steps": 0}
    penalty = SensitivityPenalty(encoder, seed=3, **settings)
    values = [penalty(images()).item() for _ in range(2)]
    state = penalty.state_dict()
    values.append(penalty(images()).item())
    assert len(set(values)) == 3
    resumed = SensitivityPenalty(encoder, seed=3, **settings)
    resumed.load_state_dict(state)
    torch.rand(7)
    assert resumed(images()).item() == values[2]
    assert resumed.step == 3
    assert SensitivityPenalty(encoder, seed=30, **settings)(images()).item() != values[0]


def test_autocast_does_not_round_it():
    penalty = SensitivityPenalty(tiny(), strength=1, direction="neighbour")
    expected = penalty(images())
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(penalty(images()), expected, rtol=0, atol=0)


@pytest.mark.parametrize("case", ["checkpointing", "compiled", "compiled within"])
def test_it_is_the_same_of_a_model_that_is_compiled_or_checkpointed(case):
    encoder, found = tiny("vit_tiny_patch16_224").train(), []
    penalty = SensitivityPenalty(encoder, strength=1)
    for change in (False, True):
        if change and case == "checkpointing":
            encoder.network.set_grad_checkpointing()
        elif change:
            (encoder if case == "compiled" else encoder.network).compile(backend="aot_eager")
        encoder.zero_grad()
        penalty.step = 0
        value = penalty(images())
        value.backward()
        found.append([value, *(p.grad for p in encoder.parameters() if p.grad is not None)])
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)
    assert encoder.network.grad_checkpointing == (case == "checkpointing")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_finite_differences_of_weights_in_half_precision_are_refused(dtype):
    encoder, x = tiny().to(dtype), images().to(dtype)
    said = f"weights in {dtype} are noise: .* train under torch.autocast"
    for settings in ({}, {"direction": "neighbour", "by": "finite_difference"}):
        with pytest.raises(ValueError, match=said):
            SensitivityPenalty(encoder, strength=1, **settings)(x)
    assert SensitivityPenalty(encoder, strength=1, direction="neighbour")(x).isfinite()
    config = RegularizersConfig(input_gradient=InputGradientConfig(1, by="finite_difference"))
    (term,) = build_regularizers(encoder, config, steps_per_epoch=1, epochs=1)
    with pytest.raises(ValueError, match=said):
        term(x, torch.arange(len(x)) % 3, [])


def test_a_wrapped_model_and_one_without_a_head():
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.GELU(), nn.Linear(6, 5))
    wrapped = SensitivityPenalty(
        nn.DataParallel(network),
        strength=1,
        head=(),
        input_size=(1, 8, 8),
        pixel_std=1,
        direction="neighbour",
    )
    value = wrapped(images())
    value.backward()
    expected = sensitivity(network, images(), direction="neighbour", spread="neighbour")
    torch.testing.assert_close(value, expected)
    assert network[3].weight.grad.norm() > 0
    with pytest.raises(ValueError, match="'margin' is of a head"):
        SensitivityPenalty(wrapped.space, strength=1, pixel_std=1, direction="margin")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"images": 1}, r"images \(1\) must be at least 2"),
        ({"step": 0.0}, r"step \(0.0\) must be positive"),
        ({"power_steps": -1}, r"power_steps \(-1\)"),
        ({"ramp": -1}, r"ramp \(-1\) must be not negative"),
        ({"ramp_epochs": 1.0}, "ramp_epochs is of recipes"),
        ({"burn_in": -1}, r"burn_in_steps \(-1\)"),
        ({"burn_in_epochs": 1.0}, "burn_in_epochs is of recipes: pass burn_in"),
        ({"burn_in_fraction": 0.5}, "burn_in_fraction is of recipes: pass burn_in"),
        ({"images": 2.5}, r"images \(2\.5\) must be a whole number"),
    ],
)
def test_settings_out_of_range_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        SensitivityPenalty(tiny(), strength=1, **settings)


def test_a_micro_batch_of_one_image_adds_nothing_and_the_others_theirs():
    """As the last of an accumulated step may be; no random number is drawn for it."""
    model = tiny()
    penalty, other = (SensitivityPenalty(model, strength=1.0) for _ in range(2))
    with pytest.warns(UserWarning, match="one image adds nothing.*take larger micro-batches"):
        alone = penalty(images(1))
    assert alone.item() == 0
    loss = model(images(1)).square().sum()
    (loss + alone).backward()
    other.step = 1
    assert torch.equal(penalty(images(4)), other(images(4)))
    with pytest.raises(ValueError, match="2 images or more, and there are 1"):
        sensitivity(model.features, images(1))


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"direction": "nearest"}, r"direction \(nearest\) must be one of \['top', 'neighbour'"),
        ({"spread": "between"}, r"spread \(between\) must be one of \['total', 'neighbour'"),
        ({"by": "double"}, r"by \(double\) must be one of \['double_backprop'"),
    ],
)
def test_a_setting_that_is_none_of_its_kinds_is_named(setting, said):
    with pytest.raises(ValueError, match=said):
        SensitivityConfig(**setting)
    assert SensitivityConfig(spread="margin").spread == "margin"
    assert SensitivityConfig().spread is None


def test_a_penalty_cannot_be_copied():
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 4), nn.Linear(4, 3))
    penalty = SensitivityPenalty(net, strength=1.0, head="2", input_size=(1, 8, 8), pixel_std=1)
    with pytest.raises(TypeError, match="cannot be copied or pickled"):
        copy.deepcopy(penalty)
