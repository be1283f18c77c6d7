"""The command line of a recipe: a configuration from YAML and arguments, and a run of it."""

from collections.abc import Callable, Sequence
from typing import TypeVar

from jsonargparse import ArgumentParser

from hf_specreg.training.config import RunConfig
from hf_specreg.training.metrics import TrainingResult
from hf_specreg.training.recipe import finish

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


def run_recipe(
    parse: Callable[[Sequence[str] | None], tuple[Config, bool]],
    train: Callable[..., TrainingResult],
    arguments: Sequence[str] | None = None,
) -> None:
    """Train as the command line says, and print the result as JSON.

    Args:
        parse: arguments -> configuration, whether to resume.
        train: (configuration, resume=) -> the result.
        arguments: of the command line; default: those of this process.
    """
    config, resume = parse(arguments)
    finish(train(config, resume=resume))
