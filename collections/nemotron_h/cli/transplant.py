"""`nemotron-h transplant`: a hybrid of a Transformer, whose Mamba-2 layers begin from its attention layers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from nemotron_h.architecture.hybrid import check_matrices
from nemotron_h.cli.calibration import BATCH, LR, SAMPLES, CalibrationText, device, load_parent
from nemotron_h.cli.prune import CheckpointArgument
from nemotron_h.core.errors import UserError
from nemotron_h.core.progress import StageProgress
from nemotron_h.core.units import count_of

if TYPE_CHECKING:
    import numpy as np

    from nemotron_h.architecture.definition import ModelDefinition
    from nemotron_h.compression.forward import Forward
    from nemotron_h.compression.puzzle.local import Change
    from nemotron_h.compression.transplant.mixers import Error, Lengths, Mixers


def transplant(
    checkpoint: CheckpointArgument,
    out: Annotated[Path, typer.Argument(help="The checkpoint folder to write; must not exist.")],
    layers: Annotated[
        str | None, typer.Option(help="Attention layers that become Mamba-2: 0,2,4, numbers of the pattern.")
    ] = None,
    every: Annotated[
        int | None,
        typer.Option(help="Attention stays in every N-th attention layer alone: with 2 in the second, fourth, ..."),
    ] = None,
    count: Annotated[
        int | None,
        typer.Option(min=1, help="So many attention layers become Mamba-2: those in whose place it harms least."),
    ] = None,
    groups: Annotated[
        int | None,
        typer.Option(
            min=1, help="Groups of each mixer; fewer average queries and keys.", show_default="one a query head"
        ),
    ] = None,
    blend: Annotated[
        str | None,
        typer.Option(help="Text to choose by and to train on: of a prepared blend.", show_default="none"),
    ] = None,
    tokens: Annotated[
        str | None,
        typer.Option(
            help="Text on which each mixer trains to do what the attention did, such as 200K.", show_default="none"
        ),
    ] = None,
    matrices: Annotated[
        str | None,
        typer.Option(
            help="Text on which its matrix learns the attention's before, such as 100K (MOHAWK).", show_default="none"
        ),
    ] = None,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Windows of a step, and of a pass.", show_default=f"{BATCH}")
    ] = None,
    lr: Annotated[
        float | None, typer.Option(min=1e-9, help="Of the mixers at first; it falls to 0.", show_default=f"{LR}")
    ] = None,
    samples: Annotated[
        int | None, typer.Option(min=1, help="Held-out windows to measure on, at most.", show_default=f"{SAMPLES}")
    ] = None,
    seq_length: Annotated[
        int | None, typer.Option(min=1, help="Tokens of a window.", show_default="as in training")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the weights that attention lacks, and of the text.")] = 0,
    root: Annotated[
        Path | None, typer.Option(help="Where blends are prepared.", show_default="$NEMOTRON_H_DATA or ./data")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Of the model definition.", show_default="the folder's")] = None,
) -> None:
    """Turn attention layers into Mamba-2 layers that begin from their weights (Mamba in the Llama, arXiv 2408.15237).

    nemotron-h transplant runs/llama_tiny half --every 2

    nemotron-h transplant runs/llama_tiny half --count 4 --blend sample_small --matrices 100K --tokens 200K

    Queries become C, keys B, values x, and the output projection stays; all else of a mixer begins as in the paper's
    code. Lines tell where each layer's weights come from, and what of the attention is dropped. With --matrices each
    mixer first learns to mix tokens as the attention does, with --tokens then to add what it adds (stages 1 and 2 of
    MOHAWK, arXiv 2408.10189). A line tells its squared error, of the squares of what the layer adds, over held-out
    text. With --count a table tells the KL divergence from the parent with one layer replaced. The result is an
    ordinary checkpoint with a definition of its own (model.yaml); distil it from its parent. nemotron-h hybridise does
    all of it in rounds.
    """
    of_text = {"--samples": samples, "--seq-length": seq_length, "--root": root, "--blend": blend}
    of_training = {"--lr": lr} | ({} if count else {"--batch": batch})
    trained = {"--tokens": tokens, "--matrices": matrices}
    ways = {"--layers": layers, "--every": every, "--count": count}
    budgets = _check_options(ways, count, trained, of_text, of_training)
    from nemotron_h.checkpoint.writer import size
    from nemotron_h.compression.transplant.child import write_child
    from nemotron_h.compression.transplant.layers import child_definition
    from nemotron_h.export.config import definition_name
    from nemotron_h.export.folder import check_new, check_room

    check_new(out)
    mixers = _mixers(checkpoint, (layers, every, count), groups, seed)
    source, chosen, name = mixers.source, list(mixers.transplants), name or definition_name(out.absolute().name)
    check_room(out, size(child_definition(source.definition, mixers.transplants, name), source.dtype))
    settings: dict[str, Any] = {
        "chosen_by": "layers" if layers else "every" if every else "count",
        "groups": f"{groups}, as asked for: means" if groups else "one for each query head, which has its own Q",
    }
    errors: dict[int, Error] = {}
    if any(budgets.values()) or count:
        text = CalibrationText.of(source.checkpoint, blend or "", root, seq_length, samples or SAMPLES, seed)
        if matrices:
            check_matrices(text.length, "transplant: --seq-length")
        training = (budgets["--matrices"], budgets["--tokens"], batch or BATCH, LR if lr is None else lr)
        chosen, errors, measured = _measure(mixers, text, training, count)
        settings |= measured
    _tell_layers(mixers, chosen)
    child = child_definition(source.definition, {layer: mixers.transplants[layer] for layer in chosen}, name)
    with StageProgress(Console(stderr=True), "writing", size(child, source.dtype), "bytes") as bar:
        write_child(mixers, child, chosen, out, settings, errors, bar.advance)
    _tell_child(out, source.definition, child)


def _check_options(
    ways: Mapping[str, Any],
    count: int | None,
    trained: Mapping[str, Any],
    of_text: Mapping[str, Any],
    of_training: Mapping[str, Any],
) -> dict[str, int]:
    """Return the tokens of each training; refuse options that exclude each other or do nothing, before any work.

    Args:
        ways: of choosing layers.
        trained: tokens of each training.
        of_text, of_training: values of the options of text and of training.
    """
    stated, trains, text, training = (
        [name for name, value in part.items() if value is not None] for part in (ways, trained, of_text, of_training)
    )
    if len(stated) != 1:
        raise UserError(
            f"{' and '.join(stated)} exclude each other" if stated else "no layer is chosen",
            hint=f"give one of {', '.join(ways)}",
        )
    if training and not trains:
        raise UserError(f"{', '.join(training)}: nothing is trained", hint="add --tokens, or leave it out")
    if (count or trains) and "--blend" not in text:
        raise UserError(f"{'--count' if count else trains[0]} needs text", hint="add --blend NAME, a prepared blend")
    if text and not (count or trains):
        raise UserError(f"{', '.join(text)}: no text is read", hint="add --tokens or --count, or leave it out")
    return {key: count_of(text, key, "transplant") if text else 0 for key, text in trained.items()}


def _mixers(checkpoint: Path, ways: tuple[str | None, int | None, int | None], groups: int | None, seed: int) -> Mixers:
    """Return the mixers in the places of the layers that are transplanted, or that these are chosen of.

    Args:
        ways: layers, every and count of the command, of which one is given.
    """
    from nemotron_h.architecture.blocks.transplant import transplants
    from nemotron_h.architecture.vision import check_text_only
    from nemotron_h.checkpoint.adapters import check_whole
    from nemotron_h.checkpoint.reader import find_checkpoint
    from nemotron_h.compression.transplant.layers import all_but_every, check_count, listed
    from nemotron_h.compression.transplant.mixers import Mixers
    from nemotron_h.export.source import ModelSource

    checkpoint = find_checkpoint(checkpoint)
    check_whole(checkpoint)
    source, origin, (layers, every, count) = ModelSource(checkpoint), f"checkpoint {checkpoint}", ways
    check_text_only(source.definition, origin)
    if layers is not None:
        chosen = listed(source.definition, layers, origin)
    elif every is not None:
        chosen = all_but_every(source.definition, every, origin)
    else:
        chosen = check_count(source.definition, count or 0, origin)
    return Mixers(source, transplants(source.definition.blocks, chosen, groups, f"{origin}: --groups"), seed)


def _measure(
    mixers: Mixers, text: CalibrationText, training: tuple[int, int, int, float], count: int | None
) -> tuple[list[int], dict[int, Error], dict[str, Any]]:
    """Train the mixers, then choose those of the least scores.

    Args:
        training: tokens of matrices and of mixers, windows of a step, learning rate; 0 tokens train none.
        count: of layers to choose; None takes all.
    Returns:
        the layers, the errors of those that are trained, and what run.json tells of it.
    """
    from nemotron_h.compression.forward import Forward
    from nemotron_h.compression.puzzle.local import Training
    from nemotron_h.compression.transplant.mixers import Lengths, least_harmful

    matrices, tokens, batch, lr = training
    held_out, lengths, record = text.held_out(), Lengths.of(*training), text.record(mixers.source.checkpoint)
    record |= {"samples": len(held_out)}
    batches = text.batches(Training(matrices + tokens, batch, lr)) if matrices + tokens else None
    forward = Forward(load_parent(mixers.source.checkpoint, exact=True), device=device())
    chosen, errors = list(mixers.transplants), {}
    if batches:
        record |= {"tokens": tokens, "matrices": matrices, "batch": batch, "lr": lr}
        errors = _train(mixers, forward, lengths, batches, held_out[:, :-1], batch)
    if count:
        scores = _score(mixers, forward, held_out, batch)
        chosen = least_harmful(scores, count)
        _tell_scores(scores, chosen)
        record["scores"] = [
            {"layer": layer, **{variant: change.kl for variant, change in row.items() if variant}}
            for layer, row in scores.items()
        ]
    return chosen, errors, record


def _train(
    mixers: Mixers, forward: Forward, lengths: Lengths, batches: Any, held_out: np.ndarray, batch: int
) -> dict[int, Error]:
    """Train the mixers, each told as a line when it is done."""
    errors, step = {}, batches(0).size
    work = len(mixers.transplants) * sum(lengths.steps(step)) * step
    with StageProgress(Console(stderr=True), "tokens through layers", work) as bar:
        for layer in mixers.transplants:
            errors[layer] = mixers.train(layer, forward, lengths, batches, held_out, batch, bar.advance)
            typer.echo(f"layer {layer}: {errors[layer].line()}")
    return errors


def _score(mixers: Mixers, forward: Forward, windows: np.ndarray, batch: int) -> dict[int, dict[str, Change]]:
    work = len(mixers.transplants) * windows[:, 1:].size
    with StageProgress(Console(stderr=True), "tokens through models of one other layer", work) as bar:
        return {layer: mixers.score(layer, forward, windows, batch, bar.advance) for layer in mixers.transplants}


def _tell_scores(scores: Mapping[int, Mapping[str, Change]], chosen: list[int]) -> None:
    """Print what each layer's replacement costs, and which are taken."""
    variants = [variant for variant in next(iter(scores.values())) if variant]
    table = Table("layer", *(f"KL {variant}" for variant in variants), "taken", box=None, padding=(0, 2, 0, 0))
    for layer, row in scores.items():
        values = [f"{row[variant].kl:.4f}" for variant in variants]
        table.add_row(str(layer), *values, "yes" if layer in chosen else "")
    Console(highlight=False).print(table)


def _tell_layers(mixers: Mixers, chosen: list[int]) -> None:
    """Print where each layer's weights come from."""
    from nemotron_h.compression.transplant.child import record

    for layer in chosen:
        row = record(mixers, layer)
        parts = "; ".join(f"{part} <- {row[part]}" for part in ("C", "B", "x", "out_proj"))
        dropped = f"; dropped: {', '.join(row['dropped'])}" if row["dropped"] else ""
        typer.echo(f"layer {layer}: {row['heads']} heads, {row['groups']} groups; {parts}{dropped}")


def _tell_child(out: Path, parent: ModelDefinition, child: ModelDefinition) -> None:
    from nemotron_h.architecture.blocks.transplant import attention_layers

    stay = ", ".join(map(str, attention_layers(child.blocks)))
    where = f"attention stays in layers {stay}" if stay else "no attention stays"
    size = f"{child.parameters:,} parameters, {child.parameters / parent.parameters:.1%} of {parent.name}'s"
    typer.echo(f"{out}: {child.name}, {child.pattern}, {where}; {size}")
