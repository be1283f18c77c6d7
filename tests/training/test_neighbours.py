"""Features of a set of images: neighbours and collapse, on features whose answer is known."""

import logging
import math

import pytest
import torch
from accelerate import Accelerator
from sklearn.neighbors import KNeighborsClassifier
from torch.utils.data import DataLoader

from hf_specreg.data.images import collate
from hf_specreg.training.neighbours import (
    NeighbourScores,
    effective_rank,
    feature_deviation,
    knn_accuracy,
)
from tests.tiny import tiny
from tests.training.test_probe import clusters, images_of


def test_knn_is_scikit_learns_where_one_neighbour_votes():
    bank, queries = clusters(spread=0.5), clusters(200, spread=0.8)
    reference = KNeighborsClassifier(1, metric="cosine").fit(*(t.numpy() for t in bank))
    expected = reference.score(queries[0].numpy(), queries[1].numpy())
    assert knn_accuracy(bank, queries, neighbours=1) == pytest.approx(expected)


def test_nearer_neighbours_weigh_more():
    bank = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.6, 0.8]]), torch.tensor([0, 1, 1])
    query = torch.tensor([[1.0, 0.1]]), torch.tensor([0])
    assert knn_accuracy(bank, query, neighbours=3, temperature=0.07) == 1.0
    assert knn_accuracy(bank, query, neighbours=3, temperature=100.0) == 0.0


def test_effective_rank_counts_the_directions_of_equal_size():
    draws = torch.Generator().manual_seed(0)
    basis, _ = torch.linalg.qr(torch.randn(8, 8, generator=draws))
    orthogonal, _ = torch.linalg.qr(torch.randn(101, 4, generator=draws, dtype=torch.float64))
    centred = orthogonal - orthogonal.mean(0)
    centred, _ = torch.linalg.qr(centred)
    features = centred.float() @ basis[:4]
    assert effective_rank(features) == pytest.approx(4, rel=1e-3)
    assert effective_rank(features + 7.0) == pytest.approx(4, rel=1e-2)
    assert effective_rank(torch.ones(50, 8) / 3) == 1.0
    assert math.isnan(effective_rank(features.index_fill(0, torch.tensor([3]), torch.inf)))


def test_deviation_is_one_on_the_sphere_and_zero_for_a_constant():
    spread = torch.randn(5000, 16, generator=torch.Generator().manual_seed(0))
    assert feature_deviation(spread) == pytest.approx(1, rel=0.05)
    assert feature_deviation(torch.ones(100, 16)) == pytest.approx(0, abs=1e-4)


def test_a_collapsed_encoder_is_said_to_be_collapsed(caplog):
    model = tiny(num_classes=0)
    score = NeighbourScores(images_of(), neighbours=5, batch_size=16)
    loader, accelerator = DataLoader(images_of(), 16, collate_fn=collate), Accelerator(cpu=True)
    with torch.no_grad():
        model.network.hidden.weight.normal_(std=1.0)
    alive = score(model, loader, accelerator)
    assert alive["collapsed"] == 0.0
    assert alive["accuracy"] > 0.6
    assert alive["images"] == 60
    assert not caplog.records
    with torch.no_grad():
        model.network.hidden.weight.zero_()
        model.network.hidden.bias.fill_(1.0)
    with caplog.at_level(logging.WARNING):
        dead = score(model, loader, accelerator)
    assert dead["collapsed"] == 1.0
    assert dead["effective_rank"] == 1.0
    assert "the features have collapsed" in caplog.text
