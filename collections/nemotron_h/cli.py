"""The `nemotron-h` command: everything around training runs. `nemo llm ...` starts the runs themselves."""

from __future__ import annotations

import sys

import typer
from rich.console import Console

from nemotron_h.data.cli import app as data_app
from nemotron_h.errors import UserError

app = typer.Typer(
    name="nemotron-h",
    help="Recipes, data and checkpoints of Nemotron-H models. Training: nemo llm pretrain --factory NAME.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.add_typer(data_app, name="data", help="Prepare and check training data.")


def main() -> None:
    """Run a command; a mistake of the user is one message without a traceback."""
    try:
        app()
    except UserError as error:
        console = Console(stderr=True, soft_wrap=True, highlight=False)
        console.print(f"[bold red]error:[/bold red] {error.message}")
        if error.hint:
            console.print(f"[bold]fix:[/bold] {error.hint}")
        sys.exit(error.EXIT_CODE)
