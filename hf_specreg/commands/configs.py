"""The command that lists the configurations that come with the package, or prints one."""

import re
import textwrap

from rich.console import Console
from rich.markup import escape

from hf_specreg.configs import named, shipped

WIDTH = 80


def configs(name: str | None = None) -> None:
    """List the configurations that --config takes by their names, or print one.

    Args:
        name: of the one to print, such as digits or studies/digits, to be changed in a file of
            one's own.
    """
    if name is not None:
        print(named(name).path.read_text("utf-8"), end="")
        return
    console = Console(highlight=False, soft_wrap=True)
    for one in shipped().values():
        console.print(f"[bold]{one.name}[/bold]")
        console.print(f"    {escape(one.says)}")
        for line in _continued(one.command):
            console.out(f"    {line}")


def _continued(command: str) -> list[str]:
    """A command on lines of a terminal's width, to be pasted."""
    options = {"subsequent_indent": "  ", "break_on_hyphens": False, "break_long_words": False}
    whole = re.sub(r"(--\S+|,) (?!-)", "\\1\0", command)  # no break before an option's value
    lines = [line.replace("\0", " ") for line in textwrap.wrap(whole, WIDTH - 6, **options)]
    return [line + " \\" for line in lines[:-1]] + lines[-1:]
