"""Chat templates: the family's and any other, from conversations to tokens with their loss mask.

A `ChatTemplate` turns `Turn`s (see `data.messages`) into token ids and marks the ones that an assistant writes, its end
marker included. Each stretch of text is tokenised on its own where the mask changes, as in generation:
the prompt is tokens before the first token of the answer exists.
"""

from __future__ import annotations

import contextlib
import json
import re
import resource
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from nemotron_h.core.errors import UserError
from nemotron_h.core.files import read_text
from nemotron_h.data.messages import ASSISTANT, IMAGE, REASONING_FIELDS, USER, ChatError, Conversation, Refused, Turn
from nemotron_h.data.tokenizer import CHAT_TOKENS, Tokenizer

FAMILY_TEMPLATE = "nemotron_h"
TOKENIZER_TEMPLATE = "tokenizer"  # the template that came with the blend's tokenizer
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
#: characters of Unicode's private area, which stand in a rendered text where a `{% generation %}` block begins and
#: ends, and inside of a special token's name that a message holds
_BEGIN, _END, _ESCAPE = _RESERVED = "\ue0fd\ue0fe\ue0ff"
_EXAMPLE = "\ue0fc"  # an answer that no template holds
#: what one rendering of a template may take, in processor time and in memory; and the size of a power. Ours
_TEMPLATE_SECONDS, _TEMPLATE_BYTES, _POWER_BITS = 10, 1 << 30, 1 << 16
_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


@dataclass(frozen=True)
class Encoded:
    """A conversation as tokens.

    Args:
        ids: token ids.
        loss: of each token, whether it is to be learnt: those of assistant turns with their end marker. A pair of
            conversations has `data.pairs.REJECTED` added in its second one.
        rewards: of a pair.
        images: places of images among the tokens, which have the padding's id there.
    """

    ids: list[int]
    loss: list[int]
    rewards: tuple[float, float] | None = None
    images: list[int] = field(default_factory=list)


def template_source(name_or_path: str) -> str:
    """Return the Jinja text of a template: `nemotron_h`, or a file.

    Errors:
        UserError: there is no such file, or it is no text.
    """
    if name_or_path == FAMILY_TEMPLATE:
        return FAMILY_SOURCE
    try:
        return read_text(name_or_path)
    except UserError as error:
        hint = error.hint or f"Name {FAMILY_TEMPLATE} (the family's), or the path of a Jinja file."
        raise UserError(f"chat_template: {error.message}", hint) from error


class _Generation(Extension):
    """Hugging Face's block around what the assistant writes."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's own form

    def parse(self, parser: Parser) -> nodes.Node:
        """Parse the tag; called by jinja2."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

    def _marked(self, caller: Callable[[], str]) -> str:
        return _BEGIN + caller() + _END


class _Refusal(jinja2.TemplateError):
    """A template's own `raise_exception`: it is about the conversation."""


def _raise_exception(message: str) -> None:
    raise _Refusal(message)


class _OutOfTime(BaseException):  # passes by every `except Exception` of a filter
    pass


@contextlib.contextmanager
def _bounded() -> Iterator[None]:
    """Limit the processor time and the memory of a template, which may be from anywhere and compute without end.

    Errors:
        ChatError: it took more.
    """
    if threading.current_thread() is not threading.main_thread():  # no other gets signals
        yield
        return

    def stop(number: int, frame: object) -> None:
        raise _OutOfTime

    limits = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGVTALRM, stop)
    try:
        if sys.platform == "linux":
            with open("/proc/self/statm", "rb") as file:
                used = int(file.read().split()[0]) * resource.getpagesize()
            soft = used + _TEMPLATE_BYTES
            if limits[0] == resource.RLIM_INFINITY or soft < limits[0]:
                resource.setrlimit(resource.RLIMIT_AS, (soft, limits[1]))
        signal.setitimer(signal.ITIMER_VIRTUAL, _TEMPLATE_SECONDS, 1.0)
        yield
    except _OutOfTime:
        raise ChatError(f"the template computes for more than {_TEMPLATE_SECONDS} s") from None
    except MemoryError:
        raise ChatError(f"the template needs more than {_TEMPLATE_BYTES >> 20:,} MiB") from None
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, limits)


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox of templates, where a power stays a number of readable size: no signal interrupts a longer one."""

    intercepted_binops = frozenset({"**"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Compute `**` within bounds; called by jinja2."""
        if isinstance(left, int) and isinstance(right, int) and left.bit_length() * right > _POWER_BITS:
            raise OverflowError(f"a number of more than {_POWER_BITS:,} bits")
        return super().call_binop(context, operator, left, right)


