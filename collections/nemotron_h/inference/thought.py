"""End a thought at a budget of tokens: the tokens of `</think>` are written in place of what the model chose.

As for Nemotron Nano 2 (2508.14444): from the budget on at the first end of a line, and within a line where none comes
for 500 more tokens. The model reads the forced tokens as it reads its own, and answers behind them.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from nemotron_h.core.errors import UserError
from nemotron_h.data.thoughts import BEGIN, END
from nemotron_h.data.tokenizer import Tokenizer

#: tokens beyond the budget in which an end of a line is waited for (2508.14444)
GRACE = 500


class ThoughtBudget:
    """Most tokens of an answer's thoughts, in one tokenizer.

    Args:
        tokenizer: where the markers are its special tokens, those alone begin and end a thought; elsewhere their text,
            whatever tokens it is written in.
        tokens: of thoughts that are written, without the markers.
        grace: see `GRACE`.
    Errors:
        UserError: the budget is negative.
    """

    def __init__(self, tokenizer: Tokenizer, tokens: int, grace: int = GRACE) -> None:
        if tokens < 0:
            raise UserError(f"thought-budget = {tokens}; it has to be 0 or more")
        self.tokens, self.grace = tokens, grace
        special = tokenizer.special_tokens
        self.marker_ids = {marker: special.get(marker) for marker in (BEGIN, END)}
        own = self.marker_ids[END]
        self.end_ids = [own] if own is not None else tokenizer.text_to_ids(END)
        self.text_of = functools.cache(lambda token: tokenizer.ids_to_text([token]))

    def start(self, prompt: Iterable[int]) -> Thought:
        """Return the state behind a prompt, which may have begun a thought."""
        thought = Thought(self)
        for token in prompt:
            thought.read(token)
        thought.tokens = 0
        return thought


class Thought:
    """Reads the tokens of one sequence, and tells which has to come next.

    Attributes:
        begun, open: a thought has begun; and not ended.
        tokens: of thoughts that were written so far.
        cut: a thought was ended by its budget.
    """

    def __init__(self, budget: ThoughtBudget) -> None:
        self.budget = budget
        self.begun = self.open = self.cut = False
        self.tokens = 0
        self._tail = ""  # text that a marker may have begun in
        self._at_line_end = False
        self._forced = 0  # tokens of the end marker that were forced

    def pass_on(self, tokens: Sequence[int]) -> list[int]:
        """Read tokens up to the first in whose place another has to stand, and return them with that one; else all."""
        for place, token in enumerate(tokens):
            forced = self._next()
            if forced is None:
                self.read(token)
                continue
            self._force()
            if forced != token:
                return [*tokens[:place], forced]
        return list(tokens)

    def read(self, token: int) -> None:
        """Read a token that the model chose, or one of the prompt."""
        marker, text = END if self.open else BEGIN, self.budget.text_of(token)
        own, seen = self.budget.marker_ids[marker], self._tail + text
        self.tokens += self.open
        if token == own if own is not None else marker in seen:
            self.open, self._tail, self.begun = not self.open, "", True
        else:
            self._tail = seen[1 - len(END) :]
        self._at_line_end = text.endswith("\n")

    def _next(self) -> int | None:
        """Return the token that has to come next; None where the model chooses."""
        beyond = self.tokens - self.budget.tokens
        due = self.open and beyond >= 0 and (self._at_line_end or beyond >= self.budget.grace)
        return self.budget.end_ids[self._forced] if due or self._forced else None

    def _force(self) -> None:
        self._forced += 1
        if self._forced == len(self.budget.end_ids):
            self.open, self.cut, self._forced, self._tail = False, True, 0, ""
            self._at_line_end = False


def bounded(chosen: Tensor, thoughts: Sequence[Thought | None]) -> Tensor:
    """Return the tokens that come next, int64 [batch]: those that were chosen, but where a thought is to end.

    Args:
        chosen: [batch].
        thoughts: of each row; None is not looked at.
    """
    tokens = [
        token if thought is None else thought.pass_on([token])[0]
        for token, thought in zip(chosen.tolist(), thoughts, strict=True)
    ]
    return torch.tensor(tokens, device=chosen.device)
