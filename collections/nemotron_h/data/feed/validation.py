"""The validation windows of a blend: a fixed list, the same for every run, seed and length. No torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import numpy as np

from nemotron_h.core.errors import UserError
from nemotron_h.data.blend import Blend
from nemotron_h.data.feed.sampler import BlendSampler, Segment
from nemotron_h.data.manifest import Manifest

VALIDATION_SEED = 0  # ours: not the run's seed, so that runs with different seeds validate on the same text


@dataclass(frozen=True)
class ValidationText:
    """The held-out text of a blend, as windows.

    Attributes:
        shares: of the sources in the list: the mean of all phases' shares, so that every category is seen, those of the
            late phases too.
        left_out: sources with a share and less text than a window.
        windows: how many windows the text has without repeating any.
        tokens: source -> tokens.
        seq_length: tokens of a window.
        first: source -> where its text begins in its stream; 0 where it is not named.
    """

    shares: dict[str, float]
    left_out: list[str]
    windows: int
    tokens: dict[str, int]
    seq_length: int
    first: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, blend: Blend, manifest: Manifest, seq_length: int) -> ValidationText:
        """Return the held-out text of the prepared blend.

        Errors:
            UserError: no source has held-out text of a window.
        """
        return cls._of(blend, manifest.tokens("validation"), seq_length, "one window")

    @classmethod
    def halves(cls, blend: Blend, manifest: Manifest, seq_length: int) -> tuple[ValidationText, ValidationText]:
        """Return the held-out text of the prepared blend, each source's split in two: no token is in both.

        Errors:
            UserError: no source has held-out text of two windows.
        """
        tokens = manifest.tokens("validation")
        half = {name: count // 2 for name, count in tokens.items()}
        first = cls._of(blend, half, seq_length, "two windows")
        return first, replace(first, first={name: count - half[name] for name, count in tokens.items()})

    @classmethod
    def _of(cls, blend: Blend, tokens: dict[str, int], seq_length: int, wanted: str) -> ValidationText:
        phases = [blend.source_shares(n) for n in range(len(blend.phases))]
        shares = {name: math.fsum(phase[name] for phase in phases) / len(phases) for name in blend.sources}
        left_out = sorted(name for name, share in shares.items() if share > 0 and tokens[name] < seq_length)
        used = {name: share for name, share in shares.items() if share > 0 and name not in left_out}
        if not used:
            raise UserError(
                f"no source of blend {blend.name!r} has validation text of {wanted} of {seq_length:,} tokens",
                "Hold out more (`validation` of the sources) or shorten seq_length; a run can also do without: "
                "trainer.limit_val_batches=0.",
            )
        windows = sum(tokens[name] // seq_length for name in used)
        return cls(used, left_out, windows, tokens, seq_length)

    def sampler(self, samples: int) -> BlendSampler:
        """Return the first `samples` windows of the list."""
        segments = [Segment("validation", 0, samples, self.shares)]
        return BlendSampler(segments, self.tokens, self.seq_length, VALIDATION_SEED)

    def check(self, samples: int) -> None:
        """Check that there are so many windows.

        Errors:
            UserError: the held-out text has fewer.
        """
        if samples > self.windows:
            raise UserError(
                f"{samples * self.seq_length:,} validation tokens are asked for, the held-out text of the blend has "
                f"{self.windows * self.seq_length:,} in whole windows of {self.seq_length:,}",
                "Ask for fewer, or hold out more (`validation` of the sources) and prepare the blend again.",
            )

    def read(self, manifest: Manifest, samples: int) -> np.ndarray:
        """Return the first windows with the label of their last token: int64 [samples, seq_length + 1].

        Errors:
            UserError: see `check`.
        """
        self.check(samples)
        sampler = self.sampler(samples)
        streams = {name: manifest.stream(name, "validation") for name in sampler.names}

        def window(source: str, start: int) -> np.ndarray:
            first, count = self.first.get(source, 0), self.seq_length + 1
            rest = count - (self.tokens[source] - start)  # what runs over the end goes on at the beginning
            pieces = [(first + start, count)] if rest <= 0 else [(first + start, count - rest), (first, rest)]
            return np.concatenate([streams[source].read(*piece) for piece in pieces])

        chosen = (sampler[number] for number in range(samples))
        return np.stack([window(sample.source, sample.start) for sample in chosen])
