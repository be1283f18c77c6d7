"""What a worker does: one cell after the other, as long as there is one that nobody has."""

import shutil
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

from rich.console import Console

from hf_specreg.data.datasets import build_splits
from hf_specreg.encoders.checksum import weights_sha256
from hf_specreg.encoders.model import SpecRegModel
from hf_specreg.study.cells import Cell, Cells, StudyRunError
from hf_specreg.study.folder import FAILED, StudyFolder, read_json, write_json
from hf_specreg.study.measure import Evaluation, kept_report
from hf_specreg.study.timing import time_methods, timed_methods
from hf_specreg.training.checkpoints import CheckpointError
from hf_specreg.training.metrics import DivergedError
from hf_specreg.training.probe import CollapsedError
from hf_specreg.training.resume import MAY_CHANGE, changes_of_the_run

# A full disk, a Hub that is silent: would stop the next cell too. A network that a cell's settings
# name and that is not there does not.
STOPPING = (OSError, StudyRunError, CheckpointError)
MOST_TOLD = 500  # letters of an error
POLL = 2.0  # seconds between two looks at cells that others have


@dataclass(frozen=True)
class Task:
    """Something that one worker does.

    Attributes:
        label: for people.
        folder: that is claimed.
        done: whether there is what it leaves.
        do: it; returns what is said of it.
    """

    label: str
    folder: Path
    done: Callable[[], bool]
    do: Callable[[], str]


class Worker:
    """Trains and evaluates the cells of a study that no other worker has.

    Args:
        cells: of the study.
        folder: that the workers share.
        limit: of cells that this one does; default: none.
    """

    def __init__(self, cells: Cells, folder: StudyFolder, *, limit: int | None = None):
        self.cells = cells
        self.folder = folder
        self.limit = limit
        # Of what failed before; what fails from now on, with any worker, is not tried again.
        before = [*folder.path.glob(f"cells/*/{FAILED}"), folder.path / "timing" / FAILED]
        self.failures = {path: path.stat().st_mtime_ns for path in before if path.exists()}
        self.console = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)
        self.evaluation = Evaluation.of(cells.config.evaluation, build_splits(cells.plain.data))

    def run(self, chosen: Callable[[], list[Cell]]) -> None:
        """Work until nothing is left, or what is left waits for cells beyond the limit.

        What fails otherwise than by diverging is written down and left for the next time.

        Args:
            chosen: the cells that get the final attacks, once all cells are done or failed.
        """
        count = 0
        while count != self.limit:
            outcome = self._next([self._training(cell) for cell in self.cells])
            count += outcome == "did"
            if outcome == "nothing":
                break
        trainings = [self._training(cell) for cell in self.cells]
        if all(task.done() or self._failed(task) for task in trainings):
            for tasks in ([self._final(cell) for cell in chosen()], self._timing()):
                while self._next(tasks) != "nothing":
                    pass

    def _next(self, tasks: list[Task]) -> str:
        """Do one task: "did"; "waited" for other workers; or "nothing" is left."""
        left = [task for task in tasks if not (self._failed(task) or task.done())]
        for task in left:
            with self.folder.claimed(task.folder) as mine:
                if not mine or task.done() or self._failed(task):
                    continue
                start = time.perf_counter()
                try:
                    said = task.do()
                    (task.folder / FAILED).unlink(missing_ok=True)
                except Exception as error:
                    if isinstance(error, STOPPING) and not isinstance(error, FileNotFoundError):
                        raise
                    reason = f"{type(error).__name__}: {str(error)[:MOST_TOLD]}"
                    said = f"failed: {reason} (see {task.folder})"
                    write_json(task.folder / FAILED, {"task": task.label, "reason": reason})
                    with (task.folder / "log.txt").open("a") as log:
                        traceback.print_exc(file=log)
                self._say(task.label, said, time.perf_counter() - start, tasks)
                return "did"
        if left:
            time.sleep(POLL)
            return "waited"
        return "nothing"

    def _failed(self, task: Task) -> bool:
        """Whether it failed since this worker began."""
        path = task.folder / FAILED
        try:
            return path.stat().st_mtime_ns != self.failures.get(path)
        except FileNotFoundError:
            return False

    def _say(self, label: str, said: str, seconds: float, tasks: list[Task]) -> None:
        done = sum(task.done() for task in tasks)
        self.console.print(f"{done} of {len(tasks)}: {label}: {said}, {seconds:.0f} s")

    def _training(self, cell: Cell) -> Task:
        folder = self.folder.cell(cell.name)
        path = folder / "cell.json"
        return Task(cell.label, folder, path.exists, lambda: self._train(cell, folder))

    def _train(self, cell: Cell, folder: Path) -> str:
        output = folder / "run"
        config = replace(cell.run, output_dir=str(output))
        about = {"method": cell.method, "strength": cell.strength, "seed": cell.seed}
        about["run"] = config.as_dict()
        classifier = output / self.cells.recipe.classifier
        start = time.perf_counter()
        try:
            with said_to(folder / "log.txt"):
                known = read_json(folder / "trained.json")
                if known is None:
                    result = self.cells.recipe.train(config, resume=True)
                    known = {
                        "run": about["run"],
                        "seconds": time.perf_counter() - start,
                        "metrics": result.metrics,
                    }
                    write_json(folder / "trained.json", known)
        except (DivergedError, CollapsedError) as error:
            write_json(folder / "cell.json", {**about, "status": "diverged", "reason": str(error)})
            shutil.rmtree(output / "checkpoints", ignore_errors=True)
            return f"diverged: {error}"
        begun = time.perf_counter()
        measured = self.evaluation.measure(classifier, folder)
        record = {
            **about,
            "status": "done",
            "reason": None,
            "weights_sha256": weights_sha256(SpecRegModel.from_pretrained(classifier)),
            "train_images": len(self.evaluation.splits.train),
            "sum_sigma2": known["metrics"]["sum_sigma2"],
            "train_seconds": known["seconds"],
            "evaluate_seconds": time.perf_counter() - begun,
            **measured,
        }
        for name in ("checkpoints", "best"):
            shutil.rmtree(output / name, ignore_errors=True)
        write_json(folder / "cell.json", record)
        test = measured["test"]
        distance = "none" if test["distance"] is None else f"{test['distance']:.4g}"
        return f"accuracy {test['accuracy']:.2%}, mean distance {distance}"

    def _final(self, cell: Cell) -> Task:
        """All attacks on fewer of the test images; without any final ones, those of every cell once
        more, for the look at masked gradients that goes with them.
        """
        config, folder = self.cells.config.evaluation, self.folder.cell(cell.name)
        attacks = {**config.attacks, **config.final_attacks}
        model = folder / "run" / self.cells.recipe.classifier

        def do() -> str:
            report = self.evaluation.attack(
                model, folder / "final", "test", attacks, samples=config.final, masking=True
            )
            return f"{report.content['n']} images, {', '.join(attacks)}"

        def done() -> bool:
            count = min(config.final, len(self.evaluation.splits.test))
            return kept_report(folder / "final", attacks, count) is not None

        return Task(f"all attacks on {cell.label}", folder, done, do)

    def _timing(self) -> list[Task]:
        """What a step of each method costs, in one process, in turn."""
        path = self.folder.path / "timing.json"
        if not self.cells.config.evaluation.timing_steps:
            return []

        def do() -> str:
            with said_to(path.with_suffix(".txt")):
                images = len(self.evaluation.splits.train)
                found = time_methods(self.cells, path.with_name("timing"), images=images)
            write_json(path, found)
            return "seconds of a step"

        def done() -> bool:
            return timed_methods(self.cells).keys() <= (read_json(path) or {}).keys()

        return [Task("timing", path.with_name("timing"), done, do)]


