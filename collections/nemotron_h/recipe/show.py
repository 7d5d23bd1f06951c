"""Print a resolved recipe with where each value comes from."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from nemotron_h.recipe.compose import Composed
from nemotron_h.recipe.text import Line, lines

WIDTH = 44
"""Column at which the comments begin, where a value is not longer."""


def show(composed: Composed, console: Console) -> None:
    """Print a table on a terminal; elsewhere YAML with the origin and source of each value as its comment."""
    if console.is_terminal:
        console.print(_table(lines(composed), console.width))
        return
    for line in lines(composed):
        comment = f"# {line.origin}" + (f"; {line.source}" if line.source else "")
        console.print(Text(f"{line.text:<{WIDTH}}  {comment}" if line.origin else line.text), soft_wrap=True)


def _table(content: list[Line], width: int) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("value", overflow="fold", min_width=min(34, width // 3))
    table.add_column("written in", overflow="fold", no_wrap=width >= 100)
    table.add_column("source", overflow="fold")
    for line in content:
        style = "bold magenta" if line.origin == "override" else "" if line.origin else "bold"
        dim = "dim" if line.origin == "schema default" else "cyan"
        source = Text(line.source, "yellow" if line.source.startswith("ours") else "green")
        table.add_row(Text(line.text, style), Text(line.origin, dim), source)
    return table
