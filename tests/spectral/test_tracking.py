"""Which layers are renewed together and when, and that each is followed as if it were alone."""

import pytest
import timm
import torch

import hf_specreg.encoders.small  # noqa: F401  registers the CIFAR networks
from hf_specreg.spectral import tracking
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
    assert max(map(len, penalty._triplets.groups)) > 1
    monkeypatch.setattr(tracking, "CACHED", 0)
    alone, penalty = train(name)
    assert max(map(len, penalty._triplets.groups)) == 1
    assert together == pytest.approx(alone, rel=1e-5)


@pytest.mark.parametrize("name", NETWORKS)
def test_only_alike_layers_that_a_cache_holds_are_renewed_together(name, monkeypatch):
    found = stacks(make(network(name)).layers)
    groups = renewed_together(found, steps=8)
    assert sorted(i for group in groups for i in group) == list(range(len(found)))
    assert all(len({found[i].kind for i in group}) == 1 for group in groups)
    sizes = [found[i].weight().numel() for i in range(len(found))]
    monkeypatch.setattr(tracking, "CACHED", 3 * max(sizes))
    for group in renewed_together(found, steps=0):
        assert sum(sizes[i] for i in group) <= 3 * max(sizes)
        same = sum(stack.kind == found[group[0]].kind for stack in found)
        assert len(group) >= min(same, 3) - 1  # even parts


@pytest.mark.parametrize("every", [1, 3, 5])
def test_every_layer_has_its_turn_once_in_a_round(every, monkeypatch):
    renewed, renew = [], Triplets.renew

    def watched(self, indices, weights):
        renewed.extend(indices)
        renew(self, indices, weights)

    monkeypatch.setattr(Triplets, "renew", watched)
    penalty = make(network("resnet20_cifar"), renew_every=5, every=every)
    penalty.value()
    assert not renewed  # they have only been started
    for _ in range(5):  # uses, which are 5 * every steps: so many rounds of 5 steps as `every`
        penalty.value()
    assert {renewed.count(i) for i in range(len(penalty._stacks))} == {every}
