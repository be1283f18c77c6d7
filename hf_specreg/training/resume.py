"""Where a run goes on from, and what of it may have changed since."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from hf_specreg.training.checkpoints import (
    CheckpointError,
    all_checkpoints,
    latest_checkpoint,
    read_progress,
)
from hf_specreg.training.config import RunConfig

# What a run that is resumed may change: it has no part in the weights.
MAY_CHANGE = (
    "output_dir",
    "log_every",
    "log_with",
    "tracker",
    "eval_batch_size",
    "eval_every_epochs",
    "checkpoint.",
    "data.num_workers",
    "data.in_memory",
    "ssl.neighbours",
    "ssl.bank",
    "probe.",
    "report.",
)
# Settings that there are no more, and that had no part in the weights.
GONE = ("probe.epochs", "probe.lr")
# Where the data is: checked by what it is, once it is read (`RunState.load`).
PLACE = ("data.source", "data.configuration", "data.revision")


def starting_point(config: RunConfig, *, resume: bool) -> Path | None:
    """Return the checkpoint that a run goes on from, None for a new run, and for one that was
    stopped before its first checkpoint.

    Raises:
        CheckpointError: the output folder holds another run, or a finished one without checkpoints,
            or no checkpoint in it is whole.
    """
    output = Path(config.output_dir)
    begun = bool(all_checkpoints(output / "checkpoints"))
    if not begun and (output / "model").exists():
        raise CheckpointError(
            f"{output} holds a finished run, without its checkpoints: choose another folder by "
            "--output_dir"
        )
    if not resume:
        if begun:
            raise CheckpointError(
                f"{output} already holds a run: go on with it by --resume, or choose another "
                "folder by --output_dir"
            )
        return None
    if not begun:
        return None
    checkpoint = latest_checkpoint(output / "checkpoints")
    if checkpoint is None:
        raise CheckpointError(f"{output / 'checkpoints'} has no whole checkpoint to resume from")
    progress = read_progress(checkpoint)
    free = MAY_CHANGE + (PLACE if progress.get("fingerprints") else ())
    changed = changes_of_the_run(progress["config"], config, free=free)
    if changed:
        raise CheckpointError(
            f"{checkpoint} is of a run with another configuration (there and here): "
            f"{'; '.join(changed)}"
        )
    return checkpoint


def check_agreement(checkpoint: Path | None, accelerator: Accelerator) -> None:
    """Raise CheckpointError unless all processes have found the same checkpoint, or none."""
    own = int(checkpoint.name.removeprefix("step_")) if checkpoint else -1
    found = accelerator.gather(torch.tensor([own], device=accelerator.device)).unique().tolist()
    if len(found) > 1:
        raise CheckpointError(
            f"the processes find different checkpoints (of steps {found}, -1 for none): output_dir "
            "must be on a filesystem that all nodes share"
        )


def changes_of_the_run(
    before: dict[str, Any], config: RunConfig, *, free: Sequence[str] = MAY_CHANGE
) -> list[str]:
    """Return the settings that differ from those of a saved run, but for those that are free to.
    What a setting does that did not exist then is its default.
    """
    now, default = (json.loads(json.dumps(c.as_dict())) for c in (config, type(config)()))
    found = differences(_filled(before, default), now)
    if now.get("transfer", {}).get("head") == "probe":  # the probe's weights are where it begins
        free = tuple(name for name in free if name != "probe.")
    return [difference for difference in found if not difference.startswith((*free, *GONE))]


def _filled(settings: dict[str, Any], default: dict[str, Any]) -> dict[str, Any]:
    """Settings, and the defaults of those that are missing."""
    filled = {**default, **settings}
    for key in default.keys() & settings.keys():
        if isinstance(default[key], dict) and isinstance(settings[key], dict):
            filled[key] = _filled(settings[key], default[key])
    return filled


def differences(a: dict[str, Any], b: dict[str, Any], prefix: str = "") -> list[str]:
    """Return the dotted keys in which two configurations differ."""
    found = []
    for key in sorted(set(a) | set(b)):
        x, y = a.get(key), b.get(key)
        if isinstance(x, dict) and isinstance(y, dict):
            found += differences(x, y, f"{prefix}{key}.")
        elif (list(x) if isinstance(x, tuple) else x) != (list(y) if isinstance(y, tuple) else y):
            found.append(f"{prefix}{key}: {x!r} and {y!r}")
    return found
