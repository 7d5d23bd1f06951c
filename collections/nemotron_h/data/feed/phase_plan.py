"""The order of a run's data: what decides it, what of it goes into a checkpoint, how a run continues from there.

`DataPlan` names everything that the order depends on; two equal plans feed equal batches. `DataOrder` is a plan that
is being followed: it knows where it took over, and turns steps into samples. No torch.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nemotron_h.core.errors import UserError
from nemotron_h.data.blend import Blend
from nemotron_h.data.feed.rows import Positions, RowSampler, RowSegment, ShortSegment
from nemotron_h.data.feed.sampler import BlendSampler
from nemotron_h.data.manifest import Manifest
from nemotron_h.data.phases import Horizon, phase_spans
from nemotron_h.data.short_rows import check_short_rows

STATE_FORMAT = 1
#: name of the one phase of a run with `data.phase_order=random`
RANDOM_ORDER = "random order"
SHOWN_DIFFERENCES = 12


@dataclass(frozen=True)
class PlannedSource:
    """The training text of a source.

    Args:
        tokens: of its stream.
        sha256: of the `.bin` file, as prepared.
    """

    tokens: int
    sha256: str


@dataclass(frozen=True)
class PlannedPhase:
    """Steps `first_step <= step < end_step` take tokens in these shares (they sum to 1; sources without a share are
    left out); those of `short` are of its short rows, and `shares` then of the others.
    """

    name: str
    first_step: int
    end_step: int
    shares: dict[str, float]
    short: ShortSegment | None = None

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> PlannedPhase:
        """Return the phase of a dictionary, the inverse of `dataclasses.asdict`."""
        short = content.get("short")
        return cls(**{**content, "short": ShortSegment(**short) if short else None})

    def lengths(self, seq_length: int) -> dict[int, float]:
        """Return tokens of a sequence -> share of the phase's tokens, of rows of `seq_length` tokens."""
        if self.short is None:
            return {seq_length: 1.0}
        return {seq_length: 1 - self.short.share, self.short.seq_length: self.short.share}


@dataclass(frozen=True)
class DataPlan:
    """State that the order of the data depends on, and the blend's name and hash for the record."""

    blend: str
    blend_hash: str
    seed: int
    seq_length: int
    global_batch_size: int
    sources: dict[str, PlannedSource]
    phases: list[PlannedPhase]

    @classmethod
    def of(
        cls,
        blend: Blend,
        manifest: Manifest,
        horizon: Horizon,
        seq_length: int,
        global_batch_size: int,
        seed: int,
        phase_order: str = "blend",
    ) -> DataPlan:
        """Return the plan of a prepared blend for a run.

        In random order the run is one phase with the mean shares of all. A source gives its windows in an order of its
        own, whatever the phases, so the run reads those that it would read phase after phase: all but a few, where a
        share of the samples is no whole number.

        Errors:
            UserError: a phase would be empty, its short rows do not fit, or a source that has a share is too small for
                one window.
        """
        spans = phase_spans(blend.phases, horizon)
        check_short_rows(blend.phases, [span.steps * global_batch_size for span in spans], seq_length, phase_order)

        def shares(of_categories: dict[str, float]) -> dict[str, float]:
            return {name: share for name, share in blend.of_sources(of_categories).items() if share > 0}

        phases = []
        for span in spans:
            phase = blend.phases[span.index]
            short = phase.short and ShortSegment(
                phase.short.seq_length, phase.short.share, shares(phase.short_shares())
            )
            phases.append(PlannedPhase(span.name, span.first_step, span.end_step, shares(phase.long_shares()), short))
        phases = [_mean(phases)] if phase_order == "random" else phases
        used = sorted({name for phase in phases for part in (phase, phase.short) if part for name in part.shares})
        splits = {name: manifest.sources[name].splits.get("train") for name in used}
        sources = {
            name: PlannedSource(s.tokens, s.sha256_bin) if s else PlannedSource(0, "") for name, s in splits.items()
        }
        return cls(blend.name, blend.hash(), seed, seq_length, global_batch_size, sources, phases)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> DataPlan:
        """Return the plan of a dictionary, the inverse of `dataclasses.asdict`."""
        sources = {name: PlannedSource(**source) for name, source in content["sources"].items()}
        phases = [PlannedPhase.from_dict(phase) for phase in content["phases"]]
        return cls(**{**content, "sources": sources, "phases": phases})

    def windows(self, source: str, seq_length: int | None = None) -> int:
        """Return the number of windows of `seq_length` tokens, by default the plan's, in an epoch of a source."""
        return self.sources[source].tokens // (seq_length or self.seq_length)


