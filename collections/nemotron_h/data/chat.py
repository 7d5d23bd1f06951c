"""Conversations: the common record shapes, the family's chat template, and tokens with their loss mask.

A record becomes a tuple of `Turn`s; a `ChatTemplate` turns those into token ids and marks the ones that an assistant
writes, its end marker included. Each stretch of text is tokenised on its own where the mask changes, as in generation:
the prompt is tokens before the first token of the answer exists.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from nemotron_h.data.tokenizer import CHAT_TOKENS, Tokenizer
from nemotron_h.errors import UserError
from nemotron_h.strict import nearest

FAMILY_TEMPLATE = "nemotron_h"
#: as Megatron-LM's `nemotron-h-aligned` prompt format. `<SPECIAL_11>` ends an assistant turn; where a user turn
#: follows, the same token begins it. A conversation without a system message has no system block.
FAMILY_SOURCE = (
    "{% for message in messages %}{% set content = message['content'] | trim %}"
    "{% if message['role'] == 'system' %}{{ '<SPECIAL_10>System\n' + content + '\n' }}"
    "{% elif message['role'] == 'user' %}"
    "{% if loop.first or loop.previtem['role'] != 'assistant' %}{{ '<SPECIAL_11>' }}{% endif %}"
    "{{ 'User\n' + content + '\n' }}"
    "{% elif message['role'] == 'assistant' %}{{ '<SPECIAL_11>Assistant\n' }}"
    "{% generation %}{{ content + '\n<SPECIAL_11>' }}{% endgeneration %}"
    "{% else %}{{ raise_exception('unknown role ' + message['role']) }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}"
    "{% if not messages or messages[-1]['role'] != 'assistant' %}{{ '<SPECIAL_11>' }}{% endif %}"
    "{{ 'Assistant\n' }}{% endif %}"
)
SYSTEM, USER, ASSISTANT = ROLES = ("system", "user", "assistant")
SHAREGPT_ROLES = {"system": SYSTEM, "human": USER, "user": USER, "gpt": ASSISTANT, "assistant": ASSISTANT}
#: characters of Unicode's private area, which stand in a rendered text where a `{% generation %}` block begins and
#: ends, and inside of a special token's name that a message holds
_BEGIN, _END, _ESCAPE = _RESERVED = "\ue0fd\ue0fe\ue0ff"
_EXAMPLE = "\ue0fc"  # an answer that no template holds
_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


class ChatError(ValueError):
    """Why one conversation cannot be used; whoever reads it adds file and position."""


@dataclass(frozen=True)
class Turn:
    """A message.

    Args:
        role: `system`, `user` or `assistant`.
        content: its text.
        trained: assistant turns only: whether it is in the loss (`weight: 0` in OpenAI's shape takes it out).
    """

    role: str
    content: str
    trained: bool = True


Conversation = tuple[Turn, ...]


def read_conversation(record: Any, shape: str) -> Conversation:
    """A record as a conversation.

    Args:
        record: as parsed from JSON or Parquet.
        shape: one of `SHAPES`.
    Raises:
        ChatError: fields are missing or of another type, a role is unknown, turns do not alternate, or one is empty.
    """
    if not isinstance(record, dict):
        raise ChatError(f"the record is {type(record).__name__}, not an object")
    turns = tuple(turn for turn in SHAPES[shape](record) if turn.role != SYSTEM or turn.content.strip())
    check_turns(turns)
    return turns


def check_turns(turns: Conversation) -> None:
    """Turns alternate, none is empty, and the last is an answer.

    Raises:
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
    """The text of the first of these fields that the record has.

    Raises:
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


def _list(record: dict[str, Any], name: str) -> list[Any]:
    value = record.get(name)
    if value is None:
        raise ChatError(f"no field {name!r}; the record has {', '.join(map(str, record))}"[:300])
    if not isinstance(value, list):
        raise ChatError(f"field {name!r} is {type(value).__name__}, not a list")
    return value


def role_of(name: Any, known: dict[str, str], number: int) -> str:
    """The role that turn `number` names.

    Raises:
        ChatError: it is unknown.
    """
    if name not in known:
        hint = f"{nearest(str(name), known)}Known: {', '.join(known)}"
        raise ChatError(f"turn {number} has the unknown role {name!r}. {hint}")
    return known[name]


def _messages(record: dict[str, Any]) -> Iterator[Turn]:
    """OpenAI: `{"messages": [{"role": ..., "content": ...}]}`; content is text, or a list of text parts."""
    if record.get("tools") or record.get("functions"):
        raise ChatError("the record offers tools, which the template does not write")
    for number, message in enumerate(_list(record, "messages"), 1):
        if not isinstance(message, dict):
            raise ChatError(f"turn {number} is {type(message).__name__}, not an object")
        role = role_of(message.get("role"), {role: role for role in ROLES}, number)
        if message.get("tool_calls") or message.get("function_call"):
            raise ChatError(f"turn {number} calls a tool, which the template does not write")
        weight = message.get("weight", 1)
        if weight not in (None, 0, 1):
            raise ChatError(f"turn {number} has weight {weight!r}; 0 and 1 are known")
        yield Turn(role, message_content(message.get("content"), number), trained=weight != 0)


def message_content(value: Any, number: int) -> str:
    """A message's text, or that of its text parts.

    Raises:
        ChatError: it is neither.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in value):
        parts = [part.get("text") for part in value]
        if all(isinstance(part, str) for part in parts):
            return "".join(parts)
    if value is None:
        return ""
    raise ChatError(f"turn {number} has content that is neither text nor a list of text parts")


