import pytest
import timm
import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from hf_specreg import SpectralPenalty
from hf_specreg.encoders.pinned import pin_norms
from tests.unchanged import unchanged

SIZE = {"input_size": (3, 2, 2)}


class Net(nn.Module):
    """A convolution with its batch norm, one with an activation between, and one with none."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.second = nn.Conv2d(6, 6, 3, padding=1)
        self.late_norm = nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 2)

    def forward(self, x):
        x = self.norm(self.first(x)).relu()
        x = self.late_norm(self.second(x).relu())
        return self.head(x.mean((2, 3)))


@pytest.fixture
def net():
    torch.manual_seed(0)
    net = Net()
    for norm in (net.norm, net.late_norm):
        norm.running_var.uniform_(0.2, 3)
        nn.init.uniform_(norm.weight, 0.5, 2)
    return net.train()


def test_folded_sigma_is_that_of_the_fused_convolution(net):
    penalty = SpectralPenalty(net, head="head", input_size=(3, 8, 8))
    values = penalty.top_singular_values(tolerance=1e-5, fold_norm=True)
    assert list(values) == ["first"]
    fused = Net()
    norm = net.norm
    fused.first.weight = fuse_conv_bn_weights(
        net.first.weight,
        None,
        norm.running_mean,
        norm.running_var,
        norm.eps,
        norm.weight,
        norm.bias,
    )[0]
    plain = SpectralPenalty(fused, head="head", input_size=(3, 8, 8))
    expected = plain.top_singular_values(tolerance=1e-5)["first"].sigma
    torch.testing.assert_close(values["first"].sigma, expected, rtol=1e-4, atol=0)


def test_rescaling_a_normalised_convolution_changes_the_plain_sigma_only(net):
    penalty = SpectralPenalty(net, head="head", input_size=(3, 8, 8))
    before = [penalty.top_singular_values(fold_norm=f)["first"].sigma for f in (False, True)]
    with torch.no_grad():
        net.first.weight *= 3
        net.norm.running_var *= 9
    after = [penalty.top_singular_values(fold_norm=f)["first"].sigma for f in (False, True)]
    torch.testing.assert_close(after[0], 3 * before[0], rtol=1e-3, atol=0)
    torch.testing.assert_close(after[1], before[1], rtol=1e-3, atol=0)


def test_folding_leaves_the_model_as_it_is(net):
    with unchanged(net.eval(), torch.rand(2, 3, 8, 8)):
        penalty = SpectralPenalty(net, head="head", input_size=(3, 8, 8), fold_norm=True)
        penalty.top_singular_values()
    assert penalty.folded == {"first": ("norm.weight", "norm.running_var")}


class Blocks(nn.Module):
    """A linear layer with a layer norm before and a batch norm after it, and one with neither."""

    def __init__(self):
        super().__init__()
        self.before = nn.LayerNorm(12)
        self.hidden = nn.Linear(12, 7)
        self.after = nn.BatchNorm1d(7)
        self.plain = nn.Linear(7, 5)
        self.head = nn.Linear(5, 2)

    def forward(self, x):
        x = self.after(self.hidden(self.before(x.flatten(1))))
        return self.head(self.plain(x.relu()))


@pytest.fixture
def blocks():
    torch.manual_seed(0)
    blocks = Blocks().double()
    with torch.no_grad():
        blocks.after.running_var.uniform_(0.2, 3)
        for norm in (blocks.before, blocks.after):
            norm.weight.uniform_(0.5, 2)
    return blocks


def dense(blocks):
    """The folded matrices, written out."""
    scale = blocks.after.weight / (blocks.after.running_var + blocks.after.eps).sqrt()
    return torch.diag(scale) @ blocks.hidden.weight @ torch.diag(blocks.before.weight)


def folded_penalty(blocks, **options):
    options |= {"head": "head", "input_size": (3, 2, 2)}
    return SpectralPenalty(blocks, strength=0.5, fold_norm=True, **options)


def test_the_folded_penalty_is_that_of_the_matrix_between_the_norms(blocks):
    penalty = folded_penalty(blocks)
    expected = torch.linalg.matrix_norm(dense(blocks), 2) ** 2
    plain = torch.linalg.matrix_norm(blocks.plain.weight, 2) ** 2
    torch.testing.assert_close(penalty(), 0.5 * (expected + plain), rtol=1e-6, atol=0)
    sigmas = penalty.sigmas()
    assert sigmas["hidden"] == pytest.approx(expected.sqrt().item(), rel=1e-4)
    assert sigmas["plain"] == pytest.approx(plain.sqrt().item(), rel=1e-4)


def test_its_gradient_is_that_of_the_dense_matrix_with_the_factors_that_it_says(blocks):
    folded_penalty(blocks)().backward()
    found = {n: p.grad for n, p in blocks.named_parameters() if p.grad is not None}
    blocks.zero_grad()
    norms = [torch.linalg.matrix_norm(m, 2) for m in (dense(blocks), blocks.plain.weight)]
    (0.5 * sum(norm**2 for norm in norms)).backward()
    expected = {n: p.grad for n, p in blocks.named_parameters() if p.grad is not None}
    gain = blocks.after.weight.detach()
    squared = gain**2 / (blocks.after.running_var + blocks.after.eps)
    assert squared.min() < 1 < squared.max()
    assert gain.min() < 1 < gain.max()
    expected["hidden.weight"] /= squared.clamp(min=1)[:, None]
    expected["after.weight"] *= gain.square().clamp(max=1)
    assert found.keys() == expected.keys()
    assert {"hidden.weight", "before.weight", "after.weight"} <= found.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("pinned", [False, True])
def test_the_exact_gradient_and_that_beside_a_pinned_norm_is_that_of_the_dense_matrix(
    blocks, pinned
):
    if pinned:  # nothing runs after the map
        pin_norms(blocks)
    penalty = folded_penalty(blocks, fold_gradient="bounded" if pinned else "exact")
    names = ("before.weight", "before.std", "after.weight", "after.running_var")
    assert penalty.folded["hidden"] == names
    penalty().backward()
    found = {n: p.grad for n, p in blocks.named_parameters() if p.grad is not None}
    blocks.zero_grad()
    norms = [torch.linalg.matrix_norm(m, 2) for m in (dense(blocks), blocks.plain.weight)]
    (0.5 * sum(norm**2 for norm in norms)).backward()
    assert {"hidden.weight", "before.weight", "after.weight"} <= found.keys()
    for name, gradient in found.items():
        expected = blocks.get_parameter(name).grad
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-8)
    with pytest.raises(ValueError, match="fold_gradient"):
        folded_penalty(blocks, fold_gradient="other")


def test_a_step_moves_the_folded_map_no_further_than_one_without_a_norm():
    """Whatever the running variance: without the factors, by 1 / variance as much."""
    moved = []
    for variance in (1.0, 1e-4):
        torch.manual_seed(0)
        layer, norm = nn.Linear(6, 5, bias=False), nn.BatchNorm1d(5)
        norm.running_var.fill_(variance)
        layer.weight.data *= variance**0.5  # so that the folded map is the same
        net = nn.Sequential(nn.Flatten(), layer, norm, nn.Linear(5, 2))
        penalty = SpectralPenalty(net, strength=1.0, head="3", input_size=(1, 2, 3), fold_norm=True)
        before = penalty.sigmas()["1"]
        penalty().backward()
        with torch.no_grad():
            layer.weight -= 0.01 * layer.weight.grad
        moved.append(before - penalty.sigmas()["1"])
    assert moved[0] > 0
    assert moved[1] == pytest.approx(moved[0], rel=0.05)


def test_rescaling_what_the_norms_undo_leaves_the_folded_penalty_and_moves_the_plain_one(blocks):
    folded, plain = folded_penalty(blocks), SpectralPenalty(blocks, **{"head": "head"} | SIZE)
    for _ in range(5):  # until the vectors have converged
        before = folded.value().item(), plain.value().item()
    with torch.no_grad():
        blocks.hidden.weight *= 3
        blocks.before.weight /= 3
    assert folded.value().item() == pytest.approx(before[0], rel=1e-6)
    assert plain.value().item() > 2 * before[1]


VIT = {"img_size": 32, "depth": 1, "embed_dim": 24, "num_heads": 3}
CONVNEXT = {"depths": [1] * 4, "dims": [8] * 4}


@pytest.mark.parametrize(
    ("name", "args", "layer", "norm"),
    [
        ("vit_tiny_patch16_224", VIT, "blocks.0.attn.qkv.q", "blocks.0.norm1"),
        ("vit_tiny_patch16_224", VIT, "blocks.0.mlp.fc1", "blocks.0.norm2"),
        ("convnext_atto", CONVNEXT, "stages.0.blocks.0.conv_dw", "stages.0.blocks.0.norm"),
        ("convnext_atto", CONVNEXT, "stages.1.downsample.1", "stages.1.downsample.0"),
        (
            "convnext_atto",
            {**CONVNEXT, "conv_mlp": True},
            "stages.0.blocks.0.conv_dw",
            "stages.0.blocks.0.norm",
        ),
    ],
)
def test_layer_norms_of_real_networks_are_folded_into_the_maps_beside_them(name, args, layer, norm):
    torch.manual_seed(0)
    network = timm.create_model(name, num_classes=2, **args)
    options = {"input_size": (3, 32, 32)}
    penalty = SpectralPenalty(network, fold_norm=True, strength=1.0, **options)
    names = {operator.name for operator in penalty.layers}
    assert layer in names
    with torch.no_grad():
        network.get_submodule(norm).weight.fill_(2.0)
    plain = SpectralPenalty(network, **options).sigmas()
    assert penalty.sigmas()[layer] == pytest.approx(2 * plain[layer], rel=1e-2)


def test_batch_norms_of_a_resnet_are_folded_and_resume_is_exact():
    torch.manual_seed(0)
    network = timm.create_model("resnet20_cifar")
    penalty = SpectralPenalty(network, fold_norm=True)
    folded = penalty.top_singular_values(fold_norm=True)
    assert len(folded) == len(penalty.layers) == 21
    penalty()
    again = SpectralPenalty(network, fold_norm=True)
    again.load_state_dict(penalty.state_dict())
    assert torch.equal(penalty(), again())
