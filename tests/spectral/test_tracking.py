"""Which layers are renewed together and when, and that each is followed as if it were alone."""

import copy
import itertools
import math

import pytest
import timm
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

import hf_specreg.encoders.small  # noqa: F401  registers the CIFAR networks
from hf_specreg.spectral import followed, pace, singular, tracking
from hf_specreg.spectral.penalty import SpectralPenalty
from hf_specreg.spectral.tracking import Triplets, renewed_together, stacks

NETWORKS = {
    "vit_tiny_patch16_224": {"img_size": 32, "embed_dim": 48, "num_heads": 3, "depth": 5},
    "convnext_atto": {"depths": (2, 2, 2, 2), "dims": (8, 16, 24, 32)},
    "resnet20_cifar": {},
}


def network(name):
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=10, **NETWORKS[name])


def make(model, **kwargs):
    return SpectralPenalty(model, strength=1.0, input_size=(3, 32, 32), **kwargs)


def train(name, uses=6):
    """The penalty's values while its own gradient, and noise, move the weights."""
    model = network(name)
    penalty = make(model, renew_every=1, lanczos_steps=4)
    noise, values = torch.Generator().manual_seed(1), []
    for _ in range(uses):
        model.zero_grad()
        value = penalty()
        value.backward()
        values.append(value.item())
        with torch.no_grad():
            for weight in model.parameters():
                if weight.grad is not None:
                    step = torch.randn(weight.shape, generator=noise) * weight.std()
                    weight.sub_(0.01 * weight.grad + 0.05 * step)
    return values, penalty


@pytest.mark.parametrize("name", NETWORKS)
def test_layers_that_are_renewed_together_are_followed_as_each_alone(name, monkeypatch):
    together, penalty = train(name)
    assert max(map(len, penalty._sum.triplets.groups)) > 1
    monkeypatch.setattr(tracking, "CACHED", 0)
    alone, penalty = train(name)
    assert max(map(len, penalty._sum.triplets.groups)) == 1
    assert together == pytest.approx(alone, rel=1e-5)


@pytest.mark.parametrize("name", NETWORKS)
def test_only_alike_layers_that_a_cache_holds_are_renewed_together(name, monkeypatch):
    found = stacks(make(network(name)).layers)
    groups = renewed_together(found, steps=8)
    assert sorted(i for group in groups for i in group) == list(range(len(found)))
    assert all(len({found[i].kind for i in group}) == 1 for group in groups)
    sizes = [stack.shape.numel() for stack in found]
    monkeypatch.setattr(tracking, "CACHED", 3 * max(sizes))
    groups = renewed_together(found, steps=0)
    assert max(sum(sizes[i] for i in group) for group in groups) <= 3 * max(sizes)
    assert max(map(len, groups)) > 1


def test_layers_of_equal_weights_but_another_geometry_are_renewed_apart():
    layers = [nn.Conv2d(8, 8, 3, s, p, d) for s, p, d in [(1, 1, 1), (1, 1, 1), (1, 2, 2)]]
    layers += [nn.Conv2d(8, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 1, 1)]  # the last sees a smaller map
    layers += [nn.Conv2d(8, 8, 3, 1, 1, padding_mode="circular")]
    penalty = SpectralPenalty(nn.Sequential(*layers), head=(), input_size=(8, 12, 12))
    assert penalty._sum.triplets.groups == [[0, 1], [2], [3], [4], [5]]


@pytest.mark.parametrize("name", NETWORKS)
def test_turns_are_as_even_as_groups_can_be(name):
    triplets = make(network(name))._sum.triplets
    costs = [sum(triplets.stacks[i].cost for i in group) for group in triplets.groups]
    loads = [0] * triplets.pace.slowest
    for group, cost in zip(triplets.groups, costs, strict=True):
        assert len({triplets.turns[i] for i in group}) == 1
        loads[triplets.turns[group[0]]] += cost
    assert max(loads) <= sum(loads) / len(loads) + max(costs)
    assert loads.count(0) == max(0, len(loads) - len(costs))


def test_a_weight_is_computed_once_a_use():
    """It can cost as much as a product, and torch's spectral_norm moves whenever it is asked."""

    class Counted(nn.Module):
        calls = 0

        def forward(self, weight):
            Counted.calls += 1
            return 2 * weight

    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    for layer in model:
        parametrize.register_parametrization(layer, "weight", Counted())
    penalty = SpectralPenalty(model, head=(), input_size=(6,), renew_every=2)
    for _ in range(4):  # the start, renewals, and uses between them
        Counted.calls = 0
        penalty.value()
        assert Counted.calls == len(model)


class Watched(TorchDispatchMode):
    """The names of all operations within."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("fold_norm", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_no_warm_use_waits_for_a_number(name, fold_norm, monkeypatch):
    """On a GPU each such read would wait for all work before it; there small matrices are squared
    rather than given to the svd, which reads too."""
    monkeypatch.setattr(singular, "FEW_BLOCKS", 0)
    model = network(name)
    penalty = make(model, renew_every=3, fold_norm=fold_norm)
    value = penalty()  # the start may read
    with Watched() as read:
        value.item()
    assert read.names == ["_local_scalar_dense"]
    for _ in range(3):  # all layers' renewals, and their directions
        with Watched() as warm:
            penalty().backward()
        assert "mul" in warm.names
        assert not {"_local_scalar_dense", "nonzero", "_linalg_svd", "equal"} & set(warm.names)


def large_map():
    torch.manual_seed(0)
    return nn.Conv2d(8, 8, 3, padding=1, bias=False), (8, 64, 64)


def follow(layer, shape, uses):
    penalty = SpectralPenalty(
        nn.Sequential(layer), strength=1.0, head=(), input_size=shape, renew_every=1
    )
    sigmas = [penalty.value().item() ** 0.5 for _ in range(uses)]
    return penalty, sigmas


def most_allocated(work):
    """The most bytes that were allocated at once by what is called."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        work()
    events = profiled.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return max(itertools.accumulate(size for _, size in changes))


