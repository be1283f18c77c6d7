"""What is done to a model after its penalty was made: wrapped, replaced, loaded, copied, left."""

import copy
import gc
import pickle

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils.parametrizations import spectral_norm

from hf_specreg import SpectralPenalty
from hf_specreg.spectral.pace import Pace
from tests.spectral.test_norms import Net, convolution
from tests.spectral.test_penalty import SmallNet, exact_sum, make

WRAPPERS = {
    "DataParallel": nn.DataParallel,
    "checkpoint": checkpoint_wrapper,
    "compile": torch.compile,
    "both": lambda block: torch.compile(checkpoint_wrapper(block)),
}


class Blocks(nn.Module):
    """A block with a norm, which looks at the scale of its first map, and a head."""

    def __init__(self):
        super().__init__()
        parts = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3)
        self.block, self.head = nn.Sequential(*parts), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.block(x).mean((2, 3)))


@pytest.mark.parametrize("is_used", [False, True])
@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_a_block_that_is_wrapped_later_has_the_terms_of_its_weights(wrap, is_used):
    torch.manual_seed(0)
    net = Blocks()
    expected = make(net, strength=1)()
    penalty = make(net, strength=1)
    if is_used:
        penalty()
    net.block = wrap(net.block)
    value = penalty()
    torch.testing.assert_close(value, expected, rtol=1e-4, atol=0)
    value.backward()
    assert [p.grad is not None for p in net.parameters() if p.ndim == 4] == [True, True]


def test_a_layer_that_was_replaced_is_noticed_during_the_burn_in():
    net = SmallNet()
    penalty = make(net, burn_in=100)
    penalty()
    net.proj = nn.Linear(8, 16)
    with pytest.raises(ValueError, match="layer 'proj' was replaced"):
        penalty()


@pytest.mark.parametrize("part", ["", "proj"])
@pytest.mark.parametrize("assign", [False, True])
def test_weights_that_are_loaded_are_penalised_in_full_at_once(part, assign):
    torch.manual_seed(0)
    net, other = SmallNet(), SmallNet()
    nn.init.orthogonal_(other.proj.weight)
    with torch.no_grad():  # a direction that stands out
        other.proj.weight.add_(torch.outer(torch.randn(16), torch.randn(8)))
    penalty = make(net, strength=1)
    for _ in range(3):
        penalty()
    net.get_submodule(part).load_state_dict(other.get_submodule(part).state_dict(), assign=assign)
    assert penalty().item() == pytest.approx(exact_sum(net).item(), rel=1e-2)


def _replaced(layer, weight):
    layer.weight = nn.Parameter(weight)


def _deleted_and_set(layer, weight):
    del layer.weight
    layer.weight = nn.Parameter(weight)


def _averaged_in_place(layer, weight):
    layer.weight.data.copy_(weight)


@pytest.mark.parametrize("change", [_replaced, _deleted_and_set, _averaged_in_place])
def test_weights_that_are_others_are_penalised_in_full_at_once_where_it_is_seen_or_said(change):
    torch.manual_seed(0)
    net = SmallNet()
    weight = torch.outer(torch.randn(16), torch.randn(8))
    penalty = make(net, strength=1)
    for _ in range(30):  # until few are renewed at once
        penalty()
    change(net.proj, weight)
    if change is _averaged_in_place:
        penalty.load_state_dict(penalty.state_dict())  # whose vectors might seem to fit
        penalty.renew()
    assert penalty().item() == pytest.approx(exact_sum(net).item(), rel=1e-2)
    vectors = penalty.state_dict()["vectors"]
    penalty()  # in which only some layers have their turn
    assert any(v is penalty.state_dict()["vectors"][name] for name, v in vectors.items())


def test_weights_that_were_not_finite_and_are_put_back_are_penalised_as_before():
    """At whichever layer's turn it was."""
    torch.manual_seed(0)
    net = SmallNet()
    penalty = make(net, strength=1)
    before, good = penalty().item(), copy.deepcopy(net.state_dict())
    for _ in range(8):
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.fill_(torch.nan)
        assert penalty().isnan()
        with torch.no_grad():
            for name, parameter in net.named_parameters():
                parameter.copy_(good[name])
        assert penalty().item() == pytest.approx(before, rel=1e-3)