def _mean(phases: Sequence[PlannedPhase]) -> PlannedPhase:
    """Return one phase over the steps of all, with their mean shares."""
    steps = phases[-1].end_step
    names = {name: None for phase in phases for name in phase.shares}
    shares = {
        name: math.fsum((p.end_step - p.first_step) * p.shares.get(name, 0.0) for p in phases) / steps for name in names
    }
    return PlannedPhase(RANDOM_ORDER, 0, steps, shares)


@dataclass(frozen=True)
class Origin:
    """Start of a plan: the run's start, or a declared change.

    Args:
        step: its first step.
        sample: its first sample.
        positions: windows that each source gave before.
        short_positions: the same of short sequences, by their tokens (as text).
    """

    step: int = 0
    sample: int = 0
    positions: dict[str, int] = field(default_factory=dict)
    short_positions: dict[str, dict[str, int]] = field(default_factory=dict)


def compare(old: DataPlan, new: DataPlan, step: int) -> tuple[list[str], list[str]]:
    """Compare two plans at a step.

    Returns:
        What changes the blend or the batches before `step` (one line each), and what only moves switches that are
        still to come (a longer run does that): the batches of the past stay what they were.
    """
    differences, moved = [], []
    for key in ("seed", "seq_length", "global_batch_size"):
        if getattr(old, key) != getattr(new, key):
            differences.append(f"{key}: {getattr(old, key)} -> {getattr(new, key)}")
    for name in sorted(old.sources.keys() | new.sources.keys()):
        before, now = old.sources.get(name), new.sources.get(name)
        if before is None or now is None:
            differences.append(f"source {name}: {'added' if now else 'removed'}")
        elif before != now:
            what = f"{before.tokens:,} -> {now.tokens:,} tokens" if before.tokens != now.tokens else "other content"
            differences.append(f"source {name}: {what}")
    if len(old.phases) != len(new.phases):
        differences.append(f"phases: {len(old.phases)} -> {len(new.phases)}")
    for before, now in zip(old.phases, new.phases, strict=False):
        for name in sorted(before.shares.keys() | now.shares.keys()):
            a, b = before.shares.get(name, 0.0), now.shares.get(name, 0.0)
            if a != b:
                differences.append(f"phase {now.name!r}, share of {name}: {a:.4%} -> {b:.4%}")
        if before.short != now.short:
            differences.append(f"phase {now.name!r}, short rows: {_of_short(before)} -> {_of_short(now)}")
        if before.first_step != now.first_step:
            line = f"phase {now.name!r} begins at step {before.first_step:,} -> {now.first_step:,}"
            (differences if min(before.first_step, now.first_step) < step else moved).append(line)
    return differences, moved


def _of_short(phase: PlannedPhase) -> str:
    """Return a phase's short rows on one line."""
    if phase.short is None:
        return "none"
    shares = ", ".join(f"{name} {share:.4%}" for name, share in sorted(phase.short.shares.items()))
    return f"{phase.short.share:g} of the rows, sequences of {phase.short.seq_length:,} ({shares})"


def continued(old: DataPlan, new: DataPlan, step: int) -> DataPlan:
    """Return the new plan with the switches before `step` where the old one made them.

    A run that was made longer would have switched later, but what was trained stays trained: a phase that has begun
    goes on, and the switches to come are those of the new length.
    """
    if len(old.phases) != len(new.phases):
        return new
    firsts = [
        before.first_step if before.first_step < step else now.first_step
        for before, now in zip(old.phases, new.phases, strict=True)
    ]
    ends = [*firsts[1:], new.phases[-1].end_step]
    phases = [
        dataclasses.replace(phase, first_step=first, end_step=end)
        for phase, first, end in zip(new.phases, firsts, ends, strict=True)
    ]
    return dataclasses.replace(new, phases=phases)