def _compiled(source: str) -> tuple[jinja2.Template, frozenset[str]]:
    """Compile a template with what Hugging Face's tokenizers offer it, but for the date of today: the same data
    gives the same tokens. Beside it, the names of all fields that it asks for.
    """
    environment = _Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
    environment.globals["raise_exception"] = _raise_exception
    tree = environment.parse(source)
    names = {node.attr for node in tree.find_all(nodes.Getattr)} | {
        node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)
    }
    return environment.from_string(source), frozenset(names)


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
    Errors:
        UserError: the text is not a template, or it cannot write a question and its answer.
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
            with _bounded():
                self._template, names = _compiled(source)
        except jinja2.TemplateSyntaxError as error:
            raise UserError(f"chat_template: no Jinja template: line {error.lineno}: {error.message}") from error
        except ChatError as error:
            raise UserError(f"chat_template: {error}") from error
        except Exception as error:  # of nesting that Python does not compile
            raise UserError(f"chat_template: no template that can be used: {type(error).__name__}: {error}") from error
        self._reasoning = sorted(names & set(REASONING_FIELDS))
        self._check()

    def _check(self) -> None:
        """Write one exchange, so that what no conversation can cure is told before the first one."""
        try:
            self.segments((Turn(USER, "question"), Turn(ASSISTANT, _EXAMPLE)))
        except Refused:
            return  # it may want a system message: the conversations tell
        except ChatError as error:
            hint = "Edit the template, or name another one."
            if "strftime_now" in str(error):
                hint = "Templates are not given today's date: the same data must give the same tokens. Write a date."
            raise UserError(f"chat_template: {error}", hint) from error

    def encode(self, turns: Conversation) -> Encoded:
        """Return the tokens, the loss mask, and the places of images.

        Errors:
            ChatError: the template refuses the conversation, does not tell its assistant turns apart, or does not write
                an image's place.
        """
        return self._encoded(turns, self.segments(turns))

    def prompt(self, turns: Conversation) -> list[int]:
        """Return the tokens before the next answer: those that `encode` gives to the conversation up to there.

        Errors:
            ChatError: as `encode`.
        """
        return self.begun(turns).ids

    def begun(self, turns: Conversation) -> Encoded:
        """Return what `prompt` does, with the places of images.

        Errors:
            ChatError: as `encode`.
        """
        return self._encoded(turns, self.segments(turns, add_generation_prompt=True))

    def _encoded(self, turns: Conversation, segments: list[tuple[str, bool]]) -> Encoded:
        encoded, images = Encoded([], []), sum(len(turn.images) for turn in turns)
        for text, trained in segments:
            for number, part in enumerate(text.split(IMAGE) if images else [text]):
                if number:
                    encoded.images.append(len(encoded.ids))
                    encoded.ids.append(self.tokenizer.pad_id)
                encoded.ids.extend(self.tokens(part))
            encoded.loss.extend([trained] * (len(encoded.ids) - len(encoded.loss)))
        if len(encoded.images) != images:
            raise ChatError(f"the template writes {len(encoded.images)} of {images} images")
        return encoded

    def following(self, turns: Conversation) -> Encoded:
        """Return what stands behind the last answer and its end marker, up to the next answer: the end of what `begun`
        gives.

        Errors:
            ChatError: as `encode`.
        """
        return self._encoded(turns[-1:], self.segments(turns, add_generation_prompt=True)[-1:])

    def answer_end(self) -> str:
        """Return the text that the template writes behind an answer: its end marker and what stands around it.

        Errors:
            ChatError: as `encode`.
        """
        example = (Turn(USER, "question"), Turn(ASSISTANT, _EXAMPLE))
        answer = next(text for text, trained in self.segments(example) if trained)
        return answer.partition(_EXAMPLE)[2]

    def end_marker(self) -> int | None:
        """Return the token that ends an answer; None where the tokenizer has the template's markers as text.

        Errors:
            ChatError: as `encode`.
        """
        special = set(self.tokenizer.special_tokens.values())
        return next((token for token in self.tokens(self.answer_end()) if token in special), None)

    def answer_begin(self, turns: Conversation) -> str:
        """Return the text that the template writes between the last message and the answer to it.

        Errors:
            ChatError: as `encode`.
        """
        text = self.segments(turns, add_generation_prompt=True)[-1][0]
        return text.rpartition(self._special.sub(_escape, turns[-1].content).strip())[2]

    def segments(self, turns: Conversation, add_generation_prompt: bool = False) -> list[tuple[str, bool]]:
        """Return the rendered text in stretches, each with whether it is in the loss; messages are escaped (see
        `_escaped`).

        Errors:
            ChatError: as `encode`.
        """
        messages = self._escaped(turns)
        find = self._tagged_spans if self._tagged else self._prefix_spans
        text, spans = find(messages, add_generation_prompt)
        last = self._special.sub(_escape, turns[-1].reasoning.strip()) if turns else ""
        if last not in text:  # that of earlier turns may be left out: many templates do
            raise ChatError(f"the last turn has {REASONING_FIELDS[0]}, which the template does not write")
        answers = [turn for turn in turns if turn.role == ASSISTANT]
        if len(spans) != len(answers):
            raise ChatError(f"the template marks {len(spans)} assistant turns of {len(answers)}")
        found, place = [], 0
        for (start, end), turn in zip(spans, answers, strict=True):
            found += [(text[place:start], False), (text[start:end], turn.trained)]
            place = end
        return [(part, trained) for part, trained in [*found, (text[place:], False)] if part]

    def _escaped(self, turns: Sequence[Turn]) -> list[dict[str, str]]:
        """Return the messages with no special token left to find: a private character follows its first letter."""
        for turn in turns:
            text = turn.content + turn.reasoning
            reserved = next((letter for letter in _RESERVED if letter in text), None)
            if reserved:
                raise ChatError(f"a {turn.role} turn holds the character U+{ord(reserved):04X}, which is reserved here")
            marker = next((name for name in self.plain_markers if name in text), None)
            if marker:
                raise ChatError(f"a {turn.role} turn holds {marker}, which the tokenizer cannot tell from the marker")
            if turn.reasoning and not self._reasoning:
                raise ChatError(f"an {turn.role} turn has {REASONING_FIELDS[0]}, which the template does not write")
        return [self._message(turn) for turn in turns]

    def _message(self, turn: Turn) -> dict[str, str]:
        message = {"role": turn.role, "content": self._special.sub(_escape, turn.content)}
        if turn.reasoning:
            message |= dict.fromkeys(self._reasoning, self._special.sub(_escape, turn.reasoning))
        return message

    def tokens(self, text: str) -> list[int]:
        """Return the tokens of text as the template writes it: names of special tokens become single ids."""
        ids: list[int] = []
        for number, part in enumerate(self._special.split(text)):
            if number % 2:
                ids.append(self._ids[part])
            elif part:
                ids += self.tokenizer.text_to_ids(part.replace(_ESCAPE, ""))
        return ids

    def _rendered(self, messages: list[dict[str, str]], add_generation_prompt: bool = False) -> str:
        variables = {"messages": messages, "add_generation_prompt": add_generation_prompt, **self._names}
        with _bounded():
            try:
                return self._template.render(tools=None, documents=None, **variables)
            except _Refusal as error:
                raise Refused(f"the template: {error}") from error
            except jinja2.TemplateError as error:
                raise ChatError(f"the template: {error}") from error
            except MemoryError:
                raise
            except Exception as error:  # a template's own code can raise any
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
        """Return the end of an answer: behind its last special token, when nothing but white space follows that."""
        last = None
        for last in self._special.finditer(text, start):  # noqa: B007
            pass
        return last.end() if last and not text[last.end() :].strip() else len(text)


def _escape(found: re.Match[str]) -> str:
    return found[0][0] + _ESCAPE + found[0][1:]