@contextmanager
def said_to(path: Path) -> Iterator[None]:
    """Let what is printed within go to a file."""
    with path.open("a") as file, redirect_stdout(file), redirect_stderr(file):
        yield


def check_records(cells: Cells, folder: StudyFolder) -> None:
    """See that what is done was trained as the study says now.

    Raises:
        StudyRunError: a cell was trained with other settings, by name.
    """
    for cell in cells:
        place = folder.cell(cell.name)
        record = read_json(place / "cell.json") or read_json(place / "trained.json")
        if record is None:
            continue
        # A probe on the features is a part of what is attacked.
        free = [name for name in MAY_CHANGE if name != "probe."]
        changed = changes_of_the_run(record["run"], cell.run, free=free)
        if changed:
            raise StudyRunError(
                f"{folder.cell(cell.name)} was trained with other settings (there and here): "
                f"{'; '.join(changed)}; delete it, or choose another output_dir"
            )


def expected_seconds(cells: Cells, folder: StudyFolder) -> dict[str, float | None]:
    """Return how long each cell took or is expected to take, by name; None while none is done.

    What is expected is the mean of the method's cells that are done, else of all methods', for as
    many epochs.
    """
    rates: dict[str, list[float]] = {}
    for cell in cells:
        record = folder.record(cell.name)
        if record and record["status"] == "done":
            seconds = record["train_seconds"] + record["evaluate_seconds"]
            rates.setdefault(cell.method, []).append(seconds / cell.run.epochs)
    every = [rate for own in rates.values() for rate in own]
    found = {}
    for cell in cells:
        own = rates.get(cell.method, every)
        found[cell.name] = sum(own) / len(own) * cell.run.epochs if own else None
    return found


def left(seconds: float) -> str:
    """A length of time for people."""
    return str(timedelta(seconds=round(seconds)))
