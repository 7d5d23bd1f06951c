"""`nemotron-h layer-costs`: measure the latency of a layer of each kind on this machine, for `nemotron-h shapes`."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer


def layer_costs(
    out: Annotated[Path, typer.Option(help="File to write; nemotron-h shapes --on takes it.")],
    like: Annotated[str, typer.Option(help="Model whose kinds of layers and sizes of heads are measured.")] = (
        "nemotron_h_1b"
    ),
    hidden: Annotated[
        list[int] | None, typer.Option(help="Hidden sizes; repeat it.", show_default="512, 1024, 1536, 2048")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Sequences at once.")] = 1,
    context: Annotated[int, typer.Option(min=1, help="Tokens of each prompt.")] = 512,
    turns: Annotated[int, typer.Option(min=1, help="Timed turns, of which the shortest counts.")] = 7,
    name: Annotated[str | None, typer.Option(help="Of the machine.", show_default="cpu, or cuda")] = None,
) -> None:
    """Measure a layer of each kind, in prefill and decode, through the generation that models run with.

    One file is of one scenario (batch, context) and one machine. On a GPU weights are in BF16, else in float32; threads
    are those of OMP_NUM_THREADS, and the seconds of one thread are its CPU time.
    """
    from rich.console import Console

    from nemotron_h.core.progress import StageProgress
    from nemotron_h.core.strict import check_yaml_place
    from nemotron_h.inference.layer_costs import measure, on_gpu
    from nemotron_h.laws.shapes import model_named
    from nemotron_h.planning.latency import write_layer_costs
    from nemotron_h.schema.layer_costs import Scenario

    model, sizes = model_named(like), sorted(set(hidden or (512, 1024, 1536, 2048)))
    check_yaml_place("--out", out, "my_cpu.yaml")
    command = shlex.join(["nemotron-h", *sys.argv[1:]])
    machine = name or ("cuda" if on_gpu() else "cpu")
    with StageProgress(Console(), "layers", len(sizes) * len(model.kinds)) as bar:
        costs = measure(
            model, sizes, Scenario(batch, context), machine, turns, command, lambda title: bar.advance(1, title)
        )
    write_layer_costs(out, costs)
    typer.echo(f"{out}: nemotron-h shapes --parameters 1B --on {out}")