def test_the_first_use_of_a_large_map_takes_little_more_than_bases_of_bounded_size(monkeypatch):
    layer, shape = large_map()
    pair = 2 * 4 * torch.Size(shape).numel()  # bytes of u and v
    peaks = {}
    for bases in (2**24, 8 * pair // 4):
        monkeypatch.setattr(singular, "BASES", bases)
        peaks[bases] = most_allocated(lambda: follow(layer, shape, 2))
    assert peaks[2**24] > 24 * pair
    assert peaks[8 * pair // 4] < 8 * pair + 8 * pair


def test_bases_of_bounded_size_lead_to_the_same_sigma(monkeypatch):
    layer, shape = large_map()
    penalty, sigmas = follow(layer, shape, 8)
    monkeypatch.setattr(singular, "BASES", 1)  # the least steps
    bounded, others = follow(layer, shape, 8)
    assert others != sigmas
    (found,) = bounded.top_singular_values().values()
    assert found.converged
    assert found.sigma.item() == pytest.approx(penalty.sigmas()["0"], rel=1e-3)
    assert others[0] == pytest.approx(found.sigma.item(), rel=0.01)
    assert others[-1] == pytest.approx(found.sigma.item(), rel=0.003)


def test_bases_of_bounded_size_are_restarted_until_as_many_products_are_made(monkeypatch):
    taken, search = [], singular.bidiagonalize

    def watched(*args, steps, **kwargs):
        taken.append(steps)
        return search(*args, steps=steps, **kwargs)

    monkeypatch.setattr(singular, "BASES", 1)
    for module in (singular, tracking):
        monkeypatch.setattr(module, "bidiagonalize", watched)
    penalty, _ = follow(nn.Conv2d(4, 4, 3, padding=1), (4, 32, 32), 1)
    assert taken == [4] * 6
    penalty.value()
    assert taken[6:] == [4] * 2


@pytest.mark.parametrize("name", NETWORKS)
def test_the_memory_that_is_kept_is_the_weights_and_a_vector_on_each_side(name):
    penalty = make(network(name), renew_every=2)
    assert penalty.memory == 0
    penalty.value()
    weights = sum(stack.shape.numel() for stack in penalty._sum.stacks)
    shapes = [shape for stack in penalty._sum.stacks for shape in stack.vectors.values()]
    assert penalty.memory == 4 * (weights + sum(shape.numel() for shape in shapes))
    for _ in range(2):
        penalty.value()
    noise = max(math.prod(layer.input_shape) for layer in penalty.layers)
    assert penalty.memory == 4 * (weights + sum(shape.numel() for shape in shapes) + noise)


@pytest.mark.parametrize("most", [1, 60, 2**20])
def test_nodes_of_the_graph_hold_consecutive_layers_of_so_many_weights(most, monkeypatch):
    monkeypatch.setattr(followed, "ONE_NODE", most)
    monkeypatch.setattr(pace, "FEW_STEPS", 20)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 6), nn.Linear(6, 20), nn.Linear(20, 2))
    model[1].requires_grad_(False)
    penalty = SpectralPenalty(model, head=(), input_size=(4,), strength=1.0, lanczos_steps=20)
    expected = {1: [[0], [1], [2], [3]], 60: [[0, 1], [2], [3]], 2**20: [[0, 1, 2, 3]]}
    assert penalty._sum.nodes == expected[most]
    first = penalty.value()
    (first + penalty.value()).backward()  # twice in one graph
    for layer in model:
        sigma = torch.linalg.matrix_norm(layer.weight.detach(), ord=2)
        u, _, v = torch.linalg.svd(layer.weight.detach())
        gradient = 2 * 2 * sigma * torch.outer(u[:, 0], v[0])
        if layer is model[1]:
            assert layer.weight.grad is None
        else:
            torch.testing.assert_close(layer.weight.grad, gradient, rtol=1e-3, atol=1e-4)


def test_a_resumed_penalty_goes_on_bit_for_bit_where_layers_are_renewed_together():
    name = "vit_tiny_patch16_224"
    _, penalty = train(name)
    again = make(penalty._network, renew_every=1, lanczos_steps=4)
    again.load_state_dict(copy.deepcopy(penalty.state_dict()))
    for _ in range(3):
        assert again.value().item() == penalty.value().item()


@pytest.mark.parametrize("every", [1, 3, 5])
def test_every_layer_has_its_turn_once_in_a_round(every, monkeypatch):
    renewed, renew = [], Triplets.renew

    def watched(self, weights, **strayed):
        renewed.extend(weights)
        renew(self, weights, **strayed)

    monkeypatch.setattr(Triplets, "renew", watched)
    penalty = make(network("resnet20_cifar"), renew_every=5, every=every)
    monkeypatch.setattr(pace.Pace, "renew_every", penalty._sum.pace.slowest)
    penalty.value()
    assert not renewed  # they have only been started
    for _ in range(5):  # uses
        penalty.value()
    assert {renewed.count(i) for i in range(len(penalty._sum.stacks))} == {1}
