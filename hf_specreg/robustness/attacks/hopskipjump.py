"""foolbox's HopSkipJump (Chen, Jordan, Wainwright, S&P 2020): black-box, L2, minimum distance."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from hf_specreg.robustness.attacks.attack import checked, seeded
from hf_specreg.robustness.attacks.tangent import TangentAttack
from hf_specreg.robustness.classifier import Classifier
from hf_specreg.robustness.threat import AttackResult, Norm, distance


@dataclass(frozen=True)
class HopSkipJump:
    """foolbox's HopSkipJump (Chen, Jordan, Wainwright 2020): black-box, L2, minimum distance.

    Starts are found image by image, so that one image without a start does not fail the batch, and
    normals are normalised image by image: foolbox divides by the norm over the whole batch. Of the
    points that it comes by the nearest is kept, where foolbox gives the last.
    """

    norm: ClassVar[Norm] = "l2"
    black_box: ClassVar[bool] = True
    minimum_distance: ClassVar[bool] = True
    package: ClassVar[str] = "foolbox"

    iterations: int = 40
    initial_probes: int = 100
    max_probes: int = 10_000

    def run(self, classifier, images, labels, *, seeds, eps=()) -> AttackResult:
        """See `Attack.run`."""
        images, labels = images.to(classifier.device), labels.to(classifier.device)
        start = TangentAttack(iterations=0).run(classifier, images, labels, seeds=seeds)
        index = (start.distances.isfinite() & (start.distances > 0)).nonzero()[:, 0]
        nearest = _Nearest(classifier, images, labels, start.adversarials.clone())
        queries, said = start.queries.clone(), ()
        if len(index):
            before = classifier.queries
            with seeded(seeds, classifier):
                stopped = self._improve(nearest, start.adversarials, index)
            if stopped:
                said = (f"foolbox gave {stopped} images up before the last iteration",)
            queries[index] += (classifier.queries - before) // len(index)
        result = checked(classifier, images, labels, nearest.adversarials, queries, self.norm)
        return result._replace(warnings=said)

    def _improve(self, nearest: "_Nearest", starts: Tensor, index: Tensor) -> int:
        """Attack the images of `index` together, or one by one; return how many were given up."""
        import foolbox

        attack = _per_image(
            nearest,
            steps=self.iterations,
            initial_gradient_eval_steps=self.initial_probes,
            max_gradient_eval_steps=self.max_probes,
        )
        device = nearest.classifier.device
        model = foolbox.PyTorchModel(nearest.classifier, bounds=(0, 1), device=device)

        def improve(index: Tensor) -> bool:
            """Attack images; False if foolbox gave them up."""
            attack.index = index
            goal = foolbox.criteria.Misclassification(nearest.labels[index])
            try:
                images = nearest.images[index]
                points = attack.run(model, images, goal, starting_points=starts[index])
                nearest.keep(index, points)
            except (AssertionError, ValueError) as error:
                # A point on the boundary may be decided otherwise in other company.
                if isinstance(error, ValueError) and "starting_points" not in str(error):
                    raise
                return False
            return True

        return 0 if improve(index) else sum(not improve(i[None]) for i in index)


@dataclass
class _Nearest:
    """The nearest adversarial image that each image has yet."""

    classifier: Classifier
    images: Tensor
    labels: Tensor
    adversarials: Tensor

    def keep(self, index: Tensor, points: Tensor) -> None:
        """Keep, for the images of `index`, what is adversarial and nearer than before."""
        images = self.images[index]
        before = distance(images, self.adversarials[index], "l2")
        better = distance(images, points, "l2") < before
        better &= self.classifier.predict(points) != self.labels[index]
        self.adversarials[index[better]] = points[better]


def _per_image(nearest: _Nearest, **settings: Any) -> Any:
    """Foolbox's attack with normals that are normalised image by image, keeping what it comes
    by.
    """
    import eagerpy
    import foolbox

    class PerImage(foolbox.attacks.HopSkipJumpAttack):
        def approximate_gradients(self, is_adversarial, x_advs, steps, delta):
            center = x_advs.raw
            nearest.keep(self.index, center)
            signed, plain = torch.zeros_like(center), torch.zeros_like(center)
            total = torch.zeros_like(delta.raw)
            for _ in range(steps):
                noise = torch.randn_like(center)
                norms = torch.linalg.vector_norm(noise.flatten(1), dim=1)
                noise = noise * (delta.raw / norms).reshape(-1, 1, 1, 1)
                probes = (center + noise).clamp(0, 1)
                signs = 2.0 * is_adversarial(eagerpy.astensor(probes)).raw - 1
                signed += signs.reshape(-1, 1, 1, 1) * (probes - center)
                plain += probes - center
                total += signs
            mean = (total / steps).reshape(-1, 1, 1, 1)
            normal = torch.where(mean.abs() == 1, signed, signed - mean * plain)
            size = torch.linalg.vector_norm(normal.flatten(1), dim=1).clamp(min=1e-12)
            return eagerpy.astensor(normal / size.reshape(-1, 1, 1, 1))

    return PerImage(**settings)
