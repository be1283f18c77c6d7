"""Command lines whose errors are one line, with what an unknown key may mean."""

import difflib
import re
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from jsonargparse import ActionConfigFile, ArgumentParser

from hf_specreg.configs import find_config
from hf_specreg.usage import GroupedHelp, ShortHelp

PROGRAM = "hf-specreg"
PACKAGE = Path(__file__).parent
REFUSED = (OSError, ValueError, ImportError)  # exit code 2
INTERRUPTED = 130  # the exit code that shells know Ctrl-C by

UNKNOWN = (
    r"unrecognized arguments: (?P<key>--\S+)",
    r"Group '(?P<group>.+)' does not accept option '(?P<key>.+)'",
    r"Option '(?P<key>.+)' is not accepted",
)
REQUIRED = r"arguments are required: (?P<keys>.+)"
WORD = r"unrecognized arguments: (?P<word>[^-\s]\S*)"
VALUELESS = r"argument --config: expected one argument"
MISSING = r'expected "\S*subcommand" to be one of (?P<choices>\{.+\})'
CHOICE = r"invalid choice: '(?P<value>.+)' \(choose from (?P<choices>.+)\)"
VALUE = r'Parser key "(?P<key>.+?)":.*(?:Got|Given) value: (?P<value>.*)'


class OneLineParser(ArgumentParser):
    """jsonargparse's parser, whose errors are one line and exit with code 2.

    Args:
        grouped_help: whether --help names the groups of keys alone.
        kwargs: of ArgumentParser.
    """

    def __init__(self, *, grouped_help: bool = False, **kwargs):
        given = {"formatter_class": ShortHelp, "allow_abbrev": False, **kwargs}
        super().__init__(add_help=not grouped_help, **given)
        if grouped_help:
            self.add_argument("-h", "--help", action=GroupedHelp)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the error and exit; with exit_on_error=False raise it, a ValueError."""
        keys = [key.removeprefix("--") for key in self._option_string_actions]
        said = in_one_line(message, keys)
        if not self.exit_on_error:
            raise ValueError(said) from ex
        self.exit(2, f"{self.prog}: error: {said}\n")


class ConfigOfRun(ActionConfigFile):
    """--config: a file, or the name of a configuration that comes with the package."""

    folder = ""

    def __call__(self, parser: ArgumentParser, cfg: Any, values: str, *rest: Any) -> None:
        """Read the file that is meant."""
        try:
            found = find_config(values, self.folder)
        except ValueError as error:
            parser.error(str(error))
        super().__call__(parser, cfg, found, *rest)


class ConfigOfStudy(ConfigOfRun):
    """--config of a study."""

    folder = "studies"


def add_config(parser: ArgumentParser, action: type[ConfigOfRun] = ConfigOfRun) -> None:
    """Give a parser its --config."""
    said = "a YAML file, or one of `hf-specreg configs`; later arguments override it"
    parser.add_argument("--config", action=action, metavar="NAME|FILE", help=said)
    for printing in parser._actions:
        if printing.dest == "print_config":
            printing.help = "print all keys with their values, and exit"


def in_one_line(message: str, keys: Sequence[str]) -> str:
    """Return an error of jsonargparse's as one line.

    Args:
        message: its own.
        keys: that there are, dotted.
    """
    for pattern in UNKNOWN:
        if found := re.search(pattern, message):
            group = f"{found['group']}." if "group" in found.groupdict() else ""
            return unknown_key(group + found["key"].removeprefix("--").split("=")[0], keys)
    if found := re.search(CHOICE, message):
        near = difflib.get_close_matches(found["value"], re.findall(r"[\w-]+", found["choices"]), 1)
        meant = f"did you mean {near[0]}? " if near else ""
        return f"there is no {found['value']!r}: {meant}there are {found['choices']}"
    if found := re.search(WORD, message):
        taken = f": did you mean --config {found['word']}?" if "config" in keys else ""
        return f"there is no place for {found['word']!r}{taken}"
    found = re.search(REQUIRED, message)
    if "config" in keys and (found or re.search(VALUELESS, message)):
        lacks = f", which has {found['keys']}" if found else ""
        return f"--config NAME is missing{lacks}: {PROGRAM} configs lists names"
    if found := re.search(MISSING, message):
        return f"name one of {found['choices']}: --help says what each does"
    if found := re.search(VALUE, message, re.DOTALL):
        kinds = re.findall(r"Expected an? (.+?)(?:\. Got value|\n|$)", message)
        return f"{found['key']} ({found['value']}) must be {' or '.join(map(_plain, kinds))}"
    return " ".join(message.split())


def unknown_key(key: str, keys: Sequence[str]) -> str:
    """Return what is said of a key that there is not."""
    last = {k.rpartition(".")[-1]: k for k in reversed(keys)}
    near = difflib.get_close_matches(key, keys, 1) or [
        last[name] for name in difflib.get_close_matches(key, last, 1, cutoff=0.8)
    ]
    meant = f"did you mean {near[0]}? " if near else ""
    return f"there is no key {key!r}: {meant}--help lists all"


def with_its_key(error: ValueError, settings: Mapping[str, Any]) -> str:
    """Return what is said of a setting out of its range, "every (0) must be ...", by dotted key.

    Args:
        error: of a record of settings, which knows its own names alone.
        settings: of all records, by dotted keys.
    """
    for key, value in settings.items():
        name = key.rpartition(".")[-1]
        if str(error).startswith(f"{name} ({value})"):
            return key.removesuffix(name) + str(error)
    return str(error)


@contextmanager
def errors_in_one_line(*failures: type[Exception]) -> Iterator[None]:
    """Print an error of this package's without its traceback, and exit: with 2 if what was asked
    for cannot begin. Ctrl-C is said in a line too.

    Args:
        failures: errors of what failed on its way; the exit code is 1.
    """
    try:
        yield
    except (*REFUSED, *failures) as error:
        if not _says_all(error):
            raise
        print(f"{PROGRAM}: error: {error}", file=sys.stderr)
        raise SystemExit(1 if isinstance(error, failures) else 2) from error
    except KeyboardInterrupt:
        print(f"\n{PROGRAM}: interrupted", file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None


def _says_all(error: Exception) -> bool:
    """Whether this package itself raised an error, which then says all that there is to know, or
    the system with a file's name; one from deeper is a surprise, and keeps its traceback.
    """
    place = traceback.extract_tb(error.__traceback__)[-1].filename
    named = isinstance(error, OSError) and error.filename is not None
    return named or Path(place).is_relative_to(PACKAGE)


def _plain(kind: str) -> str:
    """A type as it is written in YAML."""
    kind = re.sub(r"<class '(.+)'>|^typing\.", r"\1", kind).replace("NoneType", "null")
    choices = re.fullmatch(r"Literal\[(.+)\]", kind)
    return f"one of {choices[1]}" if choices else kind
