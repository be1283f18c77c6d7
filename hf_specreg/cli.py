"""Train, attack, compare and publish vision encoders with the spectral penalty.

This is the command hf-specreg. What a command needs is imported when it runs, so that its help is
there at once.
"""

from collections.abc import Sequence

from hf_specreg import __version__
from hf_specreg.arguments import OneLineParser, errors_in_one_line
from hf_specreg.commands.hub import card, list_encoders, publish_zoo, push, space
from hf_specreg.commands.models import compare, evaluate, spectrum

COMMANDS = {
    "spectrum": spectrum,
    "evaluate": evaluate,
    "compare": compare,
    "card": card,
    "push": push,
    "list": list_encoders,
    "publish-zoo": publish_zoo,
    "space": space,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    description = __doc__.splitlines()[0]
    parser = OneLineParser(prog="hf-specreg", description=description, version=__version__)
    commands = parser.add_subcommands(title="commands", metavar="COMMAND")
    for name, command in COMMANDS.items():
        summary = command.__doc__.split("\n\n")[0]
        own = OneLineParser(description=summary)
        if command is compare:
            own.add_argument("reports", nargs="+", help="folders or robustness.json files")
            own.add_function_arguments(compare, skip={"reports"})
        else:
            own.add_function_arguments(command, as_positional=True)
        commands.add_subcommand(name, own, help=summary)
        own.prog = f"{parser.prog} {name}"
    settings = parser.parse_args(arguments).as_dict()
    name = settings["subcommand"]
    with errors_in_one_line():
        COMMANDS[name](**settings[name])
