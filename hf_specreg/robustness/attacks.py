"""The attacks by name, with one interface and one result type.

Attacks of minimum distance find the nearest adversarial image that they can; attacks at fixed eps
are run over a grid of eps, upwards, each on the images that still stand, and their distance is the
smallest eps at which an image fell. Whatever a library returns is classified again here, and
counts only if it is adversarial, in the [0, 1] box and within eps.

TangentAttack is this package's; PGD, DeepFool, Carlini-Wagner and HopSkipJump are foolbox's
(Rauber et al., JOSS 2020); AutoAttack is its authors' (Croce, Hein, ICML 2020).
"""

import logging
import math
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from hf_specreg.robustness.classifier import Classifier
from hf_specreg.robustness.tangent import TangentAttack
from hf_specreg.robustness.threat import ROUNDING, AttackResult, Norm, distance, in_box

PULL_BACK_STEPS = 12
SQUARE_MIN_HEIGHT = 5  # its first stripes are a fifth of the image


class Attack(Protocol):
    """An attack with its settings, which are the fields of its dataclass."""

    norm: Norm
    black_box: bool
    minimum_distance: bool

    def run(
        self,
        classifier: Classifier,
        images: Tensor,
        labels: Tensor,
        *,
        seeds: Sequence[int],
        eps: Sequence[float],
    ) -> AttackResult:
        """Attack images [B, C, H, W] in [0, 1] that are classified as their labels [B].

        Args:
            classifier: what is attacked.
            images: the images.
            labels: their classes.
            seeds: one an image.
            eps: the grid, for attacks at fixed eps.
        """


class MissingPackageError(ImportError):
    """An attack's library is not installed."""


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

    iterations: int = 40
    initial_probes: int = 100
    max_probes: int = 10_000

    def run(self, classifier, images, labels, *, seeds, eps=()) -> AttackResult:
        """See `Attack.run`."""
        import eagerpy
        import foolbox

        class PerImage(foolbox.attacks.HopSkipJumpAttack):
            def approximate_gradients(self, is_adversarial, x_advs, steps, delta):
                center = x_advs.raw
                keep(self.index, center)
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

        images, labels = images.to(classifier.device), labels.to(classifier.device)
        start = TangentAttack(iterations=0).run(classifier, images, labels, seeds=seeds)
        started = start.distances.isfinite() & (start.distances > 0)
        adversarials, queries = start.adversarials.clone(), start.queries.clone()
        said = ()
        if started.any():
            attack = PerImage(
                steps=self.iterations,
                initial_gradient_eval_steps=self.initial_probes,
                max_gradient_eval_steps=self.max_probes,
            )
            before = classifier.queries
            model = foolbox.PyTorchModel(classifier, bounds=(0, 1), device=classifier.device)

            index = started.nonzero()[:, 0]

            def keep(index: Tensor, points: Tensor) -> None:
                """Keep what is adversarial and nearer than what was found before."""
                before = distance(images[index], adversarials[index], "l2")
                better = distance(images[index], points, "l2") < before
                better &= classifier.predict(points) != labels[index]
                adversarials[index[better]] = points[better]

            def improve(index: Tensor) -> bool:
                """Attack images; False if foolbox gave them up."""
                attack.index = index
                goal = foolbox.criteria.Misclassification(labels[index])
                starts = start.adversarials[index]
                try:
                    keep(index, attack.run(model, images[index], goal, starting_points=starts))
                except (AssertionError, ValueError) as error:
                    # A point on the boundary may be decided otherwise in other company.
                    if isinstance(error, ValueError) and "starting_points" not in str(error):
                        raise
                    return False
                return True

            with _seeded(seeds, classifier):
                stopped = 0 if improve(index) else sum(not improve(i[None]) for i in index)
            if stopped:
                said = (f"foolbox gave {stopped} images up before the last iteration",)
            queries[started] += (classifier.queries - before) // int(started.sum())
        result = _checked(classifier, images, labels, adversarials, queries, self.norm)
        return result._replace(warnings=said)


@dataclass(frozen=True)
class DeepFool:
    """foolbox's DeepFool (Moosavi-Dezfooli et al. 2016): white-box, L2, minimum distance.

    What it finds is pulled back along the straight line to the image, to the decision boundary.
    """

    norm: ClassVar[Norm] = "l2"
    black_box: ClassVar[bool] = False
    minimum_distance: ClassVar[bool] = True

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
                return eagerpy.astensor(_unit(gradients.raw))

        kind = {"l2": L2, "linf": foolbox.attacks.LinfPGD}[self.norm]
        attack = kind(steps=self.steps, rel_stepsize=self.relative_stepsize, random_start=True)

        def at(images: Tensor, labels: Tensor, e: float) -> Tensor:
            model = foolbox.PyTorchModel(classifier, bounds=(0, 1), device=classifier.device)
            best = images
            for _ in range(self.restarts):
                found = attack.run(model, images, labels, epsilon=e)
                fooled = (classifier.predict(found) != labels)[:, None, None, None]
                best = torch.where(fooled, found, best)
            return best

        return _run_over_grid(at, classifier, images, labels, seeds, eps, self.norm)


