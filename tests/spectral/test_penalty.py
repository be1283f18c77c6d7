"""SpectralPenalty: its value and gradient, its schedule, its state, and the training loops it
lives in."""

import copy
import warnings

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

from hf_specreg import FeatureSpace
from hf_specreg.spectral import operators
from hf_specreg.spectral.layers import linear_operators
from hf_specreg.spectral.penalty import SpectralPenalty
from tests.spectral.references import dense_matrix


class SmallNet(nn.Module):
    """Convolution, depthwise convolution with batch norm, linear layer, head."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.norm = nn.BatchNorm2d(8)
        self.proj = nn.Linear(8, 16)
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        x = self.norm(self.depthwise(self.stem(x).relu())).mean((2, 3))
        return self.head(self.proj(x).relu())


SIZE = (3, 12, 12)


@pytest.fixture
def net():
    torch.manual_seed(0)
    return SmallNet()


def make(net, **kwargs):
    return SpectralPenalty(net, **{"head": "head", "input_size": SIZE, **kwargs})


def exact_sum(net, names=("stem", "depthwise", "proj")):
    shapes = {"stem": SIZE, "depthwise": (8, 6, 6), "proj": (8,), "head": (16,)}
    total = 0
    for name in names:
        (operator,) = linear_operators(name, net.get_submodule(name), shapes[name])
        total = (
            total
            + torch.linalg.matrix_norm(
                dense_matrix(operator, operator.effective_weight()), ord=2
            ).square()
        )
    return total


def test_value_and_gradient_are_those_of_the_dense_svd(net):
    penalty = make(net, strength=0.3)
    value = penalty()
    value.backward()
    expected = 0.3 * exact_sum(net)
    weights = [net.stem.weight, net.depthwise.weight, net.proj.weight]
    gradients = torch.autograd.grad(expected, weights)
    torch.testing.assert_close(value, expected, rtol=1e-4, atol=0)
    for weight, gradient in zip(weights, gradients, strict=True):
        assert weight.grad.abs().max() > 0
        torch.testing.assert_close(
            weight.grad, gradient, rtol=2e-2, atol=2e-3 * gradient.abs().max()
        )
    assert net.head.weight.grad is None


def test_scope_all_adds_the_head_and_nothing_else(net):
    features, everything = (
        make(net),
        make(net, scope="all"),
    )
    assert [layer.name for layer in features.layers] == ["stem", "depthwise", "proj"]
    assert [layer.name for layer in everything.layers] == ["stem", "depthwise", "proj", "head"]
    expected = exact_sum(net, ("stem", "depthwise", "proj", "head"))
    torch.testing.assert_close(everything(), 1e-2 * expected, rtol=1e-4, atol=0)


class Only(nn.Module):
    """One layer of a model, without another."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer
        self.head = nn.Identity()

    def forward(self, x):
        return self.head(self.layer(x))


@pytest.mark.parametrize(
    ("layer", "size"),
    [
        (nn.Conv2d(1, 2, 3, stride=2, padding=1), (1, 6, 6)),
        (nn.Conv2d(3, 2, 2, stride=2), (3, 6, 6)),
        (nn.Conv2d(4, 4, 3, groups=4, padding=1, padding_mode="reflect"), (4, 5, 5)),
        (nn.ConvTranspose2d(2, 3, 3, stride=2, output_padding=1), (2, 3, 3)),
        (nn.Linear(5, 4), (2, 3, 5)),
    ],
    ids=["strided", "patches", "depthwise-reflect", "transposed", "linear"],
)
def test_gradcheck_in_float64_and_the_gradient_of_the_svd(layer, size):
    torch.manual_seed(0)
    layer.reset_parameters()  # it was made before the seed, when tests were collected
    net = Only(layer.double())
    options = {"head": "head", "input_size": size, "renew_every": 1, "lanczos_steps": 40}
    penalty = SpectralPenalty(net, strength=1.0, **options)
    penalty()
    (operator,) = penalty.layers

    def squared_sigma(w):
        """Converged at each w, so that differences of values are those of sigma^2 itself."""
        for _ in range(5):
            value = torch.func.functional_call(Value(net, penalty), {"net.layer.weight": w})
        return value

    given = layer.weight.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(squared_sigma, given, atol=1e-4)
    (gradient,) = torch.autograd.grad(squared_sigma(given), given)

    def exact(w):
        return torch.linalg.matrix_norm(dense_matrix(operator, operator.part(w)), ord=2).square()

    (of_the_svd,) = torch.autograd.grad(exact(given), given)
    torch.testing.assert_close(gradient, of_the_svd, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["same", "reflect", "circular", "replicate"])
