"""Map sample number `i` of a run to a document window: a pure function of (plan, seed, i). No torch, no index files.

A run is a list of segments (the phases, in samples), each with fixed shares of the sources. Three steps give the
window of a sample, each in closed form, so that memory and start-up do not depend on the length of the run:

1. **Source.** Sample `j` of a segment stands at `(start + j * STRIDE) mod 2^31` on a circle that is divided among the
   sources in proportion to their shares. STRIDE / 2^31 is next to the golden ratio, so every stretch of samples is
   close to the plan (a discrepancy of O(log n) samples after n), and every 2^31 samples meet it exactly.
2. **Ordinal.** How many earlier samples of the segment went to the same source is a difference of two floor sums,
   which a Euclid-like recursion evaluates in O(log n) steps. Added to what the segments before took from that source,
   it is the sample's position in the source: epochs go on across a switch, and nothing repeats there.
3. **Window.** Position `k` is in epoch `k // windows`; within the epoch a keyed permutation (a Feistel network over
   `rows x columns` cells, walking on when a cell is outside) shuffles the windows. Seed, source name and epoch make
   the key.

Samples are computed in blocks of `BLOCK` at a time, vectorised; the last few blocks are kept.

Validation takes a fixed list of windows (`ValidationText`), the same for every run, seed and length.
"""

from __future__ import annotations

import hashlib
import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction

import numpy as np

from nemotron_h.core.errors import UserError
from nemotron_h.data.blend import Blend
from nemotron_h.data.manifest import Manifest

CIRCLE_BITS = 31  # floor_sums forms products of two such numbers in int64
CIRCLE = 1 << CIRCLE_BITS
STRIDE = 1327220129  # odd, so that 2^31 samples meet every point once; no quotient of its continued fraction is over 3
BLOCK = 1024
ROUNDS = 6  # of the Feistel network; four are the theoretical minimum for a strong pseudo-random permutation
_U = np.uint64


def floor_sums(n: int, stride: int, offsets: np.ndarray, modulus: int) -> np.ndarray:
    """Return `sum over 0 <= j < n of floor((stride * j + offset) / modulus)` for every offset, modulo 2^64.

    Args:
        n: number of terms, at most `modulus`.
        stride: in [0, modulus).
        offsets: int64, each in [0, 2 * modulus).
        modulus: at most 2^31.
    """
    total = np.zeros_like(offsets)
    count, rest = np.full_like(offsets, n), offsets
    slope = stride
    with np.errstate(over="ignore"):
        while count.any():
            total += count * (count - 1) // 2 * (slope // modulus) + count * (rest // modulus)
            slope, rest = slope % modulus, rest % modulus
            # The points under the line, counted column by column so far, are now counted row by row.
            height = slope * count + rest
            count, rest = height // modulus, height % modulus
            slope, modulus = modulus, slope
    return total


def mix64(x: np.ndarray) -> np.ndarray:
    """Hash uint64 numbers one to one (the finaliser of splitmix64)."""
    x = (x ^ (x >> _U(30))) * _U(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> _U(27))) * _U(0x94D049BB133111EB)
    return x ^ (x >> _U(31))


