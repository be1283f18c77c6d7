"""Which maps have a free scale: what is found agrees with what networks compute."""

import warnings

import pytest
import timm
import torch
from timm.layers import ScaledStdConv2d, StdConv2d, freeze_batch_norm_2d
from timm.models.densenet import DenseNet
from timm.models.vgg import VGG
from torch import nn
from torch.nn import functional as F
from transformers import ResNetConfig, ResNetForImageClassification

from hf_specreg import FeatureSpace, SpectralPenalty
from hf_specreg.encoders.pinned import pin_norms
from tests.spectral.test_norms import CONVNEXT, SWIN, VIT, Net, OwnBackward, convolution

RESNET = {"layers": (1, 1, 1, 1), "channels": (32, 32, 32, 32)}
STAGES = {"depths": CONVNEXT["depths"], "dims": CONVNEXT["hidden_sizes"]}
VGG_ARGS = {"cfg": [8, "M", 8, "M"], "mlp_ratio": 0.01, "num_classes": 5}
DENSE = {"block_config": (2, 1), "growth_rate": 4, "num_classes": 5}
HF = {"embedding_size": 8, "hidden_sizes": [8] * 4, "depths": [1] * 4, "layer_type": "basic"}


def by_name(name, **options):
    return lambda: timm.create_model(name, num_classes=5, **options)


# Of each network how many maps have a free scale, and of how many.
NETWORKS = {
    "resnet": (by_name("resnet10t", channels=(8, 12, 16, 20)), 15, 15),
    "cifar": (by_name("resnet20_cifar", layers=(1, 1, 1)), 9, 9),
    "fixup": (by_name("resnet20_cifar_fixup", layers=(1, 1, 1)), 0, 9),
    "frozen": (lambda: freeze_batch_norm_2d(by_name("resnet10t", channels=[8] * 4)()), 0, 15),
    "pre-activation": (by_name("resnetv2_18", channels=(8, 12, 16, 20), stem_chs=8), 20, 20),
    "group norms": (by_name("resnet50_gn", **RESNET), 17, 17),
    "without norms": (by_name("resnet50_gn", norm_layer=nn.Identity, **RESNET), 0, 17),
    "transformers": (lambda: ResNetForImageClassification(ResNetConfig(**HF)), 12, 12),
    "vgg": (lambda: VGG(**VGG_ARGS), 0, 4),
    "vgg with norms": (lambda: VGG(norm_layer=nn.BatchNorm2d, **VGG_ARGS), 2, 4),
    "convnext": (by_name("convnext_atto", **STAGES), 11, 16),
    "vit": (by_name("vit_tiny_patch16_224", **VIT), 4, 7),
    "convnext, nothing": (by_name("convnext_atto", norm_layer="identity", **STAGES), 0, 16),
    "vit, dynamic tanh": (
        by_name("vit_tiny_patch16_224", norm_layer="dynamictanh", **VIT, init_values=1e-4),
        0,
        7,
    ),
    "swin": (by_name("swin_tiny_patch4_window7_224", drop_path_rate=0, **SWIN), 8, 20),
    "norms at the end": (by_name("swinv2_tiny_window8_256", drop_path_rate=0, **SWIN), 8, 20),
    "densenet": (lambda: DenseNet(**DENSE), 8, 8),
    "mlp": (by_name("mlp_2000", img_size=8, hidden_features=20), 0, 1),
}


@pytest.mark.parametrize(("build", "count", "of"), NETWORKS.values(), ids=NETWORKS)
@torch.no_grad()
def test_scales_are_free_where_their_powers_together_change_nothing(build, count, of):
    torch.manual_seed(0)
    network = in_general_position(build())
    penalty = of_any(network)
    images = torch.randn(4, *penalty.input_size, dtype=torch.double)
    before, alone = logits(network, images), set()
    for name in penalty._modules:
        rescale(penalty, {("map", name): 1.0, **biases_of(penalty, name)})
        if torch.allclose(logits(network, images), before, rtol=1e-6, atol=1e-8):
            alone.add(name)
        rescale(penalty, {("map", name): -1.0, **biases_of(penalty, name, -1.0)})
    found = penalty.free_scale
    assert alone <= set(found)
    assert (len(found), len(penalty._modules)) == (count, of)
    rescale(penalty, penalty._free_scales._found.solution())
    torch.testing.assert_close(logits(network, images), before, rtol=1e-6, atol=1e-8)


