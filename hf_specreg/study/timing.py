"""What a training step of each method costs, against the plain network's in the same process."""

import json
import shutil
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from hf_specreg.spectral.regularizers.term import BURN_INS, RegularizerConfig
from hf_specreg.study.cells import Cells
from hf_specreg.study.config import STOPPED
from hf_specreg.training.config import RunConfig

ROUNDS = 3
PARTS = 5  # of a run, of which the first is left out: it has what is done once


def time_methods(cells: Cells, folder: Path, *, images: int) -> dict[str, Any]:
    """Return the seconds of a step over the plain network's, by method: "ratio", the median of its
    "rounds".

    Each round trains every method for a few steps, one after the other, without a burn-in.

    Args:
        cells: of the study.
        folder: for the runs, which are deleted.
        images: of the training split; fewer than the steps want give fewer steps.
    """
    shown = {cell.method: cell.run for cell in cells if cell.method != STOPPED}
    steps = cells.config.evaluation.timing_steps
    seconds: dict[str, list[float]] = {name: [] for name in shown}
    for _ in range(ROUNDS):
        for name, run in shown.items():
            shutil.rmtree(folder / "run", ignore_errors=True)
            config = _short(run, folder / "run", min(steps, images // run.batch_size))
            cells.recipe.train(config, resume=False)
            seconds[name].append(_seconds_an_image(folder / "run"))
    shutil.rmtree(folder / "run", ignore_errors=True)
    plain = np.array(seconds[cells.config.plain])
    ratios = {name: (np.array(own) / plain).tolist() for name, own in seconds.items()}
    return {name: {"ratio": float(np.median(r)), "rounds": r} for name, r in ratios.items()}


def _short(run: RunConfig, output: Path, steps: int) -> RunConfig:
    """A few steps of a run with everything in it from the first on."""
    at_once = {**dict.fromkeys(BURN_INS), "burn_in_steps": 0}
    terms = {
        field.name: getattr(run.regularizers, field.name) for field in fields(run.regularizers)
    }
    terms = {n: replace(t, **at_once) for n, t in terms.items() if isinstance(t, RegularizerConfig)}
    return replace(
        run,
        output_dir=str(output),
        epochs=1,
        log_every=max(1, steps // PARTS),
        data=replace(run.data, train_samples=steps * run.batch_size),
        penalty=replace(run.penalty, **at_once),
        regularizers=replace(run.regularizers, **terms),
        optimizer=replace(run.optimizer, warmup_epochs=0),
    )


def _seconds_an_image(output: Path) -> float:
    lines = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    speeds = [line["images_per_second"] for line in lines if "images_per_second" in line]
    return float(np.mean([1 / speed for speed in speeds[1:] or speeds]))