def _sharegpt(record: dict[str, Any]) -> Iterator[Turn]:
    """ShareGPT: `{"conversations": [{"from": "human", "value": ...}, {"from": "gpt", ...}]}`, and maybe `system`."""
    if record.get("tools"):
        raise ChatError("the record offers tools, which the template does not write")
    yield Turn(SYSTEM, text_field(record, "system", default=""))
    for number, message in enumerate(_list(record, "conversations"), 1):
        if not isinstance(message, dict):
            raise ChatError(f"turn {number} is {type(message).__name__}, not an object")
        role = role_of(message.get("from"), SHAREGPT_ROLES, number)
        yield Turn(role, message_content(message.get("value"), number))


def _alpaca(record: dict[str, Any]) -> Iterator[Turn]:
    """Alpaca: `instruction`, `output`, and maybe `input` (put under the instruction after an empty line), `system`, and
    `history` (pairs of earlier turns).
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
    """`prompt` and `response` (or `completion`), and maybe `system`."""
    yield Turn(SYSTEM, text_field(record, "system", default=""))
    yield Turn(USER, text_field(record, "prompt"))
    yield Turn(ASSISTANT, text_field(record, "response", "completion"))


SHAPES: dict[str, Callable[[dict[str, Any]], Iterator[Turn]]] = {
    "messages": _messages,
    "sharegpt": _sharegpt,
    "alpaca": _alpaca,
    "prompt_response": _prompt_response,
}


@dataclass(frozen=True)
class Encoded:
    """A conversation as tokens.

    Args:
        ids: token ids.
        loss: of each token, whether it is to be learnt: those of assistant turns with their end marker. A pair of
            conversations has `data.pairs.REJECTED` added in its second one.
        rewards: of a pair.
    """

    ids: list[int]
    loss: list[int]
    rewards: tuple[float, float] | None = None


def template_source(name_or_path: str) -> str:
    """The Jinja text of a template: `nemotron_h`, or a file.

    Raises:
        UserError: there is no such file.
    """
    if name_or_path == FAMILY_TEMPLATE:
        return FAMILY_SOURCE
    try:
        return Path(name_or_path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"chat_template: {name_or_path}: {getattr(error, 'strerror', None) or error}",
            f"Name {FAMILY_TEMPLATE} (the family's), or the path of a Jinja file.",
        ) from error


class _Generation(Extension):
    """Hugging Face's block around what the assistant writes."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's own form

    def parse(self, parser: Parser) -> nodes.Node:
        """Called by jinja2 at the tag."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

    def _marked(self, caller: Callable[[], str]) -> str:
        return _BEGIN + caller() + _END


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _compiled(source: str) -> jinja2.Template:
    """With what Hugging Face's tokenizers offer a template, but for the date of today: the same data gives the same
    tokens.
    """
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
    environment.globals["raise_exception"] = _raise_exception
    return environment.from_string(source)


class ChatTemplate:
    """A Jinja chat template, as Hugging Face's tokenizers have them, over a tokenizer.

    Which tokens an assistant writes is read off the template's `{% generation %}` blocks. A template without them is
    rendered turn by turn: what a turn adds to the prompt before it is that turn.

    Args:
        source: the template's text.
        tokenizer: its special tokens, where the template writes them, become single ids. Text inside of messages never
            does: it is encoded as ordinary text, whatever it looks like.

    Attributes:
        plain_markers: the family's markers that the template writes and the tokenizer lacks; they are encoded as text.
    Raises:
        UserError: the text is not a template.
    """

    def __init__(self, source: str, tokenizer: Tokenizer) -> None:
        self.source, self.tokenizer = source, tokenizer
        self._tagged = bool(_GENERATION.search(source))
        self._ids = tokenizer.special_tokens
        self.plain_markers = [name for name in CHAT_TOKENS if name in source and name not in self._ids]
        names = sorted(self._ids, key=len, reverse=True)
        self._special = re.compile("(" + "|".join(map(re.escape, names)) + ")") if names else re.compile(r"(?!)")
        tokens = tokenizer.ids_to_tokens([tokenizer.bos_id, tokenizer.eod_id])
        self._names = {"bos_token": tokens[0], "eos_token": tokens[1]}
        try:
            self._template = _compiled(source)
        except jinja2.TemplateSyntaxError as error:
            raise UserError(f"chat_template: no Jinja template: line {error.lineno}: {error.message}") from error

    def encode(self, turns: Conversation) -> Encoded:
        """Tokens and loss mask.

        Raises:
            ChatError: the template refuses the conversation, or does not tell its assistant turns apart.
        """
        ids: list[int] = []
        loss: list[bool] = []
        for text, trained in self.segments(turns):
            part = self.tokens(text)
            ids += part
            loss += [trained] * len(part)
        return Encoded(ids, loss)

    def prompt(self, turns: Conversation) -> list[int]:
        """Tokens before the next answer: those that `encode` gives to the conversation up to there.

        Raises:
            ChatError: as `encode`.
        """
        return [i for text, _ in self.segments(turns, add_generation_prompt=True) for i in self.tokens(text)]

    def following(self, turns: Conversation) -> list[int]:
        """Tokens behind the last answer and its end marker, up to the next answer: the end of what `prompt` gives.

        Raises:
            ChatError: as `encode`.
        """
        return self.tokens(self.segments(turns, add_generation_prompt=True)[-1][0])

    def answer_end(self) -> str:
        """What the template writes behind an answer's text: its end marker and what stands around it.

        Raises:
            ChatError: as `encode`.
        """
        example = (Turn(USER, "question"), Turn(ASSISTANT, _EXAMPLE))
        answer = next(text for text, trained in self.segments(example) if trained)
        return answer.partition(_EXAMPLE)[2]

    def segments(self, turns: Conversation, add_generation_prompt: bool = False) -> list[tuple[str, bool]]:
        """The rendered text in stretches, each with whether it is in the loss; messages are escaped (see `_escaped`).

        Raises:
            ChatError: as `encode`.
        """
        messages = self._escaped(turns)
        find = self._tagged_spans if self._tagged else self._prefix_spans
        text, spans = find(messages, add_generation_prompt)
        answers = [turn for turn in turns if turn.role == ASSISTANT]
        if len(spans) != len(answers):
            raise ChatError(f"the template marks {len(spans)} assistant turns of {len(answers)}")
        found, place = [], 0
        for (start, end), turn in zip(spans, answers, strict=True):
            found += [(text[place:start], False), (text[start:end], turn.trained)]
            place = end
        return [(part, trained) for part, trained in [*found, (text[place:], False)] if part]

    def _escaped(self, turns: Sequence[Turn]) -> list[dict[str, str]]:
        """Messages in which no special token can be found: a private character is put behind its first letter."""
        for turn in turns:
            reserved = next((letter for letter in _RESERVED if letter in turn.content), None)
            if reserved:
                raise ChatError(f"a {turn.role} turn holds the character U+{ord(reserved):04X}, which is reserved here")
            marker = next((name for name in self.plain_markers if name in turn.content), None)
            if marker:
                raise ChatError(f"a {turn.role} turn holds {marker}, which the tokenizer cannot tell from the marker")
        return [{"role": t.role, "content": self._special.sub(_escape, t.content)} for t in turns]

    def tokens(self, text: str) -> list[int]:
        """Tokens of text as the template writes it: names of special tokens become single ids."""
        ids: list[int] = []
        for number, part in enumerate(self._special.split(text)):
            if number % 2:
                ids.append(self._ids[part])
            elif part:
                ids += self.tokenizer.text_to_ids(part.replace(_ESCAPE, ""))
        return ids

    def _rendered(self, messages: list[dict[str, str]], add_generation_prompt: bool = False) -> str:
        try:
            variables = {"messages": messages, "add_generation_prompt": add_generation_prompt, **self._names}
            return self._template.render(tools=None, documents=None, **variables)
        except jinja2.TemplateError as error:
            raise ChatError(f"the template: {error}") from error
        except (TypeError, ValueError, KeyError) as error:  # what a template's own code raises
            raise ChatError(f"the template: {type(error).__name__}: {error}") from error

    def _tagged_spans(
        self, messages: list[dict[str, str]], add_generation_prompt: bool
    ) -> tuple[str, list[tuple[int, int]]]:
        text, spans = "", []
        rendered = self._rendered(messages, add_generation_prompt)
        for number, part in enumerate(re.split(f"[{_BEGIN}{_END}]", rendered)):
            if number % 2:
                spans.append((len(text), len(text) + len(part)))
            text += part
        return text, spans

    def _prefix_spans(
        self, messages: list[dict[str, str]], add_generation_prompt: bool
    ) -> tuple[str, list[tuple[int, int]]]:
        whole = self._rendered(messages, add_generation_prompt)
        spans = []
        for number, message in enumerate(messages):
            if message["role"] != ASSISTANT:
                continue
            before = self._rendered(messages[:number], add_generation_prompt=True)
            after = self._rendered(messages[: number + 1])
            if not (after.startswith(before) and whole.startswith(after) and len(after) > len(before)):
                raise ChatError(
                    "the template writes a turn in another way when more follow, or has no generation prompt: put "
                    "{% generation %} ... {% endgeneration %} around what the assistant writes"
                )
            spans.append((len(before), self._end(after, len(before))))
        return whole, spans

    def _end(self, text: str, start: int) -> int:
        """Where an answer ends: behind its last special token, when nothing but white space follows that."""
        last = None
        for last in self._special.finditer(text, start):  # noqa: B007
            pass
        return last.end() if last and not text[last.end() :].strip() else len(text)


def _escape(found: re.Match[str]) -> str:
    return found[0][0] + _ESCAPE + found[0][1:]
