"""The help of a command line: one or two lines an option, and for many options their groups."""

import re
import textwrap
from argparse import SUPPRESS, Action, _HelpAction
from typing import Any

from jsonargparse import ArgumentParser, DefaultHelpFormatter

QUOTES = str.maketrans("", "", "' ")
RUN = "run"  # the group of the keys that are in none


class ShortHelp(DefaultHelpFormatter):
    """A line or two an option: its key, its type, what it is and its default."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=34)

    def add_argument(self, action: Action) -> None:
        """Add an option, but not that a whole group can come from a file."""
        if action.metavar != "CONFIG" or action.dest == "config":
            super().add_argument(action)

    def _get_default_metavar_for_optional(self, action: Action) -> str:
        kind = re.sub(r"^Optional\[(.*)\]$| \| null$", r"\1", self._get_type_str(action) or "FILE")
        return re.sub(r"Literal\[(.*)\]", lambda m: f"{{{m[1]}}}".translate(QUOTES), kind)

    def _get_help_string(self, action: Action) -> str:
        stated = action.default in (None, SUPPRESS, (), {}) or "default" in action.help
        return action.help or "" if stated else f"{action.help} (default: %(default)s)"


class GroupedHelp(_HelpAction):
    """--help names the groups of keys; --help=GROUP says all of one, --help=all of all."""

    def __init__(self, option_strings: list[str], dest: str = SUPPRESS, **kwargs):
        kwargs = {
            "help": "this; --help=GROUP says what a group's keys are, --help=all what all are",
            **kwargs,
        }
        super().__init__(option_strings, dest, **kwargs)
        self.nargs, self.metavar = "?", "GROUP|all"

    def __call__(self, parser: ArgumentParser, namespace: Any, values: Any, *_: Any) -> None:
        """Print the help and exit."""
        groups = groups_of(parser)
        if values == "all":
            said = parser.format_help()
        elif values is None:
            said = short_help(parser)
        elif values in groups:
            said = _sections(parser, groups[values])
        else:
            parser.error(f"invalid choice: {values!r} (choose from {', '.join([*groups, 'all'])})")
        print(said, end="")
        parser.exit()


def groups_of(parser: ArgumentParser) -> dict[str, list[Any]]:
    """Return argparse's groups by the first part of their keys; those of none are the run's."""
    found: dict[str, list[Any]] = {}
    for group in parser.groups.values():
        found.setdefault((group.dest or RUN).split(".")[0], []).append(group)
    return found


def short_help(parser: ArgumentParser) -> str:
    """Return the usage, the options and, a group of keys a paragraph, their names."""
    formatter = parser._get_formatter()
    formatter.add_usage(parser.usage, parser._actions, parser._mutually_exclusive_groups)
    formatter.add_text(parser.description)
    formatter.start_section("options")
    formatter.add_arguments(parser._optionals._group_actions)
    formatter.end_section()
    lines = ["", "keys, on the command line --GROUP.KEY VALUE (of the run --KEY VALUE):"]
    for name, groups in groups_of(parser).items():
        title = groups[0].title if name != RUN else "what is run, and how"
        keys = ", ".join(dict.fromkeys(_keys(groups, name)))
        lines += [f"  {name}: {title}", textwrap.fill(keys, 78, **_indented(6))]
    return formatter.format_help() + "\n".join(lines) + "\n"


def _keys(groups: list[Any], name: str) -> list[str]:
    """The names of a group's keys, or of the groups in it."""
    dests = [action.dest for group in groups for action in group._group_actions]
    if name == RUN:
        return dests
    return [dest.split(".")[1] for dest in dests if "." in dest]


def _sections(parser: ArgumentParser, groups: list[Any]) -> str:
    formatter = parser._get_formatter()
    for group in groups:
        formatter.start_section(group.title)
        formatter.add_arguments(group._group_actions)
        formatter.end_section()
    return formatter.format_help()


def _indented(width: int) -> dict[str, str]:
    return {"initial_indent": " " * width, "subsequent_indent": " " * width}
