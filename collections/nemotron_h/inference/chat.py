"""A conversation with a model: what was read stays in the state, so a turn costs its own tokens and no more."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from nemotron_h.data.chat import ChatTemplate
from nemotron_h.data.images.records import asked
from nemotron_h.data.messages import ASSISTANT, SYSTEM, USER, ChatError, Conversation, Turn
from nemotron_h.inference.drafts import Acceptance, Draft, Drafter
from nemotron_h.inference.looking import Asked, Looking
from nemotron_h.inference.model import GenerationModel
from nemotron_h.inference.prefill import extend_in_passes
from nemotron_h.inference.sampling import Sampling
from nemotron_h.inference.speculative import SpeculativeWriter
from nemotron_h.inference.text import StoppingText
from nemotron_h.inference.thought import ThoughtBudget
from nemotron_h.inference.vision import Placed
from nemotron_h.inference.writer import Writer

#: ours: room for keys and values at first; it doubles
_CAPACITY = 512


class ChatSession:
    """Turns of user and assistant over one state.

    The tokens that the model wrote stay as it wrote them; they are not encoded again from their text.

    Args:
        model: whose vocabulary is the template's tokenizer's.
        template: how turns are written.
        system: a system message, or nothing.
        sampling: how tokens are chosen; the generator goes on from turn to turn.
        max_tokens: longest answer.
        draft, budget: see `Generation`.
        looking: reads images in this template; None where the model reads text alone.

    Attributes:
        turns: what was said.
        ids: all tokens of the conversation, read or about to be.
        read, written: tokens of the last turn that were read before its answer, and those of the answer.
        read_seconds, write_seconds: of the last turn.
        acceptance: of the draft, in the last turn.
        ended_by: the last answer's end: `its end marker`, `end of document`, `--max-tokens` or `interrupt`.
    """

    def __init__(
        self,
        model: GenerationModel,
        template: ChatTemplate,
        *,
        system: str = "",
        sampling: Sampling | None = None,
        max_tokens: int = 512,
        draft: Draft | None = None,
        budget: ThoughtBudget | None = None,
        looking: Looking | None = None,
    ) -> None:
        if draft is not None:
            draft.check_vocabulary(model)
        self.draft, self.budget, self.looking = draft, budget, looking
        self.model, self.template, self.max_tokens = model, template, max_tokens
        self.sampling = sampling or Sampling()
        self._system = (Turn(SYSTEM, system),) if system.strip() else ()
        self._end = template.answer_end()
        self._marker = template.end_marker()
        #: a tokenizer without the template's markers gets them as text
        self._stops = [self._end.strip()] if self._marker is None and self._end.strip() else []
        self._end_ids = template.tokens(self._end)
        self.reset()

    def reset(self) -> None:
        """Forget all but the system message."""
        self.turns: tuple[Turn, ...] = self._system
        self.ids: list[int] = []
        self.states = self.model.new_states(1, _CAPACITY)
        self._drafter: Drafter | None = self.draft.start(1) if self.draft else None
        self.acceptance = Acceptance()
        self._generators = self.sampling.generators(1)
        self._unwritten: list[int] = []
        self.read = self.written = 0
        self.read_seconds = self.write_seconds = 0.0
        self.ended_by = ""

    def answer(self, text: str, images: Sequence[str] = ()) -> Iterator[str]:
        """Read a user's turn and write the answer; closing the iterator ends the answer where it is.

        Args:
            images: files, which stand before the text.
        Yields:
            one piece of text per token; empty where a token completes no character.
        Errors:
            ChatError: the template refuses the text, or the model reads text alone; nothing has changed then.
            ImageError: an image cannot be read; neither.
        """
        if images and self.looking is None:
            raise ChatError(f"{self.model.definition.name} reads text alone")
        turns = (*self.turns, asked(text, images) if images else Turn(USER, text))
        begun = self.template.following(turns) if self.ids else self.template.begun(turns)
        read = self.looking.continued(begun, turns[-1].images) if images else Asked(begun.ids, None)
        self.ids += [*self._unwritten, *read.ids]
        began = time.perf_counter()
        done = int(self.states.lengths[0])
        self.read, self.written = len(self.ids) - done, 0
        placed = read.placed and replace(read.placed, places=read.placed.places + len(self.ids) - len(read.ids) - done)
        writer = self._writer(done, turns, placed)
        shown = StoppingText(self.template.tokenizer.ids_to_text, self._stops)
        pieces: list[str] = []
        self._unwritten, self.ended_by = self._end_ids, "interrupt"
        started = time.perf_counter()
        self.read_seconds = started - began
        before = len(self.ids)
        try:
            while self.ended_by == "interrupt":
                before = len(self.ids)
                for token in writer.write([False])[0]:
                    if token == self.template.tokenizer.eod_id and token != self._marker:
                        self.ended_by = "end of document"
                        break
                    self.ids.append(token)
                    self.written += 1
                    if token == self._marker:
                        self.ended_by = "its end marker"
                        self._unwritten = self._end_ids[self._end_ids.index(token) + 1 :]
                        break
                    pieces.append(shown.add(token))
                    yield pieces[-1]
                    if shown.stopped_by is not None:
                        self.ended_by, self._unwritten = "its end marker", []
                        break
                    if self.written >= self.max_tokens:
                        self.ended_by = "--max-tokens"
                        break
            pieces.append(shown.finish())
            yield pieces[-1]
        finally:
            writer.finish([len(self.ids) - before])
            self.write_seconds = time.perf_counter() - started
            self.turns = (*turns, Turn(ASSISTANT, "".join(pieces).strip()))

    def _writer(self, done: int, turns: Conversation, placed: Placed | None) -> Writer:
        """Read the tokens from `done` on, with the image tokens among them, and return what writes after them."""
        capacity = len(self.ids) + self.max_tokens + (self.draft.tokens + 1 if self.draft else 0)
        self.states.reserve(capacity)
        hidden = extend_in_passes(self.model, torch.tensor([self.ids[done:]]), self.states, placed=placed)
        chosen = self.model, self.states, hidden, self.sampling, self._generators
        thoughts = []
        if self.budget is not None:
            thoughts = [self.budget.start(self.template.tokens(self.template.answer_begin(turns)))]
        if self._drafter is None:
            return Writer(*chosen, thoughts=thoughts)
        self.acceptance = Acceptance()
        self._drafter.read([self.ids], capacity, self.sampling, None)
        return SpeculativeWriter(*chosen, self._drafter, [self.ids], self.acceptance, thoughts=thoughts)
