"""Batch norms that stay as they are, Fixup's start without normalisation, and what loads it."""

import copy
import json
import pickle
import warnings

import pytest
import timm
import torch
from torch import nn
from transformers import AutoModelForImageClassification, ResNetConfig

from hf_specreg import FeatureSpace, SpecRegModel
from hf_specreg.encoders.blueprint import FolderError
from hf_specreg.encoders.pinned import batch_norms, initialize_pinned, is_pinned, pin, pin_norms
from tests.tiny import SIZE, images, tiny


def small_resnet():
    config = ResNetConfig(
        num_channels=1, embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic"
    )
    return SpecRegModel.from_transformers(config, num_classes=3, input_size=SIZE)


def step(model):
    """One large step of gradient descent in training mode."""
    model.train()
    nn.functional.cross_entropy(model(images()), torch.arange(5) % 3).backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.sub_(parameter.grad)


def test_training_changes_gains_and_biases_but_no_statistics_and_both_modes_are_one_network():
    model = tiny("resnet20_cifar")
    model(images())  # statistics of its own
    pin_norms(model)
    before = copy.deepcopy(model.state_dict())
    step(model)
    after = model.state_dict()
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert {"network.bn1.weight", "network.bn1.bias", "network.conv1.weight"} <= changed
    assert not any("running" in name or "tracked" in name for name in changed)
    assert torch.equal(model(images()), model.eval()(images()))


def test_copies_and_pickles_stay_pinned_by_themselves():
    model = tiny("resnet20_cifar").network
    pin_norms(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        norm = other.train().bn1
        assert is_pinned(norm)
        assert not norm.training
        assert norm.train() is norm
        assert other.conv1.training


def test_what_cannot_be_pinned_is_named():
    with pytest.raises(ValueError, match="OneHiddenLayer has no batch norm to pin"):
        pin_norms(tiny().network)
    network = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2, track_running_stats=False))
    with pytest.raises(ValueError, match="batch norm '1' has no running statistics"):
        pin_norms(network)


@pytest.mark.parametrize("build", [lambda: tiny("resnet20_cifar"), small_resnet])
def test_stock_libraries_load_what_was_trained_pinned_with_the_same_logits(build, tmp_path):
    model = build()
    initialize_pinned(model)
    step(model)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = model.eval()(images())
        normal = model.normalize(images())
        stock = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
        torch.testing.assert_close(stock(normal).logits, expected)
        if model.is_timm:
            stock = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
            torch.testing.assert_close(stock(normal), expected)
    assert json.loads((tmp_path / "specreg.json").read_text())["norms"] == "pinned"
    again = SpecRegModel.from_pretrained(tmp_path).train()
    torch.testing.assert_close(again(images()), expected)


@pytest.mark.parametrize(
    ("build", "names"),
    [
        (lambda: tiny("resnet20_cifar"), ["bn1", "stages.0.0.bn2"]),
        (small_resnet, ["embedder.embedder.normalization"]),
    ],
)
@pytest.mark.parametrize("classes", [None, 0])
def test_those_that_were_pinned_come_back_pinned_and_no_others(build, names, classes, tmp_path):
    model = build()
    prefix = "" if model.is_timm else "resnet."
    pin(model.network.get_submodule(prefix + name) for name in names)
    model.save_pretrained(tmp_path)
    again = SpecRegModel.from_pretrained(tmp_path, num_classes=classes).train()
    found = {name for name, norm in batch_norms(again.network).items() if is_pinned(norm)}
    assert {name.removeprefix("resnet.") for name in found} == set(names)
    again.save_pretrained(tmp_path / "again")
    description = json.loads((tmp_path / "again" / "specreg.json").read_text())
    assert description == {"norms": "partly pinned", "pinned": names}
    description["pinned"] = ["another"]
    (tmp_path / "specreg.json").write_text(json.dumps(description))
    with pytest.raises(FolderError, match=r"pinned that are not there: \['another'\]"):
        SpecRegModel.from_pretrained(tmp_path)