class DataOrder:
    """A plan that is being followed.

    Args:
        plan: of the run, or of what is left of it after a declared change.
        origin: where it takes over.
        history: the records of the plans before it.

    Attributes:
        rows: the windows of each row.

    Errors:
        UserError: a source that has a share is too small for one window.
    """

    def __init__(self, plan: DataPlan, origin: Origin | None = None, history: Sequence[dict[str, Any]] = ()) -> None:
        self.plan, self.origin, self.history = plan, origin or Origin(), list(history)
        last = len(plan.phases) - 1
        # A plan that takes over after its planned end goes on with its last phase.
        self._phases = [p for n, p in enumerate(plan.phases) if p.end_step > self.origin.step or n == last]
        segments = [
            RowSegment(
                p.name,
                self.sample_at(max(p.first_step, self.origin.step)),
                self.sample_at(p.end_step),
                p.shares,
                p.short,
            )
            for p in self._phases
        ]
        tokens = {name: source.tokens for name, source in plan.sources.items()}
        given = Positions(self.origin.positions, self.origin.short_positions)
        self.rows = RowSampler(segments, plan.global_batch_size, tokens, plan.seq_length, plan.seed, given)

    @property
    def sampler(self) -> BlendSampler:
        """Return the windows of the long rows, by their number among these."""
        return self.rows.long

    def sample_at(self, step: int) -> int:
        """Return the first sample of a step; that is also the number of samples consumed before it."""
        return self.origin.sample + max(step - self.origin.step, 0) * self.plan.global_batch_size

    def sources(self, sample: int) -> list[str]:
        """Return the names of the sources that a row is of."""
        return list(dict.fromkeys(window.source for window in self.rows.row(sample)))

    def phase_at(self, step: int) -> PlannedPhase:
        """Return the phase that a step belongs to."""
        return self._phases[self.rows.phase_of(self.sample_at(step))]

    def state_dict(self, step: int) -> dict[str, Any]:
        """Return the state that a checkpoint after `step` steps keeps, in plain containers.

        `consumed` lists, per phase of this plan, the windows that each source gave; `positions` those that each source
        gave since the run's start, `short_positions` the same of short sequences; `history` the same for plans that a
        declared change replaced.
        """
        samples = self.sample_at(step)
        positions = self.rows.positions(samples)
        short = {
            length: {**self.origin.short_positions.get(length, {}), **positions.short.get(length, {})}
            for length in {**self.origin.short_positions, **positions.short}
        }
        return {
            "format": STATE_FORMAT,
            "step": step,
            "consumed_samples": samples,
            "plan": dataclasses.asdict(self.plan),
            "origin": dataclasses.asdict(self.origin),
            "consumed": [
                {"phase": p.name, **c} for p, c in zip(self._phases, self.rows.consumed(samples), strict=True)
            ],
            "positions": {**self.origin.positions, **positions.long},
            **({"short_positions": short} if short else {}),
            "history": self.history,
        }

    @classmethod
    def resume(cls, plan: DataPlan, state: Mapping[str, Any], blend_change: str | None = None) -> DataOrder:
        """Continue from a checkpoint.

        Args:
            plan: of the run as it is now; it is followed as `continued` has it.
            state: of the checkpoint.
            blend_change: `from_step` lets another plan take over at the checkpoint's step. Its sources go on where
                they are; those whose windows became others (new text, seed or seq_length) start with a new epoch.

        Errors:
            UserError: the plan is another one and no change is declared, or the state is of another format.
        """
        if state.get("format") != STATE_FORMAT:
            raise UserError(f"the checkpoint's data state has format {state.get('format')}, not {STATE_FORMAT}")
        old, step = DataPlan.from_dict(state["plan"]), state["step"]
        origin, history = Origin(**state["origin"]), state["history"]
        longer = continued(old, plan, step)
        differences, _ = compare(old, longer, step)
        if not differences:
            return cls(longer, origin, history)
        if blend_change is None:
            shown = differences[:SHOWN_DIFFERENCES]
            if len(differences) > len(shown):
                shown.append(f"... and {len(differences) - len(shown)} more")
            raise UserError(
                f"the checkpoint (step {step:,}, blend {old.blend!r}) was trained on other data than this run "
                f"(blend {plan.blend!r}) plans; checkpoint -> now:\n" + "\n".join(f"  {line}" for line in shown),
                "Resume with the checkpoint's settings, or declare the change, and the run takes the new data from "
                "this step on: resume.blend_change=from_step (nemotron-h data peek: --blend-change from_step)",
            )
        record = {key: value for key, value in state.items() if key not in ("format", "history")}
        plans = [DataPlan.from_dict(entry["plan"]) for entry in [*history, record]]
        positions = {name: _carried(name, position, plans, plan) for name, position in state["positions"].items()}
        short = {
            length: {name: _carried(name, position, plans, plan, int(length)) for name, position in given.items()}
            for length, given in state.get("short_positions", {}).items()
        }
        return cls(plan, Origin(step, state["consumed_samples"], positions, short), [*history, record])


def _carried(name: str, position: int, plans: Sequence[DataPlan], new: DataPlan, short: int | None = None) -> int:
    """Return a source's position under a new plan, among the windows of long rows or of `short` tokens."""
    old = next(plan for plan in reversed(plans) if name in plan.sources)
    lengths = [short or plan.seq_length for plan in (old, new)]
    same_windows = (old.seed, lengths[0], old.sources[name]) == (new.seed, lengths[1], new.sources.get(name))
    if same_windows or name not in new.sources:
        return position
    return -(-position // old.windows(name, lengths[0])) * new.windows(name, lengths[1])
