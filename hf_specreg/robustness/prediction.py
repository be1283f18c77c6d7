"""How long an evaluation will take: the passes of its attacks, by one forward and one backward
pass that are measured.

The passes of an attack are those of an image that it is run on to the end. What is found early
makes fewer of them, and so does an image that is not classified correctly, which is not attacked.
"""

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import singledispatch
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from hf_specreg.encoders.features import FeatureSpace
from hf_specreg.robustness.attacks import Attack
from hf_specreg.robustness.attacks.autoattack import AutoAttack
from hf_specreg.robustness.attacks.fmn import CANDIDATES, FMN
from hf_specreg.robustness.attacks.foolbox import PGD, PULL_BACK_STEPS, CarliniWagner, DeepFool
from hf_specreg.robustness.attacks.geometry import bisections
from hf_specreg.robustness.attacks.hopskipjump import HopSkipJump
from hf_specreg.robustness.attacks.tangent import TangentAttack
from hf_specreg.robustness.classifier import Classifier
from hf_specreg.robustness.corruptions import CORRUPTIONS, SEVERITIES
from hf_specreg.robustness.evaluate import Plan
from hf_specreg.robustness.images import Images
from hf_specreg.robustness.stages import MASKING_IMAGES
from hf_specreg.robustness.subject import Subject

ROUNDS = 3
PULLED_BACK = PULL_BACK_STEPS + 2
HALVINGS = 2  # of a tangent point's radius, on average


class Passes(NamedTuple):
    """How many images a model is run on, and differentiated at, for one image that is attacked."""

    forward: float
    backward: float = 0


class Problem(NamedTuple):
    """What the passes depend on: how many classes, eps and pixels (C x H x W) there are."""

    classes: int
    eps: int
    pixels: int


@singledispatch
def passes(attack: Attack, problem: Problem) -> Passes:
    """Return the passes of an attack, an image.

    Raises:
        ValueError: they are not known.
    """
    raise ValueError(f"the passes of {type(attack).__name__} are not known: run it on few samples")


@passes.register
def _(attack: TangentAttack, problem: Problem) -> Passes:
    search = bisections(attack.tolerance, problem.pixels)
    of_iterations = (attack.probes(t) + HALVINGS + search for t in range(1, attack.iterations + 1))
    found = 2 + search + sum(of_iterations)
    return Passes(min(found, attack.max_queries or math.inf))


@passes.register
def _(attack: HopSkipJump, problem: Problem) -> Passes:
    same = TangentAttack(attack.iterations, attack.initial_probes, attack.max_probes)
    return Passes(passes(same, problem).forward + attack.iterations + 1)


@passes.register
def _(attack: PGD, problem: Problem) -> Passes:
    each = problem.eps * attack.restarts
    return Passes(each * (attack.steps + 1) + problem.eps, each * attack.steps)


@passes.register
def _(attack: FMN, problem: Problem) -> Passes:
    nearest = min(CANDIDATES, problem.classes - 1)
    runs = 1 if nearest == 1 else min(attack.runs, 1 + nearest)
    derived = 0 if nearest == 1 else nearest
    return Passes(runs * attack.steps + 1 + 2 * PULLED_BACK, runs * attack.steps + derived)


@passes.register
def _(attack: DeepFool, problem: Problem) -> Passes:
    derived = attack.steps * (min(10, problem.classes) - 1)  # foolbox looks at 10 classes
    return Passes(derived + 1 + PULLED_BACK, derived)


@passes.register
def _(attack: CarliniWagner, problem: Problem) -> Passes:
    steps = attack.binary_search_steps * attack.steps
    return Passes(steps + PULLED_BACK, steps)


@passes.register
def _(attack: AutoAttack, problem: Problem) -> Passes:
    targets = min(9, problem.classes - 1)
    forward = {"apgd-ce": 101, "apgd-dlr": 101, "apgd-t": 101 * targets, "square": 5001}
    forward |= {"fab": 200 * targets, "fab-t": 200 * targets}
    chosen = attack.attacks or attack._standard(problem.classes)
    derived = sum(min(forward[name], 101 * targets) for name in chosen if name != "square")
    return Passes(problem.eps * (sum(map(forward.get, chosen)) + 1), problem.eps * derived)


