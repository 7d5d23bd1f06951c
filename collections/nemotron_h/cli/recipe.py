"""`nemotron-h recipe ...`: look at, make, compare and check recipes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

app = typer.Typer(no_args_is_help=True, help="Look at, make, compare and check recipes.", rich_markup_mode=None)

Name = Annotated[str, typer.Argument(help="A shipped recipe (nemotron-h recipe list), or the path of a YAML file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="Values to change: optim.peak_lr=3e-4, or a part by name: model=nemotron_h_8b."),
]


@app.command("list")
def list_(
    gpu: Annotated[str, typer.Option(help="Which GPU; see configs/gpus.yaml.")] = "h100",
    json_: Annotated[bool, typer.Option("--json", help="Print JSON, with numbers in full.")] = False,
) -> None:
    """List the shipped recipes: parameters of the model, stage, tokens, fewest GPUs, source of the length.

    GPUs are the fewest on which `nemotron-h plan NAME --gpus N --sweep` has a layout that fits; how long it takes there
    is another question.
    """
    from nemotron_h.planning.catalogue import catalogue

    entries = catalogue(gpu)
    if json_:
        import dataclasses
        import json

        typer.echo(json.dumps([dataclasses.asdict(entry) for entry in entries], indent=2))
        return
    from rich.table import Table

    from nemotron_h.core.units import short_count

    def three_digits(count: int) -> str:
        return short_count(float(f"{count:.3g}"))

    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    for column in ("recipe", "size", "stage", "tokens", "GPUs", "source"):
        table.add_column(column, justify="right" if column in ("size", "tokens", "GPUs") else "left", no_wrap=True)
    model = None
    for entry in entries:
        size = three_digits(entry.parameters) if entry.model != model else ""  # once a model: groups are seen
        model = entry.model
        gpus = "-" if entry.gpus is None else f"{entry.gpus:,}"
        table.add_row(entry.recipe, size, entry.stage, three_digits(entry.tokens), gpus, entry.source)
    Console(highlight=False, width=100).print(table)


@app.command()
def show(
    name: Name,
    overrides: Overrides = None,
    plain: Annotated[bool, typer.Option("--plain", help="Only YAML: a whole recipe that runs again.")] = False,
) -> None:
    """Show a recipe with every value: where it was written, and the source that is stated for it.

    `schema default` is a key's own default, `override` was given here. Piped, the output is YAML with these as
    comments.
    """
    import dataclasses

    from nemotron_h.recipe import show as shown
    from nemotron_h.recipe.compose import to_yaml, trace

    composed = trace(name, overrides or ())
    if plain:
        typer.echo(to_yaml(dataclasses.asdict(composed.recipe)), nl=False)
    else:
        shown.show(composed, Console(highlight=False))


@app.command()
def new(
    name: Annotated[str, typer.Argument(help="Of the recipe, and of its run's folder.")],
    parent: Annotated[str, typer.Option("--from", help="The recipe to differ from: a shipped one, or a YAML file.")],
    out: Annotated[
        Path | None, typer.Option("--out", help="The file to write.", show_default="NAME.yaml; beside a parent's file")
    ] = None,
) -> None:
    """Write a recipe of your own as a small diff to another; never overwrites."""
    from nemotron_h.recipe.compose import compose
    from nemotron_h.recipe.new import write
    from nemotron_h.schema.recipe import command_of

    path = write(name, parent, out)
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"wrote {path}; to run it:", markup=False)
    console.print(command_of(compose(str(path)).stage, path), markup=False)


@app.command()
def diff(
    a: Annotated[str, typer.Argument(help="A recipe: a shipped one, or the path of a YAML file.")],
    b: Annotated[str, typer.Argument(help="Another one.")],
) -> None:
    """Show the keys in which two recipes differ, with both values and where they were written."""
    from nemotron_h.recipe import diff as compared
    from nemotron_h.recipe.compose import trace

    compared.show(compared.differences(trace(a), trace(b)), Console(highlight=False))


@app.command()
def check(name: Name, overrides: Overrides = None) -> None:
    """Check all that can be checked without starting: keys, model, layout, batch, blend, phases, vocabulary.

    Of a compression it also says what the command takes of the machine that it runs on. Exit code 2: something is
    wrong, and the message says what.
    """
    from nemotron_h.compression import needs
    from nemotron_h.compression.hybridise import needs as hybridise_needs
    from nemotron_h.compression.puzzle import needs as puzzle_needs
    from nemotron_h.recipe.check import examine

    console, checked = Console(highlight=False, soft_wrap=True), examine(name, overrides or ())
    console.print(checked.line(), markup=False)
    of_stage = {"minipuzzle": needs, "puzzle": puzzle_needs, "hybridise": hybridise_needs}
    if checked.recipe.stage in of_stage:
        console.print(f"    {of_stage[checked.recipe.stage].sentence(checked.recipe)}", markup=False)