def test_a_convolution_that_pads_by_itself_is_measured_on_what_it_is_fed(mode):
    torch.manual_seed(0)
    if mode == "same":
        layer = timm.layers.Conv2dSame(3, 4, 3, stride=2)
    else:
        layer = nn.Conv2d(3, 4, 3, stride=2, padding=1, padding_mode=mode)
    net = Only(layer)
    penalty = SpectralPenalty(net, head="head", input_size=(3, 8, 8))
    for _ in range(2):  # the second looks at what the first training step was of
        penalty()
        net(torch.rand(2, 3, 8, 8)).sum().backward()
    matrix = torch.autograd.functional.jacobian(
        lambda x: layer(x[None]).flatten(), torch.rand(3, 8, 8)
    )
    expected = torch.linalg.matrix_norm(matrix.flatten(1), ord=2)
    assert penalty.sigmas()["layer"] == pytest.approx(expected.item(), rel=1e-4)


class Value(nn.Module):
    """A penalty as a module, so that it can be called with another weight."""

    def __init__(self, net, penalty):
        super().__init__()
        self.net = net
        self.penalty = penalty

    def forward(self):
        return self.penalty.value()


def test_scaling_the_weights_scales_the_penalty_by_the_square(net):
    before = make(net)()
    with torch.no_grad():
        for layer in (net.stem, net.depthwise, net.proj):
            layer.weight.mul_(-3)
    torch.testing.assert_close(make(net)(), 9 * before, rtol=1e-4, atol=0)


def test_descending_the_penalty_lowers_the_exact_sum(net):
    penalty = make(net, strength=1.0)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    before = exact_sum(net).item()
    for _ in range(30):
        optimizer.zero_grad()
        penalty().backward()
        optimizer.step()
    assert exact_sum(net).item() < 0.7 * before


@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("lanczos_steps", [4, 8])
def test_uses_stay_at_a_top_singular_value_that_stands_out(monkeypatch, rounded, lanczos_steps):
    """Once it has converged, a renewal has only noise and rounding to work on."""
    monkeypatch.setattr(operators, "multiplies_bfloat16", lambda: rounded)
    monkeypatch.setattr(operators, "LARGE_PRODUCT", 0)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(32, 32, 3, padding=1), nn.Flatten(), nn.Linear(512, 2))
    model[0].weight.data = torch.randn(32, 1, 1, 1) * torch.randn(1, 32, 1, 1) * torch.ones(3, 3)
    model[0].weight.data += 0.1 * torch.randn(32, 32, 3, 3)
    penalty = SpectralPenalty(
        model, strength=1, head="2", input_size=(32, 4, 4), lanczos_steps=lanczos_steps
    )
    expected = penalty.sigmas()["0"] ** 2
    for _ in range(80):
        assert penalty().item() == pytest.approx(expected, rel=2e-3)


def test_one_lanczos_step_is_refused(net):
    """It would keep v where it is, and add the noise to it each time."""
    with pytest.raises(ValueError, match=r"lanczos_steps \(1\) must be at least 2"):
        make(net, lanczos_steps=1)


def test_burn_in_and_cadence_count_calls(net):
    penalty = make(net, burn_in=3.0, every=2)
    assert [penalty().item() > 0 for _ in range(8)] == [False] * 3 + [
        True,
        False,
        True,
        False,
        True,
    ]
    assert penalty.step == 8


