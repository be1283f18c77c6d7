"""That singular vectors are renewed as often as the weights ask for."""

import copy
import warnings

import pytest
import torch
from torch import nn

from hf_specreg.spectral import pace
from hf_specreg.spectral.penalty import SpectralPenalty


def network():
    """Two layers whose singular values are almost alike, so that a few steps turn their order."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 48))
    for layer in (layers[0], layers[2]):
        u, _, v = torch.linalg.svd(torch.randn(48, 48))
        layer.weight.data = u @ torch.diag(torch.linspace(1.0, 0.9, 48)) @ v
    return layers


def make(model, **kwargs):
    return SpectralPenalty(model, strength=1.0, head=(), input_size=(48,), **kwargs)


def descend(penalty, model, *, part, steps):
    """Descend the penalty alone, each step by a part of the sigma that is followed; return the
    followed sums over the true ones."""
    shares = []
    for _ in range(steps):
        sigmas = [torch.linalg.matrix_norm(model[i].weight.detach(), 2) for i in (0, 2)]
        model.zero_grad()
        value = penalty()
        value.backward()
        shares.append(value.item() / sum(s.item() ** 2 for s in sigmas))
        with torch.no_grad():
            for i in (0, 2):
                model[i].weight -= part / 2 * model[i].weight.grad
    return shares


def test_a_strong_penalty_is_followed_by_more_frequent_renewals(monkeypatch):
    model = network()
    penalty = make(model)
    adapted = descend(penalty, model, part=0.2, steps=120)
    assert penalty._sum.pace.renew_every < 8
    assert sum(adapted[40:]) / 80 > 0.9
    monkeypatch.setattr(pace.Pace, "renew_every", 8)
    model = network()
    fixed = descend(make(model), model, part=0.2, steps=120)
    assert sum(fixed[40:]) / 80 < 0.8


def test_a_penalty_that_is_followed_keeps_the_pace_that_was_asked_for():
    model = network()
    penalty = make(model)
    shares = descend(penalty, model, part=0.001, steps=60)
    assert min(shares) > 0.98
    assert (penalty._sum.pace.renew_every, penalty._sum.pace.lanczos_steps) == (8, 8)


def test_renewals_become_rare_again_when_the_weights_slow_down():
    model = network()
    penalty = make(model)
    descend(penalty, model, part=0.2, steps=60)
    assert penalty._sum.pace.renew_every < 8
    descend(penalty, model, part=0.0, steps=60)
    assert penalty._sum.pace.renew_every == 8


CPU = {"device": torch.device("cpu"), "together": False}
GPU = {"device": torch.device("meta"), "together": False}  # as of any but the CPU


def read(one, share, *, rounds, **where):
    """The pace after each round in which so much had been followed."""
    found = []
    for _ in range(rounds):
        one.note(torch.tensor(share), torch.tensor(1.0))
        for _ in range(one.slowest // one._every):
            one.adapt(**where)
        found.append((one.renew_every, one.lanczos_steps))
    return found


@pytest.mark.parametrize(
    ("asked", "seen"),
    [
        ((8, 8), [(2, 4), (4, 4), (8, 8), (8, 8)]),
        ((3, 6), [(3, 6), (3, 6)]),
        ((4, 2), [(2, 2), (4, 2)]),
    ],
)
def test_it_is_every_use_at_first_then_halved_down_to_what_was_asked_for(asked, seen):
    one = pace.Pace(*asked, every=1)
    assert (one.renew_every, one.lanczos_steps) == (1, min(4, asked[1]))
    one.adapt(**CPU)  # the first use
    assert read(one, 1.0, rounds=len(seen), **CPU) == seen
    assert read(one, 0.5, rounds=4, **CPU)[-1][0] == 1


@pytest.mark.parametrize("every", range(1, 12))
def test_it_is_every_use_at_first_at_any_cadence(every):
    assert pace.Pace(8, 8, every=every).renew_every <= every


def test_it_is_not_more_often_than_uses_are():
    one = pace.Pace(8, 8, every=4)
    assert one.renew_every == 4
    one.adapt(**CPU)
    assert read(one, 1.0, rounds=1, **CPU) == [(8, 8)]
    assert read(one, 0.5, rounds=9, **CPU)[-1] == (4, 4)


def test_a_raised_strength_is_followed_at_every_use_again():
    model = network()
    penalty = make(model)
    descend(penalty, model, part=0.001, steps=60)
    assert penalty._sum.pace.renew_every == 8
    penalty.strength = 0.5
    assert penalty._sum.pace.renew_every == 8
    penalty.strength = 200.0
    assert min(descend(penalty, model, part=0.001 * 200, steps=4)) > 0.9
    assert penalty._sum.pace.renew_every == 1


@pytest.mark.parametrize("found", [0.0, torch.nan, torch.inf])
def test_weights_of_zeros_or_not_finite_leave_it_as_it_is(found):
    one = pace.Pace(2, 8, every=1)
    one.adapt(**CPU)
    read(one, 1.0, rounds=1, **CPU)
    one.note(torch.tensor(found), torch.tensor(found))
    for _ in range(2):
        one.adapt(**CPU)
    assert one.renew_every == 2
    assert read(one, 0.1, rounds=1, **CPU) == [(1, 4)]


@pytest.mark.parametrize(
    ("where", "expected"),
    [(CPU, [4, 8, 12, 16, 20, 24, 28, 32]), (GPU, [4, 12, 28, 60, 92, 124])],
)
def test_it_looks_at_every_round_but_on_a_gpu_more_and_more_rarely(where, expected, monkeypatch):
    monkeypatch.setattr(pace.Pace, "_read", lambda *_: [0.9, 1.0])
    one, looks = pace.Pace(4, 4, every=1), []
    for step in range(expected[-1] + 1):
        one.note(torch.tensor(0.9), torch.tensor(1.0))
        one.adapt(**where)
        if one._sums is None:  # read, to begin anew
            looks.append(step)
    assert looks == expected


def test_layers_that_are_frozen_are_neither_renewed_nor_counted():
    model = network()
    model[0].weight.requires_grad_(False)
    penalty = make(model)
    penalty()
    before = {name: v.clone() for name, v in penalty._sum.triplets.vectors.items()}
    model.zero_grad()
    penalty().backward()
    after = penalty._sum.triplets.vectors
    assert all(torch.equal(before[n], after[n]) == n.startswith("0") for n in before)
    top = torch.linalg.matrix_norm(model[2].weight.detach(), 2) ** 2
    assert penalty.state_dict()["pace"]["sums"][1] == pytest.approx(top.item(), rel=0.01)


def test_a_penalty_on_frozen_weights_alone_says_so_once():
    model = network().requires_grad_(False)
    penalty = make(model)
    with pytest.warns(UserWarning, match="no weight that the spectral penalty is of requires a g"):
        penalty()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        penalty()
    model[2].weight.requires_grad_(True)
    penalty().backward()
    assert model[2].weight.grad.any()


def test_weights_that_were_replaced_say_nothing_of_the_pace():
    model = network()
    penalty = make(model, renew_every=1)
    penalty()
    model.load_state_dict({name: torch.randn_like(w) for name, w in model.state_dict().items()})
    penalty()
    assert penalty.state_dict()["pace"]["sums"] == [0, 0]


def test_a_state_from_before_the_first_use_asks_no_other_process(monkeypatch):
    penalty = make(network())
    monkeypatch.setattr(penalty._sum, "shared", True)  # of processes that are not there
    assert penalty.state_dict()["pace"]["sums"] == [0, 0]


def test_a_resumed_penalty_goes_on_bit_for_bit_at_its_pace():
    model = network()
    penalty = make(model)
    descend(penalty, model, part=0.2, steps=30)
    state, weights = copy.deepcopy(penalty.state_dict()), copy.deepcopy(model)
    expected = descend(penalty, model, part=0.2, steps=30)
    again = make(weights)
    again.load_state_dict(state)
    assert again._sum.pace.renew_every < 8
    assert descend(again, weights, part=0.2, steps=30) == expected
