"""The `nemotron-h` command: everything around training runs. `nemo llm ...` starts the runs themselves."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from nemotron_h.cli.align_heads import align_heads
from nemotron_h.cli.cache_teacher import distill_cache
from nemotron_h.cli.chat import chat
from nemotron_h.cli.compare_precision import compare_precision
from nemotron_h.cli.completion import completion
from nemotron_h.cli.coverage import coverage
from nemotron_h.cli.data import app as data_app
from nemotron_h.cli.eval import evaluate
from nemotron_h.cli.export import export_app, import_app, merge_adapter
from nemotron_h.cli.generate import generate
from nemotron_h.cli.hybridise import hybridise
from nemotron_h.cli.incidents import show_incidents
from nemotron_h.cli.layer_costs import layer_costs
from nemotron_h.cli.minipuzzle import minipuzzle
from nemotron_h.cli.plan import plan
from nemotron_h.cli.prune import importance, prune
from nemotron_h.cli.puzzle import puzzle
from nemotron_h.cli.reason import reason
from nemotron_h.cli.recipe import app as recipe_app
from nemotron_h.cli.report import report as draw_report
from nemotron_h.cli.ruler import ruler
from nemotron_h.cli.shapes import shapes
from nemotron_h.cli.sweep import sweep
from nemotron_h.cli.transplant import transplant
from nemotron_h.cli.vqa import vqa
from nemotron_h.core.errors import report, user_error

app = typer.Typer(
    name="nemotron-h",
    help="Recipes, data and checkpoints of Nemotron-H models. Training: nemo llm pretrain --factory NAME.",
    no_args_is_help=True,
    add_completion=False,  # Typer's starts Python at each TAB
    pretty_exceptions_enable=False,
)
app.add_typer(recipe_app, name="recipe", help="Look at, make, compare and check recipes.")
app.add_typer(data_app, name="data", help="Prepare and check training data.")
app.add_typer(export_app, name="export", help="Write a checkpoint for other tools.")
app.add_typer(import_app, name="import", help="Read a model of other tools.")
app.command()(plan)
app.command()(shapes)
app.command()(layer_costs)
app.command()(compare_precision)
app.command()(sweep)
app.command()(importance)
app.command()(prune)
app.command()(align_heads)
app.command()(transplant)
app.command()(minipuzzle)
app.command()(puzzle)
app.command()(hybridise)
app.command()(reason)
app.command()(distill_cache)
app.command()(generate)
app.command()(chat)
app.command()(merge_adapter)
app.command("eval")(evaluate)
app.command()(coverage)
app.command()(ruler)
app.command()(vqa)
app.command("report")(draw_report)
app.command("incidents")(show_incidents)
app.command()(completion)

_STYLES = {"ok": "green", "warn": "yellow", "fail": "red"}


@app.command()
def doctor(
    folder: Annotated[Path, typer.Option(help="Where runs would write; its disk is checked.")] = Path("runs"),
    quick: Annotated[bool, typer.Option("--quick", help="Do not import NeMo (saves ten seconds and more).")] = False,
) -> None:
    """Say what this machine has and what to fix. Exit code 1: training cannot run here."""
    from nemotron_h.launch.doctor import examine

    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    failed = False
    for finding in examine(folder.resolve(), imports=not quick):
        fix = ("\n", ("fix: ", "bold"), finding.fix) if finding.fix else ()
        state = Text(finding.state, _STYLES[finding.state])
        table.add_row(state, Text(finding.what), Text.assemble(finding.found, *fix))  # text: paths may have brackets
        failed = failed or finding.state == "fail"
    Console(highlight=False).print(table)
    raise typer.Exit(1 if failed else 0)


def main() -> None:
    """Run a command; a mistake of the user is one message without a traceback."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
    try:
        app()
    except Exception as error:
        mistake = user_error(error)
        if mistake is None:
            raise
        report(mistake)
        sys.exit(mistake.EXIT_CODE)