def test_after_the_burn_in_the_strength_rises_with_the_ramp(net):
    penalty = make(net, burn_in=2, ramp=4, every=2)
    found = torch.stack([penalty().detach() for _ in range(10)]) / make(net).value().detach()
    expected = torch.tensor([0, 0, 0, 0, 0.5, 0, 1, 0, 1, 0])
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=0)


def test_between_cadences_it_adds_nothing_to_the_gradient(net):
    penalty = make(net, burn_in=1)
    images = torch.randn(2, *SIZE)
    (net(images).square().mean() + penalty()).backward()
    expected = torch.autograd.grad(net(images).square().mean(), net.proj.weight)[0]
    torch.testing.assert_close(net.proj.weight.grad, expected)


def test_frozen_layers_give_value_but_no_gradient(net):
    reference = make(net)()
    net.stem.weight.requires_grad_(False)
    value = make(net)()
    value.backward()
    torch.testing.assert_close(value, reference)
    assert net.stem.weight.grad is None
    assert net.proj.weight.grad is not None
    net.requires_grad_(False)
    assert not make(net)().requires_grad


def test_tied_weights_count_once():
    torch.manual_seed(0)
    first, second = nn.Linear(6, 6), nn.Linear(6, 6)
    second.weight = first.weight
    net = nn.Sequential(first, second, nn.Linear(6, 2))
    penalty = SpectralPenalty(FlatInput(net), head="net.2", input_size=(1, 2, 3))
    assert [layer.name for layer in penalty.layers] == ["net.0"]


class FlatInput(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x.flatten(1))


def test_finding_the_layers_touches_no_statistics_mode_hook_or_random_state(net):
    net.train()
    net.depthwise.eval()
    before, random_state = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    penalty = make(net)
    penalty.sigmas()
    assert torch.equal(torch.get_rng_state(), random_state)
    assert [net.training, net.depthwise.training, net.norm.training] == [True, False, True]
    assert all(torch.equal(a, before[k]) for k, a in net.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


def test_in_use_one_hook_looks_at_the_images_until_they_are_removed(net):
    penalty = make(net)
    for _ in range(2):
        penalty()
        assert sum(len(m._forward_pre_hooks) for m in net.modules()) == 1
    penalty.set_input_size(penalty.input_size)
    assert not any(m._forward_pre_hooks for m in net.modules())
    penalty()
    penalty.remove_hooks()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


@pytest.mark.parametrize("calls", [1, 3, 12])
def test_state_resumes_to_the_same_bits(net, calls):
    penalty = make(net, every=2)
    for _ in range(calls):
        penalty()
    other = make(net, every=2)
    other.load_state_dict(copy.deepcopy(penalty.state_dict()))
    with torch.no_grad():
        net.proj.weight.add_(0.1)
    expected, resumed = [[p().item() for _ in range(4)] for p in (penalty, other)]
    assert resumed == expected


def test_state_of_another_model_is_refused(net):
    state = make(net)
    state()
    with pytest.raises(ValueError, match=r"vector 'stem\.u'"):
        make(net, input_size=(3, 10, 10)).load_state_dict(state.state_dict())
    with pytest.raises(ValueError, match=r"vectors \['proj\.u', 'proj\.v'\] are in one of"):
        make(net, skip=["proj"]).load_state_dict(state.state_dict())


def test_sigmas_are_converged_and_do_not_change_the_training(net):
    penalty = make(net)
    penalty()
    vectors = copy.deepcopy(penalty.state_dict())
    sigmas = penalty.sigmas()
    assert list(sigmas) == ["stem", "depthwise", "proj"]
    total = sum(s**2 for s in sigmas.values())
    assert total == pytest.approx(exact_sum(net).item(), rel=1e-4)
    after = penalty.state_dict()
    assert after["step"] == 1
    assert all(torch.equal(v, after["vectors"][k]) for k, v in vectors["vectors"].items())


@pytest.mark.parametrize("mode", [True, False])
def test_an_encoder_trained_at_another_resolution_is_noticed(net, mode):
    penalty = make(net)
    penalty()
    with torch.no_grad():  # an evaluation
        net(torch.randn(2, 3, 20, 20))
    penalty()
    net.train(mode)
    net(torch.randn(2, 3, 20, 20))
    with pytest.raises(ValueError, match=r"inputs of \(3, 20, 20\).*set_input_size"):
        penalty()
    penalty.set_input_size((3, 20, 20))
    net(torch.randn(2, 3, 20, 20))
    assert penalty() > 0


def test_a_convolution_that_is_called_by_keyword_is_looked_at_too():
    class ByKeyword(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 3, 3), nn.Linear(3, 2)

        def forward(self, x):
            return self.fc(self.conv(input=x).mean((2, 3)))

    net = ByKeyword()
    penalty = SpectralPenalty(net, head="fc", input_size=SIZE)
    penalty()
    net(torch.randn(2, 3, 20, 20))
    with pytest.raises(ValueError, match="set_input_size"):
        penalty()


def test_a_replaced_projection_of_attention_is_an_error():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    net = nn.Sequential(nn.Linear(8, 8), layer, nn.Linear(8, 2))
    penalty = SpectralPenalty(net, head="2", input_size=(5, 8))
    penalty()
    attention = layer.self_attn
    attention.out_proj = type(attention.out_proj)(8, 8)
    with pytest.raises(ValueError, match=r"layer '1\.self_attn\.out_proj' was replaced"):
        penalty()


@pytest.mark.parametrize("mistake", ["replaced", "parametrized", "adapted"])
def test_layers_that_change_after_the_penalty_was_made_are_an_error(net, mistake):
    penalty = make(net)
    penalty()
    if mistake == "replaced":
        net.proj = nn.Linear(net.proj.in_features, net.proj.out_features)
    elif mistake == "parametrized":
        nn.utils.parametrizations.weight_norm(net.proj)
    else:
        peft = pytest.importorskip("peft")
        peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["proj"], r=2), net)
    with pytest.raises(ValueError, match="layer 'proj' was replaced or reparameterised"):
        penalty()


