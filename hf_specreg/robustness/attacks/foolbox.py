"""White-box attacks of foolbox (Rauber et al., JOSS 2020): PGD, DeepFool, Carlini-Wagner."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from hf_specreg.robustness.attacks.attack import checked, over_grid, seeded
from hf_specreg.robustness.classifier import Classifier
from hf_specreg.robustness.threat import AttackResult, Norm

PULL_BACK_STEPS = 12


@dataclass(frozen=True)
class DeepFool:
    """foolbox's DeepFool (Moosavi-Dezfooli et al. 2016): white-box, L2, minimum distance.

    What it finds is pulled back along the straight line to the image, to the decision boundary.
    """

    norm: ClassVar[Norm] = "l2"
    black_box: ClassVar[bool] = False
    minimum_distance: ClassVar[bool] = True
    package: ClassVar[str] = "foolbox"

    steps: int = 50
    overshoot: float = 0.02

    def run(self, classifier, images, labels, *, seeds, eps=()) -> AttackResult:
        """See `Attack.run`."""
        import foolbox

        attack = foolbox.attacks.L2DeepFoolAttack(steps=self.steps, overshoot=self.overshoot)
        return _run_minimization(attack, classifier, images, labels, seeds)


@dataclass(frozen=True)
class CarliniWagner:
    """foolbox's Carlini-Wagner (2017): white-box, L2, minimum distance; pulled back likewise."""

    norm: ClassVar[Norm] = "l2"
    black_box: ClassVar[bool] = False
    minimum_distance: ClassVar[bool] = True
    package: ClassVar[str] = "foolbox"

    binary_search_steps: int = 9
    steps: int = 300
    stepsize: float = 0.01
    initial_const: float = 1.0

    def run(self, classifier, images, labels, *, seeds, eps=()) -> AttackResult:
        """See `Attack.run`."""
        import foolbox

        attack = foolbox.attacks.L2CarliniWagnerAttack(**asdict(self))
        return _run_minimization(attack, classifier, images, labels, seeds)


@dataclass(frozen=True)
class PGD:
    """foolbox's projected gradient descent (Madry et al. 2018): white-box, at fixed eps.

    In L2 steps have their full length however small the gradient is: that of a confident model's
    cross-entropy is, and foolbox would divide it by 1e-12 at least.

    Args:
        norm: "l2" or "linf".
        steps: a restart.
        relative_stepsize: of eps.
        restarts: each from a random point within eps, on the images that still stand.
    """

    black_box: ClassVar[bool] = False
    minimum_distance: ClassVar[bool] = False
    package: ClassVar[str] = "foolbox"

    norm: Norm = "l2"
    steps: int = 50
    relative_stepsize: float = 0.1
    restarts: int = 1

    def run(self, classifier, images, labels, *, seeds, eps) -> AttackResult:
        """See `Attack.run`."""
        import eagerpy
        import foolbox

        class L2(foolbox.attacks.L2ProjectedGradientDescentAttack):
            def normalize(self, gradients, *, x, bounds):
                return eagerpy.astensor(unit(gradients.raw))

        kind = {"l2": L2, "linf": foolbox.attacks.LinfPGD}[self.norm]
        attack = kind(steps=self.steps, rel_stepsize=self.relative_stepsize, random_start=True)

        def at(images: Tensor, labels: Tensor, e: float) -> Tensor:
            model = foolbox.PyTorchModel(classifier, bounds=(0, 1), device=classifier.device)
            best, standing = images.clone(), torch.arange(len(images), device=images.device)
            for _ in range(self.restarts):
                found = attack.run(model, images[standing], labels[standing], epsilon=e)
                fooled = classifier.predict(found) != labels[standing]
                best[standing[fooled]] = found[fooled]
                standing = standing[~fooled]
                if not len(standing):
                    break
            return best

        return over_grid(at, classifier, images, labels, seeds, eps, self.norm)


def _run_minimization(
    attack: Any, classifier: Classifier, images: Tensor, labels: Tensor, seeds: Sequence[int]
) -> AttackResult:
    """Run a foolbox attack of minimum distance, and pull what it found back to the boundary."""
    import foolbox

    images, labels = images.to(classifier.device), labels.to(classifier.device)
    before = classifier.queries
    model = foolbox.PyTorchModel(classifier, bounds=(0, 1), device=classifier.device)
    with seeded(seeds, classifier), classifier.as_it_comes():
        found = attack.run(model, images, foolbox.criteria.Misclassification(labels))
    # Where Carlini and Wagner's finds nothing, foolbox gives a black image back.
    failed = (found == 0).flatten(1).all(1)
    found = torch.where(failed[:, None, None, None], images, found)
    return pulled_back(classifier, images, labels, found, before, "l2")


def pulled_back(
    classifier: Classifier,
    images: Tensor,
    labels: Tensor,
    found: Tensor,
    before: int,
    norm: Norm,
) -> AttackResult:
    """Pull images back along straight lines to the decision boundary, and check them.

    Args:
        classifier: what was attacked.
        images: [B, C, H, W], to which the lines go.
        labels: their classes [B].
        found: [B, C, H, W]; what is not adversarial counts as not found.
        before: the classifier's queries before the attack.
        norm: of the distances.
    """
    failed = classifier.predict(found.nan_to_num()) == labels
    found = torch.where(failed[:, None, None, None], images, found)
    low, high = (images.new_full((len(images), 1, 1, 1), v) for v in (0.0, 1.0))
    for _ in range(PULL_BACK_STEPS):
        middle = (low + high) / 2
        fooled = classifier.predict(torch.lerp(images, found, middle)) != labels
        fooled = fooled[:, None, None, None]
        low, high = torch.where(fooled, low, middle), torch.where(fooled, middle, high)
    nearest = torch.where(high < 1, torch.lerp(images, found, high), found)
    queries = torch.full_like(labels, (classifier.queries - before) // len(images))
    return checked(classifier, images, labels, nearest, queries, norm)


def unit(gradients: Tensor) -> Tensor:
    """Gradients [B, ...] with norm 1 each, however small; 0 where they are 0."""
    rows = gradients.flatten(1).double()
    norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return (rows / norms.masked_fill(norms == 0, math.inf)).to(gradients).reshape_as(gradients)
