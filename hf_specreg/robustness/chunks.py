"""The folder of an evaluation: what each stage gave for each chunk of images, one file each.

A file is there whole or not at all, so that an evaluation goes on where it was stopped, and several
processes can share the chunks out.
"""

import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np


class EvaluationError(ValueError):
    """An evaluation that cannot be done as it was asked for, with what to do."""


def claim(folder: Path, settings: dict[str, Any], first: bool, barrier: Callable[[], None]) -> None:
    """Write down what the chunks are of; refuse a folder that holds others."""
    path = folder / "settings.json"
    settings = json.loads(json.dumps(settings))
    if first and not path.exists():
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(settings, indent=2))
        partial.replace(path)
    barrier()
    try:
        known = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise EvaluationError(
            f"{path} cannot be read ({error}): take another output folder, or delete this one"
        ) from error
    changed = [k for k in settings if settings[k] != known.get(k)]
    if changed:
        raise EvaluationError(
            f"{folder} holds an evaluation with other {', '.join(changed)}: take another output "
            "folder, or delete this one"
        )


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
