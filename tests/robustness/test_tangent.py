from dataclasses import replace

import pytest
import torch
from torch import nn

from hf_specreg.robustness.attacks.geometry import tangent_points
from hf_specreg.robustness.attacks.tangent import TangentAttack
from hf_specreg.robustness.classifier import Classifier


@pytest.fixture(scope="module")
def case():
    """A small network with curved boundaries, images that it classifies, and its classes.

    In float64: of float32 some processors round a batch in another way than an image alone, and one
    answer that turns over leads the search elsewhere.
    """
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.GELU(), nn.Flatten(), nn.Linear(288, 5)).double()
    images = torch.rand(24, 1, 8, 8, dtype=torch.float64)
    classifier = Classifier(net)
    return classifier, images, classifier.predict(images)


@pytest.mark.parametrize("part", [None, 0.5])
def test_the_result_for_an_image_does_not_depend_on_its_company(case, part):
    classifier, images, labels = case
    attack, seeds = TangentAttack(iterations=12, low_frequencies=part), list(range(24))
    together = attack.run(classifier, images, labels, seeds=seeds)
    small = replace(attack, batch_size=100)
    for i in range(0, 24, 6):
        part = slice(i, i + 1)
        alone = small.run(classifier, images[part], labels[part], seeds=seeds[part])
        torch.testing.assert_close(alone.distances, together.distances[part], rtol=1e-5, atol=0)
        assert torch.equal(alone.queries, together.queries[part])


def test_a_budget_that_some_exhaust_does_not_touch_the_others(case):
    classifier, images, labels = case
    attack, seeds = TangentAttack(max_queries=140), list(range(24))
    together = attack.run(classifier, images, labels, seeds=seeds)
    for i in range(24):
        part = slice(i, i + 1)
        alone = attack.run(classifier, images[part], labels[part], seeds=seeds[part])
        assert torch.equal(alone.queries, together.queries[part])
        torch.testing.assert_close(alone.distances, together.distances[part], rtol=1e-5, atol=0)


def test_on_large_images_the_boundary_is_known_better_than_the_probes_step():
    """At 3x224x224 the original tolerance hides the boundary's normal, and the search stands."""
    generator = torch.Generator().manual_seed(0)
    shape = (3, 224, 224)
    normal = torch.randn(shape, generator=generator).flatten()
    normal /= normal.norm()

    class Plane(nn.Module):
        def forward(self, images):
            side = (images - 0.5).flatten(1) @ normal + 0.5
            return torch.stack([side, -side], dim=1)

    image, label = torch.full((1, *shape), 0.5), torch.tensor([0])
    noise = torch.randn(shape, generator=generator)
    start = (image + 0.05 * noise - 4 * normal.reshape(shape)).clamp(0, 1)
    gains = {}
    for tolerance in (None, 1e-5):
        attack = TangentAttack(iterations=8, tolerance=tolerance)
        result = attack.run(Classifier(Plane()), image, label, seeds=[0], starts=start)
        distances = result.trajectory[0, :, 1]
        assert distances[-1] > 0.5  # the truth
        gains[tolerance] = distances[1] - distances[-1]
    assert gains[None] > 2 * gains[1e-5]


def test_the_distance_falls_with_every_query_and_is_that_of_the_image_returned(case):
    classifier, images, labels = case
    result = TangentAttack(iterations=15).run(classifier, images, labels, seeds=range(24))
    queries, distances = result.trajectory.unbind(2)
    assert (queries.diff(dim=1) > 0).all()
    assert (distances.diff(dim=1) <= 0).all()
    assert torch.equal(queries[:, -1].long(), result.queries)
    measured = (result.adversarials - images).flatten(1).norm(dim=1)
    torch.testing.assert_close(measured.float(), result.distances)
    assert (classifier.predict(result.adversarials) != labels).all()


@pytest.mark.parametrize("budget", [1, 10, 30, 500])
def test_no_query_is_made_beyond_the_budget(case, budget):
    classifier, images, labels = case
    classifier.queries = 0
    attack = TangentAttack(max_queries=budget)
    result = attack.run(classifier, images, labels, seeds=range(24))
    assert result.queries.max() <= budget
    assert classifier.queries == result.queries.sum()


def test_the_number_of_probes_is_the_papers():
    attack = TangentAttack()
    assert [attack.probes(t) for t in (1, 2, 40)] == [100, 141, 632]
    assert TangentAttack(max_probes=200).probes(40) == 200


def test_a_misclassified_image_costs_one_query(case):
    classifier, images, labels = case
    wrong = (labels + 1) % 5
    result = TangentAttack(iterations=2).run(classifier, images, wrong, seeds=range(24))
    assert (result.distances == 0).all()
    assert (result.queries == 1).all()


def test_the_tangent_point_is_on_the_sphere_and_its_line_touches_it():
    generator = torch.Generator().manual_seed(0)
    x, centre = 0.5 + 0.1 * torch.randn(2, 5, 30, generator=generator, dtype=torch.float64)
    offset = x - centre
    length = offset.norm(dim=1, keepdim=True)
    towards = offset / length
    across = torch.randn(5, 30, generator=generator, dtype=torch.float64)
    across -= (across * towards).sum(1, keepdim=True) * towards
    across /= across.norm(dim=1, keepdim=True)
    radius = 0.3 * length
    point = tangent_points(centre, towards, across, radius, length)
    torch.testing.assert_close((point - centre).norm(dim=1, keepdim=True), radius)
    assert ((point - centre) * (point - x)).sum(1).abs().max() < 1e-12
    assert (((point - centre) * across).sum(1) > 0).all()


def test_one_seed_an_image_is_needed(case):
    classifier, images, labels = case
    with pytest.raises(ValueError, match="3 seeds for 24 images"):
        TangentAttack().run(classifier, images, labels, seeds=[1, 2, 3])