def rescale(penalty, exponents):
    """Multiply maps, and what is added to their outputs, by powers of 3."""
    parameters = dict(penalty.space.network.named_parameters(remove_duplicate=False))
    for (kind, name, *part), exponent in exponents.items():
        if kind == "map":
            module, (layer, _, last) = penalty._modules[name], name.rpartition(".")
            tensor = getattr(module, "gain", module.weight)
            part = ["qkv".find(last)] if layer.endswith("qkv") else []
        else:
            tensor = parameters[name]
        if part:
            tensor = tensor.chunk(3)[int(part[0])]
        tensor *= 3**exponent


def biases_of(penalty, name, exponent=1.0):
    module = penalty._modules[name]
    dotted = next(n for n, m in penalty.space.network.named_modules() if m is module)
    return {} if module.bias is None else {("added", f"{dotted}.bias"): exponent}


def of_any(network, **options):
    """A penalty at a size that is quick, where a network takes any."""
    if isinstance(network, VGG):
        options |= {"head": "head", "input_size": (3, 28, 28)}
    elif isinstance(network, DenseNet):
        options |= {"head": "classifier", "input_size": (3, 64, 64)}
    elif hasattr(network, "layer4") or hasattr(network, "stages"):
        options |= {"input_size": (3, 64, 64)}
    return SpectralPenalty(network, **options)


def in_general_position(network):
    """In double precision, with norms that have no eps, and gains and biases that are not 0."""
    for module in network.modules():
        if isinstance(getattr(module, "eps", None), float):
            module.eps = 1e-30
    for tensor in (*network.parameters(), *network.buffers()):
        if tensor.is_floating_point() and (tensor.ndim == 1 or not tensor.any()):
            nn.init.uniform_(tensor, 0.5, 1.5)
    return network.double().train()


def logits(network, images):
    output = network(images)
    return output if isinstance(output, torch.Tensor) else output.logits


def free(forward, **parts):
    network = Net(forward, **parts).train()
    return SpectralPenalty(network, head="head", input_size=(3, 8, 8)).free_scale


BIASED = {"conv": convolution(), "two": convolution(4), "norm": nn.BatchNorm2d(4)}
PLAIN = {"conv": convolution(), "two": convolution(4, bias=False), "norm": nn.BatchNorm2d(4)}
WIDE = {"conv": convolution(), "norm": nn.BatchNorm2d(7)}


def together(m, x):
    return F.max_pool2d(torch.cat([m.conv(x), x], dim=1).relu(), 1)


def changed_through_a_view(m, x):
    y = m.conv(x)
    y[:, :2].mul_(0.5)
    return y


STEPS = {
    "map": (lambda m, x: m.norm(m.two(m.conv(x))), PLAIN, ("conv", "two")),
    "bias": (lambda m, x: m.norm(m.two(m.conv(x))), BIASED, ("conv", "two")),
    "relu": (lambda m, x: m.norm(F.max_pool2d(m.conv(x).relu(), 2)), PLAIN, ("conv",)),
    "gelu": (lambda m, x: m.norm(F.gelu(m.conv(x))), PLAIN, ()),
    "shift": (lambda m, x: m.norm((m.conv(x) + 1).relu()), PLAIN, ()),
    "stream": (
        lambda m, x: m.norm((y := m.conv(x)) + m.two(m.norm(y).sin())),
        PLAIN,
        ("conv", "two"),
    ),
    "past": (lambda m, x: m.norm(y := m.conv(x)) + y, PLAIN, ()),
    "twice": (lambda m, x: m.norm(y := m.conv(x)) + m.norm(y.relu() + y), PLAIN, ("conv",)),
    "other": (lambda m, x: m.norm(m.conv(x) + x.mean(1, keepdim=True)), PLAIN, ()),
    "gate": (lambda m, x: m.norm(m.conv(x) * x.mean()), PLAIN, ("conv",)),
    "square": (lambda m, x: m.norm((y := m.conv(x)) * y), PLAIN, ("conv",)),
    "quotient": (lambda m, x: (y := m.conv(x)) / y.mean(), PLAIN, ("conv",)),
    "beside": (lambda m, x: m.norm(together(m, x))[:, 3:], WIDE, ("conv",)),
    "across": (lambda m, x: F.layer_norm(together(m, x), [7, 8, 8])[:, 3:], WIDE, ()),
    "mixed": (lambda m, x: m.norm(together(m, x).flip(1))[:, 3:], WIDE, ()),
    "below": (lambda m, x: m.norm(torch.cat([m.conv(x), m.two(m.conv(x)).sin()])), PLAIN, ()),
    "a view": (changed_through_a_view, PLAIN, ()),
    "own": (lambda m, x: m.norm(m.two(m.two(m.conv(x)))), PLAIN, ("conv", "two")),
    "opaque": (lambda m, x: m.norm(y := m.conv(x)) * OwnBackward.apply(y), PLAIN, ()),
}


