"""Train, attack, compare and publish vision encoders with the spectral penalty.

This is the command hf-specreg. What a command needs is imported when it runs, so that its help is
there at once.
"""

import sys
from collections.abc import Sequence
from importlib import import_module

from hf_specreg import __version__
from hf_specreg.arguments import PROGRAM, OneLineParser, errors_in_one_line
from hf_specreg.commands.configs import configs
from hf_specreg.commands.hub import card, list_encoders, publish_zoo, push, space
from hf_specreg.commands.models import compare, evaluate, spectrum

COMMANDS = {
    "configs": configs,
    "spectrum": spectrum,
    "evaluate": evaluate,
    "compare": compare,
    "card": card,
    "push": push,
    "list": list_encoders,
    "publish-zoo": publish_zoo,
    "space": space,
}
TRAIN = {
    "supervised": "Train a classifier with the spectral penalty up to its features.",
    "self-supervised": "Train an encoder without labels, then put linear heads on it.",
    "transfer": "Fine-tune a pretrained encoder on other data.",
}
STUDY = "Compare methods over strengths and seeds, at equal accuracy."


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if arguments[:1] == ["study"]:
        import_module("hf_specreg.study.command").main(arguments[1:])
    elif arguments[:1] == ["train"] and set(arguments[1:2]) & set(TRAIN):
        recipe = arguments[1].replace("-", "_")
        import_module(f"hf_specreg.recipes.{recipe}").main(arguments[2:])
    else:
        settings = _parser().parse_args(arguments).as_dict()
        name = settings["subcommand"]
        with errors_in_one_line():
            COMMANDS[name](**settings[name])


def _parser() -> OneLineParser:
    """The parser of all commands; those that train and study have one of their own."""
    description = __doc__.splitlines()[0]
    parser = OneLineParser(prog=PROGRAM, description=description, version=__version__)
    commands = parser.add_subcommands(title="commands", metavar="COMMAND")
    train = OneLineParser(description="Train an encoder with the spectral penalty.")
    commands.add_subcommand("train", train, help="Train an encoder, or fine-tune one.")
    train.prog = f"{PROGRAM} train"
    kinds = train.add_subcommands(title="kinds", metavar="KIND")
    for kind, summary in TRAIN.items():
        kinds.add_subcommand(kind, OneLineParser(), help=summary)
    commands.add_subcommand("study", OneLineParser(), help=STUDY)
    for name, command in COMMANDS.items():
        summary = command.__doc__.split("\n\n")[0]
        own = OneLineParser(description=summary)
        if command is compare:
            own.add_argument("reports", nargs="+", help="folders or robustness.json files")
            own.add_function_arguments(compare, skip={"reports"})
        elif command is configs:
            own.add_argument("name", nargs="?", help="of one to print, such as studies/digits")
        elif command is evaluate:
            own.add_function_arguments(evaluate, as_positional=True, skip={"dry_run"})
            own.add_argument("--dry_run", action="store_true", help="say how long it will take")
        else:
            own.add_function_arguments(command, as_positional=True)
        commands.add_subcommand(name, own, help=summary)
        own.prog = f"{PROGRAM} {name}"
    return parser
