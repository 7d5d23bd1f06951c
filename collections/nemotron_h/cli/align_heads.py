"""`nemotron-h align-heads`: fewer key-value heads, rotated into agreement before they are merged."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from nemotron_h.cli.calibration import BATCH, LR, SAMPLES, CalibrationText, device, load_parent
from nemotron_h.cli.prune import CheckpointArgument
from nemotron_h.core.errors import UserError
from nemotron_h.core.progress import StageProgress
from nemotron_h.core.strict import check_one_of

if TYPE_CHECKING:
    import numpy as np

    from nemotron_h.architecture.blocks.block import AttentionHeads
    from nemotron_h.compression.heads.alignment import LayerAlignment
    from nemotron_h.compression.heads.gates import Gates
    from nemotron_h.compression.heads.training import TrainedLayer
    from nemotron_h.compression.puzzle.local import Training
    from nemotron_h.inference.model import GenerationModel

ALIGNED, MEAN, GATES = METHODS = ("aligned", "mean", "gates")


def align_heads(
    checkpoint: CheckpointArgument,
    out: Annotated[Path, typer.Argument(help="The checkpoint folder to write; must not exist.")],
    kv_heads: Annotated[int, typer.Option(min=1, help="Key-value heads of each attention layer, after merging.")],
    blend: Annotated[str | None, typer.Option(help="Text to align on: the training text of a prepared blend.")] = None,
    method: Annotated[
        str,
        typer.Option(
            help="aligned; gates: aligned, and merged little by little while the layers train; or mean, a control: "
            "neighbours as they are."
        ),
    ] = ALIGNED,
    tokens: Annotated[
        str | None,
        typer.Option(help="Text on which each layer trains to do what it did, such as 200K.", show_default="none"),
    ] = None,
    multipliers: Annotated[
        str | None,
        typer.Option(
            help="Of the gates' penalty: trained, or fixed at 1 as in the paper's code.", show_default="trained"
        ),
    ] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Windows of a step.", show_default=f"{BATCH}")] = None,
    lr: Annotated[
        float | None, typer.Option(min=1e-9, help="Of the layers at first; it falls to 0.", show_default=f"{LR}")
    ] = None,
    align_only: Annotated[
        bool, typer.Option("--align-only", help="Rotate and reorder, merge nothing: the same function.")
    ] = False,
    samples: Annotated[int | None, typer.Option(min=1, help="Windows of text.", show_default=f"{SAMPLES}")] = None,
    seq_length: Annotated[
        int | None, typer.Option(min=1, help="Tokens of a window.", show_default="as in training")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Of the text, the search for groups and the gates.", show_default="0")
    ] = None,
    root: Annotated[
        Path | None, typer.Option(help="Where blends are prepared.", show_default="$NEMOTRON_H_DATA or ./data")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Of the model definition.", show_default="the folder's")] = None,
) -> None:
    """Merge key-value heads, rotated into agreement before (arXiv 2412.20677): a smaller cache for keys and values.

    Each line tells a layer's groups of heads, and which share of the squares of its keys and values merging loses; in
    brackets, what the plain mean of neighbours would. With --tokens each layer then trains on what the parent's does,
    and a line tells its squared error, of the squares of what the layer adds, over held-out text. Query heads keep
    their number. The result is an ordinary checkpoint with a definition of its own (model.yaml); fine-tune or distil
    it to bring the loss back.
    """
    of_text = {"--seq-length": seq_length, "--seed": seed, "--root": root, "--blend": blend}
    of_training = {"--batch": batch, "--lr": lr}
    _check_options(method, align_only, tokens, multipliers, {"--samples": samples}, of_text, of_training)
    from nemotron_h.architecture.vision import check_text_only
    from nemotron_h.checkpoint.definition import read_definition
    from nemotron_h.checkpoint.reader import find_checkpoint, read_record
    from nemotron_h.compression.heads.alignment import aligned_definition, attention_layers, plain_mean
    from nemotron_h.compression.heads.child import aligned_size, write_aligned
    from nemotron_h.compression.heads.gates import MULTIPLIERS, Gates
    from nemotron_h.compression.puzzle.local import Training
    from nemotron_h.core.units import count_of
    from nemotron_h.export.config import definition_name
    from nemotron_h.export.folder import check_new

    check_new(out)
    checkpoint = find_checkpoint(checkpoint)
    parent = read_definition(read_record(checkpoint), f"checkpoint {checkpoint}")
    check_text_only(parent, f"checkpoint {checkpoint}")
    layers = attention_layers(parent, kv_heads, f"checkpoint {checkpoint}")
    merged, name = None if align_only else kv_heads, name or definition_name(out.absolute().name)
    aligned_definition(parent, merged, name)
    settings: dict[str, Any] = {"method": method}
    alignments, trained = {layer: plain_mean(heads, kv_heads) for layer, heads in layers.items()}, None
    if method == MEAN:
        for layer, alignment in alignments.items():
            typer.echo(f"layer {layer}: {alignment.line()}")
    if method != MEAN or tokens:
        text = CalibrationText.of(checkpoint, blend or "", root, seq_length, samples or SAMPLES, seed or 0)
        settings |= text.record(checkpoint)
        if tokens:
            training = Training(count_of(tokens, "--tokens", "align-heads"), batch or BATCH, LR if lr is None else lr)
            training_text = text.batches(training), text.held_out()[:, :-1]
            weighed = multipliers or MULTIPLIERS[0] if method == GATES else None
            settings |= asdict(training) | ({"multipliers": weighed} if weighed else {})
        model = load_parent(checkpoint, exact=tokens is not None)
        if method != MEAN:
            alignments = _align(model, text, layers, kv_heads)
        if tokens:
            gates = partial(Gates, multipliers=weighed, seed=text.seed) if weighed else None
            trained = _train(model, checkpoint, training, training_text, alignments, kv_heads, gates)
        del model
    with StageProgress(Console(stderr=True), "writing", aligned_size(checkpoint, merged), "bytes") as bar:
        child = write_aligned(checkpoint, alignments, merged, out, name, settings, bar.advance, trained)
    heads = "aligned, none merged" if align_only else f"{kv_heads} key-value heads"
    share = child.parameters / parent.parameters
    typer.echo(f"{out}: {child.name}, {heads}, {child.parameters:,} parameters, {share:.1%} of {parent.name}'s")


def _check_options(
    method: str,
    align_only: bool,
    tokens: str | None,
    multipliers: str | None,
    *of_parts: Mapping[str, Any],
) -> None:
    """Refuse options that exclude each other or do nothing, before anything is read.

    Args:
        of_parts: values of the options of alignment, of text, and of training.
    """
    check_one_of("--method", method, METHODS, "")
    alignment, text, training = ([name for name, value in part.items() if value is not None] for part in of_parts)
    if method == GATES and tokens is None:
        raise UserError("--method gates trains layers, and needs text for it", hint="add --tokens 200K")
    if align_only and (method != ALIGNED or tokens):
        other = "--tokens" if method == ALIGNED else f"--method {method}"
        raise UserError(
            f"--align-only and {other} exclude each other: there is nothing to {'train' if tokens else 'align'}"
        )
    if multipliers is not None:
        if method != GATES:
            raise UserError(f"--multipliers: --method {method} has no gates", hint="leave it out")
        check_one_of("--multipliers", multipliers, ("trained", "fixed"), "")
    if training and not tokens:
        raise UserError(f"{', '.join(training)}: nothing is trained", hint="add --tokens, or leave it out")
    if method == MEAN and (unused := alignment + ([] if tokens else text)):
        what = "aligns nothing" if tokens else "reads no text"
        raise UserError(f"{', '.join(unused)}: --method mean {what}", hint="leave it out")
    if "--blend" not in text and (method != MEAN or tokens):
        raise UserError(f"--method {method} needs text", hint="add --blend NAME, a prepared blend")


def _align(
    model: GenerationModel, text: CalibrationText, layers: Mapping[int, AttentionHeads], kv_heads: int
) -> dict[int, LayerAlignment]:
    """Return the alignments, each told as a line when it is there."""
    from nemotron_h.compression.heads.alignment import align
    from nemotron_h.compression.heads.moments import measure_moments
    from nemotron_h.data.feed.calibration import calibration_windows

    windows = calibration_windows(text.blend, text.manifest, text.samples, text.length, text.seed)
    console = Console(stderr=True)
    with StageProgress(console, "windows through the model", len(windows)) as bar:
        moments = measure_moments(model, windows, bar.advance, device())
    with StageProgress(console, "layers aligned", len(layers)) as bar:

        def tell(layer: int, alignment: LayerAlignment) -> None:
            typer.echo(f"layer {layer}: {alignment.line()}")
            bar.advance()

        return align(moments, layers, kv_heads, text.seed, tell)


def _train(
    model: GenerationModel,
    checkpoint: Path,
    training: Training,
    text: tuple[Callable[[int], np.ndarray], np.ndarray],
    alignments: Mapping[int, LayerAlignment],
    kv_heads: int,
    gates: Callable[[int], Gates] | None,
) -> dict[int, TrainedLayer]:
    """Return the trained layers, each told as a line when it is there."""
    from nemotron_h.compression.forward import Forward
    from nemotron_h.compression.heads.training import train_layers
    from nemotron_h.export.source import ModelSource

    (batches, held_out), forward = text, Forward(model, device=device())
    step = batches(0).size
    work = len(alignments) * math.ceil(training.tokens / step) * step
    with StageProgress(Console(stderr=True), "tokens through layers", work) as bar:

        def tell(layer: int, trained: TrainedLayer) -> None:
            typer.echo(f"layer {layer}: {trained.line()}")

        parent = (forward, ModelSource(checkpoint))
        return train_layers(*parent, alignments, kv_heads, training, batches, held_out, gates, bar.advance, tell)
