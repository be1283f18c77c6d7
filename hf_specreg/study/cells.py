"""The cells of a study: which trainings it is made of, and that each is what it claims to be."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from hf_specreg.configs import find_config
from hf_specreg.robustness.attacks import ATTACKS, Attack, make_attacks
from hf_specreg.robustness.evaluate import check_settings
from hf_specreg.study.config import STOPPED, MethodConfig, StudyConfig, dotted
from hf_specreg.training.config import RunConfig
from hf_specreg.training.metrics import TrainingResult

SEED = "{seed}"  # in a text of the settings


class StudyRunError(ValueError):
    """A study that cannot be run as it was asked for, with what to do."""


@dataclass(frozen=True)
class Recipe:
    """How a cell is trained.

    Attributes:
        name: of the recipe.
        parse: arguments of its command line -> its configuration; raises ValueError.
        train: (configuration, resume=) -> the result.
        classifier: the folder in its output that holds the classifier to attack.
    """

    name: str
    parse: Callable[[Sequence[str]], RunConfig]
    train: Callable[..., TrainingResult]
    classifier: str = "model"


@dataclass(frozen=True)
class Cell:
    """One training.

    Attributes:
        method: its name.
        strength: of the method; None for the plain network.
        seed: of the training.
        run: the recipe's configuration of it.
    """

    method: str
    strength: float | None
    seed: int
    run: RunConfig

    @property
    def name(self) -> str:
        """Of its folder."""
        method = re.sub(r"[^\w.-]+", "-", self.method)
        strength = "" if self.strength is None else f"_{self.strength:g}"
        return f"{method}{strength}_seed{self.seed}"

    @property
    def label(self) -> str:
        """For people."""
        strength = "" if self.strength is None else f" {self.strength:g}"
        return f"{self.method}{strength}, seed {self.seed}"


class Cells(Sequence[Cell]):
    """All cells of a study, checked before any compute is spent; seeds are the outer loop, so that
    an unfinished study has all methods of its first seeds, which `--seeds` compares.

    Args:
        config: of the study.
        recipe: that trains them.

    Raises:
        StudyRunError: a key that the recipe does not have, a strength that changes nothing, a
            method with data of its own, attacks without a minimum distance in L2.
    """

    def __init__(self, config: StudyConfig, recipe: Recipe):
        self.config = config
        self.recipe = recipe
        check_settings(
            {**config.evaluation.attacks, **config.evaluation.final_attacks},
            {"l2": config.evaluation.eps},
        )
        _check_distances(config.evaluation.attacks)
        self._cells = [
            Cell(method, strength, seed, self._of_seed(method, strength, seed))
            for seed in config.seeds
            for method, strength in self._runs
        ]
        names = [cell.name for cell in self._cells]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise StudyRunError(f"two methods would share the folders {twice}: rename one")

    def __getitem__(self, place):
        return self._cells[place]

    def __len__(self) -> int:
        return len(self._cells)

    @property
    def plain(self) -> RunConfig:
        """The configuration of the network that all are compared with."""
        return self._runs[self.config.plain, None]

    @cached_property
    def methods(self) -> dict[str, MethodConfig]:
        """All methods by name, the control after the plain network."""
        methods = dict(self.config.methods)
        plain = methods.pop(self.config.plain)
        epochs = self._parsed(plain, None, self.config.plain).epochs
        quarters = {epochs * part // 4 for part in (1, 2, 3)} - {0}
        stopped = self.config.stopped_epochs or tuple(sorted(quarters))
        if not stopped or not all(1 <= e < epochs for e in stopped):
            raise StudyRunError(
                f"stopped_epochs ({list(stopped)}) must be there, and below the {epochs} epochs: "
                "the plain network that is trained for fewer is the control of a study"
            )
        control = MethodConfig("epochs", stopped, plain.settings)
        return {self.config.plain: plain, STOPPED: control, **methods}

    @cached_property
    def _runs(self) -> dict[tuple[str, float | None], RunConfig]:
        """The recipe's configuration by method and strength."""
        runs: dict[tuple[str, float | None], RunConfig] = {}
        for name, method in self.methods.items():
            for strength in method.strengths or (None,):
                run = self._parsed(method, strength, name)
                label = name if strength is None else f"{name} {strength:g}"
                same = [key for key, other in runs.items() if _plain(run) == _plain(other)]
                if same:
                    other, at = same[0]
                    raise StudyRunError(
                        f"{label} changes nothing: its settings are those of {other}"
                        + ("" if at is None else f" {at:g}")
                    )
                if runs and run.data != next(iter(runs.values())).data:
                    raise StudyRunError(
                        f"{label} has data of its own: all cells of a study have the same images"
                    )
                runs[name, strength] = run
        return runs

    @cached_property
    def _base(self) -> str:
        """The file of the configuration that all cells share."""
        try:
            return find_config(self.config.base)
        except ValueError as error:
            raise StudyRunError(f"base: {error}") from error

    def _of_seed(self, method: str, strength: float | None, seed: int) -> RunConfig:
        """The recipe's configuration of a cell."""
        run = self._runs[method, strength]
        if any(SEED in str(value) for value in self._settings(self.methods[method]).values()):
            run = self._parsed(self.methods[method], strength, method, seed)
        return replace(run, seed=seed)

    def _settings(self, method: MethodConfig) -> dict[str, Any]:
        return {**dotted(self.config.settings), **dotted(method.settings)}

    def _parsed(
        self, method: MethodConfig, strength: float | None, name: str, seed: int | None = None
    ) -> RunConfig:
        settings = self._settings(method)
        if method.key is not None:
            # A count, such as epochs, is written without its fraction.
            settings[method.key] = int(strength) if strength == int(strength) else strength
        arguments = ["--config", self._base]
        for key, value in settings.items():
            if isinstance(value, bool):  # YAML's of mixed_precision: no
                value = "yes" if value else "no"
            written = value if isinstance(value, str) else json.dumps(value)
            if strength is not None:
                written = written.replace("{strength}", f"{strength:g}")
            if seed is not None:
                written = written.replace(SEED, str(seed))
            arguments += [f"--{key}", written]
        try:
            run = self.recipe.parse(arguments)
        except ValueError as error:
            raise StudyRunError(f"method {name!r}: {error}") from error
        if hasattr(run, "report"):  # the study attacks the cells itself
            run = replace(run, report=replace(run.report, samples=0))
        return run


def _check_distances(attacks: Mapping[str, Any]) -> None:
    """See that the attacks of every cell find what methods are compared by."""

    def finds_them(attack: Attack) -> bool:
        return attack.norm == "l2" and attack.minimum_distance

    if not any(map(finds_them, make_attacks(attacks).values())):
        known = ", ".join(name for name, attack in ATTACKS.items() if finds_them(attack))
        raise StudyRunError(
            f"evaluation.attacks ({', '.join(attacks) or 'none'}) find no minimum distances in L2, "
            f"which methods are compared by: add one of {known}"
        )


def _plain(run: RunConfig) -> dict[str, Any]:
    return json.loads(json.dumps({**run.as_dict(), "seed": 0, "output_dir": ""}))
