"""That singular vectors are renewed as often as the weights ask for."""

import copy

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
    monkeypatch.setattr(pace, "TOO_SMALL", 0)
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


@pytest.mark.parametrize(
    ("asked", "seen"),
    [
        ((8, 8), [(8, 8), (4, 4), (2, 4), (1, 4), (1, 4)]),
        ((3, 6), [(3, 6), (1, 4), (1, 4)]),
        ((4, 2), [(4, 2), (2, 2), (1, 2)]),
    ],
)
def test_it_is_halved_with_the_lanczos_steps_down_to_each_step(asked, seen):
    one, found = pace.Pace(*asked, every=1), []
    for step in range(0, asked[0] * len(seen), asked[0]):
        one.adapt(step, device=torch.device("cpu"), together=False)
        one.note(torch.tensor(0.5), torch.tensor(1.0))
        found.append((one.renew_every, one.lanczos_steps))
    assert found == seen


def test_it_is_not_halved_below_the_cadence_of_uses():
    one = pace.Pace(8, 8, every=4)
    for step in range(0, 80, 8):
        one.adapt(step, device=torch.device("cpu"), together=False)
        one.note(torch.tensor(0.5), torch.tensor(1.0))
    assert one.renew_every == 4


@pytest.mark.parametrize("found", [0.0, torch.nan, torch.inf])
def test_weights_of_zeros_or_not_finite_leave_it_as_it_is(found):
    one = pace.Pace(2, 8, every=1)
    one.note(torch.tensor(found), torch.tensor(found))
    one.adapt(2, device=torch.device("cpu"), together=False)
    assert one.renew_every == 2
    one.note(torch.tensor(0.1), torch.tensor(1.0))
    one.adapt(6, device=torch.device("cpu"), together=False)
    assert one.renew_every == 1


def test_it_looks_after_one_round_then_after_two_four_and_eight():
    one, looks = pace.Pace(4, 4, every=1), []
    for step in range(130):
        one.note(torch.tensor(0.9), torch.tensor(1.0))
        one.adapt(step, device=torch.device("cpu"), together=False)
        if one._sums is None:  # read, to begin anew
            looks.append(step)
    assert looks == [4, 12, 28, 60, 92, 124]


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
