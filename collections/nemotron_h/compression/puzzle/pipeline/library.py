"""Stage `library`: the variants of every layer, made and trained on what the parent's layer does.

    nemotron-h puzzle RECIPE --stage library

Reads the importance. Writes library.json, and each variant into the library once it is trained: an interrupted attempt
loses the layer that it was at, and a variant that is not changed is not made again.
"""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from nemotron_h.architecture.variants import LINEAR, Variant
from nemotron_h.compression.forward import Forward
from nemotron_h.compression.heads.gates import Gates
from nemotron_h.compression.heads.moments import Moments, measure_moments
from nemotron_h.compression.pipeline.text import CHOICE
from nemotron_h.compression.puzzle.context import Context
from nemotron_h.compression.puzzle.gated import GatedPiece
from nemotron_h.compression.puzzle.initial import Knowledge, initial_tensors, layer_tensors, merging
from nemotron_h.compression.puzzle.library import Entry
from nemotron_h.compression.puzzle.local import Piece, Training, fit_linear, imitate
from nemotron_h.compression.workers import bound, over_layers
from nemotron_h.core.files import write_json
from nemotron_h.core.progress import StageProgress
from nemotron_h.data.feed.calibration import calibration_windows
from nemotron_h.export.source import ModelSource
from nemotron_h.launch.stages import Stage

LIBRARY = "library.json"
MOMENTS = "moments.safetensors"


def stage(c: Context) -> Stage:
    """Return the stage."""
    title = "variants of every layer, trained to do what it does"
    return Stage("library", title, ("importance",), (LIBRARY,), partial(inputs, c), partial(run, c))


def inputs(c: Context) -> dict[str, Any]:
    """Return what the result depends on, beside the importance."""
    names = {layer: c.hash(layer, variant) for layer, variant in _all(c)}
    return {"variants": sorted(names.values())} if names else {}


def _all(c: Context) -> list[tuple[int, Variant]]:
    return [(layer, v) for layer in range(len(c.variants)) for v in c.trained_variants(layer).values()]


def run(c: Context, folder: Path) -> str:
    """Make what the library lacks."""
    missing = [(layer, v) for layer, v in _all(c) if c.library.entry(c.hash(layer, v)) is None]
    layers = sorted({layer for layer, _ in missing}, reverse=True)  # the last ones read most of the parent
    moments = _moments(c, folder, missing)
    work = {layer: _work(c, layer, [v for n, v in missing if n == layer]) for layer in layers}
    with StageProgress(c.console, "work on variants", sum(work.values())) as bar:
        for layer, _ in over_layers(c, bound(make_layer, moments), layers):
            bar.advance(work[layer])
    entries = [c.library.entry(c.hash(layer, variant)) for layer, variant in _all(c)]
    write_json(folder / LIBRARY, [asdict(entry) for entry in entries])
    worst = max(entries, key=lambda entry: entry.trained)
    return (
        f"{len(entries)} variants, {len(missing)} of them made now; the mean error fell from "
        f"{_mean([e.made for e in entries]):.3f} to {_mean([e.trained for e in entries]):.3f}, the largest is "
        f"{worst.trained:.3f} of layer {worst.layer}, {worst.variant}"
    )


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _work(c: Context, layer: int, variants: list[Variant]) -> int:
    """Return the work on a layer: tokens through the parent before it, and three times through each variant."""
    tokens = [c.tokens(variant.name) for variant in variants]
    return max(tokens) * (1 + layer) + 3 * sum(tokens) + 1


def _moments(c: Context, folder: Path, missing: list[tuple[int, Variant]]) -> str | None:
    """Return the file of the moments of key-value heads, where some are to be merged by them."""
    heads = {n: each.key for n, block in enumerate(c.definition.blocks) if (each := block.attention_heads())}
    if c.part.merge == "mean" or not any(heads.get(layer) in variant.widths for layer, variant in missing):
        return None
    path = folder / MOMENTS
    if not path.is_file():
        windows = calibration_windows(c.text.blend, c.text.manifest, c.part.neuron_samples, c.text.seq_length)
        with StageProgress(c.console, "windows through the parent", len(windows)) as bar:
            moments = measure_moments(c.parent.model, windows, bar.advance)
        save_file({f"{n}.{k}": tensor for n, each in moments.items() for k, tensor in vars(each).items()}, path)
    return str(path)


def make_layer(c: Context, layer: int, moments: str | None) -> None:
    """Make, train and store the variants of a layer that the library lacks.

    Args:
        moments: file of the moments; None merges key-value heads as their plain mean.
    """
    variants = {
        name: variant
        for name, variant in c.trained_variants(layer).items()
        if c.library.entry(c.hash(layer, variant)) is None
    }
    forward, batch = Forward(c.parent.model), c.part.local.batch
    fits = {}
    if LINEAR in variants:
        windows = calibration_windows(c.text.blend, c.text.manifest, c.part.neuron_samples, c.text.seq_length)
        fits[layer] = fit_linear(forward, layer, windows, batch)
    stored = load_file(moments) if moments else {}
    own = {layer: Moments(stored[f"{layer}.keys"], stored[f"{layer}.values"])} if f"{layer}.keys" in stored else None
    knowledge = Knowledge(c.importance.scores(), own, fits)
    whole = [tensor.float() for tensor in layer_tensors(ModelSource(c.parent.checkpoint), layer)]
    tensors = {name: initial_tensors(c.definition, layer, v, whole, knowledge) for name, v in variants.items()}
    pieces = {name: _piece(c, layer, v, tensors[name], whole, knowledge, forward) for name, v in variants.items()}
    lengths = {name: Training(c.tokens(name), batch, c.part.local.lr) for name in variants}
    batches = c.batches(max(length.tokens for length in lengths.values()))
    held_out = c.text.held_out[CHOICE][:, :-1]
    measured = imitate(forward, range(layer, layer + 1), pieces, lengths, batches, held_out)
    for name, variant in variants.items():
        entry = Entry(layer, name, c.hash(layer, variant), lengths[name].tokens, *measured[name])
        c.library.save(entry, pieces[name].tensors)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _piece(
    c: Context,
    layer: int,
    variant: Variant,
    tensors: list[Tensor],
    whole: list[Tensor],
    knowledge: Knowledge,
    forward: Forward,
) -> Piece:
    """Return a variant that is to train: with gates, where it merges heads by them.

    Args:
        tensors, whole: weights of the variant and of the parent's layer.
    """
    alignment = merging(c.definition, layer, variant, knowledge) if c.part.merge == "gates" else None
    if alignment is None:
        return Piece(variant.block, tensors, forward)
    gates = Gates(alignment.heads.groups, seed=c.recipe.init_seed)
    return GatedPiece(variant.block, alignment, tensors, whole[alignment.heads.qkv], forward, gates)
