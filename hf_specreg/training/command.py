"""The command line of a recipe: a configuration from YAML and arguments, and a run of it."""

import sys
from collections.abc import Callable, Sequence
from functools import cache
from typing import TypeVar

from hf_specreg.arguments import (
    PROGRAM,
    OneLineParser,
    add_config,
    errors_in_one_line,
    with_its_key,
)
from hf_specreg.training.checkpoints import CheckpointError
from hf_specreg.training.config import RunConfig
from hf_specreg.training.metrics import DivergedError, TrainingResult
from hf_specreg.training.recipe import finish

Config = TypeVar("Config", bound=RunConfig)


def parse_run(
    config: type[Config],
    command: str,
    description: str,
    arguments: Sequence[str] | None = None,
    *,
    exit_on_error: bool = True,
) -> tuple[Config, bool]:
    """Return the configuration of a run and whether to resume.

    Args:
        config: RunConfig or one of its kinds.
        command: of hf-specreg, such as "train supervised".
        description: of the recipe; its first line is shown by --help.
        arguments: of the command line; default: those of this process.
        exit_on_error: print an error and exit; else raise it.

    Raises:
        ValueError: the arguments are wrong, and the process is not to end.
    """
    parser = _parser(config, command, description.splitlines()[0], exit_on_error)
    given = sys.argv[1:] if arguments is None else arguments
    settings = parser.parse_args(given)
    resume = settings.pop("resume")
    settings.pop("config")
    try:
        run = config(**vars(parser.instantiate(settings)))
    except ValueError as error:
        parser.error(with_its_key(error, settings.as_flat().__dict__))
    if not any(one.startswith(("--config", "--data")) for one in given):
        parser.error(
            "what is trained on what? Name a configuration, such as --config digits "
            f"({PROGRAM} configs lists all), or --data.source and --model.name"
        )
    return run, resume


@cache
def _parser(
    config: type[RunConfig], command: str, summary: str, exit_on_error: bool
) -> OneLineParser:
    """The parser of a kind of run; making one takes longer than parsing."""
    parser = OneLineParser(
        grouped_help=True,
        exit_on_error=exit_on_error,
        prog=f"{PROGRAM} {command}",
        description=summary,
        usage="%(prog)s [--config NAME] [--resume] [--KEY VALUE ...]",
    )
    add_config(parser)
    parser.add_argument("--resume", action="store_true", help="go on from the latest checkpoint")
    parser.add_class_arguments(config)
    return parser


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
    with errors_in_one_line(CheckpointError, DivergedError):
        finish(train(config, resume=resume))
