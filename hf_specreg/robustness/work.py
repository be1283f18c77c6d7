"""The stages' work over the chunks of all images: what is not done yet, by one process or several.

What a chunk gave is a file: a killed evaluation goes on where it was, and several processes share
the chunks out. What is random depends on the seed and on an image's row, or on its chunk, never on
what was done before.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from hf_specreg.data.transforms import derived_seed
from hf_specreg.robustness.chunks import EvaluationError, chunk_path, gather, write
from hf_specreg.robustness.classifier import Classifier, check_images
from hf_specreg.robustness.images import Images
from hf_specreg.robustness.stages import Chunk, Stage, clean, digests


@dataclass(frozen=True)
class Processes:
    """The processes of an evaluation, of which this is one; all need the same output folder.

    Args:
        rank: of this one.
        count: of all.
        barrier: waits for the others.

    Raises:
        EvaluationError: the rank is not below the count.
    """

    rank: int = 0
    count: int = 1
    barrier: Callable[[], None] = lambda: None

    def __post_init__(self):
        if not 0 <= self.rank < self.count:
            raise EvaluationError(
                f"rank ({self.rank}) must be from 0 to below the count of processes ({self.count})"
            )


@dataclass(frozen=True)
class Work:
    """What is to be done.

    Attributes:
        classifier: what is attacked.
        classes: how many it has.
        images: of which `images.rows` are evaluated.
        seed: of everything random.
        folder: of the chunks' files.
        processes: which share the chunks out.
        progress: show it.
    """

    classifier: Classifier
    classes: int
    images: Images
    seed: int
    folder: Path
    processes: Processes
    progress: bool

    def do(self, stages: Mapping[str, Stage], batch_size: int) -> dict[str, dict[str, np.ndarray]]:
        """Return every stage's arrays over all images, those of the clean images first."""
        first = Stage(lambda chunk: clean(self.classifier, chunk), batch_size)
        with self._shown() as show:
            results = {"clean": self._stage("clean", first, None, show)}
            for name, stage in stages.items():
                results[name] = self._stage(name, stage, results["clean"], show)
        return results

    def _stage(
        self, name: str, stage: Stage, known: Mapping[str, np.ndarray] | None, show: Progress
    ) -> dict[str, np.ndarray]:
        """Do this process's chunks of a stage, after the clean images are known; return all
        processes'.
        """
        starts = range(0, len(self.images.rows), stage.size)
        mine = starts[self.processes.rank :: self.processes.count]
        total = sum(len(self.images.rows[start : start + stage.size]) for start in mine)
        task = show.add_task(name, total=total, queries=0)
        self.classifier.queries = 0
        self.classifier.watch = lambda queries: show.update(task, queries=queries)
        for start in mine:
            path, places = chunk_path(self.folder, name, start), self._places(start, stage.size)
            if not path.exists():
                chunk = self._read(places, known)
                begun = time.perf_counter()
                arrays = stage.run(chunk)
                write(path, {**arrays, "seconds": np.array(time.perf_counter() - begun)})
            show.update(task, advance=len(places))
        self.classifier.watch = None
        self.processes.barrier()
        return gather(self.folder, name, len(self.images.rows), stage.size)

    def _places(self, start: int, size: int) -> np.ndarray:
        return np.arange(start, min(start + size, len(self.images.rows)))

    def _read(self, places: np.ndarray, known: Mapping[str, np.ndarray] | None) -> Chunk:
        rows = self.images.rows[places]
        images, labels = self.images.read(rows)
        check_images(images, labels, classes=self.classes)
        seeds = [derived_seed(self.seed, int(row)) for row in rows]
        if known is None:
            return Chunk(images, labels, seeds, places)
        if not np.array_equal(digests(images, labels), known["digest"][places]):
            raise EvaluationError(
                f"the images of rows {rows[0]} to {rows[-1]} are others than when the evaluation "
                f"began: take another output folder, or delete {self.folder}"
            )
        return Chunk(images, labels, seeds, places, torch.from_numpy(known["correct"][places]))

    @contextmanager
    def _shown(self) -> Iterator[Progress]:
        with Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("images, {task.fields[queries]:,} queries"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=not self.progress or self.processes.rank != 0,
            redirect_stdout=False,
        ) as show:
            yield show
