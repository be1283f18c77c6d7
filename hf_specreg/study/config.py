"""The configuration of a study: a recipe, methods with a grid of strengths each, seeds."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from hf_specreg.ranges import require

STOPPED = "stopped earlier"
NAME = r"[^|<>\r\n]{1,60}"  # of a method or a study: what fits into the cell of a table


@dataclass(frozen=True)
class MethodConfig:
    """A method: which setting of the recipe is its strength, and what else it sets.

    Args:
        key: of the recipe's configuration, dotted, that takes the strengths, such as
            penalty.strength; none where they stand in the settings alone.
        strengths: that are tried; none for the plain network.
        settings: further keys of the recipe's configuration; "{strength}" and "{seed}" in a text
            stand for the cell's, as in the folder of another study's network.
    """

    key: str | None = None
    strengths: tuple[float, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        taken = self.key or "{strength}" in str(self.settings)
        if bool(taken) != bool(self.strengths):
            raise ValueError(
                f"strengths ({list(self.strengths)}) go with a key ({self.key}) that takes them, "
                "or with {strength} in the settings"
            )
        if len(set(self.strengths)) < len(self.strengths):
            raise ValueError(f"strengths ({list(self.strengths)}) name one twice")
        if not all(map(math.isfinite, self.strengths)):
            raise ValueError(f"strengths ({list(self.strengths)}) must be finite")


@dataclass(frozen=True)
class EvaluationConfig:
    """How each cell is evaluated: on the same images, drawn by the same seed.

    Args:
        attacks: of every cell, on validation and on test images, from each one's name to its
            settings.
        final_attacks: of the cells that are chosen and of what they are compared with, beside
            those; on test images. Without any there is no table of them, and masked gradients are
            looked for all the same.
        eps: L2 radii, in [0, 1] pixels, at which robust accuracy is stated.
        validation: how many validation images are attacked.
        test: how many test images are attacked.
        final: how many test images are attacked by all attacks.
        seed: of the draw and of the attacks.
        batch_size: images attacked at once.
        channels_last: attack networks whose weights are in torch.channels_last, which can be faster
            for convolutions, and is the same up to rounding.
        ood: another image set, whose images are to be told from the test images by how sure the
            classifier is; its test split, or the training split where it has none.
        ood_classes: of that set; default: all.
        timing_steps: optimizer steps of each method that are timed, against the plain network's in
            turn; 0: none.
    """

    attacks: dict[str, dict[str, Any]] = field(default_factory=lambda: {"fmn-l2": {}})
    final_attacks: dict[str, dict[str, Any]] = field(default_factory=dict)
    eps: tuple[float, ...] = (0.25, 0.5, 1.0)
    validation: int = 500
    test: int = 1000
    final: int = 200
    seed: int = 0
    batch_size: int = 250
    channels_last: bool = False
    ood: str | None = None
    ood_classes: tuple[str, ...] = ()
    timing_steps: int = 20

    def __post_init__(self):
        require(self, "at least 1", "validation", "test", "final", "batch_size")
        require(self, "not negative", "seed", "timing_steps")
        if self.ood_classes and not self.ood:
            raise ValueError("ood_classes are of the image set `ood`, and none is given")
        if set(self.attacks) & set(self.final_attacks):
            raise ValueError("final_attacks come beside attacks: name each once")
        if not self.eps or len(set(self.eps)) < len(self.eps):
            raise ValueError(f"eps ({list(self.eps)}) must be there, each once")


@dataclass(frozen=True)
class StudyConfig:
    """A comparison of methods over strengths and seeds.

    The first method is what all are compared with: the plain network, without a strength. A network
    like it that is trained for fewer epochs, with the learning rates of so long a training, is
    always one of the methods, as the control: what does a method give that training less does not?

    Args:
        base: a configuration of the recipe, a file or one's name, from which each cell differs by
            its method, strength and seed.
        methods: by name; the first has no strengths.
        recipe: how cells are trained.
        output_dir: folder of the study, which several workers may share.
        description: what it asks, in a sentence or two.
        settings: keys of the recipe's configuration that are unlike `base` in all cells.
        seeds: of the trainings.
        stopped_epochs: how long the control is trained; default: 1/4, 1/2 and 3/4 of the epochs.
        accuracy_margin: what a method may lose against the plain network, as a fraction of the
            validation images, to be chosen.
        pairs: of methods, by their names, that are compared directly, each at its chosen strength.
        evaluation: of each cell.
    """

    base: str
    methods: dict[str, MethodConfig]
    recipe: Literal["supervised", "self_supervised", "transfer"] = "supervised"
    output_dir: str = "runs/study"
    description: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    seeds: tuple[int, ...] = (0, 1, 2)
    stopped_epochs: tuple[int, ...] = ()
    accuracy_margin: float = 0.005
    pairs: tuple[tuple[str, str], ...] = ()
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def __post_init__(self):
        require(self, "in [0, 1]", "accuracy_margin")
        self._check_names()
        if not self.methods or next(iter(self.methods.values())).strengths:
            raise ValueError("the first of the methods is the plain network: without strengths")
        for name, method in list(self.methods.items())[1:]:
            if not method.strengths:
                raise ValueError(f"method {name!r} has no strengths: only the first has none")
        if STOPPED in self.methods:
            raise ValueError(f"{STOPPED!r} is always there: its epochs are stopped_epochs")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds ({list(self.seeds)}) must be there, each once")
        self._check_pairs()

    def _check_names(self) -> None:
        """That what came out can be written down in the end."""
        folder = Path(self.output_dir).name
        for what, name in (("output_dir", folder), *(("methods", name) for name in self.methods)):
            if not re.fullmatch(NAME, name):
                raise ValueError(
                    f"{what}: {name!r} must have 1 to 60 letters, and no |, <, > or line break: it "
                    "stands in tables"
                )

    def _check_pairs(self) -> None:
        others = [name for name in self.methods if name != self.plain]
        for pair in self.pairs:
            if len(set(pair)) < 2 or not set(pair) <= set(others):
                raise ValueError(f"pairs: {list(pair)} must be two of {', '.join(others)}")
        if len({frozenset(pair) for pair in self.pairs}) < len(self.pairs):
            raise ValueError(f"pairs ({list(map(list, self.pairs))}) name one twice")

    @property
    def plain(self) -> str:
        """The name of the method that all are compared with."""
        return next(iter(self.methods))


def dotted(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings by their dotted keys; what is a mapping in the end stays one."""
    found = {}
    for key, value in settings.items():
        if isinstance(value, Mapping) and key not in ("options", "args", "init_kwargs"):
            found |= dotted(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found
