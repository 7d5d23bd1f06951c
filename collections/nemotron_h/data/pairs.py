"""Preferences: a prompt with a chosen and a rejected answer, from the common record shapes to tokens."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from typing import Any

from nemotron_h.data.chat import ChatTemplate, Encoded
from nemotron_h.data.messages import (
    ASSISTANT,
    SYSTEM,
    USER,
    ChatError,
    Conversation,
    Turn,
    check_turns,
    read_messages,
    refuse_tools,
    text_field,
)

#: where a record has its prompt; `question` is Orca-DPO's
PROMPTS = ("prompt", "question", "messages", "conversations")
#: names of the chosen and the rejected answer's reward
REWARDS = (("chosen_reward", "rejected_reward"), ("score_chosen", "score_rejected"))
#: in a `.loss` file: this bit is set in every token of a rejected conversation, which follows its chosen one
REJECTED = 2


@dataclass(frozen=True)
class Pair:
    """Two conversations that differ in their end.

    Args:
        chosen, rejected: whole conversations; only the turns of the answer are in the loss.
        rewards: of the two; NaN where the record has none.
    """

    chosen: Conversation
    rejected: Conversation
    rewards: tuple[float, float] = (math.nan, math.nan)

    def text(self) -> str:
        """Return the text that stands for the pair where equal ones are looked for."""
        sides = [
            [[t.role, t.content, *([t.reasoning] if t.reasoning else [])] for t in side]
            for side in (self.chosen, self.rejected)
        ]
        return json.dumps([*sides, *map(str, self.rewards)], ensure_ascii=False)


def read_pair(record: Any) -> Pair:
    """Return a record as a pair.

    The prompt is a text or a list of messages in `prompt`, OpenAI's `messages`, or ShareGPT's `conversations`, with
    `system` beside it if need be. `chosen` and `rejected` are texts, messages, or lists of messages; where these begin
    with the user's turn (or a system message) they are whole conversations, whose prompts must be the same: they are
    the source then, and what else the record calls a prompt has to agree with it.

    Args:
        record: as parsed from JSON or Parquet.
    Errors:
        ChatError: fields are missing or of another type, turns do not alternate, the answers are equal, or one reward
            is missing.
    """
    refuse_tools(record)
    sides = {name: _answer(record, name) for name in ("chosen", "rejected")}
    prompts = {name: _prompt(record, name) for name in PROMPTS if record.get(name) is not None}
    if all(turns[0].role != ASSISTANT for turns in sides.values()):
        prompt, sides = _common(prompts, sides)
    elif len(prompts) > 1:
        raise ChatError(f"the record has {' and '.join(map(repr, prompts))}: one prompt is needed")
    else:
        prompt = next(iter(prompts.values()), [])
    system = text_field(record, "system", default="")
    if system.strip() and prompt:
        rest = prompt[1:] if prompt[0] == Turn(SYSTEM, system) else prompt
        prompt = [Turn(SYSTEM, system), *rest]  # a second system message that differs is refused below
    for name, turns in sides.items():
        if turns[0].role != ASSISTANT:
            raise ChatError(f"{name!r} begins with a {turns[0].role} turn, where the answer belongs")
    if not prompt:
        raise ChatError(f"no prompt: the record has none of {', '.join(PROMPTS)}")
    if prompt[-1].role != USER:
        raise ChatError("the prompt does not end with the user's turn")
    context = tuple(replace(turn, trained=False) for turn in prompt)
    chosen, rejected = ((*context, *sides[name]) for name in ("chosen", "rejected"))
    for name, turns in (("chosen", chosen), ("rejected", rejected)):
        try:
            check_turns(turns)
        except ChatError as error:
            raise ChatError(f"{name!r}: {error}") from error
    if [(t.reasoning.strip(), t.content.strip()) for t in sides["chosen"]] == [
        (t.reasoning.strip(), t.content.strip()) for t in sides["rejected"]
    ]:
        raise ChatError("the chosen and the rejected answer are equal")
    return Pair(chosen, rejected, _rewards(record))


def _prompt(record: dict[str, Any], name: str) -> list[Turn]:
    value = record[name]
    return [Turn(USER, value)] if isinstance(value, str) else _messages(value, name)


def _answer(record: dict[str, Any], name: str) -> list[Turn]:
    value = record.get(name)
    if value is None:
        raise ChatError(f"no field {name!r}; the record has {', '.join(map(str, record))}"[:300])
    if isinstance(value, str):
        return [Turn(ASSISTANT, value)]
    return _messages([value] if isinstance(value, dict) else value, name)


def _messages(value: Any, name: str) -> list[Turn]:
    """Return the turns of a field; an empty system message is none."""
    if not isinstance(value, list):
        raise ChatError(f"field {name!r} is {type(value).__name__}, neither text nor messages")
    try:
        turns = [turn for turn in read_messages(value, name) if turn.role != SYSTEM or turn.content.strip()]
    except ChatError as error:
        raise ChatError(f"{name!r}: {error}") from error
    if not turns:
        raise ChatError(f"field {name!r} has no turns")
    return turns


def _common(prompts: dict[str, list[Turn]], sides: dict[str, list[Turn]]) -> tuple[list[Turn], dict[str, list[Turn]]]:
    """Return the prompt that two whole conversations share, and their last answers."""
    heads = {name: turns[:-1] for name, turns in sides.items()}
    if heads["chosen"] != heads["rejected"]:
        raise ChatError("'chosen' and 'rejected' are conversations with different prompts")
    head = heads["chosen"]
    asked = next((turn.content for turn in head if turn.role == USER), None)
    same = [head, sides["chosen"], sides["rejected"]]
    same += [[turn for turn in turns if turn.role != SYSTEM] for turns in same]
    for name, prompt in prompts.items():
        if prompt not in same and prompt[-1].content != asked:
            raise ChatError(f"'chosen' and 'rejected' are conversations with another prompt than the record's {name!r}")
    return head, {name: turns[-1:] for name, turns in sides.items()}


def _rewards(record: dict[str, Any]) -> tuple[float, float]:
    for names in REWARDS:
        values = [record.get(name) for name in names]
        if values == [None, None]:
            continue
        for name, value in zip(names, values, strict=True):
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise ChatError(
                    f"field {name!r} is {value!r}, not a number" + (", as its pair has" if value is None else "")
                )
        return float(values[0]), float(values[1])
    return math.nan, math.nan


def encode_pair(template: ChatTemplate, pair: Pair) -> Encoded:
    """Return the tokens of both, the chosen conversation first; in the mask, `REJECTED` is added in the second.

    Errors:
        ChatError: the template refuses one, or writes both alike.
    """
    chosen, rejected = template.encode(pair.chosen), template.encode(pair.rejected)
    if chosen.ids == rejected.ids:
        raise ChatError("the chosen and the rejected answer are equal as tokens")
    loss = [*chosen.loss, *(learnt | REJECTED for learnt in rejected.loss)]
    return Encoded([*chosen.ids, *rejected.ids], loss, pair.rewards)
