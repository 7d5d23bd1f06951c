"""Ask a model in its chat template, and check that a tokenizer gives back what it is asked."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from nemotron_h.core.errors import UserError
from nemotron_h.data.chat import FAMILY_SOURCE, ChatTemplate
from nemotron_h.data.messages import SYSTEM, USER, ChatError, Turn
from nemotron_h.data.thoughts import BEGIN, OFF, has_switch, in_thought, switched
from nemotron_h.data.tokenizer import Tokenizer
from nemotron_h.evaluation.subject import Subject
from nemotron_h.inference.opening import recorded_template


def template_of(subject: Subject, thinking: str | None) -> tuple[str, str]:
    """Return the template that came with a checkpoint, else the family's, and the system message that asks for thoughts
    or for none; there may be no need for one.
    """
    return switched(thinking, recorded_template(subject.tokenizer, subject.record) or FAMILY_SOURCE)


class Conversation:
    """A model that is asked in its chat template.

    Args:
        thinking: `on` or `off` asks for a thought before each answer, or for none.
    Attributes:
        source: of the template.
        system: line of the system message that asks for a thought or for none; there may be no need for one.
        stop_ids: tokens that end an answer.
        opening: that answers begin with, where the template has begun a thought.
    Errors:
        UserError: the template cannot be used.
    """

    def __init__(self, subject: Subject, thinking: str | None = None) -> None:
        self.source, self.system = template_of(subject, thinking)
        self._checkpoint = subject.checkpoint
        with self._telling():
            self._template = ChatTemplate(self.source, subject.tokenizer)
            end = self._template.end_marker()
            begun = in_thought(self._template.answer_begin(self._turns((Turn(USER, "question"),))))
        self.stop_ids = frozenset({subject.tokenizer.eod_id, end} - {None})
        self.opening = f"{BEGIN}\n" if begun else ""

    def prompt(self, question: str) -> list[int]:
        """Return the tokens before the answer to a question."""
        return self.tokens((Turn(USER, question),))

    def tokens(self, turns: Sequence[Turn]) -> list[int]:
        """Return the tokens before the answer to a conversation's last message."""
        with self._telling():
            return self._template.prompt(self._turns(turns))

    def _turns(self, turns: Sequence[Turn]) -> tuple[Turn, ...]:
        """Return the messages with the line of the system message, which is the first of that message."""
        if not self.system:
            return tuple(turns)
        begins = turns[0].role == SYSTEM
        system = f"{self.system}\n{turns[0].content}" if begins else self.system
        return (Turn(SYSTEM, system), *turns[begins:])

    @contextmanager
    def _telling(self) -> Iterator[None]:
        try:
            yield
        except ChatError as error:
            raise UserError(f"the chat template of {self._checkpoint} cannot be used: {error}") from error


def without_thoughts(subject: Subject) -> Conversation:
    """Return a conversation without thoughts: where the template has a switch for them it is off.

    Errors:
        UserError: the template cannot be used.
    """
    return Conversation(subject, OFF if has_switch(template_of(subject, None)[0]) else None)


def check_gives_back(tokenizer: Tokenizer, ids: list[int], text: str, what: str) -> None:
    """Refuse a tokenizer that does not give back a text.

    Args:
        ids: of the text.
        what: the text is, for an error.
    Errors:
        UserError: names characters that it lacks.
    """
    if (back := tokenizer.ids_to_text(ids)) != text:
        lacking = "".join(sorted({letter for letter in text if letter not in back})) or "spaces or line ends"
        raise UserError(
            f"the tokenizer in {tokenizer.path} does not give back {what}: it lacks "
            f"{json.dumps(lacking, ensure_ascii=False)}",
            hint="leave that task or file out, or take a model whose tokenizer has all characters",
        )