def test_fixup_scales_the_branches_by_their_number_and_starts_them_at_zero():
    model = tiny("resnet20_cifar", channels=[64, 64, 128], layers=[2, 1, 1])
    initialize_pinned(model)
    network, count = model.network, 4
    for block in (network.stages[0][0], network.stages[2][0]):
        fan_in = block.conv1.weight[0].numel()
        expected = (2 / fan_in) ** 0.5 * count**-0.5  # L ** (-1 / (2 m - 2)), m = 2
        assert block.conv1.weight.std().item() == pytest.approx(expected, rel=0.05)
        assert not block.bn2.weight.any()
        assert (block.bn1.weight == 1).all()
    last = network.stages[2][0]
    for conv, norm in ((last.conv2, last.bn1), (last.downsample[0], last.downsample[1])):
        he = (2 / conv.weight[0].numel()) ** 0.5
        assert conv.weight.std().item() == pytest.approx(he, rel=0.05)
        assert (norm.weight == 1).all()
    for norm in batch_norms(network).values():
        assert not norm.running_mean.any()
        assert (norm.running_var == 1).all()


@pytest.mark.parametrize(
    ("name", "zero"),
    [
        ("mobilenetv2_035", "blocks.1.1.bn3.weight"),
        ("resnetv2_18", "stages.0.blocks.0.conv2.weight"),  # so is its head; ends in a convolution
        ("regnetx_002", "s1.b1.conv3.bn.weight"),
        ("skresnet18", "layer1.0.conv2.bn.weight"),
    ],
)
def test_branches_are_found_whatever_the_blocks_are_called(name, zero):
    network = timm.create_model(name, num_classes=2)
    space = FeatureSpace.of(network, input_size=(3, 32, 32))
    head = [p.clone() for n, p in network.named_parameters() if space.of_head(n)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        initialize_pinned(space)
    parameters = dict(network.named_parameters())
    assert all(map(torch.equal, head, (p for n, p in parameters.items() if space.of_head(n))))
    assert zero in parameters
    assert not parameters[zero].any()
    zeros = [n for n, m in batch_norms(network).items() if not m.weight.any()]
    ends = zeros or [n for n, p in parameters.items() if p.ndim == 4 and not p.any()]
    spread = FeatureSpace.of(network.train(), input_size=(3, 32, 32)).features
    assert len(ends) > 1
    assert 0.01 < spread(torch.randn(4, 3, 32, 32)).std() < 100


def test_gates_count_for_no_layer_of_their_branch():
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two, self.gate = (nn.Conv2d(4, 4, 1, bias=False) for _ in range(3))
            self.norm, self.last = nn.BatchNorm2d(4), nn.BatchNorm2d(4)

        def forward(self, x):
            y = self.last(self.two(self.norm(self.one(x)).relu()))
            return x + y * self.gate(y.mean((2, 3), keepdim=True)).sigmoid()

    network = Gated()
    torch.manual_seed(0)
    initialize_pinned(FeatureSpace.of(network, head=(), input_size=(4, 5, 5)))
    assert not network.last.weight.any()
    assert (network.norm.weight == 1).all()
    drawn = network.one.weight.clone(), network.gate.weight.clone()
    torch.manual_seed(0)
    for conv in (network.one, network.two, network.gate):  # one branch: scaled by 1
        nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
    torch.testing.assert_close(drawn, (network.one.weight.data, network.gate.weight.data))


def test_branches_that_do_not_start_at_zero_are_told_of():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.conv = nn.Conv2d(1, 4, 1), nn.Conv2d(4, 4, 1, bias=False)
            self.norm = nn.BatchNorm2d(4)

        def forward(self, x):
            x = self.stem(x)
            return x + self.norm(self.conv(x)).relu()

    space = FeatureSpace.of(Residual(), head=(), input_size=SIZE)
    said = r"1 of 1 residual branches end in neither .* \(ReluBackward0\) and do not start at 0"
    with pytest.warns(UserWarning, match=said) as caught:
        initialize_pinned(space)
    assert [warning.filename for warning in caught] == [__file__]
    assert (space.network.norm.weight == 1).all()
