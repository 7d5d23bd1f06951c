"""Measure tokens per second of generation on this machine."""

from __future__ import annotations

import time

import torch

from nemotron_h.inference.model import GenerationModel

#: ours: prompt, steps that are not counted, and steps that are
PROMPT, WARMUP, STEPS = 64, 4, 32


def generation_speed(model: GenerationModel, sequences: int, repeats: int = 3) -> float:
    """Return tokens per second over all sequences; the fastest of some repeats, which other work disturbed least."""
    rng = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.definition.vocab_size, (sequences, PROMPT), generator=rng)
    states = model.new_states(sequences, PROMPT + repeats * (WARMUP + STEPS))
    model.extend(tokens, states)
    following, best = tokens[:, -1], 0.0

    def step() -> None:
        model.logits(model.step(following, states))

    for _ in range(repeats):
        for _ in range(WARMUP):
            step()
        _wait(model)
        started = time.perf_counter()
        for _ in range(STEPS):
            step()
        _wait(model)
        best = max(best, STEPS * sequences / (time.perf_counter() - started))
    return best


def _wait(model: GenerationModel) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
