"""The samples that a step of a run sees, read as training reads them and decoded. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from nemotron_h.core.errors import UserError
from nemotron_h.data.blend import Blend
from nemotron_h.data.feed.phase_plan import DataOrder, DataPlan
from nemotron_h.data.feed.sampler import Sample
from nemotron_h.data.manifest import Manifest, check_manifest
from nemotron_h.data.phases import Horizon
from nemotron_h.data.tokenizer import load_tokenizer


@dataclass(frozen=True)
class RunSettings:
    """Settings of a run that decide the order of its data.

    Args:
        tokens: length of the run.
        seq_length: tokens per sequence.
        global_batch_size: sequences per step, over all ranks.
        seed: of the sample order.
        phase_order: as `data.phase_order`.
    """

    tokens: int
    seq_length: int
    global_batch_size: int
    seed: int
    phase_order: str = "blend"


@dataclass(frozen=True)
class PeekedSample:
    """A sample of a step, or of a short row one of its sequences.

    Attributes:
        row: number of the sample in the run.
        part: number of the sequence in it, from 0.
        parts: how many it has.
        sample: source, epoch and window.
        phase: name.
        windows: of an epoch of the source.
        tokens: int64 `[seq_length / parts]`, the model's input.
        labels: int64 `[seq_length / parts]`, the token after each.
    """

    row: int
    part: int
    parts: int
    sample: Sample
    phase: str
    windows: int
    tokens: np.ndarray
    labels: np.ndarray


class Peek:
    """A run's data, by step.

    Args:
        blend: from `load_blend`.
        settings: of the run.
        root: data root; see `data_root`.
        state: of a checkpoint's data (`DataOrder.state_dict`), to see what a run that resumes there sees.
        blend_change: as `resume.blend_change`.

    Errors:
        UserError: the blend is not prepared, is damaged, does not fit the run, or is not the checkpoint's and no change
            is declared.
    """

    def __init__(
        self,
        blend: Blend,
        settings: RunSettings,
        root: str | Path | None = None,
        state: Mapping[str, Any] | None = None,
        blend_change: str | None = None,
    ) -> None:
        if blend.is_chat():
            raise UserError(f"blend {blend.name} holds conversations: peek shows windows of text")
        self.manifest: Manifest = check_manifest(root, blend)
        self.settings = settings
        self.horizon = Horizon(settings.tokens, settings.seq_length * settings.global_batch_size)
        batches = settings.seq_length, settings.global_batch_size, settings.seed
        plan = DataPlan.of(blend, self.manifest, self.horizon, *batches, settings.phase_order)
        self.order = DataOrder(plan) if state is None else DataOrder.resume(plan, state, blend_change)

    def samples(self, step: int) -> Iterator[PeekedSample]:
        """Yield the samples of a step (from 0), in their order in the global batch.

        Errors:
            UserError: the run has no such step, or read it from the data before a declared change.
        """
        begin = self.order.origin.step
        if 0 <= step < begin:
            raise UserError(
                f"--step {step:,}: this data takes over at step {begin:,}, and the run read others before",
                f"Take a step from {begin:,} on; for those before, name an earlier checkpoint, or the data of before "
                "without --checkpoint.",
            )
        if not 0 <= step < self.horizon.steps:
            raise UserError(f"--step {step:,}: the run has the steps 0 to {self.horizon.steps - 1:,}")
        for number in range(self.order.sample_at(step), self.order.sample_at(step + 1)):
            windows = self.order.rows.row(number)
            length = self.settings.seq_length // len(windows)
            sampler = self.order.rows.short[length] if len(windows) > 1 else self.order.rows.long
            for part, sample in enumerate(windows):
                text = self.manifest.stream(sample.source, "train").read(sample.start, length + 1)
                of_phase = self.order.phase_at(step).name, sampler.windows(sample.source)
                yield PeekedSample(number, part, len(windows), sample, *of_phase, text[:-1], text[1:])


def show(peek: Peek, step: int, console: Console, limit: int | None = None, characters: int | None = None) -> None:
    """Print the decoded samples of a step.

    Args:
        peek: of the run.
        step: from 0.
        console: where the lines go.
        limit: samples to print, the sequences of a short row one each; None prints all.
        characters: of each sample to print; None prints all.
    """
    path, expected = peek.manifest.tokenizer_path(), peek.manifest.tokenizer.sha256
    tokenizer = load_tokenizer(path)
    if tokenizer.fingerprint() != expected:
        raise UserError(f"{path} is not the tokenizer that made the data", "Restore its files, or prepare again.")
    size = peek.settings.global_batch_size
    for place, item in enumerate(peek.samples(step)):
        if place == 0:
            console.print(
                f"Step {step:,} of {peek.horizon.steps:,}, phase {item.phase}: samples {item.row:,} to "
                f"{item.row + size - 1:,}, {peek.settings.seq_length:,} tokens each"
            )
        if place == limit:
            left = size - (item.row - peek.order.sample_at(step))
            console.print(f"... and {left:,} more samples{' or parts of them' * (item.part > 0)} (--limit 0 shows all)")
            return
        s, several = item.sample, f", sequence {item.part + 1:,} of {item.parts:,}" if item.parts > 1 else ""
        console.rule(
            f"sample {item.row:,}{several}  source {s.source}  epoch {s.epoch}  "
            f"window {s.window:,} of {item.windows:,}  from token {s.start:,}",
            align="left",
        )
        text = tokenizer.ids_to_text(item.tokens.tolist())
        cut = len(text) if characters is None else characters
        console.print(text[:cut], markup=False, highlight=False, soft_wrap=True)
        if len(text) > cut:
            console.print(f"... {len(text) - cut:,} more characters (--characters 0 shows all)", style="dim")
