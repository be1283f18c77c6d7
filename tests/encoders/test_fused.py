"""Batch norms fused into the maps before them: the same function, in the same architecture."""

import copy

import pytest
import timm
import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torch.nn.utils.parametrizations import weight_norm
from transformers import AutoModelForImageClassification

from hf_specreg import FeatureSpace, SpecRegModel
from hf_specreg.encoders.fused import fuse_norms
from hf_specreg.encoders.pinned import batch_norms, is_pinned
from tests.tiny import images, tiny


def trained(network):
    """Give a network the statistics, gains and biases that a training might have."""
    torch.manual_seed(1)
    for norm in batch_norms(network).values():
        norm.running_mean.normal_(0, 0.3)
        norm.running_var.uniform_(0.3, 3)
        if norm.affine:
            nn.init.uniform_(norm.weight, -1.5, 1.5)
            nn.init.normal_(norm.bias, 0, 0.3)
    return network.eval()


def space_of(network, *size):
    return FeatureSpace.of(network, head=(), input_size=size)


@pytest.mark.parametrize(
    ("name", "left"),
    [
        ("resnet18", 0),
        ("mobilenetv3_small_050", 0),
        ("efficientnet_lite0", 0),
        ("resnetv2_18", 9),  # pre-activation: they stand before the convolutions
    ],
)
@pytest.mark.filterwarnings("ignore:.*are pinned, not fused")
def test_real_networks_have_the_same_logits_in_both_modes(name, left):
    network = trained(timm.create_model(name, num_classes=5))
    pictures = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = network(pictures)
        found = fuse_norms(space_of(network, 3, 64, 64))
        for mode in (True, False):
            difference = network.train(mode)(pictures) - expected
            assert difference.abs().max() < 1e-4 * expected.abs().max()
    norms = batch_norms(network)
    assert len(norms) - len(found) == left
    for name in found:
        assert (norms[name].weight == 1).all()
        assert (norms[name].running_var + norms[name].eps - 1).abs().max() < 1e-6


class Cases(nn.Module):
    """What can be fused, and what cannot, on images of 4 channels."""

    def __init__(self):
        super().__init__()
        for name in "biased activated forked doubled shared computed plain".split():
            setattr(self, name, nn.Conv2d(4, 4, 3, padding=1))
        self.depthwise = nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False)
        weight_norm(self.computed)
        self.transposed = nn.ConvTranspose2d(4, 4, 3, padding=1)
        self.fc, self.out = nn.Linear(4, 4), nn.Linear(4, 4, bias=False)
        names = "biased depthwise activated before forked forked2 twice doubled computed transposed"
        self.norms = nn.ModuleDict({name: nn.BatchNorm2d(4) for name in names.split()})
        self.norms["plain"] = nn.BatchNorm2d(4, affine=False)
        self.norms.update({"fc": nn.BatchNorm1d(4), "out": nn.BatchNorm1d(4)})

    def forward(self, x):
        n = self.norms
        x = n["depthwise"](self.depthwise(n["biased"](self.biased(x)).relu())).relu()
        x = n["activated"](self.activated(x).relu())
        x = self.forked(n["before"](x.relu()).relu())
        x = n["forked"](x) + n["forked2"](x)
        x = n["twice"](self.doubled(n["twice"](self.shared(x)).relu()))
        x = n["doubled"](self.shared(x))
        x = n["plain"](self.plain(n["computed"](self.computed(x))))
        x = n["transposed"](self.transposed(x))
        x = n["fc"](self.fc(x.mean((2, 3)))).relu()
        return n["out"](self.out(x))


def test_a_norm_is_fused_where_one_map_alone_stands_before_it_and_the_others_are_named():
    network = trained(Cases())
    pictures = torch.randn(5, 4, 6, 6)
    expected = network(pictures)
    with pytest.warns(UserWarning, match=r"9 of 13 batch norms are pinned, not fused.*activated"):
        found = fuse_norms(space_of(network, 4, 6, 6))
    assert set(found) == {f"norms.{name}" for name in ("biased", "depthwise", "fc", "out")}
    torch.testing.assert_close(network.train()(pictures), expected, rtol=1e-4, atol=1e-5)
    assert all(is_pinned(norm) for norm in batch_norms(network).values())
    frozen = {name for name, p in network.named_parameters() if not p.requires_grad}
    assert frozen == {f"{name}.weight" for name in found}


def test_the_fused_weight_is_torchs_and_to_fuse_again_changes_nothing():
    network = trained(nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)))
    conv, norm = copy.deepcopy(network)
    of_norm = norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
    weight, bias = fuse_conv_bn_weights(conv.weight, conv.bias, *of_norm)
    for _ in range(2):
        assert fuse_norms(space_of(network, 1, 8, 8)) == ("1",)
        torch.testing.assert_close(network[0].weight, weight)
        torch.testing.assert_close(network[0].bias + network[1].bias, bias)


def test_the_saved_folder_is_of_the_same_architecture(tmp_path):
    model = tiny("resnet20_cifar")
    trained(model)
    expected = model(images())
    names = set(model.state_dict())
    fuse_norms(model)
    assert set(model.state_dict()) == names
    model.save_pretrained(tmp_path)
    normal = model.normalize(images())
    for stock in (
        timm.create_model(f"local-dir:{tmp_path}", pretrained=True),
        AutoModelForImageClassification.from_pretrained(tmp_path),
    ):
        output = stock.eval()(normal)
        torch.testing.assert_close(getattr(output, "logits", output), expected)
    again = SpecRegModel.from_pretrained(tmp_path)
    for one, other in zip(model.parameters(), again.parameters(), strict=True):
        assert one.requires_grad == other.requires_grad
    assert not again.network.bn1.weight.requires_grad


def test_a_network_that_would_not_be_the_same_is_left_as_it_was():
    class Peeking(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x):
            return self.norm(self.conv(x)) * (1 + self.conv.weight.detach().abs().sum())

    network = trained(Peeking())
    before = copy.deepcopy(network.state_dict())
    with pytest.raises(ValueError, match=r"Peeking gives other outputs, by .* left as it was"):
        fuse_norms(space_of(network, 1, 8, 8))
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert not is_pinned(network.norm)
    assert network.norm.weight.requires_grad


def test_nothing_is_changed_where_a_norm_cannot_be_pinned():
    convolutions = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 2, 3)
    norms = nn.BatchNorm2d(4), nn.BatchNorm2d(2, track_running_stats=False)
    network = nn.Sequential(convolutions[0], norms[0], convolutions[1], norms[1])
    nn.init.constant_(norms[0].running_var, 4)
    before = copy.deepcopy(network.state_dict())
    with pytest.raises(ValueError, match="batch norm '3' has no running statistics"):
        fuse_norms(space_of(network, 1, 8, 8))
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert not is_pinned(norms[0])


def test_nothing_to_fuse_is_an_error():
    network = nn.Sequential(nn.BatchNorm2d(1), nn.ReLU(), nn.Conv2d(1, 2, 3))
    with pytest.raises(ValueError, match=r"no batch norm of Sequential can be fused.*Pin them"):
        fuse_norms(space_of(network, 1, 8, 8))
