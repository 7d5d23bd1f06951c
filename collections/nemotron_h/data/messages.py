"""Conversations as records have them: the common shapes, read into `Turn`s. One reader reads the messages of all."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from nemotron_h.core.strict import nearest

if TYPE_CHECKING:
    from nemotron_h.data.images.records import Picture

SYSTEM, USER, ASSISTANT = "system", "user", "assistant"
#: name in a message -> role; OpenAI's `developer` is its newer name of `system`
ROLES = {
    "system": SYSTEM,
    "developer": SYSTEM,
    "user": USER,
    "human": USER,
    "assistant": ASSISTANT,
    "gpt": ASSISTANT,
}
#: where a message has the reasoning before its answer, and where templates look for it
REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")
#: stands in a turn's content where an image does: a character of Unicode's private area
IMAGE = "\ue0fb"
_CALLS = ("tool_calls", "function_call")
_FIELDS = {"role", "from", "content", "value", "weight", "train", *REASONING_FIELDS, *_CALLS}


class ChatError(ValueError):
    """Reason why one conversation cannot be used; whoever reads it adds file and position."""


class Refused(ChatError):
    """The template itself refuses the conversation."""


@dataclass(frozen=True)
class Turn:
    """A message.

    Args:
        role: `system`, `user` or `assistant`.
        content: its text.
        trained: assistant turns only: whether it is in the loss (`weight: 0` or `train: false` takes it out).
        reasoning: assistant turns only: what it thought before its answer.
        images: in the order of their places in the content, each an `IMAGE`.
        unread: names of other fields that the message has.
    """

    role: str
    content: str
    trained: bool = True
    reasoning: str = ""
    images: tuple[Picture, ...] = ()
    unread: tuple[str, ...] = field(default=(), compare=False)


Conversation = tuple[Turn, ...]


def text_of(turns: Conversation) -> str:
    """Return what stands for a conversation where equal ones are looked for, and what its split is chosen by."""
    parts = [[t.role, t.content, t.trained, *([t.reasoning] if t.reasoning else [])] for t in turns]
    return json.dumps(parts, ensure_ascii=False)


def read_conversation(record: Any, shape: str) -> Conversation:
    """Return a record as a conversation.

    Args:
        record: as parsed from JSON or Parquet.
        shape: one of `SHAPES`.
    Errors:
        ChatError: fields are missing or of another type, a role is unknown, turns do not alternate, or one is empty.
    """
    refuse_tools(record)
    turns = tuple(turn for turn in SHAPES[shape](record) if turn.role != SYSTEM or turn.content.strip())
    check_turns(turns)
    return turns


def refuse_tools(record: Any) -> None:
    """Refuse a record that is no object, or that offers tools.

    Errors:
        ChatError: it does.
    """
    if not isinstance(record, dict):
        raise ChatError(f"the record is {type(record).__name__}, not an object")
    if record.get("tools") or record.get("functions"):
        raise ChatError("the record offers tools, which the template does not write")


def check_turns(turns: Conversation) -> None:
    """Check that turns alternate, none is empty, and the last is an answer.

    Errors:
        ChatError: naming the turn.
    """
    spoken = turns[1:] if turns and turns[0].role == SYSTEM else turns
    if not spoken:
        raise ChatError("there are no turns")
    for number, turn in enumerate(spoken, len(turns) - len(spoken) + 1):
        expected = (USER, ASSISTANT)[(number - 1 - (len(turns) - len(spoken))) % 2]
        if turn.role == SYSTEM:
            raise ChatError(f"turn {number} is a system message; only the first can be")
        if turn.role != expected:
            raise ChatError(f"turn {number} is the {turn.role}'s, where the {expected}'s belongs: they alternate")
        if not turn.content.strip():
            raise ChatError(f"turn {number} ({turn.role}) is empty")
    if spoken[-1].role != ASSISTANT:
        raise ChatError("the last turn is the user's: there is no answer to learn")
    if not any(turn.trained for turn in spoken if turn.role == ASSISTANT):
        raise ChatError("every assistant turn has weight 0: there is no answer to learn")


def text_field(record: dict[str, Any], *names: str, default: str | None = None) -> str:
    """Return the text of the first of these fields that the record has.

    Errors:
        ChatError: it is no text, or there is none and no default.
    """
    for name in names:
        value = record.get(name)
        if value is not None:
            if not isinstance(value, str):
                raise ChatError(f"field {name!r} is {type(value).__name__}, not text")
            return value
    if default is None:
        raise ChatError(f"no field {' or '.join(map(repr, names))}; the record has {', '.join(map(str, record))}"[:300])
    return default


def read_messages(value: Any, name: str) -> list[Turn]:
    """Return the turns of a list of messages, of OpenAI's or of ShareGPT's form.

    Args:
        value: of the record's field `name`.
    Errors:
        ChatError: it is no list, or a message cannot be used.
    """
    if not isinstance(value, list):
        raise ChatError(f"field {name!r} is {type(value).__name__}, not a list")
    return [_message(message, number) for number, message in enumerate(value, 1)]


def _message(message: Any, number: int) -> Turn:
    if not isinstance(message, dict):
        raise ChatError(f"turn {number} is {type(message).__name__}, not an object")
    name = message["role"] if "role" in message else message.get("from")
    if not isinstance(name, str) or name not in ROLES:
        hint = f"{nearest(str(name), ROLES)}Known: {', '.join(ROLES)}"
        raise ChatError(f"turn {number} has the unknown role {name!r}. {hint}")
    if any(message.get(key) for key in _CALLS):
        raise ChatError(f"turn {number} calls a tool, which the template does not write")
    weight, train = message.get("weight"), message.get("train")
    if weight not in (None, 0, 1):
        raise ChatError(f"turn {number} has weight {weight!r}; 0 and 1 are known")
    if train not in (None, True, False):
        raise ChatError(f"turn {number} has train {train!r}; true and false are known")
    return Turn(
        ROLES[name],
        _content(message["content"] if "content" in message else message.get("value"), number),
        trained=weight != 0 and train is not False,
        reasoning=_reasoning(message, ROLES[name], number),
        unread=tuple(key for key, value in message.items() if key not in _FIELDS and value not in (None, "", [], {})),
    )


def _content(value: Any, number: int) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in value):
        parts = [part.get("text") for part in value]
        if all(isinstance(part, str) for part in parts):
            return "".join(parts)
    if value is None:
        return ""
    raise ChatError(f"turn {number} has content that is neither text nor a list of text parts")


def _reasoning(message: dict[str, Any], role: str, number: int) -> str:
    texts = {name: message[name] for name in REASONING_FIELDS if message.get(name)}
    for name, text in texts.items():
        if not isinstance(text, str):
            raise ChatError(f"turn {number} has {name} that is {type(text).__name__}, not text")
        if role != ASSISTANT:
            raise ChatError(f"turn {number} is the {role}'s and has {name}, which only an assistant's can have")
    if len(set(texts.values())) > 1:
        raise ChatError(f"turn {number} has {' and '.join(texts)}, which differ")
    return next(iter(texts.values()), "")


def _list(record: dict[str, Any], name: str) -> Any:
    value = record.get(name)
    if value is None:
        raise ChatError(f"no field {name!r}; the record has {', '.join(map(str, record))}"[:300])
    return value


def _messages(record: dict[str, Any]) -> Iterator[Turn]:
    """Yield the turns of OpenAI's `{"messages": [{"role": ..., "content": ...}]}`; content is text or text parts."""
    yield Turn(SYSTEM, text_field(record, "system", default=""))
    yield from read_messages(_list(record, "messages"), "messages")