@dataclass(frozen=True)
class AutoAttack:
    """AutoAttack (Croce, Hein 2020): an ensemble, at fixed eps.

    Args:
        norm: "l2" or "linf".
        attacks: of "apgd-ce", "apgd-dlr", "apgd-t", "fab", "fab-t", "square"; default: the standard
            version's apgd-ce, apgd-t, fab-t and square. Those with the targeted DLR loss need four
            classes: with three, apgd-dlr and fab take their place, with two, fab alone. Images
            under 5 pixels high have no square.
        batch_size: images at once.
    """

    black_box: ClassVar[bool] = False
    minimum_distance: ClassVar[bool] = False

    norm: Norm = "l2"
    attacks: tuple[str, ...] | None = None
    batch_size: int = 250

    def run(self, classifier, images, labels, *, seeds, eps) -> AttackResult:
        """See `Attack.run`."""
        import pyautoattack

        classes = classifier(images[:1].to(classifier.device)).shape[1]
        possible = self._standard(classes)
        if images.shape[-2] < SQUARE_MIN_HEIGHT:
            possible = tuple(name for name in possible if name != "square")
        attacks = list(self.attacks or possible)
        if classes < 4 and {"apgd-t", "apgd-dlr"} & set(attacks) - set(possible):
            raise ValueError(f"{attacks} have a DLR loss, which needs more than {classes} classes")

        def at(images: Tensor, labels: Tensor, e: float) -> Tensor:
            ensemble = pyautoattack.AutoAttack(
                classifier,
                attacks=attacks,
                device=classifier.device,
                eps=e,
                norm={"l2": "L2", "linf": "Linf"}[self.norm],
                seed=seeds[0] % 2**31,
                version="custom",
            )
            # As in its standard version, with no more target classes than there are.
            ensemble.apgd.n_restarts = ensemble.fab.n_restarts = 1
            ensemble.apgd_targeted.n_target_classes = min(9, classes - 1)
            ensemble.fab.n_target_classes = min(9, classes - 1)
            with warnings.catch_warnings(), _tracing_kept():
                warnings.simplefilter("ignore")
                found, _ = ensemble.run_standard_evaluation(
                    images, labels, batch_size=self.batch_size
                )
            return found

        with _logged("auto-attack") as messages:
            result = _run_over_grid(at, classifier, images, labels, seeds, eps, self.norm)
        return result._replace(warnings=tuple(dict.fromkeys(messages)))

    @staticmethod
    def _standard(classes: int) -> tuple[str, ...]:
        if classes >= 4:
            return "apgd-ce", "apgd-t", "fab-t", "square"
        if classes == 3:
            return "apgd-ce", "apgd-dlr", "fab", "square"
        return "apgd-ce", "fab", "square"


ATTACKS: Mapping[str, Attack] = {
    "tangent": TangentAttack(),
    "hopskipjump": HopSkipJump(),
    "deepfool-l2": DeepFool(),
    "cw-l2": CarliniWagner(),
    "pgd-l2": PGD(norm="l2"),
    "pgd-linf": PGD(norm="linf"),
    "autoattack-l2": AutoAttack(norm="l2"),
    "autoattack-linf": AutoAttack(norm="linf"),
}
_PACKAGES = {"hopskipjump": "foolbox", "deepfool": "foolbox", "cw": "foolbox", "pgd": "foolbox"}


def make_attacks(names: Sequence[str] | Mapping[str, Mapping[str, Any]]) -> dict[str, Attack]:
    """Return the attacks of these names; a mapping gives settings that differ from the default.

    Raises:
        ValueError: an unknown name or setting.
        MissingPackageError: the attack's library is not installed.
    """
    wanted = names if isinstance(names, Mapping) else {name: {} for name in names}
    attacks = {}
    for name, settings in wanted.items():
        if name not in ATTACKS:
            raise ValueError(f"no attack {name!r}; there are {', '.join(ATTACKS)}")
        known = {field.name for field in fields(ATTACKS[name])} - {"norm"}
        unknown = set(settings or {}) - known
        if unknown:
            raise ValueError(
                f"{name} has no settings {sorted(unknown)}; it has {', '.join(sorted(known))}"
            )
        for key, value in (settings or {}).items():
            if isinstance(value, int | float) and not isinstance(value, bool) and not value > 0:
                raise ValueError(f"{name}: {key} ({value}) must be positive")
        package = _PACKAGES.get(name.split("-")[0], "pyautoattack" if "auto" in name else None)
        if package:
            _require(package, name)
        attacks[name] = replace(ATTACKS[name], **(settings or {}))
    return attacks


