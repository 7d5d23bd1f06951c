"""What does merging key-value heads cost, and what does training bring back? `python demos/align_heads.py`.

Reads the runs of `nemotron-h sweep demos/align_heads.yaml`, merges the heads of each in memory, trains the merged
layers, by every method on the same text, and writes the table of held-out losses into
`docs/results/head_alignment.md`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
from rich.console import Console

from nemotron_h.checkpoint.reader import find_checkpoint
from nemotron_h.compression.forward import Forward
from nemotron_h.compression.heads.alignment import (
    align,
    align_layer,
    aligned_definition,
    attention_layers,
    neighbours,
    plain_mean,
)
from nemotron_h.compression.heads.fusion import aligned_model
from nemotron_h.compression.heads.gates import MULTIPLIERS, Gates
from nemotron_h.compression.heads.moments import Moments, measure_moments
from nemotron_h.compression.heads.training import merged_piece
from nemotron_h.compression.puzzle.local import Training, train
from nemotron_h.compression.scoring import predict
from nemotron_h.core.errors import UserError
from nemotron_h.core.files import write_between
from nemotron_h.core.progress import StageProgress
from nemotron_h.data.blend import load_blend
from nemotron_h.data.feed.calibration import calibration_batches, calibration_windows
from nemotron_h.data.manifest import Manifest, check_manifest
from nemotron_h.export.source import ModelSource
from nemotron_h.inference.model import GenerationModel, load_model
from nemotron_h.platform.ranks import report_mistakes

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/results/head_alignment.md"
BEGIN, END = "<!-- table: written by demos/align_heads.py -->\n", "<!-- end of table -->\n"
RUNS = {"rotary positions": Path("runs/align_heads/rotary"), "no positions": Path("runs/align_heads/no_positions")}
BLEND, SOURCE, LENGTH, SAMPLES = ROOT / "demos/width_transfer.yaml", "wiki_lead", 128, 128
KV_HEADS, SEEDS = (4, 2, 1), (0, 1, 2)
#: of each layer and method, and with which batch and learning rate
TRAINING = Training(tokens=102_400, batch=16, lr=1e-3)
METHODS = ("mean, trained", "aligned, trained", "gates", "gates, multipliers fixed")


def held_out(manifest: Manifest) -> np.ndarray:
    """Return all windows of the held-out text, int64 [windows, LENGTH + 1]."""
    stream = manifest.stream(SOURCE, "validation")
    return np.stack([stream.read(start, LENGTH + 1) for start in range(0, stream.tokens - LENGTH - 1, LENGTH)])


def losses(model: GenerationModel, moments: list[dict[int, Moments]], text: np.ndarray) -> Iterator[tuple[float, ...]]:
    """Yield the loss of the parent; and for each of KV_HEADS those of neighbours, as they are and rotated, and those
    aligned on each calibration text.
    """
    yield (predict(model, text, 32).loss,)
    for kv_heads in KV_HEADS:
        layers = attention_layers(model.definition, kv_heads, "the run")
        merged = [{layer: plain_mean(heads, kv_heads) for layer, heads in layers.items()}]
        merged.append(
            {
                layer: align_layer(moments[0][layer], heads, kv_heads, groups=neighbours(heads, kv_heads))
                for layer, heads in layers.items()
            }
        )
        merged += [align(of_seed, layers, kv_heads, seed) for seed, of_seed in zip(SEEDS, moments, strict=True)]
        definition = aligned_definition(model.definition, kv_heads, "merged")
        yield tuple(predict(aligned_model(model, each, definition), text, 32).loss for each in merged)


def trained_losses(
    model: GenerationModel,
    source: ModelSource,
    moments: dict[int, Moments],
    kv_heads: int,
    batches: Callable[[int], np.ndarray],
    text: np.ndarray,
    seed: int,
    advance: Callable[[int], None],
) -> list[float]:
    """Return the losses of METHODS, whose layers train on the same text."""
    forward, layers = Forward(model), attention_layers(model.definition, kv_heads, "the run")
    weights = {method: list(model.layers) for method in METHODS}
    for layer, heads in layers.items():
        aligned, mean = align_layer(moments[layer], heads, kv_heads, seed), plain_mean(heads, kv_heads)
        ways = (
            (mean, None),
            (aligned, None),
            *((aligned, partial(Gates, multipliers=m, seed=seed)) for m in MULTIPLIERS),
        )
        pieces = {
            method: merged_piece(forward, source, layer, alignment, kv_heads, each)
            for method, (alignment, each) in zip(METHODS, ways, strict=True)
        }
        train(forward, range(layer, layer + 1), pieces, dict.fromkeys(METHODS, TRAINING), batches, advance)
        for method, piece in pieces.items():
            weights[method][layer] = piece.weights()
    definition = aligned_definition(model.definition, kv_heads, "merged")
    ends = (model.final_norm, model.output)
    return [
        predict(GenerationModel(definition, model.embedding, of_method, *ends), text, 32).loss
        for of_method in weights.values()
    ]


def listed(losses: Iterable[float]) -> str:
    """Return the losses of all seeds."""
    return ", ".join(f"{loss:.3f}" for loss in losses)


def main() -> None:
    """Write the table."""
    blend = load_blend(str(BLEND))
    manifest = check_manifest(None, blend)
    text, texts = held_out(manifest), {}
    for seed in SEEDS:
        calibration = calibration_windows(blend, manifest, SAMPLES, LENGTH, seed)
        batches = calibration_batches(blend, manifest, TRAINING.tokens, TRAINING.batch, LENGTH, seed)
        texts[seed] = calibration, batches
    columns = ("parent", "KV heads", "mean", "rotated", "aligned", *METHODS)
    rows = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    attention = 4
    work = len(RUNS) * len(KV_HEADS) * len(SEEDS) * attention * TRAINING.tokens
    with StageProgress(Console(stderr=True), "tokens through layers", work) as bar:
        for title, folder in RUNS.items():
            if not folder.is_dir():
                raise UserError(f"there is no {folder}", hint="nemotron-h sweep demos/align_heads.yaml")
            checkpoint = find_checkpoint(folder)
            model, source = load_model(checkpoint), ModelSource(checkpoint)
            moments = [measure_moments(model, calibration) for calibration, _ in texts.values()]
            (parent,), *merged = losses(model, moments, text)
            rows.append(f"| {title} | 8, the parent | {parent:.3f} |" + "  |" * (len(columns) - 3))
            for kv_heads, (mean, rotated, *aligned) in zip(KV_HEADS, merged, strict=True):
                by_seed = [
                    trained_losses(model, source, of_seed, kv_heads, texts[seed][1], text, seed, bar.advance)
                    for seed, of_seed in zip(SEEDS, moments, strict=True)
                ]
                trained = " | ".join(map(listed, zip(*by_seed, strict=True)))
                rows.append(f"| {title} | {kv_heads} | {mean:.3f} | {rotated:.3f} | {listed(aligned)} | {trained} |")
                bar.say(rows[-1])
    table = "\n".join(rows) + "\n"
    write_between(PAGE, BEGIN, END, table)
    print(table, end="")


if __name__ == "__main__":
    report_mistakes()
    main()
