"""`nemotron-h align-heads`: fewer key-value heads, rotated into agreement before they are merged."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from nemotron_h.cli.prune import CheckpointArgument
from nemotron_h.core.errors import UserError
from nemotron_h.core.progress import StageProgress

if TYPE_CHECKING:
    from nemotron_h.architecture.blocks.block import AttentionHeads
    from nemotron_h.compression.heads.alignment import LayerAlignment

METHODS = ("aligned", "mean")
#: as the paper's code: 128 x 2,048 tokens
SAMPLES = 128


def align_heads(
    checkpoint: CheckpointArgument,
    out: Annotated[Path, typer.Argument(help="The checkpoint folder to write; must not exist.")],
    kv_heads: Annotated[int, typer.Option(min=1, help="Key-value heads of each attention layer, after merging.")],
    blend: Annotated[str | None, typer.Option(help="Text to align on: the training text of a prepared blend.")] = None,
    method: Annotated[
        str, typer.Option(help="aligned; or mean, a control: neighbours as they are, no text is read.")
    ] = METHODS[0],
    align_only: Annotated[
        bool, typer.Option("--align-only", help="Rotate and reorder, merge nothing: the same function.")
    ] = False,
    samples: Annotated[int | None, typer.Option(min=1, help="Windows of text.", show_default=f"{SAMPLES}")] = None,
    seq_length: Annotated[
        int | None, typer.Option(min=1, help="Tokens of a window.", show_default="as in training")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Of the choice of windows and the search for groups.", show_default="0")
    ] = None,
    root: Annotated[
        Path | None, typer.Option(help="Where blends are prepared.", show_default="$NEMOTRON_H_DATA or ./data")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Of the model definition.", show_default="the folder's")] = None,
) -> None:
    """Merge key-value heads, rotated into agreement before (arXiv 2412.20677): a smaller cache for keys and values.

    Each line tells a layer's groups of heads, and which share of the squares of its keys and values merging loses; in
    brackets, what the plain mean of neighbours would. Query heads keep their number. The result is an ordinary
    checkpoint with a definition of its own (model.yaml); fine-tune or distil it to bring the loss back.
    """
    asked = {"--samples": samples, "--seq-length": seq_length, "--seed": seed, "--root": root, "--blend": blend}
    _check_options(method, align_only, asked)
    from nemotron_h.checkpoint.definition import read_definition
    from nemotron_h.checkpoint.reader import find_checkpoint, read_record
    from nemotron_h.compression.heads.alignment import aligned_definition, attention_layers, plain_mean
    from nemotron_h.compression.heads.child import aligned_size, write_aligned
    from nemotron_h.export.config import definition_name
    from nemotron_h.export.folder import check_new

    check_new(out)
    checkpoint = find_checkpoint(checkpoint)
    parent = read_definition(read_record(checkpoint), f"checkpoint {checkpoint}")
    layers = attention_layers(parent, kv_heads, f"checkpoint {checkpoint}")
    merged, name = None if align_only else kv_heads, name or definition_name(out.absolute().name)
    aligned_definition(parent, merged, name)
    settings: dict[str, Any] = {"method": method}
    if method == METHODS[0]:
        alignments, text = _align_on_text(
            checkpoint, layers, kv_heads, blend or "", root, samples, seq_length, seed or 0
        )
        settings |= text
    else:
        alignments = {layer: plain_mean(heads, kv_heads) for layer, heads in layers.items()}
        for layer, alignment in alignments.items():
            typer.echo(f"layer {layer}: {alignment.line()}")
    with StageProgress(Console(stderr=True), "writing", aligned_size(checkpoint, merged), "bytes") as bar:
        child = write_aligned(checkpoint, alignments, merged, out, name, settings, bar.advance)
    heads = "aligned, none merged" if align_only else f"{kv_heads} key-value heads"
    share = child.parameters / parent.parameters
    typer.echo(f"{out}: {child.name}, {heads}, {child.parameters:,} parameters, {share:.1%} of {parent.name}'s")


def _check_options(method: str, align_only: bool, asked: Mapping[str, Any]) -> None:
    """Refuse options that exclude each other, before anything is read."""
    if method not in METHODS:
        raise UserError(f"--method {method} is unknown", hint=f"use one of {', '.join(METHODS)}")
    if method == METHODS[0]:
        if asked["--blend"] is None:
            raise UserError("--method aligned needs text", hint="add --blend NAME, a prepared blend")
        return
    if align_only:
        raise UserError("--align-only and --method mean exclude each other: there is nothing to align")
    if unused := [option for option, value in asked.items() if value is not None]:
        raise UserError(f"{', '.join(unused)}: --method mean reads no text", hint="leave it out")


def _align_on_text(
    checkpoint: Path,
    layers: Mapping[int, AttentionHeads],
    kv_heads: int,
    blend: str,
    root: Path | None,
    samples: int | None,
    seq_length: int | None,
    seed: int,
) -> tuple[dict[int, LayerAlignment], dict[str, Any]]:
    """Return the alignments, each told as a line when it is there, and what the record tells of the text."""
    import torch

    from nemotron_h.checkpoint.folders import INTEGRITY
    from nemotron_h.checkpoint.reader import read_record
    from nemotron_h.compression.heads.alignment import align
    from nemotron_h.compression.heads.moments import measure_moments
    from nemotron_h.core.files import file_sha256
    from nemotron_h.data.blend import load_blend
    from nemotron_h.data.feed.calibration import calibration_windows, text_record
    from nemotron_h.data.manifest import check_manifest
    from nemotron_h.inference.model import load_model

    length = seq_length or (read_record(checkpoint).get("data") or {}).get("seq_length")
    if not length:
        raise UserError(f"{checkpoint} does not tell its sequence length", hint="give --seq-length")
    text = load_blend(blend)
    manifest = check_manifest(root, text)
    windows = calibration_windows(text, manifest, samples or SAMPLES, length, seed)
    on_gpu, console = torch.cuda.is_available(), Console(stderr=True)
    model = load_model(checkpoint, dtype=torch.bfloat16 if on_gpu else torch.float32)
    with StageProgress(console, "windows through the model", len(windows)) as bar:
        moments = measure_moments(model, windows, bar.advance, "cuda" if on_gpu else None)
    del model
    with StageProgress(console, "layers aligned", len(layers)) as bar:

        def tell(layer: int, alignment: LayerAlignment) -> None:
            typer.echo(f"layer {layer}: {alignment.line()}")
            bar.advance()

        alignments = align(moments, layers, kv_heads, seed, tell)
    return alignments, {
        "checkpoint_sha256": file_sha256(checkpoint / INTEGRITY),
        "samples": len(windows),
        "seq_length": length,
        "seed": seed,
        **text_record(text, manifest),
    }