def _sharegpt(record: dict[str, Any]) -> Iterator[Turn]:
    """Yield ShareGPT's turns: `{"conversations": [{"from": "human", "value": ...}, ...]}`, and maybe `system`."""
    yield Turn(SYSTEM, text_field(record, "system", default=""))
    yield from read_messages(_list(record, "conversations"), "conversations")


def _alpaca(record: dict[str, Any]) -> Iterator[Turn]:
    """Yield the turns of Alpaca: `instruction`, `output`, and maybe `input` (put under the instruction after an empty
    line), `system`, and `history` (pairs of earlier turns).
    """
    yield Turn(SYSTEM, text_field(record, "system", default=""))
    for pair in record.get("history") or []:
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(part, str) for part in pair)):
            raise ChatError("field 'history' is not a list of pairs of texts")
        yield from (Turn(USER, pair[0]), Turn(ASSISTANT, pair[1]))
    asked = [text_field(record, "instruction"), text_field(record, "input", default="")]
    yield Turn(USER, "\n\n".join(part for part in asked if part.strip()))
    yield Turn(ASSISTANT, text_field(record, "output"))


def _prompt_response(record: dict[str, Any]) -> Iterator[Turn]:
    """Yield the turns of `prompt` and `response` (or `completion`), and maybe `system`."""
    yield Turn(SYSTEM, text_field(record, "system", default=""))
    yield Turn(USER, text_field(record, "prompt"))
    yield Turn(ASSISTANT, text_field(record, "response", "completion"))


SHAPES: dict[str, Callable[[dict[str, Any]], Iterator[Turn]]] = {
    "messages": _messages,
    "sharegpt": _sharegpt,
    "alpaca": _alpaca,
    "prompt_response": _prompt_response,
}
