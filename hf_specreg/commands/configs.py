"""The command that lists the configurations that come with the package, or prints one."""

from rich.console import Console
from rich.markup import escape
from rich.padding import Padding

from hf_specreg.configs import named, shipped


def configs(name: str | None = None) -> None:
    """List the configurations that --config takes by their names, or print one.

    Args:
        name: of the one to print, such as digits or studies/digits, to be changed in a file of
            one's own.
    """
    if name is not None:
        print(named(name).path.read_text("utf-8"), end="")
        return
    console = Console(width=None if Console().is_terminal else 100, highlight=False)
    for one in shipped().values():
        console.print(f"[bold]{one.name}[/bold]")
        console.print(Padding(escape(one.says), (0, 0, 0, 4)))
        console.out(f"    {one.command}")  # unwrapped, to be pasted
