"""What does merging key-value heads cost, aligned and as their plain mean? `python demos/align_heads.py`.

Reads the runs of `nemotron-h sweep demos/align_heads.yaml`, merges the heads of each in memory, and writes the table of
held-out losses into `docs/head_alignment.md`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from rich.console import Console

from nemotron_h.checkpoint.reader import find_checkpoint
from nemotron_h.compression.heads.alignment import (
    align,
    align_layer,
    aligned_definition,
    attention_layers,
    neighbours,
    plain_mean,
)
from nemotron_h.compression.heads.fusion import aligned_model
from nemotron_h.compression.heads.moments import measure_moments
from nemotron_h.compression.scoring import predict
from nemotron_h.core.errors import UserError
from nemotron_h.core.progress import StageProgress
from nemotron_h.data.blend import load_blend
from nemotron_h.data.feed.calibration import calibration_windows
from nemotron_h.data.manifest import Manifest, check_manifest
from nemotron_h.inference.model import GenerationModel, load_model
from nemotron_h.platform.ranks import report_mistakes

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/head_alignment.md"
BEGIN, END = "<!-- table: written by demos/align_heads.py -->\n", "<!-- end of table -->\n"
RUNS = {"rotary positions": Path("runs/align_heads/rotary"), "no positions": Path("runs/align_heads/no_positions")}
BLEND, SOURCE, LENGTH, SAMPLES = ROOT / "demos/width_transfer.yaml", "wiki_lead", 128, 128
KV_HEADS, SEEDS = (4, 2, 1), (0, 1, 2)


def held_out(manifest: Manifest) -> np.ndarray:
    """Return all windows of the held-out text, int64 [windows, LENGTH + 1]."""
    stream = manifest.stream(SOURCE, "validation")
    return np.stack([stream.read(start, LENGTH + 1) for start in range(0, stream.tokens - LENGTH - 1, LENGTH)])


def losses(model: GenerationModel, calibration: list[np.ndarray], text: np.ndarray) -> Iterator[tuple[float, ...]]:
    """Yield the loss of the parent; and for each of KV_HEADS those of neighbours, as they are and rotated, and those
    aligned on each calibration text.
    """
    yield (predict(model, text, 32).loss,)
    moments = [measure_moments(model, windows) for windows in calibration]
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


def main() -> None:
    """Write the table."""
    blend = load_blend(str(BLEND))
    manifest = check_manifest(None, blend)
    text = held_out(manifest)
    calibration = [calibration_windows(blend, manifest, SAMPLES, LENGTH, seed) for seed in SEEDS]
    rows = ["| parent | KV heads | mean of neighbours | rotated before | aligned, by seed of the text and the search |"]
    rows.append("|---|---|---|---|---|")
    with StageProgress(Console(stderr=True), "models scored", len(RUNS) * (1 + len(KV_HEADS))) as bar:
        for title, folder in RUNS.items():
            if not folder.is_dir():
                raise UserError(f"there is no {folder}", hint="nemotron-h sweep demos/align_heads.yaml")
            model = load_model(find_checkpoint(folder))
            heads = ("8, the parent", *map(str, KV_HEADS))
            for count, (mean, *others) in zip(heads, losses(model, calibration, text), strict=True):
                rotated, *by_seed = [f"{loss:.4f}" for loss in others] or [""]
                rows.append(f"| {title} | {count} | {mean:.4f} | {rotated} | {', '.join(by_seed)} |")
                bar.advance()
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    table = "\n".join(rows) + "\n"
    PAGE.write_text(f"{before}{BEGIN}\n{table}\n{END}{rest.partition(END)[2]}", encoding="utf-8")
    print(table, end="")


if __name__ == "__main__":
    report_mistakes()
    main()