@dataclass(frozen=True)
class Prediction:
    """What an evaluation will take.

    Attributes:
        images: that are evaluated.
        batch_size: that the passes were measured at.
        device: that they were measured on.
        forward: seconds of a forward pass, an image.
        backward: of a backward pass beside it, an image.
        stages: by name, how many images there are and the passes of each.
    """

    images: int
    batch_size: int
    device: str
    forward: float
    backward: float
    stages: Mapping[str, tuple[int, Passes]]

    def seconds(self, stage: str) -> float:
        """Return the time of a stage's passes."""
        images, (forward, backward) = self.stages[stage]
        return images * (forward * self.forward + backward * self.backward)

    def to_markdown(self) -> str:
        """Return a table, with what it means."""
        rows = [
            f"| {name} | {images:,} | {each.forward:,.0f} | {each.backward:,.0f} "
            f"| {duration(self.seconds(name))} |"
            for name, (images, each) in self.stages.items()
        ]
        total = duration(sum(map(self.seconds, self.stages)))
        head = "| | images | forward, an image | backward, an image | time |"
        return "\n".join(
            [
                f"{self.images:,} images; measured on {self.device}, {self.batch_size} images at "
                f"once: {1000 * self.forward:.3g} ms an image forward, "
                f"{1000 * self.backward:.3g} ms backward. If all images are classified "
                "correctly and none falls early:",
                "",
                *(head, "|---|---|---|---|---|", *rows, f"| all | | | | {total} |"),
                "",
                "Of one process, bare passes; without loading, checks and singular values.",
            ]
        )


def predict(
    model: nn.Module | FeatureSpace | str | Path,
    dataset: object,
    *,
    plan: Plan,
    samples: int | None = None,
    device: torch.device | str | None = None,
    name: str | None = None,
) -> Prediction:
    """Measure a forward and a backward pass, and say what an evaluation will take.

    Args:
        model: as for `evaluate_robustness`.
        dataset: likewise.
        plan: what would be done.
        samples: how many images; default: all.
        device: where; default: where the model is.
        name: of the model.

    Raises:
        ValueError: as `evaluate_robustness`, of model and data.
    """
    subject = Subject.of(model, name=name, device=device)
    images = Images(dataset, subject, samples=samples, seed=plan.seed)
    with subject.frozen():
        classes, _ = plan.check(subject, images)
        batch, _ = images.read(images.rows[: plan.batch_size])
        forward, backward = measured(subject.classifier, batch)
    count = len(images.rows)
    stages = {"clean": (count, Passes(1))}
    for attack_name, attack in plan.attacks.items():
        problem = Problem(classes, len(plan.grid[attack.norm]), batch[0].numel())
        stages[attack_name] = count, passes(attack, problem)
    if plan.measures.corruptions:
        stages["corruptions"] = count, Passes(len(CORRUPTIONS) * len(SEVERITIES))
    if plan.masking:
        stages["masking"] = min(count, MASKING_IMAGES), Passes(217, 211)
    where = str(subject.classifier.device)
    return Prediction(count, len(batch), where, forward, backward, stages)


def measured(classifier: Classifier, images: Tensor) -> tuple[float, float]:
    """Return the seconds of a forward and a backward pass, an image: medians."""
    images = images.to(classifier.device)

    def derive() -> None:
        with torch.enable_grad():
            x = images.clone().requires_grad_()
            torch.autograd.grad(classifier(x).sum(), x)

    with torch.no_grad():
        forward = _seconds(lambda: classifier(images), classifier.device)
    both = _seconds(derive, classifier.device)
    return forward / len(images), max(both - forward, 0) / len(images)


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    times = []
    for _ in range(ROUNDS + 1):  # the first warms up
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def duration(seconds: float) -> str:
    """Return a time as people say it."""
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} seconds"
