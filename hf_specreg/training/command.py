"""What the recipes share: a configuration from YAML and the command line, and the result."""

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
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


def process_state() -> PartialState:
    """Return which process this is of how many, also before the training loop is there.

    Unlike Accelerator, PartialState does not read ACCELERATE_USE_CPU by itself, and without it
    would take each of several CPU processes for the only one.
    """
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))


def finish(result: TrainingResult) -> None:
    """Print where the model is and what was measured, as JSON; part from the other processes."""
    state = process_state()
    if state.is_main_process:
        summary = {"model": str(result.model_folder), "step": result.step, **result.metrics}
        print(json.dumps(summary, indent=2))
    state.destroy_process_group()


def add_metrics(result: TrainingResult, metrics: dict[str, float]) -> TrainingResult:
    """Return the result with further metrics."""
    return replace(result, metrics={**result.metrics, **metrics})
