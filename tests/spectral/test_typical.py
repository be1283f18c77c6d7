"""The typical 1 / std of norms that take it from each image, as folded maps have it."""

import copy
import json

import pytest
import torch
from timm.layers import LayerNorm2d
from torch import nn
from torch.autograd.functional import jacobian
from torch.utils.checkpoint import checkpoint

from hf_specreg import SpectralPenalty
from hf_specreg.spectral.typical import running_inverses
from tests.spectral.test_norms import Net, convolution


def build(kind):
    """A convolution, a norm that takes all of its output, and the penalty of both."""
    torch.manual_seed(0)
    norm = {
        "layer": lambda: LayerNorm2d(4),
        "rms": lambda: nn.RMSNorm(4, eps=1e-6),
    }[kind]()
    nn.init.uniform_(norm.weight, 0.5, 2)

    def forward(m, x):
        if kind == "rms":
            return m.norm(m.conv(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return m.norm(m.conv(x))

    # As high and wide as there are channels, which must not be mistaken for one another.
    return Net(forward, conv=convolution(), norm=norm).double()


def make(net, **options):
    options |= {"head": "head", "input_size": (3, 4, 4), "fold_norm": True}
    return SpectralPenalty(net, strength=0.5, **options)


def one_over_std(kind, x):
    """The mean of 1 / std over images and positions."""
    rows = x.movedim(1, -1)
    squares = rows.square().mean(-1) if kind == "rms" else rows.var(-1, correction=0)
    return (squares + 1e-6).rsqrt().mean()


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_it_is_the_running_mean_of_one_over_std_and_the_scale_of_the_folded_map(kind):
    net = build(kind)
    penalty = make(net)
    assert penalty.folded == {"conv": ("norm.weight", "norm.std")}
    weight, gain = net.conv.weight.flatten(1), net.norm.weight
    assert penalty.sigmas()["conv"] == pytest.approx(top(gain[:, None] * weight), rel=1e-4)
    mean = total = 0
    for scale in (1, 3, 2):
        images = scale * torch.rand(5, 3, 4, 4, dtype=torch.float64)
        net(images)
        mean = 0.9 * mean + 0.1 * one_over_std(kind, net.conv(images))
        total = 0.9 * total + 0.1
        expected = top((gain * mean / total)[:, None] * weight)
        assert penalty.sigmas()["conv"] == pytest.approx(expected, rel=1e-4)
    net.eval()(100 * images)
    assert penalty.sigmas()["conv"] == pytest.approx(expected, rel=1e-4)


def top(matrix):
    return torch.linalg.matrix_norm(matrix, 2).item()


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_the_folded_map_is_the_jacobian_but_for_what_the_norm_takes_out(kind):
    """J = diag(gamma) / s (I - 1 1^T / C - x x^T / C) W, x normalised; no mean is taken by RMS."""
    net = build(kind)
    penalty, image = make(net), torch.rand(1, 3, 1, 1, dtype=torch.float64)
    normalised = Net(lambda m, x: net.compute(net, x)).double()
    net.compute(net, image)
    local = jacobian(lambda x: normalised.compute(normalised, x), image).reshape(4, 3)
    weight, gain = net.conv.weight.flatten(1), net.norm.weight
    hidden = net.conv(image).flatten()
    centred = hidden if kind == "rms" else hidden - hidden.mean()
    x = centred / (centred.square().mean() + 1e-6).sqrt()
    taken = torch.outer(x, x) / 4 + (0 if kind == "rms" else 1 / 4)
    typical = one_over_std(kind, net.conv(image))
    folded = local + torch.diag(gain * typical) @ taken @ weight
    assert penalty.sigmas()["conv"] == pytest.approx(top(folded), rel=1e-4)


def test_what_the_norm_undoes_has_no_gradient():
    net = build("layer")
    penalty, images = make(net), torch.rand(5, 3, 4, 4, dtype=torch.float64)
    net(images)
    before = penalty()
    before.backward()
    weight, gradient = net.conv.weight, net.conv.weight.grad
    assert gradient.norm() > 0.01
    assert (gradient * weight).sum().abs().item() < 1e-9
    with torch.no_grad():
        weight -= 1e-3 * gradient
    assert penalty().item() < before.item()
    net.zero_grad()
    make(net, fold_gradient="exact")().backward()
    assert (weight.grad * weight).sum().item() > 0.01


def test_a_state_goes_on_to_the_same_bits_by_way_of_json():
    net, images = build("layer").float(), torch.rand(4, 3, 4, 4)
    penalty, other = make(net), build("layer").float()
    for _ in range(3):
        net(images)
        penalty()
    state = penalty.state_dict()
    vectors = state.pop("vectors")
    again = make(other)
    again.load_state_dict({**json.loads(json.dumps(state)), "vectors": vectors})
    for one, two in ((net, penalty), (other, again)):
        one(2 * images)
        two().backward()
    assert torch.equal(net.conv.weight.grad, other.conv.weight.grad)
    assert penalty.state_dict()["norms"] == again.state_dict()["norms"]
    with pytest.raises(ValueError, match=r"the norms \['norm'\] are in one of state and model"):
        again.load_state_dict({**state, "vectors": vectors, "norms": {}})


def test_a_compiled_model_is_followed_too_and_a_copy_by_itself():
    net, images = build("layer"), torch.rand(4, 3, 4, 4, dtype=torch.float64)
    compiled = torch.compile(net, backend="aot_eager")
    penalty = make(compiled)
    compiled(images).sum().backward()
    followed = penalty.state_dict()["norms"]
    assert followed["norm"][1] == pytest.approx(0.1)
    copy.deepcopy(net)(images)
    assert penalty.state_dict()["norms"] == followed
    penalty.remove_hooks()
    net(images)
    assert penalty.state_dict()["norms"] == followed


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_pass_that_checkpointing_repeats_is_counted_once(reentrant):
    def recomputed(m, x):
        return checkpoint(plain.compute, m, x, use_reentrant=reentrant)

    plain, again = build("layer"), build("layer")
    again.compute = recomputed
    images = torch.rand(4, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    penalties = [make(net) for net in (plain, again)]
    for _ in range(2):
        for net, penalty in zip((plain, again), penalties, strict=True):
            (net(images).square().sum() + penalty()).backward()
    torch.testing.assert_close(plain.conv.weight.grad, again.conv.weight.grad)
    seen, repeated = (penalty.state_dict()["norms"]["norm"] for penalty in penalties)
    assert seen == pytest.approx(repeated)


def test_a_norm_of_many_channels_is_looked_at_on_few_positions():
    (inverse,) = running_inverses(nn.LayerNorm(8192))  # 8192 x 8193^2 numbers are 2 TB
    assert inverse.dim == -1
