import pytest
import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from hf_specreg import SpectralPenalty
from hf_specreg.spectral.folding import following_norms


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


def test_an_activation_in_place_stands_between():
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.BatchNorm2d(4)
    assert following_norms(nn.Sequential(*layers), (3, 8, 8)) == {}
    assert list(following_norms(nn.Sequential(*layers[::2]), (3, 8, 8))) == ["0"]


def test_looking_for_norms_leaves_the_model_as_it_is(net):
    state = {k: v.clone() for k, v in net.state_dict().items()}
    assert following_norms(net, (3, 8, 8)) == {"first": net.norm}
    assert net.training
    assert net.norm.training
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
