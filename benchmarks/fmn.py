"""How near FMN comes with steps in proportion to eps, beside foolbox's own, at equal steps.

    python benchmarks/fmn.py MODEL DATA [--samples 100] [--steps 20 40]

MODEL is a folder, Hub id or timm name, DATA an image set, of which test images are attacked. What
either finds is pulled back along the straight line to the image, to the decision boundary.
"""

import argparse
from collections.abc import Iterator

import foolbox
from results import record
from torch import Tensor

from hf_specreg.robustness.attacks import ATTACKS
from hf_specreg.robustness.attacks.fmn import FMN
from hf_specreg.robustness.attacks.foolbox import pulled_back
from hf_specreg.robustness.classifier import Classifier
from hf_specreg.robustness.images import Images
from hf_specreg.robustness.subject import Subject

THEIRS = {"l2": foolbox.attacks.L2FMNAttack, "linf": foolbox.attacks.LInfFMNAttack}
COLUMNS = ("norm", "steps", "attack", "mean distance", "median", "images", "not found")


def of_foolbox(classifier: Classifier, images: Tensor, labels: Tensor, fmn: FMN) -> Tensor:
    """Return the distances [B] that foolbox's attack finds, by its own step size of 1 at first."""
    attack = THEIRS[fmn.norm](steps=fmn.steps)
    model = foolbox.PyTorchModel(classifier, bounds=(0, 1), device=classifier.device)
    found = attack.run(model, images, foolbox.criteria.Misclassification(labels))
    return pulled_back(classifier, images, labels, found, 0, fmn.norm).distances


def of_this_package(classifier: Classifier, images: Tensor, labels: Tensor, fmn: FMN) -> Tensor:
    """Return the distances [B] that a run of this package's attack finds."""
    return fmn.run(classifier, images, labels, seeds=range(len(images))).distances


def rows(classifier: Classifier, images: Tensor, labels: Tensor, steps: list[int]) -> Iterator:
    """Yield the rows of the table."""
    for norm in THEIRS:
        for count in steps:
            stepsize = ATTACKS[f"fmn-{norm}"].relative_stepsize
            fmn = FMN(norm, steps=count, runs=1, relative_stepsize=stepsize)
            for name, attack in (("foolbox", of_foolbox), ("relative steps", of_this_package)):
                distances = attack(classifier, images, labels, fmn)
                known = distances[distances.isfinite()]
                said = f"{known.mean():.4f}", f"{known.median():.4f}", str(len(known))
                yield [norm, str(count), name, *said, str(len(distances) - len(known))]


def main() -> None:
    """Attack, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("--samples", type=int, default=100)
    parser.add_argument("--steps", type=int, nargs="+", default=[20, 40])
    options = parser.parse_args()
    subject = Subject.of(options.model)
    source = Images(options.data, subject, samples=options.samples)
    images, labels = source.read(source.rows)
    with subject.frozen():
        right = subject.classifier.predict(images) == labels
        found = rows(subject.classifier, images[right], labels[right], options.steps)
        record(
            f"FMN, {options.data.rstrip('/').rpartition('/')[2]}",
            COLUMNS,
            list(found),
            "One run to the class of the largest other logit, L2 and Linf in [0, 1] pixels, pulled "
            "back to the boundary; foolbox's steps are 1 long at first, those of this package in "
            "proportion to the norm that is allowed. Means and medians of what was found.",
        )


if __name__ == "__main__":
    main()
