"""Stage `importance`: how much each layer and neuron matters (paper 3.2).

    nemotron-h minipuzzle RECIPE --stage importance

Depends on the parent's weights and the training text. Writes importance.json and importance.safetensors; `unfinished`
holds what an interrupted measurement has come to.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from nemotron_h.compression.importance import FILES, measure_text
from nemotron_h.compression.pipeline.compression import Compression
from nemotron_h.data.feed.calibration import text_record
from nemotron_h.launch.stages import Stage


def stage(c: Compression) -> Stage:
    """Return the stage."""
    title = "how much each layer and neuron matters"
    return Stage("importance", title, (), FILES, partial(inputs, c), partial(run, c))


def inputs(c: Compression) -> dict[str, Any]:
    """Return what the result depends on."""
    return {
        **c.parent.inputs(),
        **c.text.inputs("train"),
        "dtype": str(c.parent.dtype),
        **c.keys("layer_samples", "neuron_samples", "layer_metric"),
    }


def run(c: Compression, folder: Path) -> str:
    """Measure the parent."""
    importance = measure_text(
        lambda: c.parent.model,
        c.text.blend,
        c.text.manifest,
        c.text.seq_length,
        (c.part.layer_samples, c.part.neuron_samples),
        console=c.console,
        metric=c.part.layer_metric,
        settings={**c.parent.inputs(), "text": text_record(c.text.blend, c.text.manifest)},
        unfinished=folder / "unfinished",
    )
    importance.save(folder)
    return f"least important layers: {importance.least()}"
