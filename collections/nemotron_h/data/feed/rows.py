"""The windows of row number i of a run: one, or in a short row several: a pure function of (plan, seed, i). No torch.

A phase may have short rows, which are n sequences of seq_length / n tokens. Before step g of such a phase there are

    floor(g * global_batch_size * share)

so the share holds to within a row in every step and in every run of steps, exactly where it comes to whole rows. The
short rows of a step are its last ones: data-parallel ranks, which take the rows of a step in turn, have equally many
of each kind to within one, whatever their number.

Long rows are numbered among themselves, and so are the sequences of short ones of each length. A `BlendSampler` for
each length maps these numbers to windows: every window of a source comes once an epoch, among those of its length.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from nemotron_h.data.feed.sampler import BlendSampler, Sample, Segment, hash_key
from nemotron_h.data.short_rows import short_rows


@dataclass(frozen=True)
class ShortSegment:
    """The short rows of a phase.

    Args:
        seq_length: tokens of their sequences.
        share: of the phase's rows, which is that of its tokens.
        shares: source -> share of their tokens.
    """

    seq_length: int
    share: float
    shares: dict[str, float]


@dataclass(frozen=True)
class RowSegment:
    """Rows `first <= i < end` are of one phase, in whole steps; the last segment of a run also serves those after it.

    Args:
        name: of the phase.
        first: number of its first row.
        end: number after its last.
        shares: source -> share of the tokens of its long rows.
        short: its short rows, or None.
    """

    name: str
    first: int
    end: int
    shares: Mapping[str, float]
    short: ShortSegment | None = None


@dataclass(frozen=True)
class Positions:
    """Windows that each source gave.

    Attributes:
        long: source -> windows of long rows.
        short: tokens of a short sequence, as text -> source -> windows.
    """

    long: Mapping[str, int] = field(default_factory=dict)
    short: Mapping[str, Mapping[str, int]] = field(default_factory=dict)


@dataclass(frozen=True)
class _Count:
    """Count the long rows, and the sequences of short ones, of a part of the run."""

    long: int
    short: int


class RowSampler:
    """Maps row numbers to the windows that a row is made of.

    Args:
        segments: of the run, in order and without gaps.
        batch: rows of a step.
        tokens: source -> number of tokens of its stream.
        seq_length: tokens of a row.
        seed: of the order.
        positions: what each source gave before the first segment (after a declared change of blend).

    Attributes:
        long: of the windows of long rows.
        short: tokens of a short sequence -> of their windows.

    Errors:
        UserError: a source with a share has too few tokens for a window.
    """

    def __init__(
        self,
        segments: Sequence[RowSegment],
        batch: int,
        tokens: Mapping[str, int],
        seq_length: int,
        seed: int,
        positions: Positions,
    ) -> None:
        self.segments, self.batch, self.seq_length = list(segments), batch, seq_length
        long: list[Segment] = []
        short: dict[int, list[Segment]] = {}
        #: of each segment, the numbers of its first long row and of its first short sequence, among their likes
        self._firsts: list[_Count] = []
        begin = self.segments[0].first
        for segment in self.segments:
            count = self._count(segment, segment.end - segment.first)
            long.append(Segment(segment.name, begin, begin + count.long, segment.shares))
            first = 0
            if segment.short is not None:
                before = short.setdefault(segment.short.seq_length, [])
                first = before[-1].end if before else 0
                before.append(Segment(segment.name, first, first + count.short, segment.short.shares))
            self._firsts.append(_Count(begin, first))
            begin += count.long
        self.long = BlendSampler(long, tokens, seq_length, seed, positions.long)
        self.short = {
            length: BlendSampler(
                parts, tokens, length, hash_key("short", seed, length), positions.short.get(str(length))
            )
            for length, parts in short.items()
        }

    @property
    def mixed(self) -> bool:
        """Return True if some rows are several sequences."""
        return bool(self.short)

    @property
    def names(self) -> list[str]:
        """Return the sources of all rows."""
        return sorted({name for sampler in (self.long, *self.short.values()) for name in sampler.names})

    def phase_of(self, row: int) -> int:
        """Return the number of the segment that serves a row."""
        return max(sum(segment.first <= row for segment in self.segments) - 1, 0)

    def row(self, index: int) -> tuple[Sample, ...]:
        """Return the windows of row number `index`, all of one length."""
        if index < self.segments[0].first:
            raise IndexError(f"row {index} is before the first of this plan, {self.segments[0].first}")
        number = self.phase_of(index)
        segment, place = self.segments[number], index - self.segments[number].first
        here, after = (self._count(segment, rows) for rows in (place, place + 1))
        first = self._firsts[number]
        if after.short > here.short:
            sampler = self.short[segment.short.seq_length]
            return tuple(sampler[first.short + n] for n in range(here.short, after.short))
        return (self.long[first.long + here.long],)

    def consumed(self, rows: int) -> list[dict[str, dict[str, int]]]:
        """Return the windows per phase and source among the first `rows` rows of the run (from its first segment on):
        `sources` of long rows, and in phases with short ones `short` of theirs.
        """
        long = self.long.consumed(self._before(rows)[0])
        result = [{"sources": counts} for counts in long]
        for length, sampler in self.short.items():
            having = [n for n, s in enumerate(self.segments) if s.short and s.short.seq_length == length]
            for number, counts in zip(having, sampler.consumed(self._before(rows)[1][length]), strict=True):
                result[number]["short"] = counts
        return result

    def positions(self, rows: int) -> Positions:
        """Return the windows of each source before row number `rows`, those before the first segment included."""
        long, short = self._before(rows)
        return Positions(
            self.long.positions(long),
            {str(length): sampler.positions(short[length]) for length, sampler in self.short.items()},
        )

    def _before(self, rows: int) -> tuple[int, dict[int, int]]:
        """Return the numbers of the first long row and of the first sequence of each length from row `rows` on."""
        long, short = self.segments[0].first, dict.fromkeys(self.short, 0)
        for number, segment in enumerate(self.segments):
            end = rows if number == len(self.segments) - 1 else min(rows, segment.end)
            count = self._count(segment, max(end - segment.first, 0))
            long += count.long
            if segment.short is not None:
                short[segment.short.seq_length] += count.short
        return long, short

    def _count(self, segment: RowSegment, rows: int) -> _Count:
        """Return the long rows and short sequences among the first `rows` rows of a segment."""
        if segment.short is None:
            return _Count(rows, 0)
        step, place = divmod(rows, self.batch)
        before, after = (short_rows(number * self.batch, segment.short.share) for number in (step, step + 1))
        short = before + max(0, place - (self.batch - (after - before)))
        return _Count(rows - short, short * (self.seq_length // segment.short.seq_length))