def _require(package: str, attack: str) -> None:
    try:
        __import__(package)
    except ImportError as error:
        raise MissingPackageError(
            f"{attack} needs {package}: pip install 'hf-specreg[attacks]'"
        ) from error


def _run_minimization(
    attack: Any, classifier: Classifier, images: Tensor, labels: Tensor, seeds: Sequence[int]
) -> AttackResult:
    """Run a foolbox attack of minimum distance, and pull what it found back to the boundary."""
    import foolbox

    images, labels = images.to(classifier.device), labels.to(classifier.device)
    before = classifier.queries
    model = foolbox.PyTorchModel(classifier, bounds=(0, 1), device=classifier.device)
    with _seeded(seeds, classifier):
        found = attack.run(model, images, foolbox.criteria.Misclassification(labels))
    # Where Carlini and Wagner's finds nothing, foolbox gives a black image back.
    failed = (found == 0).flatten(1).all(1) | (classifier.predict(found.nan_to_num()) == labels)
    found = torch.where(failed[:, None, None, None], images, found)
    low, high = (images.new_full((len(images), 1, 1, 1), v) for v in (0.0, 1.0))
    for _ in range(PULL_BACK_STEPS):
        middle = (low + high) / 2
        fooled = classifier.predict(torch.lerp(images, found, middle)) != labels
        fooled = fooled[:, None, None, None]
        low, high = torch.where(fooled, low, middle), torch.where(fooled, middle, high)
    nearest = torch.where(high < 1, torch.lerp(images, found, high), found)
    queries = torch.full_like(labels, (classifier.queries - before) // len(images))
    return _checked(classifier, images, labels, nearest, queries, "l2")


def _run_over_grid(
    at: Any,
    classifier: Classifier,
    images: Tensor,
    labels: Tensor,
    seeds: Sequence[int],
    eps: Sequence[float],
    norm: Norm,
) -> AttackResult:
    """Run an attack at every eps, upwards, on the images that still stand."""
    images, labels = images.to(classifier.device), labels.to(classifier.device)
    adversarials = images.clone()
    distances = torch.full((len(images),), torch.inf, device=images.device)
    queries = torch.zeros_like(labels)
    for e in sorted(eps):
        standing = distances.isinf()
        if not standing.any():
            break
        before = classifier.queries
        with _seeded(seeds, classifier):
            found = at(images[standing], labels[standing], e)
        queries[standing] += (classifier.queries - before) // int(standing.sum())
        result = _checked(
            classifier, images[standing], labels[standing], found, queries[standing], norm
        )
        within = result.distances <= e * (1 + ROUNDING)
        fallen = standing.nonzero()[within, 0]
        adversarials[fallen] = result.adversarials[within]
        distances[fallen] = e
    return AttackResult(adversarials, distances, queries)


def _unit(gradients: Tensor) -> Tensor:
    """Gradients [B, ...] with norm 1 each, however small; 0 where they are 0."""
    rows = gradients.flatten(1).double()
    norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return (rows / norms.masked_fill(norms == 0, math.inf)).to(gradients).reshape_as(gradients)


@contextmanager
def _logged(name: str) -> Iterator[list[str]]:
    """Collect what a library's logger warns of, without its pointers to files of its own."""
    messages: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage().split(" See ")[0])

    logger, collector = logging.getLogger(name), Collector(logging.WARNING)
    propagated, logger.propagate = logger.propagate, False
    logger.addHandler(collector)
    try:
        yield messages
    finally:
        logger.removeHandler(collector)
        logger.propagate = propagated


@contextmanager
def _tracing_kept() -> Iterator[None]:
    """Put the debugger's or the coverage tool's trace function back, which AutoAttack drops."""
    tracing = sys.gettrace()
    try:
        yield
    finally:
        sys.settrace(tracing)


def _checked(
    classifier: Classifier,
    images: Tensor,
    labels: Tensor,
    found: Tensor,
    queries: Tensor,
    norm: Norm,
) -> AttackResult:
    """Keep what is adversarial and a picture; the rest counts as not found."""
    found = found.detach()
    valid = in_box(found) & (classifier.predict(found.nan_to_num()) != labels)
    adversarials = torch.where(valid[:, None, None, None], found, images)
    distances = torch.where(valid, distance(images, adversarials, norm), torch.inf)
    return AttackResult(adversarials, distances, queries)


@contextmanager
def _seeded(seeds: Sequence[int], classifier: Classifier) -> Iterator[None]:
    """Draw from a stream of this batch's own, and leave the global one as it was."""
    devices = [classifier.device] if classifier.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seeds[0])
        yield


def describe(attack: Attack) -> dict[str, Any]:
    """Return an attack's settings as plain data."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(attack).items()}
