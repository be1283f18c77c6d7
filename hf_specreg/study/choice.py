"""The cells that are done, as arrays over seeds and images, and which of them are chosen."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hf_specreg.robustness.comparison import nearest_at_half_budget
from hf_specreg.robustness.report import UNREADABLE, RobustnessReport
from hf_specreg.study.cells import Cell, Cells, StudyRunError
from hf_specreg.study.config import STOPPED
from hf_specreg.study.folder import StudyFolder
from hf_specreg.study.measure import kept_report, nearest
from hf_specreg.study.statistics import Paired

Key = tuple[str, float | None]  # method, strength


@dataclass(frozen=True)
class Attacked:
    """What attacks found on the same images in several trainings.

    Attributes:
        distances: [S, n], the nearest over attacks; inf where nothing was found.
        correct: [S, n], bool.
        reports: of the S trainings.
    """

    distances: np.ndarray
    correct: np.ndarray
    reports: Sequence[RobustnessReport]

    def at_half_budget(self) -> np.ndarray | None:
        """Return what was found at half of the budget of every attack of minimum distance, and by
        all of the others', [S, n]; None where an attack does not tell.
        """
        halves = []
        for report in self.reports:
            attacks = {n: a for n, a in report.content["attacks"].items() if a["norm"] == "l2"}
            tells = any("distance" in attack for attack in attacks.values())
            half = nearest_at_half_budget(report, [*attacks]) if tells else None
            if half is None:
                return None
            halves.append(half)
        return np.array(halves, float)


@dataclass(frozen=True)
class Choice:
    """The strength of a method that is compared with the others.

    Attributes:
        method: its name.
        strength: None where none may be chosen.
        reason: why this one, or none.
        control: epochs of the plain network whose validation accuracy is nearest; None: that is the
            one trained to the end.
        matched: whether that one is as good, within the margin, or as good as a plain one gets.
    """

    method: str
    strength: float | None
    reason: str
    control: float | None = None
    matched: bool = False


class Results:
    """What the cells of a study gave.

    Args:
        cells: of the study.
        folder: where it is kept.
    """

    def __init__(self, cells: Cells, folder: StudyFolder):
        self.cells = cells
        self.folder = folder
        self.config = cells.config
        self.records = {cell.name: folder.record(cell.name) for cell in cells}
        self.failures = folder.failures(cell.name for cell in cells)
        self._reports: dict[Path, RobustnessReport] = {}
        self._images: dict[str, str] = {}  # hashes of those that are attacked, by split
        self.keys: list[Key] = list(dict.fromkeys((c.method, c.strength) for c in cells))

    def cells_of(self, key: Key, *, done: bool = True) -> list[Cell]:
        """Return the cells of a method and strength, by seed; those that are done, or all."""
        own = [cell for cell in self.cells if (cell.method, cell.strength) == key]
        return [cell for cell in own if not done or self.status(cell) == "done"]

    def status(self, cell: Cell) -> str:
        """Return "done", "diverged", "failed" or "missing"."""
        record = self.records[cell.name]
        if record is None:
            return "failed" if cell.name in self.failures else "missing"
        return record["status"]

    def whole(self, key: Key) -> bool:
        """Whether all seeds are done."""
        return len(self.cells_of(key)) == len(self.config.seeds)

    def unfinished(self, method: str) -> list[Key]:
        """Return a method's strengths of which a cell is still to be done."""
        return [
            key
            for key in self.keys
            if key[0] == method
            and {"missing", "failed"} & {self.status(c) for c in self.cells_of(key, done=False)}
        ]

    def values(self, key: Key, *path: str) -> np.ndarray:
        """Return a number of each training's record, [S], such as "test", "accuracy"."""
        found = []
        for cell in self.cells_of(key):
            value: Any = self.records[cell.name]
            for name in path:
                value = value[name]
            found.append(np.nan if value is None else value)
        return np.array(found, float)

    def answers(self, key: Key, split: str) -> np.ndarray:
        """Return which images of the whole split are classified correctly, bool [S, n]."""
        paths = [self.folder.cell(cell.name) / "answers.npz" for cell in self.cells_of(key)]
        return np.stack([_read(path)[f"{split}_correct"] for path in paths])

    def attacked(self, key: Key, split: str, seeds: Sequence[int] | None = None) -> Attacked:
        """Return what the attacks found.

        Args:
            key: method and strength.
            split: validation, test or final.
            seeds: of the trainings; default: all that are done.
        """
        own = [c for c in self.cells_of(key) if seeds is None or c.seed in seeds]
        paths = [self.folder.cell(c.name) / split / "robustness.json" for c in own]
        reports = [self._report(path) for path in paths]
        correct = np.stack([report.images["correct"] for report in reports])
        return Attacked(np.stack([nearest(report) for report in reports]), correct, reports)

    def pair(self, key: Key, reference: Key, split: str) -> tuple[Attacked, Attacked]:
        """Return the same for two methods, over the seeds in which both are done."""
        seeds = sorted(
            {c.seed for c in self.cells_of(key)} & {c.seed for c in self.cells_of(reference)}
        )
        return self.attacked(key, split, seeds), self.attacked(reference, split, seeds)

    def has(self, key: Key, split: str) -> bool:
        """Whether the attacks of a split were made on all networks of a method and strength, the
        final ones as they are set now.
        """
        own = self.cells_of(key)
        return bool(own) and all(self._has(cell, split) for cell in own)

    def _has(self, cell: Cell, split: str) -> bool:
        folder, evaluation = self.folder.cell(cell.name) / split, self.config.evaluation
        if split != "final":
            return (folder / "robustness.json").exists()
        attacks = {**evaluation.attacks, **evaluation.final_attacks}
        count = min(evaluation.final, self.records[cell.name]["test"]["images"])
        return kept_report(folder, attacks, count) is not None

    def reports(self, cell: Cell) -> list[RobustnessReport]:
        """Return what the attacks of every cell, and final ones if it had any, also others than are
        set now, found on the test images of a cell.
        """
        folder = self.folder.cell(cell.name)
        paths = [folder / split / "robustness.json" for split in ("test", "final")]
        return [RobustnessReport.load(path) for path in paths if path.exists()]

    def _report(self, path: Path) -> RobustnessReport:
        """The report of a cell, of the very images that the others are of."""
        if path not in self._reports:
            report = self._reports[path] = RobustnessReport.load(path)
            split = path.parent.name
            if report.content["data"]["sha256"] != self._images.setdefault(
                split, report.content["data"]["sha256"]
            ):
                raise StudyRunError(
                    f"{path.parent} is of other images than the reports before it: the data has "
                    "changed since; delete the cell, or choose another output_dir"
                )
        return self._reports[path]

    @property
    def plain(self) -> Key:
        """The network that all are compared with."""
        return self.config.plain, None

    def choices(self) -> list[Choice]:
        """Return for each method the strength with the largest distance, paired with the plain
        network's on validation images, among those that lose at most the margin there.
        """
        names = [n for n in self.cells.methods if n not in (self.config.plain, STOPPED)]
        return [self._choice(name) for name in names]

    def _choice(self, name: str) -> Choice:
        keys = [key for key in self.keys if key[0] == name and self.whole(key)]
        if not keys or not self.whole(self.plain):
            return Choice(name, None, "no strength is done with all seeds")
        goal = self.values(self.plain, "validation", "accuracy").mean()
        margin = self.config.accuracy_margin
        losses = {key: goal - self.values(key, "validation", "accuracy").mean() for key in keys}
        allowed = [key for key, loss in losses.items() if loss <= margin + 1e-9]
        if not allowed:
            least = min(losses.values())
            return Choice(
                name,
                None,
                f"no strength loses at most {100 * margin:.3g} points of accuracy: the least that "
                f"one loses is {100 * least:.3g}",
            )
        gains = {key: self._gain(key) for key in allowed}
        best = max(gains, key=gains.get)
        return Choice(
            name,
            best[1],
            f"the farthest on validation images of the {len(allowed)} of {len(keys)} strengths "
            f"that lose at most {100 * margin:.3g} points",
            *self._control(best),
        )

    def _gain(self, key: Key) -> float:
        own, reference = self.pair(key, self.plain, "validation")
        ratio = Paired(own.distances, own.correct, reference.distances, reference.correct).ratio()
        return -np.inf if ratio["value"] is None else ratio["value"]

    def _control(self, key: Key) -> tuple[float | None, bool]:
        """The plain network, stopped earlier or not, whose accuracy is nearest, and whether that
        decides: it is as good within the margin, or no plain network is better than the method.
        """
        goal = self.values(key, "validation", "accuracy").mean()
        known = [self.plain, *(k for k in self.keys if k[0] == STOPPED and self.whole(k))]
        reached = {k: self.values(k, "validation", "accuracy").mean() for k in known}
        away = {k: (round(abs(accuracy - goal), 9), accuracy) for k, accuracy in reached.items()}
        nearest = min(away, key=away.get)  # of two as near the less accurate one
        near = away[nearest][0] <= self.config.accuracy_margin + 1e-9
        return nearest[1], bool(near or goal > max(reached.values()))

    def control(self, choice: Choice) -> Key:
        """Return the plain network, stopped earlier or not, that a choice is compared with."""
        return self.plain if choice.control is None else (STOPPED, choice.control)

    def unconfirmed(self) -> list[Cell]:
        """Return those of the chosen cells on which the final attacks are still to be made."""
        return [cell for cell in self.chosen() if not self._has(cell, "final")]

    def chosen(self) -> list[Cell]:
        """Return the cells that get the final attacks: the plain network's, the chosen ones and
        their controls.
        """
        choices = [choice for choice in self.choices() if choice.strength is not None]
        keys = [self.plain, *((choice.method, choice.strength) for choice in choices)]
        keys += [self.control(choice) for choice in choices]
        return [cell for key in dict.fromkeys(keys) for cell in self.cells_of(key)]


def _read(path: Path) -> Mapping[str, np.ndarray]:
    """The arrays of a cell's file."""
    try:
        return dict(np.load(path))
    except UNREADABLE as error:
        raise StudyRunError(
            f"{path} cannot be read ({error}): delete its folder, and the same command makes it "
            "again"
        ) from error
