"""The folder of an evaluation: what each stage gave for each chunk of images, one file each.

A file is there whole or not at all, so that an evaluation goes on where it was stopped, and several
processes can share the chunks out.
"""

import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np


class EvaluationError(ValueError):
    """An evaluation that cannot be done as it was asked for, with what to do."""


def claim(folder: Path, settings: dict[str, Any], first: bool, barrier: Callable[[], None]) -> None:
    """Write down what the chunks are of; refuse a folder that holds others. Attacks that it holds
    chunks of stay known to it, whichever are asked for.
    """
    path = folder / "settings.json"
    settings = json.loads(json.dumps(settings))
    if first:
        with suppress(EvaluationError):  # which all processes raise after the barrier
            known = _known(path) if path.exists() else settings
            if not _changed(settings, known):
                _write_down(path, settings, known["attacks"])
    barrier()
    known = _known(path)
    if changed := _changed(settings, known):
        raise EvaluationError(
            f"{folder} holds an evaluation with other {', '.join(changed)}: take another output "
            "folder, or delete this one"
        )
    for name, own in settings["attacks"].items():
        if own != known["attacks"].get(name):
            raise EvaluationError(
                f"{folder} holds chunks of {name} with other settings: take another output folder, "
                f"or delete its {name}-*.npz"
            )


def _write_down(path: Path, settings: dict[str, Any], before: Mapping[str, Any]) -> None:
    kept = {name: own for name, own in before.items() if any(path.parent.glob(f"{name}-*.npz"))}
    partial = path.with_suffix(".partial")
    merged = {**settings, "attacks": {**settings["attacks"], **kept}}
    partial.write_text(json.dumps(merged, indent=2))
    partial.replace(path)


def _known(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise EvaluationError(
            f"{path} cannot be read ({error}): take another output folder, or delete this one"
        ) from error


def _changed(settings: Mapping[str, Any], known: Mapping[str, Any]) -> list[str]:
    """What all chunks depend on and is not as it was."""
    return [k for k in settings if k != "attacks" and settings[k] != known.get(k)]


@contextmanager
def workspace(output: str | Path | None) -> Iterator[Path]:
    """The folder of the chunks: the user's, or a temporary one."""
    if output is None:
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)
    else:
        folder = Path(output) / "chunks"
        folder.mkdir(parents=True, exist_ok=True)
        yield folder


def write(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write whole or not at all."""
    partial = path.with_suffix(f".{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            np.savez(file, **arrays)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise EvaluationError(
            f"{path} cannot be written ({error}); what was done before is kept, and the same "
            "command goes on from there"
        ) from error


def gather(folder: Path, stage: str, count: int, batch_size: int) -> dict[str, np.ndarray]:
    """Return a stage's arrays over all images."""
    parts = []
    for start in range(0, count, batch_size):
        path = chunk_path(folder, stage, start)
        try:
            with np.load(path) as file:
                parts.append(dict(file))
        except (OSError, ValueError, EOFError, KeyError, BadZipFile) as error:
            raise EvaluationError(
                f"{path} cannot be read ({error}); delete it and start the same command again"
            ) from error
    merged = {"seconds": np.array(sum(float(p.pop("seconds")) for p in parts))}
    for key in parts[0].keys() & {"shown", "twins"}:
        merged[key] = parts[0][key]
    said = [p.pop("warnings") for p in parts if "warnings" in p]
    if said:
        merged["warnings"] = np.unique(np.concatenate(said))
    for key in {k for p in parts for k in p} - {"shown", "twins"}:
        shape = next(p[key].shape[1:] for p in parts if key in p)
        # A chunk in which nothing is classified correctly has no trajectories.
        filled = [p[key] if key in p else np.zeros((len(p["distances"]), *shape)) for p in parts]
        merged[key] = np.concatenate(filled)
    return merged


def chunk_path(folder: Path, stage: str, start: int) -> Path:
    """Return where the stage's results of the chunk from image `start` on are."""
    return folder / f"{stage.replace(' ', '_')}-{start:07d}.npz"