def test_a_layer_that_is_wrapped_for_checkpointing_is_still_there(net):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    penalty = make(net)
    net.proj = checkpoint_wrapper(net.proj)
    assert penalty() > 0


def test_a_use_in_inference_mode_does_no_harm_to_the_next_training_step(net):
    penalty = make(net)
    with torch.inference_mode():
        looked = penalty.value()
    value = penalty()
    value.backward()
    torch.testing.assert_close(value.detach(), looked)
    assert net.proj.weight.grad.abs().max() > 0


@pytest.mark.parametrize("without", [torch.no_grad, torch.inference_mode])
def test_a_validation_with_the_trainings_loss_uses_up_no_burn_in(net, without):
    penalty = make(net, burn_in=3)
    with without(), pytest.raises(RuntimeError, match=r"in training only; sigmas\(\) gives"):
        penalty()
    assert penalty.step == 0


def test_it_may_be_made_in_inference_mode(net):
    with torch.inference_mode():
        penalty = make(net)
    penalty().backward()
    assert net.proj.weight.grad.abs().max() > 0


def test_a_strength_that_is_set_later_is_checked(net):
    penalty = make(net)
    for wrong in (-1.0, float("nan")):
        with pytest.raises(ValueError, match="strength"):
            penalty.strength = wrong


def test_a_feature_space_in_place_of_the_model_gives_the_same_penalty(net):
    space = FeatureSpace.of(net, head="head", input_size=SIZE)
    penalty = SpectralPenalty(space)
    assert penalty.space is space
    assert torch.equal(penalty(), make(net)())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_and_autocast_are_computed_in_float32(net, dtype):
    expected = make(net)()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = make(net)()
    torch.testing.assert_close(under_autocast, expected)
    half = make(net.to(dtype))()
    half.backward()
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, expected, rtol=1e-2, atol=0)
    assert net.proj.weight.grad.dtype == dtype


