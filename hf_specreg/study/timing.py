"""What a training step of each method costs, against the plain network's in the same process."""

import json
import math
import shutil
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from hf_specreg.spectral.regularizers.term import BURN_INS, RegularizerConfig
from hf_specreg.study.cells import Cells
from hf_specreg.study.config import STOPPED
from hf_specreg.training.config import RunConfig
from hf_specreg.training.metrics import DivergedError

ROUNDS = 5
WARM_UP = 3  # steps that are left out: they have what is done once
HELD_OUT = 100  # images a timed training is evaluated on, which is not timed


def timed_methods(cells: Cells) -> dict[str, RunConfig]:
    """Return the runs whose steps are timed, by method: each at its last strength."""
    return {cell.method: cell.run for cell in cells if cell.method != STOPPED}


def time_methods(
    cells: Cells, folder: Path, *, images: int, rounds: int = ROUNDS
) -> dict[str, Any]:
    """Return the seconds of a step over the plain network's, by method: "ratio", the median of its
    "rounds"; None for a method that diverges.

    Each round trains every method for a few steps, one after the other, without a burn-in; as many
    as make whole cycles of what does not enter every step.

    Args:
        cells: of the study.
        folder: for the runs, which are deleted.
        images: of the training split.
        rounds: how many.
    """
    shown = timed_methods(cells)
    seconds: dict[str, list[float]] = {name: [] for name in shown}
    for _ in range(rounds):
        for name, run in shown.items():
            shutil.rmtree(folder / "run", ignore_errors=True)
            cycle = math.lcm(*(term.every for term in run.regularizers.terms().values()))
            if run.penalty.strength:
                cycle = math.lcm(cycle, run.penalty.every * run.penalty.renew_every)
            steps = -(-cells.config.evaluation.timing_steps // cycle) * cycle
            try:
                cells.recipe.train(_short(run, folder / "run", steps, images), resume=False)
                seconds[name].append(_seconds_an_image(folder / "run", steps, cycle))
            except DivergedError:
                seconds[name].append(np.nan)
    shutil.rmtree(folder / "run", ignore_errors=True)
    plain = np.array(seconds[cells.config.plain])
    ratios = {name: np.array(own) / plain for name, own in seconds.items()}
    return {
        name: {"ratio": float(np.median(r)), "rounds": r.tolist()} if np.isfinite(r).all() else None
        for name, r in ratios.items()
    }


def _short(run: RunConfig, output: Path, steps: int, images: int) -> RunConfig:
    """The steps that are timed of a run, and those before, with everything from the first on."""
    at_once = {**dict.fromkeys(BURN_INS), "burn_in_steps": 0}
    terms = {item.name: getattr(run.regularizers, item.name) for item in fields(run.regularizers)}
    terms = {n: replace(t, **at_once) for n, t in terms.items() if isinstance(t, RegularizerConfig)}
    an_epoch = min(WARM_UP + steps, images // run.batch_size)
    epochs = -(-(WARM_UP + steps) // an_epoch)
    return replace(
        run,
        output_dir=str(output),
        epochs=epochs,
        log_every=1,
        eval_every_epochs=epochs,
        data=replace(run.data, train_samples=an_epoch * run.batch_size, held_out_samples=HELD_OUT),
        penalty=replace(run.penalty, **at_once),
        regularizers=replace(run.regularizers, **terms),
        optimizer=replace(run.optimizer, warmup_epochs=0),
        checkpoint=replace(run.checkpoint, every_epochs=epochs),
    )


def _seconds_an_image(output: Path, steps: int, cycle: int) -> float:
    """The median over cycles of steps, which forgets those in which others had the machine."""
    lines = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    speeds = [line["images_per_second"] for line in lines if "images_per_second" in line]
    seconds = 1 / np.array(speeds[WARM_UP : WARM_UP + steps])
    return float(np.median(seconds.reshape(-1, cycle).mean(1)))
