"""Continue prompts: prefill in chunks, then tokens from constant-size state, one at a time or several by a draft."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from nemotron_h.core.errors import UserError
from nemotron_h.inference.drafts import Acceptance, Draft
from nemotron_h.inference.model import GenerationModel
from nemotron_h.inference.prefill import prefill
from nemotron_h.inference.sampling import Sampling
from nemotron_h.inference.speculative import SpeculativeWriter
from nemotron_h.inference.thought import ThoughtBudget
from nemotron_h.inference.vision import Placed, check_places
from nemotron_h.inference.writer import Writer


class Generation:
    """Continuations of a batch of prompts, the next tokens of each per item.

    Each row gets what its prompt alone would get (up to rounding), whatever else is in the batch.

    Args:
        prompts: token ids, at least one each; lengths may differ.
        max_tokens: longest continuation.
        sampling: how tokens are chosen; None is `Sampling()`.
        stop_ids: a row ends before any of these tokens (a tokenizer's `eod_id`).
        draft: writes several tokens per pass where it drafts them right, by the same distribution; None writes one.
        budget: ends thoughts; None lets them go on.
        graph: see `Recorded`.
        images: of each prompt, or None; None is none at all.

    Attributes:
        stopped_by: by row, the stop token that ended it, or None.
        thoughts: by row, where there is a budget.
        acceptance: of the draft, so far.
    Errors:
        UserError: no prompts, an empty one, ids outside the vocabulary, max_tokens < 1, or a draft of another
            vocabulary.
    """

    def __init__(
        self,
        model: GenerationModel,
        prompts: Sequence[Sequence[int]],
        *,
        max_tokens: int,
        sampling: Sampling | None = None,
        stop_ids: Collection[int] = (),
        draft: Draft | None = None,
        budget: ThoughtBudget | None = None,
        graph: bool | None = None,
        images: Sequence[Placed | None] | None = None,
    ) -> None:
        check_prompts(model, prompts, max_tokens)
        if draft is not None:
            draft.check_vocabulary(model)
        self.model, self.prompts, self.max_tokens, self.graph = model, prompts, max_tokens, graph
        self.images = images or [None] * len(prompts)
        check_places(prompts, self.images)
        self.sampling, self.stop_ids = sampling or Sampling(), frozenset(stop_ids)
        self.stopped_by: list[int | None] = [None] * len(prompts)
        self.draft, self.acceptance = draft, Acceptance()
        self.thoughts = [budget.start(prompt) for prompt in prompts] if budget else []
        self._ended = [False] * len(prompts)

    def end(self, row: int) -> None:
        """End a row that has all that it was to have."""
        self._ended[row] = True

    def __iter__(self) -> Iterator[list[list[int]]]:
        """Yield one entry per prompt: its next tokens, none once it has ended. Ends when all have."""
        prompts, ended = self.prompts, self._ended
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        writer = self.writer(order)
        room = [self.max_tokens] * len(prompts)
        while True:
            items: list[list[int]] = [[] for _ in prompts]
            for index, tokens in zip(order, writer.write([ended[i] for i in order]), strict=True):
                for token in tokens if not ended[index] else ():
                    if token in self.stop_ids:
                        ended[index], self.stopped_by[index] = True, token
                        break
                    items[index].append(token)
                    if len(items[index]) == room[index]:
                        ended[index] = True
                        break
                room[index] -= len(items[index])
            if any(items):
                yield items
            if all(ended):
                return

    def writer(self, order: Sequence[int]) -> Writer:
        """Return what writes after the prompts, which it has read, in this order: the longest first."""
        prompts, generators = self.prompts, self.sampling.generators(len(order))
        prompts, generators = [prompts[i] for i in order], [generators[i] for i in order]
        capacity = len(prompts[0]) + self.max_tokens + (self.draft.tokens + 1 if self.draft else 0)
        states = self.model.new_states(len(prompts), capacity)
        hidden = prefill(self.model, prompts, states, images=[self.images[i] for i in order])
        chosen = self.model, states, hidden, self.sampling, generators
        options = {"thoughts": [self.thoughts[i] for i in order] if self.thoughts else (), "graph": self.graph}
        if self.draft is None:
            return Writer(*chosen, **options)
        drafter = self.draft.start(len(prompts))
        drafter.read(prompts, capacity, self.sampling, self.graph)
        return SpeculativeWriter(*chosen, drafter, prompts, self.acceptance, **options)


def generate(
    model: GenerationModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    sampling: Sampling | None = None,
    stop_ids: Collection[int] = (),
    draft: Draft | None = None,
    budget: ThoughtBudget | None = None,
    graph: bool | None = None,
    images: Sequence[Placed | None] | None = None,
) -> list[list[int]]:
    """Return the whole continuation of each prompt; see `Generation`."""
    found: list[list[int]] = [[] for _ in prompts]
    options = {"max_tokens": max_tokens, "sampling": sampling, "stop_ids": stop_ids, "draft": draft, "graph": graph}
    options |= {"budget": budget, "images": images}
    for items in Generation(model, prompts, **options):
        for continuation, tokens in zip(found, items, strict=True):
            continuation += tokens
    return found


def check_prompts(model: GenerationModel, prompts: Sequence[Sequence[int]], max_tokens: int) -> None:
    """Check prompts and length.

    Errors:
        UserError: see `Generation`.
    """
    if max_tokens < 1:
        raise UserError(f"max-tokens = {max_tokens}; it has to be 1 or more")
    if not prompts or not all(len(prompt) for prompt in prompts):
        raise UserError("there is nothing to continue: no prompt, or a prompt without tokens")
    size = model.definition.vocab_size
    wrong = next((token for prompt in prompts for token in prompt if not 0 <= token < size), None)
    if wrong is not None:
        raise UserError(f"token {wrong} of a prompt is outside the model's vocabulary of {size:,}")