@pytest.mark.parametrize(("forward", "parts", "found"), STEPS.values(), ids=STEPS)
def test_scales_are_followed_through_homogeneous_functions_only(forward, parts, found):
    assert free(forward, **parts) == found


def test_a_weight_that_two_layers_share_is_scaled_in_both():
    one, two = convolution(4, bias=False), convolution(4, bias=False)
    two.weight = one.weight
    parts = {"stem": convolution(), "one": one, "two": two, "norm": nn.BatchNorm2d(4)}
    assert free(lambda m, x: m.two(m.norm(m.one(m.stem(x).sin()))), **parts) == ()
    assert "one" in free(lambda m, x: m.norm(m.one(m.stem(x).sin())), **parts)


def test_a_standardised_weight_has_no_scale_but_that_of_its_gain():
    def forward(m, x):
        return m.norm(m.conv(x))

    norm = nn.GroupNorm(2, 4)
    assert free(forward, conv=StdConv2d(3, 4, 3), norm=norm) == ()
    assert free(forward, conv=ScaledStdConv2d(3, 4, 3), norm=norm) == ("conv",)


def test_fixed_statistics_free_nothing():
    network = timm.create_model("test_resnet", num_classes=5)
    penalty = of_any(network)
    assert len(penalty.free_scale) == len(penalty.layers) == 15
    for module in network.layer4.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    assert penalty.free_scale == tuple(
        layer.name for layer in penalty.layers if not layer.name.startswith("layer4")
    )
    network.eval()  # and trained so
    assert penalty.free_scale == ()
    network.train()
    assert len(penalty.free_scale) == 15
    pin_norms(network)
    assert penalty.free_scale == ()


def of_three(norm, **options):
    """A penalty on two maps with a norm after them, and one without."""
    parts = {"one": convolution(), "two": convolution(4), "three": convolution(4), "norm": norm}
    network = Net(lambda m, x: m.three(m.norm(m.two(m.norm(m.one(x)).sin())).sin()), **parts)
    return SpectralPenalty(network.train(), head="head", input_size=(3, 8, 8), **options)


def test_the_penalty_warns_at_its_first_use_and_names_layers_and_remedy():
    penalty = of_three(nn.BatchNorm2d(4), burn_in=1)
    said = r"make 2 of the 3 maps .*\(one, two\).* InputGradientPenalty .* fold_norm=True"
    with pytest.warns(UserWarning, match=said) as caught:
        penalty()
    assert [warning.filename for warning in caught] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        penalty()
        penalty.set_input_size((3, 6, 6))
        penalty()


def test_a_penalty_that_cannot_warn_runs_the_network_no_more_than_its_layers_ask_for():
    runs = []

    def forward(m, x):
        runs.append(torch.is_grad_enabled())
        return m.norm(m.conv(x))

    network = Net(forward, **PLAIN).train()
    space = FeatureSpace.of(network, head="head", input_size=(3, 8, 8))
    assert space.layers
    counts = []
    for strength in (0, 1):
        runs.clear()
        penalty = SpectralPenalty(space, strength=strength)
        counts.append(len(runs))
        assert penalty.free_scale == ("conv",)
        assert len(runs) == counts[-1] + (not strength)
    assert counts[1] == counts[0] + 1


@pytest.mark.parametrize(
    ("norm", "fixed", "options"),
    [
        (nn.BatchNorm2d(4), False, {"strength": 0}),
        (nn.BatchNorm2d(4), False, {"fold_norm": True}),
        (nn.BatchNorm2d(4), True, {}),
        (nn.Identity(), False, {}),
    ],
    ids="strength folded fixed none".split(),
)
def test_it_does_not_warn_where_no_scale_is_free_or_norms_are_folded_in(norm, fixed, options):
    penalty = of_three(norm, **options)
    if fixed:
        norm.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        penalty()