def test_a_computed_weight_is_computed_in_float32_under_autocast():
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.Linear(8, 2))
    config = peft.LoraConfig(target_modules=["1"], r=2, init_lora_weights=False)
    net = peft.inject_adapter_in_model(config, net)
    arguments = {"head": "2", "input_size": (3, 2, 2)}
    expected = SpectralPenalty(net, **arguments)()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = SpectralPenalty(net, **arguments)()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


def test_grad_scaler_scales_the_penalty_with_the_loss(net):
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    scaler.scale(make(net)()).backward()
    scaled = net.proj.weight.grad.clone()
    net.zero_grad()
    make(net)().backward()
    torch.testing.assert_close(scaled, 64 * net.proj.weight.grad)


def test_gradient_accumulation_with_one_call_a_step_gives_the_full_batch_gradient(net):
    net.norm.eval()
    images, labels = torch.randn(8, *SIZE), torch.randint(5, (8,))
    (F.cross_entropy(net(images), labels) + make(net)()).backward()
    full = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    penalty = make(net)
    for i, (x, y) in enumerate(zip(images.chunk(4), labels.chunk(4), strict=True)):
        loss = F.cross_entropy(net(x), y) / 4
        (loss + penalty() if i == 3 else loss).backward()
    assert penalty.step == 1
    for p, expected in zip(net.parameters(), full, strict=True):
        torch.testing.assert_close(p.grad, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("options", [{"strength": 0.0}, {"strength": 0.5, "ramp": 4}])
def test_where_its_strength_is_0_it_computes_nothing(net, options):
    penalty = make(net, **options)
    assert penalty().item() == 0
    assert penalty._sum.uses == 0
    penalty.strength = 0.5
    penalty().backward()
    assert penalty._sum.uses == 1
    assert net.stem.weight.grad.any()


def test_inside_a_compiled_step_it_gives_the_eager_gradient(net):
    net.norm.eval()
    images = torch.randn(4, *SIZE)
    eager = make(net)
    (net(images).square().mean() + eager()).backward()
    eager.remove_hooks()  # now, not whenever it is collected, which may be while it is compiled
    expected = net.proj.weight.grad.clone()
    net.zero_grad()
    compiled = torch.compile(net, backend="aot_eager")
    penalty = make(compiled)

    @torch.compile(backend="aot_eager")
    def step(x):
        return compiled(x).square().mean() + penalty()

    step(images).backward()
    torch.testing.assert_close(net.proj.weight.grad, expected, rtol=1e-3, atol=1e-6)
    step(images)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(10):
            net.zero_grad()
            step(images).backward()
    torch.testing.assert_close(net.proj.weight.grad, expected, rtol=1e-2, atol=1e-5)
    assert penalty.step == 12


def test_a_copied_model_does_not_drag_the_penalty_along(net):
    make(net)
    clone = copy.deepcopy(net)
    clone.load_state_dict(net.state_dict())
    assert clone(torch.randn(2, *SIZE)).shape == (2, 5)


def test_bad_arguments_name_the_argument(net):
    for kwargs, message in [
        ({"scope": "head"}, r"scope \(head\) must be one of \['features', 'all'\]"),
        ({"fold_gradient": "bound"}, "fold_gradient"),
        ({"every": 0}, "every"),
        ({"burn_in": -1}, "burn_in"),
        ({"ramp": -1}, "ramp"),
        ({"burn_in": 0.6 * 391}, r"burn_in \(234\.6\) must be a whole number: round it"),
        ({"every": 1.5}, r"every \(1\.5\) must be a whole number"),
        ({"ramp": 2.5}, r"ramp \(2\.5\) must be a whole number"),
        ({"burn_in": float("inf")}, r"burn_in \(inf\) must be finite"),
        ({"strength": -1.0}, "strength"),
        ({"head": "fc"}, "head 'fc' is no module of SmallNet; .*'head', 'proj'"),
        ({"head": None}, "cannot find the head of SmallNet"),
        ({"skip": ["norms"]}, "norms"),
        ({"skip": "norm"}, "sequence of names"),
        ({"head": "stem"}, "no linear map"),
        ({"input_size": (4, 12, 12)}, "input_size"),
        ({"input_size": 12}, r"input_size \(12\) must be \(channels, height, width\)"),
    ]:
        with pytest.raises((ValueError, RuntimeError), match=message):
            make(net, **kwargs)
    with pytest.raises(ValueError, match="does not say its input size"):
        SpectralPenalty(net, head="head")


def test_skip_leaves_a_layer_and_all_it_holds_out():
    model = timm.create_model("resnet18", num_classes=3)
    names = [p.name for p in SpectralPenalty(model, skip=["layer4", "conv1"]).layers]
    assert "layer3.1.conv2" in names
    assert not [n for n in names if n.startswith("layer4") or n == "conv1"]


def test_a_sigma_that_does_not_converge_is_warned_of(net):
    with torch.no_grad():
        net.proj.weight[0, 0] = torch.nan
    with pytest.warns(UserWarning, match="'proj' did not converge"):
        make(net).sigmas()


def test_a_clean_use_warns_of_nothing(net):
    net.norm = nn.Identity()  # which makes maps scale-invariant
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        penalty = make(net)
        penalty().backward()
        penalty.sigmas()


def test_a_model_that_changes_its_arithmetic_meanwhile_goes_on(net):
    penalty = make(net)
    before = penalty()
    net.double()
    after = penalty()
    assert after.dtype == torch.float64
    torch.testing.assert_close(after.float(), before, rtol=1e-3, atol=0)
    after.backward()
    assert net.proj.weight.grad.dtype == torch.float64


def test_a_group_whose_weight_turns_round_still_counts():
    torch.manual_seed(0)
    net = Only(nn.Conv2d(2, 2, 3, padding=1, groups=2))
    penalty = SpectralPenalty(net, head="head", input_size=(2, 5, 5), renew_every=100)
    before = penalty()
    with torch.no_grad():
        net.layer.weight.neg_()
    torch.testing.assert_close(penalty(), before)


def test_weights_that_were_not_finite_for_a_while_do_no_lasting_harm(net):
    penalty = make(net, renew_every=2)
    before, good = penalty(), net.proj.weight.detach().clone()
    with torch.no_grad():
        net.proj.weight.fill_(torch.nan)
    assert [penalty().isnan().item() for _ in range(3)] == [True] * 3
    with pytest.warns(UserWarning, match="'proj' did not converge"):
        assert penalty.sigmas()["proj"] != 0
    with torch.no_grad():
        net.proj.weight.copy_(good)
    values = [penalty() for _ in range(3)]
    torch.testing.assert_close(values[-1], before, rtol=1e-3, atol=0)
    assert sum(s**2 for s in penalty.sigmas().values()) == pytest.approx(
        100 * before.item(), rel=1e-3
    )


def test_a_first_use_at_weights_that_are_not_finite_does_no_lasting_harm(net):
    good = net.proj.weight.detach().clone()
    before = make(net)()
    with torch.no_grad():
        net.proj.weight.fill_(torch.nan)
    penalty = make(net, renew_every=100)
    assert penalty().isnan()
    with torch.no_grad():
        net.proj.weight.copy_(good)
    torch.testing.assert_close(penalty(), before, rtol=1e-3, atol=0)


def test_a_penalty_is_not_copied_but_made_for_another_model(net):
    with pytest.raises(TypeError, match=r"make one for the other model.*state_dict"):
        copy.deepcopy(make(net))


def test_a_state_of_an_earlier_version_is_an_error(net):
    with pytest.raises(ValueError, match="earlier version"):
        make(net).load_state_dict({"step": 3, "side": "input", "vectors": {}})
    penalty = make(net)
    state = penalty.state_dict()
    state["pace"] = {"halvings": 1, "rounds": 1, "look_at": 8, "sums": [0.0, 0.0]}
    with pytest.raises(ValueError, match="earlier version"):
        penalty.load_state_dict({**state, "step": 3})
    assert penalty.step == 0
