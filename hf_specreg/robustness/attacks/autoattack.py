"""AutoAttack of its authors (Croce, Hein, ICML 2020), at fixed eps."""

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from hf_specreg.robustness.attacks.attack import over_grid
from hf_specreg.robustness.threat import AttackResult, Norm

PARTS = ("apgd-ce", "apgd-dlr", "apgd-t", "fab", "fab-t", "square")


@dataclass(frozen=True)
class AutoAttack:
    """AutoAttack (Croce, Hein 2020): an ensemble, at fixed eps.

    Args:
        norm: "l2" or "linf".
        attacks: of "apgd-ce", "apgd-dlr", "apgd-t", "fab", "fab-t", "square"; default: the standard
            version's apgd-ce, apgd-t, fab-t and square. Those with the targeted DLR loss need four
            classes: with three, apgd-dlr and fab take their place, with two, fab alone. Square is
            left out, with a warning, of images that its first tiles do not fit, such as 24x24 in
            L2, or that are under 5 pixels high.
        batch_size: images at once.

    Raises:
        ValueError: an attack that is none of these.
    """

    black_box: ClassVar[bool] = False
    minimum_distance: ClassVar[bool] = False
    package: ClassVar[str] = "pyautoattack"

    norm: Norm = "l2"
    attacks: tuple[str, ...] | None = None
    batch_size: int = 250

    def __post_init__(self):
        if unknown := [name for name in self.attacks or () if name not in PARTS]:
            raise ValueError(f"attacks {unknown} are none of AutoAttack's: {', '.join(PARTS)}")

    def run(self, classifier, images, labels, *, seeds, eps) -> AttackResult:
        """See `Attack.run`."""
        import pyautoattack

        classes = classifier(images[:1].to(classifier.device)).shape[1]
        possible, said = self._standard(classes), []
        attacks = list(self.attacks or possible)
        if "square" in attacks and not _has_square(self.norm, *images.shape[-2:]):
            attacks.remove("square")
            height, width = images.shape[-2:]
            said.append(f"square was left out: its first tiles do not fit {height}x{width} pixels")
            if not attacks:
                raise ValueError(f"{said[0]}, and it is the only attack of {self.attacks}")
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
            result = over_grid(at, classifier, images, labels, seeds, eps, self.norm)
        return result._replace(warnings=tuple(dict.fromkeys(said + messages)))

    @staticmethod
    def _standard(classes: int) -> tuple[str, ...]:
        if classes >= 4:
            return "apgd-ce", "apgd-t", "fab-t", "square"
        if classes == 3:
            return "apgd-ce", "apgd-dlr", "fab", "square"
        return "apgd-ce", "fab", "square"


def _has_square(norm: Norm, height: int, width: int) -> bool:
    """Whether Square can be run: in L2 it starts with tiles of a fifth of the height, from the
    same margin at the top and at the left, each of which must be whole.
    """
    side = height // 5
    if norm == "linf" or side < 2:
        return side > 0
    margin = (height - 5 * side) // 2
    return all(margin + length // side * side <= length for length in (height, width))


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
