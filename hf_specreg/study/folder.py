"""The folder of a study, which several workers share: what is done, and who does what.

    study/
        settings.json       of the study; another one in the same folder is refused
        cells/NAME/
            run/            what the recipe leaves: checkpoints while it trains, then the model
            log.txt         what the recipe said
            validation/, test/, final/    a robustness report each
            answers.npz     which images of the whole splits are classified correctly
            cell.json       what was measured: written last, so a cell that has one is done
            failed.json     what failed and why, until the same command has done it
        timing.json         seconds of a step of each method; timing/failed.json as above
        study.json, ...     what came out

A cell is claimed by a lock on a file, which the system takes back from a process that dies: a
dead worker's cell is taken up by another, and goes on from its last checkpoint. On several nodes
the file system must know locks over nodes (NFS 4 does, Lustre where it is mounted with `flock`).
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from hf_specreg.robustness.documents import to_json, write_whole
from hf_specreg.study.cells import StudyRunError
from hf_specreg.study.config import MethodConfig, StudyConfig
from hf_specreg.training.resume import differences

# What changes no cell, or is looked at cell by cell: a cell's record has its whole configuration.
MAY_CHANGE = ("output_dir:", "description:", "base:", "pairs:")
MAY_CHANGE += ("evaluation.final", "evaluation.timing_steps:")
FAILED = "failed.json"
MAY_GROW = ("methods", "seeds", "stopped_epochs")  # further cells are no other study


class StudyFolder:
    """Where a study is kept.

    Args:
        path: of the folder.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)

    def begin(self, config: StudyConfig) -> None:
        """Write down what the study is.

        Raises:
            StudyRunError: the folder holds another, see `check`.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with self.claimed(self.path, wait=True):
            self.check(config)
            write_json(self.path / "settings.json", asdict(config))

    def check(self, config: StudyConfig) -> None:
        """Refuse a folder that holds another study.

        Raises:
            StudyRunError: other settings than when the study began, by name.
        """
        known = read_json(self.path / "settings.json")
        if known is None:
            return
        settings, default = (
            json.loads(json.dumps(asdict(c)))
            for c in (config, StudyConfig(config.base, {config.plain: MethodConfig()}))
        )
        evaluation = {**default["evaluation"], **known.get("evaluation", {})}
        known = {**default, **known, "evaluation": evaluation}  # of an older version
        if changed := _changes(known, settings):
            raise StudyRunError(
                f"{self.path} holds a study with other settings (there and here): "
                f"{'; '.join(changed)}; choose another output_dir"
            )

    def cell(self, name: str) -> Path:
        """Return the folder of a cell."""
        return self.path / "cells" / name

    def record(self, name: str) -> dict[str, Any] | None:
        """Return what was measured of a cell; None where it is not done."""
        return read_json(self.cell(name) / "cell.json")

    def failures(self, cells: Iterable[str]) -> dict[str, dict[str, str]]:
        """Return what failed and was not done since, by its folder's name, "timing" among them:
        "task", for people, and "reason".

        Args:
            cells: the names of those that count.
        """
        folders = [*map(self.cell, cells), self.path / "timing"]
        found = {folder.name: read_json(folder / FAILED) for folder in folders}
        return {name: failure for name, failure in found.items() if failure is not None}

    @contextmanager
    def claimed(self, folder: Path, *, wait: bool = False) -> Iterator[bool]:
        """Within, no other process has this folder's claim; False where one has it already."""
        folder.mkdir(parents=True, exist_ok=True)
        # A lock that is merely a file would outlive a process that dies.
        lock = FileLock(folder / ".claim", blocking=wait, fallback_to_soft=False)
        try:
            lock.acquire()
        except Timeout:
            yield False
            return
        try:
            yield True
        finally:
            lock.release()


def read_json(path: Path) -> dict[str, Any] | None:
    """Return what a file holds; None where there is none.

    Raises:
        StudyRunError: it cannot be read.
    """
    try:
        return json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise StudyRunError(
            f"{path} cannot be read ({error}): delete it, and the same command makes it again"
        ) from error


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a file, whole or not at all.

    Raises:
        StudyRunError: the disk is full or read-only.
    """
    try:
        write_whole({path: to_json(content)})
    except OSError as error:
        raise StudyRunError(
            f"{path} cannot be written ({error}); what is done is kept, and the same command goes "
            "on from there"
        ) from error


def _changes(known: Mapping[str, Any], settings: Mapping[str, Any]) -> list[str]:
    """In what a study differs from the one that was begun, but for further cells."""
    before, now = dict(known), dict(settings)
    for key in MAY_GROW:
        before.pop(key), now.pop(key)
    found = [d for d in differences(before, now) if not d.startswith(MAY_CHANGE)]
    for name, method in known["methods"].items():
        here = settings["methods"].get(name)
        if here is None:
            found.append(f"methods.{name}: there and not here")
        elif [method["key"], method["settings"]] != [here["key"], here["settings"]]:
            found += differences(method, here, f"methods.{name}.")
    return found
