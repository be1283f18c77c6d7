"""Checkpoints that are whole or not there: written beside, checked by hash, renamed into place.

checkpoints/step_00000120/
    model/           a folder that SpecRegModel.from_pretrained loads
    state/           accelerate's state: weights, optimizer, random numbers
    penalty.safetensors, ema.safetensors    the penalty's vectors; the averaged weights, if any
    progress.json    step, epoch, batch, best accuracy, configuration, precision and processes
    manifest.json    size and SHA-256 of every other file, written last
"""

import functools
import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from hf_specreg.ranges import require

logger = logging.getLogger(__name__)
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class CheckpointConfig:
    """What is kept.

    Args:
        every_epochs: epochs between two checkpoints.
        every_steps: optimizer steps between two checkpoints; default: none within an epoch.
        keep: how many checkpoints are kept, the latest; the best model by validation accuracy is
            kept beside them.
    """

    every_epochs: int = 1
    every_steps: int | None = None
    keep: int = 2

    def __post_init__(self):
        require(self, "at least 1", "every_epochs", "every_steps", "keep")


class CheckpointError(RuntimeError):
    """There is no checkpoint to go on from, or it belongs to another run."""


def save_checkpoint(
    folder: Path, step: int, progress: dict[str, Any], write: Callable[[Path], None], *, keep: int
) -> Path:
    """Write a checkpoint and remove all but the latest.

    Args:
        folder: of all checkpoints.
        step: that it is of; its name.
        progress: JSON-serialisable.
        write: writes everything else into the folder it is given.
        keep: so many of the latest.

    Raises:
        CheckpointError: the disk is full or read-only; the earlier checkpoints are untouched.
    """
    final = folder / f"step_{step:08d}"

    def write_all(into: Path) -> None:
        write(into)
        (into / "progress.json").write_text(json.dumps(progress, indent=2, allow_nan=False))
        files = sorted(p for p in into.rglob("*") if p.is_file())
        manifest = {str(p.relative_to(into)): _fingerprint(p) for p in files}
        (into / MANIFEST).write_text(json.dumps(manifest, indent=2))

    with naming_the_last_good(folder, step):
        replace_folder(final, write_all)
    others = [p for p in all_checkpoints(folder) if p != final]
    later = [p for p in others if p.name > final.name]  # of a run that went on from an earlier one
    earlier = [p for p in others if p.name < final.name]
    for old in later + earlier[: len(earlier) - keep + 1]:
        shutil.rmtree(old)
    return final


@contextmanager
def naming_the_last_good(folder: Path, step: int) -> Iterator[None]:
    """Turn a full or read-only disk into a CheckpointError that says what is left to go on from."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        # torch.save has a RuntimeError for a disk that is full.
        of_the_disk = any(word in str(error) for word in ("PytorchStreamWriter", "inline_contain"))
        if isinstance(error, RuntimeError) and not of_the_disk:
            raise
        free = shutil.disk_usage(folder.parent).free / 2**20
        raise CheckpointError(
            f"the checkpoint of step {step} could not be written to {folder} ({free:.1f} MiB are "
            f"free there): {error}; the last good one is {latest_checkpoint(folder) or 'none'}. "
            "Free some space, then resume"
        ) from error


def replace_folder(final: Path, write: Callable[[Path], None]) -> None:
    """Write a folder beside, then put it in the place of the one that may be there.

    A process that is killed leaves the old folder, or for a moment its copy `.NAME.old`.
    """
    partial, old = (final.parent / f".{final.name}.{word}" for word in ("partial", "old"))
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        write(partial)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if final.exists():
        shutil.rmtree(old, ignore_errors=True)
        final.rename(old)
    partial.rename(final)
    shutil.rmtree(old, ignore_errors=True)


def all_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints' folders, oldest first, whole or not."""
    return sorted(p for p in folder.glob("step_*") if p.is_dir())


def latest_checkpoint(folder: Path) -> Path | None:
    """Return the latest checkpoint that is whole; say of every later one what is wrong with it."""
    for checkpoint in reversed(all_checkpoints(folder)):
        fault = find_fault(checkpoint)
        if fault is None:
            return checkpoint
        logger.warning(
            "checkpoint %s is not whole (%s): using the one before it", checkpoint, fault
        )
    return None


def find_fault(checkpoint: Path) -> str | None:
    """Return what is wrong with a checkpoint; None if it is whole.

    Its files are read once a process, and again if their size or time has changed since.
    """
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        return f"{MANIFEST}: {error}"
    for name, expected in manifest.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        stat = path.stat()
        if _fingerprint_once(path, stat.st_size, stat.st_mtime_ns) != expected:
            return f"{name} was cut short or changed"
    return None


def read_progress(checkpoint: Path) -> dict[str, Any]:
    """Return what `save_checkpoint` was given as progress."""
    return json.loads((checkpoint / "progress.json").read_text())


@functools.cache
def _fingerprint_once(path: Path, size: int, changed_ns: int) -> dict[str, Any]:
    return _fingerprint(path)


def _fingerprint(path: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return {"size": path.stat().st_size, "sha256": digest.hexdigest()}