def test_a_state_that_is_loaded_after_the_weights_goes_on_to_the_same_bits():
    net = SmallNet()
    penalty = make(net)
    for _ in range(3):
        penalty()
    weights, state = net.state_dict(), penalty.state_dict()
    expected = [penalty().item() for _ in range(4)]
    net.load_state_dict(weights)
    penalty.load_state_dict(state)
    assert [penalty().item() for _ in range(4)] == expected


def test_weights_that_are_loaded_after_a_state_are_penalised_in_full_if_they_are_others():
    torch.manual_seed(0)
    net, other, again = SmallNet(), SmallNet(), SmallNet()
    penalty, resumed = make(net, strength=1), make(again, strength=1)
    for _ in range(3):
        penalty()
    resumed.load_state_dict(penalty.state_dict())
    again.load_state_dict(other.state_dict())
    assert resumed().item() == pytest.approx(exact_sum(again).item(), rel=1e-2)


def test_a_state_that_is_loaded_before_its_weights_goes_on_to_the_same_bits():
    torch.manual_seed(0)
    net, again = SmallNet(), SmallNet()
    penalty, resumed = make(net, strength=0.1), make(again, strength=0.1)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(6):
        optimizer.zero_grad()
        penalty().backward()
        optimizer.step()
    nn.init.zeros_(net.proj.weight)  # of which no vector can be said to be another's
    resumed.load_state_dict(penalty.state_dict())
    again.load_state_dict(net.state_dict())
    expected = [penalty().item() for _ in range(4)]
    assert [resumed().item() for _ in range(4)] == expected


def test_a_block_is_copied_and_pickled_without_the_network_around_it(monkeypatch):
    monkeypatch.setattr(Pace, "renew_every", 100)
    net = Blocks()
    net.rest = nn.Linear(500, 500)  # 1 MB
    size = len(pickle.dumps(net.block))
    penalty = make(net, strength=1)
    for _ in range(3):
        penalty()
    assert len(pickle.dumps(net.block)) < size + 2000
    memo = {}
    block = copy.deepcopy(net.block, memo)
    assert id(net.block) in memo
    assert id(net.rest) not in memo
    vectors = penalty.state_dict()["vectors"]
    block.load_state_dict(block.state_dict())
    penalty()  # which would renew all, had it been loaded into its own model
    assert all(vectors[name] is vector for name, vector in penalty.state_dict()["vectors"].items())


def test_a_penalty_that_is_deleted_leaves_no_hook_on_the_model():
    net = SmallNet()
    hooks = [m._forward_pre_hooks for m in net.modules()]
    hooks += [m._load_state_dict_post_hooks for m in net.modules()]
    penalty = make(net)
    penalty()
    assert any(hooks)
    del penalty
    gc.collect()
    assert not any(hooks)


def test_to_look_at_a_weight_takes_no_step_of_its_spectral_normalisation():
    net = nn.Sequential(spectral_norm(nn.Linear(8, 8)), nn.ReLU(), nn.Linear(8, 2)).train()
    before = [buffer.clone() for buffer in net.buffers()]
    penalty = SpectralPenalty(net, head="2", input_size=(8,))
    penalty().backward()
    penalty.sigmas()
    assert len(before) == 2
    assert all(map(torch.equal, net.buffers(), before))
    assert all(module.training for module in net.modules())


def test_the_warning_of_free_scales_waits_for_the_training_mode_that_frees_them():
    parts = {"conv": convolution(), "two": convolution(4), "norm": nn.BatchNorm2d(4)}
    net = Net(lambda m, x: m.norm(m.two(m.norm(m.conv(x)).sin())), **parts).eval()
    penalty = SpectralPenalty(net, head="head", input_size=(3, 8, 8))
    penalty()
    net.train()
    with pytest.warns(UserWarning, match="make 2 of the 2 maps"):
        penalty()


def test_a_model_that_was_compiled_before_the_first_use_is_seen_at_another_size_too():
    net = SmallNet()
    compiled = torch.compile(net, backend="eager")
    penalty = make(compiled)
    compiled(torch.rand(2, 3, 24, 24))
    with pytest.raises(ValueError, match="a convolution was trained on inputs of"):
        penalty()
