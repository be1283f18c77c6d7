"""Reports as they are printed: Markdown, wrapped to the terminal, its tables aligned."""

from typing import ClassVar

from rich.console import Console, ConsoleOptions, RenderResult
from rich.markdown import Markdown, TableElement

WIDTH = 100  # of what is piped into a file


class WholeCells(TableElement):
    """A table whose cells are broken over lines, never cut off."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Draw it."""
        for table in super().__rich_console__(console, options):
            for column in table.columns:
                column.overflow = "fold"
            yield table


class Report(Markdown):
    """Markdown with whole cells."""

    elements: ClassVar = {**Markdown.elements, "table_open": WholeCells}


def print_report(text: str) -> None:
    """Print Markdown, for a terminal of any width; without colours where it is piped."""
    console = Console(highlight=False)
    console = console if console.is_terminal else Console(highlight=False, width=WIDTH)
    console.print(Report(text))
