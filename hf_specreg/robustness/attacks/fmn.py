"""foolbox's FMN (Pintor, Roli, Brendel, Biggio, "Fast Minimum-norm Adversarial Attacks through
Adaptive Norm Constraints", NeurIPS 2021, arXiv:2102.12827): white-box, minimum distance.

Mean L2 distances of 48 digits, and seconds on one of 2 shared cores:

| | distance | with half the queries | seconds |
|---|---|---|---|
| fmn-l2 | 0.742 | 0.748 | 14 |
| cw-l2 | 0.814 | | 101 |
| tangent | 0.939 | 0.984 | 489 |
| deepfool-l2 | 1.155 | | 6 |

    python recipes/supervised.py --config recipes/configs/digits.yaml --epochs 10 --output_dir RUN
        --regularizers.sensitivity.strength 0
    hf-specreg evaluate RUN/model digits --attacks '[fmn-l2, deepfool-l2, cw-l2, tangent]'
        --samples 50 --output RUN/report
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from hf_specreg.robustness.attacks.foolbox import PULL_BACK_STEPS, pulled_back, unit
from hf_specreg.robustness.classifier import Classifier
from hf_specreg.robustness.threat import AttackResult, Norm, distance

CANDIDATES = 9  # classes of the largest logits, among which the nearest are looked for


@dataclass(frozen=True)
class FMN:
    """Steps along the gradient of two logits' difference, within an eps that shrinks by gamma where
    the image is adversarial and grows where it is not.

    A run may end at a class that is not the nearest, so there are several: one to whatever other
    class has the largest logit at each step, and one each to the classes that are nearest if the
    logits are linear. The nearest image that a run comes by is pulled back along the straight line
    to the decision boundary.

    Args:
        norm: "l2" or "linf".
        steps: of a run, each one forward and backward pass; step sizes and gamma fall by a cosine.
        runs: with two classes there is but one.
        relative_stepsize: of the first step, of eps; the last is a hundredth of it.
        gamma: by what part eps changes at first; at last it is a thousandth.
    """

    black_box: ClassVar[bool] = False
    minimum_distance: ClassVar[bool] = True
    package: ClassVar[str] = "foolbox"

    norm: Norm = "l2"
    steps: int = 100
    runs: int = 3
    relative_stepsize: float = 1.0
    gamma: float = 0.05

    def run(self, classifier, images, labels, *, seeds, eps=()) -> AttackResult:
        """See `Attack.run`. The trajectory is at the start, at half of each run's steps and at the
        end.
        """
        import foolbox

        images, labels = images.to(classifier.device), labels.to(classifier.device)
        before = classifier.queries
        nearest, at_half = (_Nearest(images, labels, self.norm) for _ in range(2))
        self._attack(classifier, nearest, foolbox.criteria.Misclassification, labels, at_half)
        kind = foolbox.criteria.TargetedMisclassification
        for targets in nearest_classes(classifier, images, labels, self.norm)[: self.runs - 1]:
            self._attack(classifier, nearest, kind, targets, at_half)
        half, full = (
            pulled_back(classifier, images, labels, kept.points, before, self.norm)
            for kept in (at_half, nearest)
        )
        # Of two points the one that is nearer may be the farther one when both are pulled back.
        nearer = half.distances < full.distances
        distances = torch.where(nearer, half.distances, full.distances)
        found = torch.where(nearer[:, None, None, None], half.adversarials, full.adversarials)
        last = float(full.queries[0] - PULL_BACK_STEPS)
        steps = torch.stack([torch.full_like(distances, torch.inf), half.distances, distances], 1)
        queries = torch.tensor([0.0, last / 2, last]).expand_as(steps)
        trajectory = torch.stack([queries, steps.cpu()], dim=2).double()
        return AttackResult(found, distances, full.queries, trajectory)

    def _attack(
        self,
        classifier: Classifier,
        nearest: "_Nearest",
        kind: Any,
        classes: Tensor,
        at_half: "_Nearest",
    ) -> None:
        """Run foolbox's attack to these classes [B], or away from them, keeping what it comes by
        and what it has come by after half of the steps.
        """
        import foolbox

        made = 0

        def watch(points: Tensor, predicted: Tensor) -> None:
            nonlocal made
            nearest.keep(points, predicted)
            if made < self.steps / 2:
                at_half.keep(points, predicted)
            made += 1

        model = foolbox.PyTorchModel(classifier, bounds=(0, 1), device=classifier.device)
        goal = _watched(kind, classes, watch)
        attack = _mended(self.norm, goal)(
            steps=self.steps, max_stepsize=self.relative_stepsize, gamma=self.gamma
        )
        attack.run(model, nearest.images, goal)


class _Nearest:
    """The nearest adversarial image that each image has yet; at first the image itself."""

    def __init__(self, images: Tensor, labels: Tensor, norm: Norm):
        self.images, self.labels, self.norm = images, labels, norm
        self.points = images
        self.distances = torch.full((len(images),), torch.inf, device=images.device)

    def keep(self, points: Tensor, predicted: Tensor) -> None:
        distances = distance(self.images, points, self.norm)
        better = (predicted != self.labels) & (distances < self.distances)
        self.distances = torch.where(better, distances, self.distances)
        self.points = torch.where(better[:, None, None, None], points, self.points)


def nearest_classes(
    classifier: Classifier, images: Tensor, labels: Tensor, norm: Norm
) -> list[Tensor]:
    """Return the other classes, each [B], nearest first, as if the logits were linear.

    Those are looked at that have the largest logits. With two classes there is no choice: [].
    """
    x = images.clone().requires_grad_()
    with torch.enable_grad():
        logits = classifier(x)
        others = logits.detach().scatter(1, labels[:, None], -torch.inf)
        count = min(CANDIDATES, logits.shape[1] - 1)
        if count == 1:
            return []
        classes = others.topk(count).indices
        margins = logits.gather(1, labels[:, None]) - logits.gather(1, classes)
        gradients = [
            torch.autograd.grad(margins[:, k].sum(), x, retain_graph=True)[0].flatten(1)
            for k in range(count)
        ]
    dual = {"l2": 2, "linf": 1}[norm]
    slopes = torch.stack([torch.linalg.vector_norm(g, dual, dim=1) for g in gradients], dim=1)
    order = (margins.detach() / slopes).nan_to_num(nan=torch.inf).argsort(1)
    return list(classes.gather(1, order).unbind(1))


def _watched(kind: Any, classes: Tensor, watch: Callable[[Tensor, Tensor], None]) -> Any:
    """A criterion of foolbox that shows the images it judges, with their predicted classes, and
    remembers for which it was met once.
    """

    class Watched(kind):
        met = torch.zeros_like(classes, dtype=torch.bool)

        def __call__(self, perturbed, outputs):
            watch(perturbed.raw.detach(), outputs.raw.detach().argmax(1))
            meets = super().__call__(perturbed, outputs)
            self.met = self.met | meets.raw
            return meets

    return Watched(classes)


def _mended(norm: Norm, goal: Any) -> Any:
    """Return foolbox's attack, with steps in proportion to eps and of their full length however
    small the gradient is, and cut to eps once the goal was met.

    foolbox and the paper step by an absolute length, 1 at first. Where eps is a tenth of that, each
    step turns the change wholly into the last gradient's direction: nothing is gathered over the
    steps until they have become short. In L2 foolbox 3.3 cuts nothing. The paper cuts from the
    first step on, to where a plane boundary would be: a run may then near the boundary from within
    and never cross it, most of all where pixels at the box's edge hold part of each step back.
    """
    import eagerpy
    import foolbox

    kind = {"l2": foolbox.attacks.L2FMNAttack, "linf": foolbox.attacks.LInfFMNAttack}[norm]

    class Mended(kind):
        point = None  # where the last step ended

        def normalize(self, gradients):
            return eagerpy.astensor(unit(gradients.raw))

        def project(self, x, x0, epsilon):
            before = x0.raw if self.point is None else self.point
            # A gradient of L2 length 1 has this one where all pixels reach a length of 1 in Linf.
            reach = 1.0 if norm == "l2" else math.sqrt(before[0].numel())
            eps = epsilon.raw.nan_to_num(nan=0.0)[:, None, None, None]
            change = before - x0.raw + (x.raw - before) * reach * eps
            limit = torch.where(goal.met[:, None, None, None], eps, torch.inf)
            if norm == "linf":
                change = change.clamp(-limit, limit)
            else:
                size = torch.linalg.vector_norm(change.flatten(1), dim=1).reshape(limit.shape)
                change = change * (limit / size).nan_to_num(nan=1.0).clamp(max=1)
            self.point = (x0.raw + change).clamp(0, 1)
            return eagerpy.astensor(self.point)

    return Mended