def hash_key(*parts: object) -> int:
    """Return a 64-bit key of a few words and numbers."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little")


def permute(positions: np.ndarray, sizes: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Return a keyed pseudo-random permutation of `range(size)`, at `position`, element by element.

    Args:
        positions: int64, each in [0, size).
        sizes: int64, size of the permuted range.
        keys: uint64; equal keys and sizes mean the same permutation.

    Returns:
        int64, of the same shape.
    """
    columns = np.ceil(np.sqrt(sizes)).astype(np.int64)
    rows = -(-sizes // columns)
    columns, rows, result = columns.astype(_U), rows.astype(_U), positions.astype(_U)
    limits, todo = sizes.astype(_U), np.arange(len(positions))
    while todo.size:
        row_count, column_count, key = rows[todo], columns[todo], keys[todo]
        row, column = np.divmod(result[todo], column_count)
        for number in range(ROUNDS):
            # Rows and columns take turns in being shifted by a hash of the other, so each round is invertible.
            salt = key + _U((number + 1) * 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF)
            if number % 2 == 0:
                row = (row + mix64(column ^ salt) % row_count) % row_count
            else:
                column = (column + mix64(row ^ salt) % column_count) % column_count
        cell = row * column_count + column
        result[todo] = cell
        todo = todo[cell >= limits[todo]]
    return result.astype(np.int64)


@dataclass(frozen=True)
class Segment:
    """Samples `first <= i < end` take their sources in these shares.

    Args:
        name: of the phase.
        first: number of its first sample.
        end: number after its last; the last segment of a plan also serves every sample after its end.
        shares: source -> share of the samples (equal to its share of the tokens: all windows have the same length);
            normalised here.
    """

    name: str
    first: int
    end: int
    shares: Mapping[str, float]


@dataclass(frozen=True)
class Sample:
    """Source, epoch and window of one sample.

    Args:
        index: number of the sample in the run.
        phase: number of its segment.
        source: name.
        epoch: how often the source was finished before.
        window: number of the window within the source, in [0, windows of the source).
        start: position in tokens of the window's first token in the source's stream. A window takes
            `seq_length + 1` tokens and goes on at the stream's start when it runs over the end.
    """

    index: int
    phase: int
    source: str
    epoch: int
    window: int
    start: int


class _Circle:
    """The circle of one segment: bounds of the sources, and how often each was met."""

    def __init__(self, segment: Segment, names: Sequence[str], seed: int, number: int) -> None:
        shares = [Fraction(segment.shares.get(name, 0)) for name in names]
        total, cumulative, bounds = sum(shares), Fraction(0), [0]
        for share in shares:
            cumulative += share
            bounds.append(round(cumulative * CIRCLE / total))
        self.bounds = np.array(bounds, dtype=np.int64)
        self.start = hash_key("circle", seed, number, segment.first) % CIRCLE
        widths = np.diff(self.bounds)
        lost = [name for name, share, width in zip(names, shares, widths, strict=True) if share and not width]
        if lost:
            raise UserError(f"phase {segment.name!r}: the share of {', '.join(lost)} is less than one sample in 2^31")

    def counts(self, samples: int) -> np.ndarray:
        """Return the number of the first `samples` samples that go to each source."""
        turns, rest = divmod(samples, CIRCLE)
        # floor((y - b) / CIRCLE) counts the whole turns of y that reach b: differences between bounds count visits.
        sums = floor_sums(rest, STRIDE, self.start - self.bounds + CIRCLE, CIRCLE)
        return turns * np.diff(self.bounds) - np.diff(sums)

    def sources(self, first: int, end: int) -> np.ndarray:
        """Return the number of the source of samples `first <= j < end`."""
        points = (self.start + np.arange(first % CIRCLE, first % CIRCLE + end - first) * STRIDE) % CIRCLE
        return np.searchsorted(self.bounds, points, side="right") - 1


@dataclass(frozen=True)
class SampleBlock:
    """The fields of `Sample` for consecutive samples, int64 `[samples]` each; `source` is an index of `names`."""

    phase: np.ndarray
    source: np.ndarray
    epoch: np.ndarray
    window: np.ndarray
    start: np.ndarray


class BlendSampler:
    """Maps sample numbers to windows of the sources.

    Args:
        segments: of the run, in order and without gaps.
        tokens: source -> number of tokens of its stream.
        seq_length: tokens of a window, less the one more that the last label needs.
        seed: of the order.
        positions: source -> windows it gave before the first segment (after a declared change of blend).

    Attributes:
        mixed: as of a `RowSampler`: all windows are of one length.

    Errors:
        UserError: a source with a share has fewer than `seq_length` tokens.
    """

    mixed = False

    def __init__(
        self,
        segments: Sequence[Segment],
        tokens: Mapping[str, int],
        seq_length: int,
        seed: int,
        positions: Mapping[str, int] | None = None,
    ) -> None:
        self.segments = list(segments)
        self.seq_length = seq_length
        # Sorted, so that the order in which a file lists its sources changes nothing.
        self.names = sorted({name for segment in segments for name, share in segment.shares.items() if share > 0})
        short = [f"{name} ({tokens[name]:,})" for name in self.names if tokens[name] < seq_length]
        if short:
            raise UserError(
                f"fewer tokens than one window of {seq_length:,}: {', '.join(short)}",
                "Give the source more text, take a shorter seq_length, or leave the source out of the blend.",
            )
        self._tokens = np.array([tokens[name] for name in self.names], dtype=np.int64)
        self._windows = self._tokens // seq_length
        self._keys = np.array([hash_key("source", seed, name) for name in self.names], dtype=_U)
        self._circles = [_Circle(segment, self.names, seed, n) for n, segment in enumerate(self.segments)]
        given = positions or {}
        # before[p]: what each source gave before segment p.
        self._before = [np.array([given.get(name, 0) for name in self.names], dtype=np.int64)]
        for segment, circle in zip(self.segments, self._circles, strict=True):
            self._before.append(self._before[-1] + circle.counts(segment.end - segment.first))
        self._blocks: OrderedDict[int, SampleBlock] = OrderedDict()

    @property
    def first_sample(self) -> int:
        """Number of the first sample that this sampler knows."""
        return self.segments[0].first

    def windows(self, source: str) -> int:
        """Return the number of windows in one epoch of a source."""
        return int(self._windows[self.names.index(source)])

    def phase_of(self, sample: int) -> int:
        """Return the number of the segment that serves a sample."""
        return max(sum(segment.first <= sample for segment in self.segments) - 1, 0)

    def consumed(self, samples: int) -> list[dict[str, int]]:
        """Return the samples per phase and source among the first `samples` of the run (from `first_sample` on)."""
        result = []
        for number, (segment, circle) in enumerate(zip(self.segments, self._circles, strict=True)):
            end = samples if number == len(self.segments) - 1 else min(samples, segment.end)
            counts = circle.counts(max(end - segment.first, 0))
            result.append({name: int(n) for name, n in zip(self.names, counts, strict=True) if n})
        return result

    def positions(self, samples: int) -> dict[str, int]:
        """Return the windows of each source before sample number `samples`, those before `first_sample` included."""
        phase = self.phase_of(samples)
        counts = self._before[phase] + self._circles[phase].counts(samples - self.segments[phase].first)
        return {name: int(n) for name, n in zip(self.names, counts, strict=True)}

    def row(self, index: int) -> tuple[Sample]:
        """Return the window of row number `index`, as of a `RowSampler`: a sample is a row."""
        return (self[index],)

    def __getitem__(self, index: int) -> Sample:
        """Return source, epoch and window of sample number `index`."""
        if index < self.first_sample:
            raise IndexError(f"sample {index} is before the first of this plan, {self.first_sample}")
        number = index // BLOCK
        block, place = self._kept_block(number), index - max(number * BLOCK, self.first_sample)
        return Sample(
            index,
            int(block.phase[place]),
            self.names[block.source[place]],
            int(block.epoch[place]),
            int(block.window[place]),
            int(block.start[place]),
        )

    def _kept_block(self, number: int) -> SampleBlock:
        block = self._blocks.get(number)
        if block is None:
            first = max(number * BLOCK, self.first_sample)
            block = self._blocks[number] = self.block(first, (number + 1) * BLOCK)
            if len(self._blocks) > 4:
                self._blocks.popitem(last=False)
        return block

    def block(self, first: int, end: int) -> SampleBlock:
        """Return sources, epochs and windows of the samples `first <= i < end`."""
        if first < self.first_sample:
            raise IndexError(f"sample {first} is before the first of this plan, {self.first_sample}")
        phase, source, position = (np.zeros(end - first, dtype=np.int64) for _ in range(3))
        for number, (segment, circle) in enumerate(zip(self.segments, self._circles, strict=True)):
            low = max(first, segment.first)
            high = end if number == len(self.segments) - 1 else min(end, segment.end)
            if low >= high:
                continue
            here = slice(low - first, high - first)
            chosen = circle.sources(low - segment.first, high - segment.first)
            taken = self._before[number] + circle.counts(low - segment.first)
            phase[here], source[here] = number, chosen
            position[here] = taken[chosen] + _rank_among_equals(chosen)
        epoch, place = np.divmod(position, self._windows[source])
        key = mix64(self._keys[source] + epoch.astype(_U) * _U(0x9E3779B97F4A7C15))
        window = permute(place, self._windows[source], key)
        # Each epoch splits the stream at other places; what does not fill a window at the end lies elsewhere each time.
        shift = (mix64(key) % self._tokens[source].astype(_U)).astype(np.int64)
        start = (shift + window * self.seq_length) % self._tokens[source]
        return SampleBlock(phase, source, epoch, window, start)


def _rank_among_equals(values: np.ndarray) -> np.ndarray:
    """Return the number of earlier elements that are equal to each."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    first = np.searchsorted(ordered, ordered, side="left")
    rank = np.empty_like(values)
    rank[order] = np.arange(len(values)) - first
    return rank


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
