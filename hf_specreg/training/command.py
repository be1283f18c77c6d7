"""What the recipes share: a configuration from YAML and the command line, and the result."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from accelerate import Accelerator, PartialState
from jsonargparse import ArgumentParser

from hf_specreg.training.config import RunConfig
from hf_specreg.training.metrics import TrainingResult

Config = TypeVar("Config", bound=RunConfig)


def parse_run(
    config: type[Config], description: str, arguments: Sequence[str] | None = None
) -> tuple[Config, bool]:
    """Return the configuration of a run and whether to resume.

    Args:
        config: RunConfig or one of its kinds.
        description: of the recipe; its first line is shown by --help.
        arguments: of the command line; default: those of this process.
    """
    parser = ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--config", action="config", help="YAML file; later arguments override it")
    parser.add_argument("--resume", action="store_true", help="go on from the latest checkpoint")
    parser.add_class_arguments(config)
    settings = parser.parse_args(arguments)
    resume = settings.pop("resume")
    settings.pop("config")
    return config(**vars(parser.instantiate(settings))), resume


def of_report(config: Any, accelerator: Accelerator) -> dict[str, Any]:
    """Return the arguments of `evaluate_side_by_side` that a run's `report` stands for.

    Args:
        config: of a self-supervised run or a transfer.
        accelerator: of the run; its processes share the images out.
    """
    classes = config.data.classes
    split = f"test, classes {', '.join(classes)}" if classes else "test"
    return {
        "attacks": config.report.attacks,
        "eps": config.report.eps,
        "samples": config.report.samples,
        "seed": config.seed,
        "data": {"id": config.data.source, "revision": config.data.revision, "split": split},
        "device": accelerator.device,
        "shard": (accelerator.process_index, accelerator.num_processes),
        "barrier": accelerator.wait_for_everyone,
        "output": Path(config.output_dir),
    }


def finish(result: TrainingResult) -> None:
    """Print where the model is and what was measured, as JSON; part from the other processes."""
    state = PartialState()
    if state.is_main_process:
        summary = {"model": str(result.model_folder), "step": result.step, **result.metrics}
        print(json.dumps(summary, indent=2))
    state.destroy_process_group()


def add_metrics(result: TrainingResult, metrics: dict[str, float]) -> TrainingResult:
    """Return the result with further metrics."""
    return replace(result, metrics={**result.metrics, **metrics})
