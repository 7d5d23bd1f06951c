"""Does it matter that pruning of Mamba-2 heads respects their groups? `python demos/mamba_heads.py`.

Halves the heads of each Mamba-2 layer of the run of `nemo llm pretrain --factory nemotron_h_tiny_heads` twice: as many
of each group (2504.11409), and those that are most active whatever their group, so that some read the B and C of
another one. Trains both on what the parent's layer does, on the same text, and writes the table into
`docs/results/puzzle.md`.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from statistics import mean

import numpy as np
import torch
from rich.console import Console

from nemotron_h.architecture.blocks.block import Block, Indices
from nemotron_h.checkpoint.reader import find_checkpoint
from nemotron_h.compression.child import whole_axes
from nemotron_h.compression.forward import Forward
from nemotron_h.compression.importance import measure
from nemotron_h.compression.puzzle.initial import layer_tensors
from nemotron_h.compression.puzzle.local import Piece, Training, changes, errors, train
from nemotron_h.compression.selection import top, top_channels
from nemotron_h.compression.slicing import cut
from nemotron_h.core.errors import UserError
from nemotron_h.core.files import write_between
from nemotron_h.core.progress import StageProgress
from nemotron_h.data.blend import load_blend
from nemotron_h.data.feed.calibration import calibration_windows
from nemotron_h.data.manifest import check_manifest
from nemotron_h.export.source import ModelSource
from nemotron_h.inference.model import load_model
from nemotron_h.platform.ranks import report_mistakes

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/results/puzzle.md"
BEGIN, END = "<!-- table: written by demos/mamba_heads.py -->\n", "<!-- end of table -->\n"
RUN, BLEND, LENGTH, BATCH, TOKENS, SEEDS = Path("runs/nemotron_h_tiny_heads"), "sample_small", 256, 8, 32_768, (1, 2, 3)
WAYS = ("as many of each group", "whatever their group")


def halved(block: Block, scores: dict[str, np.ndarray]) -> dict[str, dict[str, Indices]]:
    """Return the channels that stay by the way in which half of the heads are chosen."""
    widths = {axis.key: axis.size for axis in block.axes()} | {"mamba_num_heads": block.mamba_num_heads // 2}
    grouped = whole_axes(block) | top_channels(block, scores, widths)
    (activation,) = scores.values()
    most_active = top(np.linalg.norm(activation, axis=1), block.mamba_num_heads // 2)
    return dict(zip(WAYS, (grouped, grouped | {"heads": most_active}), strict=True))


def main() -> None:
    """Write the table."""
    if not RUN.is_dir():
        raise UserError(f"there is no {RUN}", hint="nemo llm pretrain --factory nemotron_h_tiny_heads --yes")
    blend = load_blend(BLEND)
    manifest, checkpoint = check_manifest(None, blend), find_checkpoint(RUN)
    parent, source = load_model(checkpoint), ModelSource(checkpoint)
    forward, d = Forward(parent), parent.definition
    layers = [n for n, block in enumerate(d.blocks) if any(axis.key == "mamba_num_heads" for axis in block.axes())]
    held_out = calibration_windows(blend, manifest, 8, LENGTH + 1, seed=99)
    rows: dict[str, list[list[float]]] = {way: [] for way in WAYS}
    with StageProgress(Console(stderr=True), "layers trained", len(SEEDS) * len(layers)) as bar:
        for seed in SEEDS:
            text = calibration_windows(blend, manifest, TOKENS // LENGTH, LENGTH, seed)
            scores = measure(parent, text[:1], text[:64]).scores()
            of_seed: dict[str, list[list[float]]] = {way: [] for way in WAYS}
            for layer in layers:
                block, whole = d.blocks[layer], [tensor.float() for tensor in layer_tensors(source, layer)]
                narrow = replace(block, mamba_num_heads=block.mamba_num_heads // 2)
                pieces = {}
                for way, kept in halved(block, dict(scores.inner[layer])).items():
                    parts = zip(whole, block.cuts(kept, np.arange(d.hidden_size)), strict=True)
                    pieces[way] = Piece(narrow, [cut(tensor, part).clone() for tensor, part in parts], forward)
                layer_range = range(layer, layer + 1)
                before = errors(forward, layer_range, pieces, held_out[:, :-1], BATCH)
                lengths = dict.fromkeys(pieces, Training(TOKENS, BATCH, 2e-3))
                train(forward, layer_range, pieces, lengths, lambda step, text=text: text[step * BATCH :][:BATCH])
                after = errors(forward, layer_range, pieces, held_out[:, :-1], BATCH)
                replaced = changes(forward, layer, pieces, held_out, BATCH)
                for way in WAYS:
                    of_seed[way].append([before[way], after[way], replaced[way].kl])
                bar.advance()
            for way in WAYS:
                rows[way].append([mean(values) for values in zip(*of_seed[way], strict=True)])
    lines = ["| heads that stay | error as cut | after training | KL with one layer replaced |", "|---|---|---|---|"]
    for way in WAYS:
        cells = [", ".join(f"{value:.4f}" for value in values) for values in zip(*rows[way], strict=True)]
        lines.append(f"| {way} | {' | '.join(cells)} |")
    table = "\n".join(lines) + "\n"
    write_between(PAGE, BEGIN, END, table)
    print(table, end="")


if __name__ == "__main__":
    report_mistakes()
    torch.manual_seed(0)
    main()
