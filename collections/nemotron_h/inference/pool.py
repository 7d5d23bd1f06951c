"""Sample many continuations in one batch, in which new sequences take the rows of those that ended, and count what each
of them costs.

Axes: b rows of the batch, v tokens that get scores.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from nemotron_h.core.errors import UserError
from nemotron_h.core.units import gib
from nemotron_h.inference.clock import now
from nemotron_h.inference.generate import check_prompts
from nemotron_h.inference.graph import Stepper
from nemotron_h.inference.model import GenerationModel
from nemotron_h.inference.prefill import extend_in_passes, pass_tokens, prefill
from nemotron_h.inference.sampling import Sampling, choose
from nemotron_h.inference.states import States
from nemotron_h.inference.thought import Thought, ThoughtBudget, bounded
from nemotron_h.inference.vision import Placed, check_places
from nemotron_h.platform.memory import available

#: ours: rows beyond which a step takes about as long for each of them
MOST_ROWS, MOST_ROWS_GPU = 256, 1024
#: ours: share of the free memory that states and scores may take
_MEMORY = 0.5
#: bytes of a token's score while a token is chosen: float64 probabilities, sorted, with their places, and their sums
_SCORE_BYTES = 40
#: ours: part of the rows that has to be free before prompts are read: passes are of several prompts then
_FREE_PART = 8
#: ours: tokens that each row takes before the clock runs: the second step of a CUDA graph is recorded
_WARM_TOKENS = 3
END, ANSWER, LENGTH = "end", "answer", "max-tokens"


class Job(NamedTuple):
    """Continuation to sample: number of the prompt, number of the sample, seed of its generator."""

    prompt: int
    sample: int
    seed: int


@dataclass
class Sample:
    """Continuation of a prompt.

    Attributes:
        job: whose it is.
        tokens: with the one that ended it.
        log_probability: sum over the tokens of the model's, in nats, at temperature 1 and before top-p; over those of a
            thought's forced end too.
        seconds: its share: of a pass over prompts by their tokens, of a step by the sequences that took part.
        ended_by: `END` (a stop token), `ANSWER` or `LENGTH`.
    """

    job: Job
    tokens: list[int] = field(default_factory=list)
    log_probability: float = 0.0
    seconds: float = 0.0
    ended_by: str = ""

    @property
    def written(self) -> list[int]:
        """Return the tokens without a stop token that ended them."""
        return self.tokens[:-1] if self.ended_by == END else self.tokens


def rows_that_fit(model: GenerationModel, capacity: int) -> int:
    """Return the rows of a batch for which half of the free memory has room, within the most that are of use.

    Args:
        capacity: tokens of the longest sequence.
    Errors:
        UserError: there is no room for one.
    """
    each = model.new_states(1, capacity).bytes() + _SCORE_BYTES * len(model.output)
    if model.device.type == "cuda":
        torch.cuda.empty_cache()  # of a model before: PyTorch holds it, and it would not be free
    there = available(str(model.device))
    most = MOST_ROWS if model.device.type == "cpu" else MOST_ROWS_GPU
    if (rows := min(most, int(_MEMORY * there) // each)) < 1:
        raise UserError(
            f"no room for a sequence of {capacity:,} tokens: it takes {gib(each)}, half of what is free is "
            f"{gib(_MEMORY * there)}",
            hint="ask for shorter ones, free memory, or take a larger machine",
        )
    return rows


class Pool:
    """A batch that is filled again as its sequences end.

    A sequence is what its prompt and seed alone give (up to rounding), whatever else is in the batch. Its clock runs
    in prefill and steps alone: the seconds of all samples add up to it.

    Args:
        prompts: token ids, at least one each.
        batch: rows.
        max_tokens: longest continuation.
        sampling: how tokens are chosen; its seed is not used.
        stop_ids: a sequence ends with any of these tokens.
        complete: asked after each token of a sequence whether it has all that it was to have.
        budget: ends thoughts; None lets them go on.
        graph: see `Stepper`.
        shared: first tokens of all prompts alike, which are read once; each prompt has more.
        images: of each prompt, or None; None is none at all. Prompts with images share nothing.

    Attributes:
        seconds, read_seconds: of the engine so far, and of these in prompts.
        thoughts: of the sequences so far, where there is a budget.
    Errors:
        UserError: see `check_prompts`.
    """

    def __init__(
        self,
        model: GenerationModel,
        prompts: Sequence[Sequence[int]],
        *,
        batch: int,
        max_tokens: int,
        sampling: Sampling,
        stop_ids: Collection[int] = (),
        complete: Callable[[Sample], bool] = lambda sample: False,
        budget: ThoughtBudget | None = None,
        graph: bool | None = None,
        shared: int = 0,
        images: Sequence[Placed | None] | None = None,
    ) -> None:
        check_prompts(model, prompts, max_tokens)
        self.shared, self.images = shared, images or [None] * len(prompts)
        check_places(prompts, self.images)
        self._shared_states: States | None = None
        self.model, self.prompts, self.batch, self.max_tokens = model, prompts, batch, max_tokens
        self.sampling, self.stop_ids, self.complete, self.graph = sampling, frozenset(stop_ids), complete, graph
        self.budget, self.capacity = budget, max(map(len, prompts)) + max_tokens
        self.seconds = self.read_seconds = 0.0
        self.thoughts: list[Thought] = []
        self._rows: list[Sample | None] = []

    def run(self, jobs: Callable[[int], Sequence[Job]]) -> Iterator[Sample]:
        """Yield samples as they end.

        Args:
            jobs: returns so many jobs at most; the run ends when all have ended and it has none.
        """
        while first := list(jobs(self.batch)):
            self._begin(len(first))
            self._fill(first)
            while any(self._rows):
                yield from self._step()
                free = self._rows.count(None)
                if max(1, len(self._rows) // _FREE_PART) <= free < len(self._rows):
                    if more := list(jobs(free)):
                        self._fill(more)
                    elif 2 * free >= len(self._rows):
                        self._shrink()

    def run_each(self, jobs: Sequence[Job]) -> Iterator[Sample]:
        """Yield the samples of these jobs as they end; the first ones begin first."""
        waiting = iter(jobs)
        return self.run(lambda free: list(itertools.islice(waiting, free)))

    def warm_up(self) -> None:
        """Run a batch for a few tokens that no clock counts: kernels are compiled and caches warm then."""
        jobs = [Job(row % len(self.prompts), row, 0) for row in range(self.batch)]
        most, self.max_tokens = self.max_tokens, min(_WARM_TOKENS, self.max_tokens)
        list(self.run_each(jobs))
        self.max_tokens, self.seconds, self.read_seconds, self.thoughts = most, 0.0, 0.0, []

    def _begin(self, rows: int) -> None:
        self._rows = [None] * rows
        self._thoughts: list[Thought | None] = [None] * rows
        self._generators = [torch.Generator() for _ in range(rows)]
        self._states = self.model.new_states(rows, self.capacity)
        self._scores = torch.zeros(rows, len(self.model.output), dtype=self.model.dtype, device=self.model.device)
        self._stepper = Stepper(self.model, self._states, self.graph)

    @torch.inference_mode()
    def _fill(self, jobs: Sequence[Job]) -> None:
        """Read the prompts of jobs, each once, in passes of a bounded number of tokens, into free rows."""
        free = [row for row, sample in enumerate(self._rows) if sample is None]
        rows_of: dict[int, list[int]] = {}
        for row, job in zip(free, jobs, strict=False):
            self._rows[row] = Sample(job)
            self._generators[row] = torch.Generator().manual_seed(job.seed)
            if self.budget:
                self._thoughts[row] = self.budget.start(self.prompts[job.prompt])
                self.thoughts.append(self._thoughts[row])
            rows_of.setdefault(job.prompt, []).append(row)
        longest_first = sorted(rows_of, key=lambda number: -len(self.prompts[number]))
        while longest_first:
            count = max(1, pass_tokens(self.model) // len(self.prompts[longest_first[0]]))
            numbers, longest_first = longest_first[:count], longest_first[count:]
            began = now(self.model)
            read = self._states_before(len(numbers))
            ends = [self.prompts[number][self.shared :] for number in numbers]
            images = [self.images[number] for number in numbers]
            scores = self.model.logits(prefill(self.model, ends, read, images=images))
            rows = [row for number in numbers for row in rows_of[number]]
            origin = [place for place, number in enumerate(numbers) for _ in rows_of[number]]
            self._states.put(rows, read.taken(origin))
            self._scores[rows] = scores[origin]
            seconds = now(self.model) - began
            self.seconds += seconds
            self.read_seconds += seconds
            tokens = sum(len(self.prompts[number]) for number in numbers)
            for number in numbers:
                for row in rows_of[number]:
                    share = len(self.prompts[number]) / tokens / len(rows_of[number])
                    self._rows[row].seconds += seconds * share

    def _states_before(self, rows: int) -> States:
        """Return the states of rows that have read what all prompts share."""
        if not self.shared:
            return self.model.new_states(rows, self.capacity)
        if self._shared_states is None:
            self._shared_states = self.model.new_states(1, self.capacity)
            tokens = torch.tensor([[*self.prompts[0][: self.shared]]])
            extend_in_passes(self.model, tokens, self._shared_states)
        return self._shared_states.taken([0] * rows)

    @torch.inference_mode()
    def _step(self) -> list[Sample]:
        """Choose a token for every row and read it; return the sequences that it ends."""
        began = now(self.model)
        chosen = choose(self._scores, self.sampling, self._generators)  # [b]
        if self.budget:
            chosen = bounded(chosen, self._thoughts)
        logs = self._scores.float().log_softmax(-1).gather(-1, chosen[:, None])  # [b, 1]
        running = [(row, sample) for row, sample in enumerate(self._rows) if sample is not None]
        tokens, values = chosen.tolist(), logs.flatten().tolist()
        for row, sample in running:
            sample.tokens.append(tokens[row])
            sample.log_probability += values[row]
            sample.ended_by = self._end(sample)
        ended = [row for row, sample in running if sample.ended_by]
        if len(ended) < len(running):
            self._scores = self._stepper.step(chosen)
        for row in ended:
            self._rows[row] = self._thoughts[row] = None
        if ended:  # rows without a sequence go on counting, from 0
            self._states.lengths[ended] = 0
            self._states.positions[ended] = 0
        seconds = now(self.model) - began
        self.seconds += seconds
        for _, sample in running:
            sample.seconds += seconds / len(running)
        return [sample for _, sample in running if sample.ended_by]

    def _end(self, sample: Sample) -> str:
        if sample.tokens[-1] in self.stop_ids:
            return END
        if self.complete(sample):
            return ANSWER
        return LENGTH if len(sample.tokens) == self.max_tokens else ""

    @torch.inference_mode()
    def _shrink(self) -> None:
        """Leave out the rows without a sequence: a step takes less time then."""
        began = now(self.model)
        rows = [row for row, sample in enumerate(self._rows) if sample is not None]
        self._rows = [self._rows[row] for row in rows]
        self._generators = [self._generators[row] for row in rows]
        self._thoughts = [self._thoughts[row] for row in rows]
        self._scores: Tensor = self._scores[rows]
        self._states: States = self._states.taken(rows)
        self._stepper = Stepper(self.model, self._states, self.graph)
        seconds = now(self.model) - began
        self.seconds += seconds
        for sample in self._rows:
            sample.seconds += seconds / len(rows)
