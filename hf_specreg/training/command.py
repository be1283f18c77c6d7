"""What the recipes share: a configuration from YAML and the command line, and the result."""

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

from accelerate import PartialState
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


def print_result(result: TrainingResult) -> None:
    """Print where the model is and what was measured, as JSON, on the main process."""
    if PartialState().is_main_process:
        summary = {"model": str(result.model_folder), "step": result.step, **result.metrics}
        print(json.dumps(summary, indent=2))


def add_metrics(result: TrainingResult, metrics: dict[str, float]) -> TrainingResult:
    """Return the result with further metrics."""
    return replace(result, metrics={**result.metrics, **metrics})
