"""`nemotron-h shapes`: rank model shapes by predicted loss under a bound of latency. No torch."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nemotron_h.core.errors import UserError

if TYPE_CHECKING:
    from nemotron_h.architecture.definition import ModelDefinition
    from nemotron_h.laws.law import Law
    from nemotron_h.laws.ranking import Ranking
    from nemotron_h.planning.latency import Latency
    from nemotron_h.schema.layer_costs import Scenario

_SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}
#: law of a family, where none is named
_LAWS = {"nemotron_h": "hybrid_tiny", "transformer": "morph"}


def shapes(
    parameters: Annotated[str, typer.Option(help="Of the model, embedding and output included: 1B, 400M.")],
    latency_below: Annotated[
        str | None, typer.Option(help="Upper bound, such as 20ms or 0.5s.", show_default="none")
    ] = None,
    part: Annotated[
        str, typer.Option(help="decode: of one more token of every sequence; prefill: of reading the prompts.")
    ] = "decode",
    on: Annotated[
        str,
        typer.Option(
            help="A machine with measured layers (configs/layer_costs), a file of nemotron-h layer-costs, or a GPU of "
            "configs/gpus.yaml, whose peak rates give a lower bound of the latency."
        ),
    ] = "h200",
    batch: Annotated[int, typer.Option(min=1, help="Sequences at once.")] = 1,
    context: Annotated[int, typer.Option(min=1, help="Tokens of each prompt.")] = 512,
    like: Annotated[
        str, typer.Option(help="Model whose family, sizes of heads, groups and vocabulary all shapes have.")
    ] = "nemotron_h_1b",
    law: Annotated[
        str | None, typer.Option(help="Of configs/laws, or a YAML file.", show_default="the family's")
    ] = None,
    tokens: Annotated[
        str | None, typer.Option(help="That are trained: 20B.", show_default="20 for each parameter")
    ] = None,
    tensor: Annotated[int, typer.Option(min=1, help="Tensor-parallel ranks that all layers must split over.")] = 1,
    top: Annotated[int, typer.Option(min=1, help="Shapes to print.")] = 10,
    write: Annotated[
        Path | None, typer.Option(help="Write the definition of the best to this file, for model=FILE of a recipe.")
    ] = None,
) -> None:
    """Rank shapes (depth, width, mix of layers) by predicted loss under a bound of latency, and write the best."""
    from nemotron_h.core.strict import check_one_of, check_yaml_place
    from nemotron_h.core.units import count_of
    from nemotron_h.laws.law import known_laws, law_named
    from nemotron_h.laws.ranking import PARTS, rank
    from nemotron_h.laws.shapes import model_named
    from nemotron_h.schema.layer_costs import Scenario

    check_one_of("--part", part, PARTS)
    count = count_of(parameters, "--parameters", "shapes")
    trained = count_of(tokens, "--tokens", "shapes") if tokens else 20 * count
    bound = None if latency_below is None else _seconds(latency_below)
    if write is not None:
        check_yaml_place("--write", write, "my_shape.yaml")
    model = model_named(like)
    if law is None and model.family not in _LAWS:
        raise UserError(
            f"there is no law of family {model.family}", hint=f"name one: --law {' or '.join(known_laws())}"
        )
    fitted, origin = law_named(law or _LAWS[model.family])
    fitted.check_family(model, origin)
    scenario = Scenario(batch, context)
    latency, machine = _latency(on, model, scenario)
    ranking = rank(model, count, trained, fitted, latency, bound, part, tensor)
    _show(ranking, top, f"{parameters} alike {like}; {scenario}; {machine}", fitted, origin)
    if write is not None:
        below = f" --latency-below {latency_below} --part {part}" if latency_below else ""
        asked = f"--parameters {parameters} --like {like} --on {on} --batch {batch} --context {context}{below}"
        _write(write, ranking, asked, origin)


def _latency(
    on: str, model: ModelDefinition, scenario: Scenario
) -> tuple[Callable[[ModelDefinition], Latency | None], str]:
    """Return the latency of a model, and words that say where it is from: of a GPU, peak rates where layers were not
    measured so.
    """
    from nemotron_h.core.strict import nearest
    from nemotron_h.planning import latency
    from nemotron_h.planning.gpus import gpu, known_gpus

    of_file, known = on.endswith((".yaml", ".yml")), sorted({*latency.known_machines(), *known_gpus()})
    if not of_file and on not in known:
        hint = f"{nearest(on, known)}Known: {', '.join(known)}, or a file of nemotron-h layer-costs."
        raise UserError(f"--on {on}: there is no such machine", hint=hint)
    device = gpu(on) if on in known_gpus() else None
    try:
        costs, file = (latency.read_layer_costs(Path(on)), on) if of_file else latency.shipped_layer_costs(on, scenario)
        latency.check_costs(costs, model, scenario, file)
    except UserError:
        if device is None:
            raise
        return lambda each: latency.roofline(each, device, scenario), f"{on} at its peak rates in BF16, a lower bound"
    machine = costs.machine
    threads = f", threads: {machine.threads}" if machine.threads else ""
    words = f"layers measured on {machine.processor}{threads}, {machine.dtype}"
    return lambda each: latency.measured_latency(costs, each), words


def _seconds(text: str) -> float:
    """Return the seconds of `20ms`."""
    matched = re.fullmatch(r"(\d+\.?\d*|\.\d+)\s*(us|ms|s)", text.strip())
    if not matched or float(matched[1]) == 0:
        raise UserError(f"--latency-below {text[:40]!r} is no time", hint="write for instance 20ms, 500us or 0.5s")
    return float(matched[1]) * _SECONDS[matched[2]]


def _show(ranking: Ranking, top: int, title: str, law: Law, origin: str) -> None:
    from rich.console import Console
    from rich.table import Table

    from nemotron_h.laws.law import FORMS

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 140  # a pipe has no width of its own
    table = Table(title=title)
    best = ranking.shapes[0].loss
    # a law of shape alone knows how much worse, not the loss
    losses = ("loss", "over best") if FORMS[law.form].of_size else ("over best",)
    for column in (*losses, "decode ms", "prefill ms", "hidden", "FFN", "layers", "parameters"):
        table.add_column(column, justify="right")
    for each in ranking.shapes[:top]:
        d = each.definition
        seconds = (f"{1e3 * part:,.3g}" for part in (each.latency.decode, each.latency.prefill))
        layers = ", ".join(f"{d.count(kind.letter)} {kind.letter}" for kind in d.kinds)
        sizes = (f"{d.hidden_size:,}", f"{d.ffn_hidden_size:,}", layers, f"{d.parameters:,}")
        cells = (f"{each.loss:.4f}", f"{100 * (each.loss / best - 1):.2f} %")[-len(losses) :]
        table.add_row(*cells, *seconds, *sizes)
    console.print(table)
    console.print(f"law {origin}, fitted to {law.fitted_to}. Its error: {law.error}.")
    left_out = [
        f"{number:,} {why}"
        for number, why in (
            (ranking.slower, "above the bound"),
            (ranking.outside_law, "deeper or wider than the law's runs"),
            (ranking.not_measured, "with layers of sizes that were not measured"),
        )
        if number
    ]
    console.print(f"{len(ranking.shapes):,} shapes; left out: {', '.join(left_out) or 'none'}.")


def _write(path: Path, ranking: Ranking, arguments: str, law: str) -> None:
    import dataclasses

    from nemotron_h.checkpoint.definition import definition_text

    chosen = f"ours: chosen by nemotron-h shapes {arguments}, by law {law}"
    shape = dataclasses.replace(
        ranking.shapes[0].definition,
        name=path.stem,
        sources={"pattern": chosen, "hidden_size": chosen, "ffn_hidden_size": chosen},
    )
    try:
        path.write_text(definition_text(shape, "Written by nemotron-h shapes."), encoding="utf-8")
    except OSError as error:
        raise UserError(f"--write {path}: {error.strerror or error}") from error
    typer.echo(f"{path}: nemotron-h plan nemotron_h_1b model={path if '/' in str(path) else f'./{path}'}")
