"""Windows of a blend's training text to measure a model on: a fixed random subset. No torch."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from nemotron_h.core.errors import UserError
from nemotron_h.data.blend import Blend
from nemotron_h.data.feed.sampler import BlendSampler, Segment
from nemotron_h.data.manifest import Manifest

CALIBRATION_SEED = 0  # ours: not the run's, so that models of runs with different seeds are measured on the same text


def calibration_windows(
    blend: Blend, manifest: Manifest, samples: int, seq_length: int, seed: int = CALIBRATION_SEED
) -> np.ndarray:
    """Return a subset of the training text, in the mean of all phases' shares; a smaller one is the beginning of a
    larger one.

    Args:
        samples: windows.
        seq_length: tokens of a window.
        seed: of the subset.
    Returns:
        token ids, int64 [samples, seq_length].
    Errors:
        UserError: a source has fewer windows than its share of the samples.
    """
    sampler = calibration_sampler(blend, manifest, samples, seq_length, seed)
    streams = {name: manifest.stream(name, "train") for name in sampler.names}
    chosen = (sampler[number] for number in range(samples))
    return np.stack([streams[s.source].read(s.start, seq_length) for s in chosen])


def calibration_batches(
    blend: Blend, manifest: Manifest, tokens: int, batch: int, seq_length: int, seed: int
) -> Callable[[int], np.ndarray]:
    """Return number of a step -> windows of the training text, int64 [batch, seq_length], for so many tokens.

    Errors:
        UserError: as of `calibration_windows`.
    """
    samples = max(1, -(-tokens // (batch * seq_length))) * batch
    sampler = calibration_sampler(blend, manifest, samples, seq_length, seed)
    streams = {name: manifest.stream(name, "train") for name in sampler.names}

    def windows(step: int) -> np.ndarray:
        chosen = (sampler[number] for number in range(step * batch, (step + 1) * batch))
        return np.stack([streams[s.source].read(s.start, seq_length) for s in chosen])

    return windows


def calibration_sampler(
    blend: Blend, manifest: Manifest, samples: int, seq_length: int, seed: int = CALIBRATION_SEED
) -> BlendSampler:
    """Return the sampler of the windows that `calibration_windows` reads, without reading; the errors are the same."""
    phases = [blend.source_shares(n) for n in range(len(blend.phases))]
    shares = {name: math.fsum(phase[name] for phase in phases) / len(phases) for name in blend.sources}
    sampler = BlendSampler([Segment("calibration", 0, samples, shares)], manifest.tokens("train"), seq_length, seed)
    (wanted,) = sampler.consumed(samples)
    few = [
        f"{name} has {sampler.windows(name):,} of the {count:,} wanted"
        for name, count in wanted.items()
        if count > sampler.windows(name)
    ]
    if few:
        raise UserError(
            f"blend {blend.name!r} has too little training text for {samples:,} samples of {seq_length:,} tokens: "
            + ", ".join(few),
            "Ask for fewer samples or a shorter seq_length, or give the source more text and prepare the blend again.",
        )
    return sampler


def text_record(blend: Blend, manifest: Manifest) -> dict[str, Any]:
    """Return the identity of a blend's text: the hashes of the blend, of the tokenizer and of every training file."""
    return {
        "blend": blend.name,
        "blend_hash": blend.hash(),
        "tokenizer_sha256": manifest.tokenizer.sha256,
        "sources": manifest.texts("train"),
    }
