"""Records of conversations with images: OpenAI's content parts, LLaVA's and ShareGPT's `<image>`, captions.

An image's place in a turn is the text of `PLACE`, whose `IMAGE` the chat template's tokens leave room for; the images
themselves are `Picture`s, which are read when the conversation is prepared.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import unquote

from nemotron_h.data.chat_keys import CAPTION
from nemotron_h.data.images.read import read_bytes
from nemotron_h.data.images.tags import BEFORE, BEHIND
from nemotron_h.data.messages import (
    IMAGE,
    USER,
    ChatError,
    Conversation,
    Turn,
    read_conversation,
    refuse_tools,
    text_field,
)

#: in texts of records whose images stand in a list of their own
_MARK = "<image>"
PLACE = BEFORE + IMAGE + BEHIND
#: ours: what the user asks where records have captions alone
PROMPTS = (
    "Describe this image.",
    "What does the image show?",
    "Write a caption for this image.",
    "Say what can be seen here.",
)
#: fields of records that hold images, and those of a content part
_FIELDS, _PART_FIELDS = ("image", "images"), ("image_url", "image", "url", "path")
_PARTS = ("image", "image_url")
#: where the user's texts are, by shape; those of messages are in the messages
_TEXTS = {"alpaca": ("instruction", "input"), "prompt_response": ("prompt",)}
_MESSAGES = {"messages": "messages", "sharegpt": "conversations"}
_DATA = re.compile(r"data:image/[\w.+-]+;base64,", re.ASCII)


@dataclass(frozen=True)
class Picture:
    """An image of a record, not read yet.

    Args:
        name: as the record calls it, for messages.
        path: of its file; empty where the record or its archive held the image itself.
        data: the encoded image, where there is no path.
    """

    name: str
    path: str = ""
    data: bytes = field(default=b"", repr=False)

    def read(self) -> bytes:
        """Return the encoded image.

        Errors:
            ImageError: its file cannot be read.
        """
        return read_bytes(self.path) if self.path else self.data


#: the picture that a text of a record names
Locate = Callable[[str], Picture]


def asked(text: str, files: Sequence[str]) -> Turn:
    """Return what a user asks of images, which stand before the text, as in records that do not place them."""
    return Turn(USER, _before(len(files), text), images=tuple(Picture(file, os.path.abspath(file)) for file in files))


def beside(file: str, folder: str) -> Locate:
    """Return how images are found that a file of records names: below a folder, which starts at the file's own."""
    base = os.path.normpath(os.path.join(os.path.dirname(os.path.abspath(file)), os.path.expanduser(folder)))

    def locate(name: str) -> Picture:
        path = unquote(name.removeprefix("file://")) if name.startswith("file://") else name
        if "://" in path:
            raise ChatError(f"image {name[:80]} is no file: download it and name that")
        path = os.path.normpath(os.path.join(base, path))
        if os.path.commonpath([base, path]) != base:
            raise ChatError(f"image {name[:80]} is not below {base}, the folder of images")
        return Picture(name, path)

    return locate


def among(members: dict[str, Picture]) -> Locate:
    """Return how images are found that the record of an archive's sample names: among the sample's own, by name; one
    that is alone on both sides may have been renamed.
    """
    renamed: set[str] = set()

    def locate(name: str) -> Picture:
        fit = [picture for member, picture in members.items() if os.path.basename(member) == os.path.basename(name)]
        if len(fit) == 1:
            return fit[0]
        renamed.add(name)
        if len(members) == len(renamed) == 1:
            return next(iter(members.values()))
        raise ChatError(f"image {name[:80]} is none of the sample's: {', '.join(members) or 'it has none'}"[:300])

    return locate


def read_illustrated(
    record: Any, shape: str, locate: Locate, prompts: Sequence[str] = (), own: Sequence[Picture] = ()
) -> Conversation:
    """Return a record as a conversation whose user turns may have images.

    Args:
        record: as parsed from JSON or Parquet.
        shape: one of `CHAT_SHAPES`, but `preference`.
        locate: finds the images that it names.
        prompts: of captions: one is chosen by the image's name and the text; empty: `PROMPTS`.
        own: the images of a record that names none.
    Errors:
        ChatError: as `read_conversation`; an image cannot be found; places and images differ in number; an answer has
            an image.
    """
    refuse_tools(record)
    listed = [_picture(value, locate) for key in _FIELDS for value in _list(record.get(key))]
    if shape == CAPTION:
        record, shape = _caption(record, listed or own, prompts or PROMPTS), "prompt_response"
    reader = _Reader(locate, listed or own)
    turns = reader.placed(read_conversation(reader.record(record, shape), shape))
    if sum(turn.content.count(IMAGE) for turn in turns) != len(reader.pictures):
        raise ChatError(f"a turn holds the character U+{ord(IMAGE):04X}, which is reserved here")
    left = iter(reader.pictures)
    return tuple(replace(t, images=tuple(next(left) for _ in range(t.content.count(IMAGE)))) for t in turns)


class _Reader:
    """Puts `PLACE` where a record's user turns have images, which it collects in their order."""

    def __init__(self, locate: Locate, listed: Sequence[Picture]) -> None:
        self.locate, self.listed, self.rest = locate, len(listed), list(listed)
        self.named = False  # content parts name images themselves
        self.pictures: list[Picture] = []

    def record(self, record: dict[str, Any], shape: str) -> dict[str, Any]:
        """Return the record with all images of its user turns as `PLACE`."""
        if shape in _TEXTS:
            return record | {key: self._text(record[key]) for key in _TEXTS[shape] if key in record}
        messages = record.get(key := _MESSAGES[shape])
        if not isinstance(messages, list):
            return record
        return {**record, key: [self._message(message) for message in messages]}

    def placed(self, turns: Conversation) -> Conversation:
        """Return turns in which all images have a place: those without any stand before the first user turn."""
        if self.rest and not self.pictures:
            first = next(number for number, turn in enumerate(turns) if turn.role == USER)
            content = _before(len(self.rest), turns[first].content)
            turns = (*turns[:first], replace(turns[first], content=content), *turns[first + 1 :])
            self.pictures, self.rest = self.rest, []
        if self.rest and not self.named:
            raise ChatError(f"the record has {self.listed} images, and {self.listed - len(self.rest)} places for them")
        return turns

    def _message(self, message: Any) -> Any:
        if not isinstance(message, dict):
            return message
        key = "content" if "content" in message else "value"
        content, asked = message.get(key), (message.get("role") or message.get("from")) in ("user", "human")
        if isinstance(content, list):
            return {**message, key: self._parts(content, asked)}
        return {**message, key: self._text(content)} if asked else message

    def _parts(self, parts: list[Any], asked: bool) -> Any:
        """Return content parts as a text; a line ends behind an image that text follows."""
        text = ""
        for part in parts:
            kind = part.get("type") if isinstance(part, dict) else None
            if kind == "text" and isinstance(part.get("text"), str):
                text += "\n" * (text.endswith(PLACE) and bool(part["text"][:1].strip())) + part["text"]
            elif kind in _PARTS and asked:
                text += self._place(next((part[name] for name in _PART_FIELDS if part.get(name)), None))
            elif kind in _PARTS:
                raise ChatError("an image stands in a turn that is not the user's")
            else:
                return parts  # refused where turns are read
        return text

    def _text(self, text: Any) -> Any:
        """Return a text of the user with the listed images in their places; without any, `<image>` is text."""
        if not (self.listed and isinstance(text, str)):
            return text
        return re.sub(re.escape(_MARK), lambda _: self._place(None), text)

    def _place(self, value: Any) -> str:
        if value is not None:
            self.named = True
            self.pictures.append(_picture(value, self.locate))
        elif self.rest:
            self.pictures.append(self.rest.pop(0))
        else:
            raise ChatError(f"the record has {self.listed} images, and more places for them")
        return PLACE


def _before(images: int, text: str) -> str:
    return PLACE * images + "\n" + text


def _caption(record: dict[str, Any], pictures: Sequence[Picture], prompts: Sequence[str]) -> dict[str, Any]:
    """Return an image and its text as a prompt and its response."""
    if not pictures:
        raise ChatError("a caption without an image")
    text = text_field(record, "caption", "text")
    digest = hashlib.sha256(f"{pictures[0].name} {text}".encode("utf-8", "replace")).digest()
    return {"prompt": prompts[digest[0] % len(prompts)], "response": text}


def _picture(value: Any, locate: Locate) -> Picture:
    """Return the picture of a path or `data:` text, OpenAI's `{url: ...}`, or the `{bytes: ..., path: ...}` of data
    sets.
    """
    if isinstance(value, dict):
        if isinstance(value.get("bytes"), bytes) and value["bytes"]:
            return Picture(str(value.get("path") or "in the record"), data=value["bytes"])
        value = value.get("url") or value.get("path")
    if not isinstance(value, str) or not value:
        raise ChatError(f"an image is {type(value).__name__}, not the path of a file")
    if not value.startswith("data:"):
        return locate(value)
    if not (head := _DATA.match(value)):
        raise ChatError(f"an image begins {value[:40]!r}, not data:image/...;base64,")
    try:
        return Picture("in the record", data=base64.b64decode(value[head.end() :], validate=True))
    except (binascii.Error, ValueError) as error:
        raise ChatError(f"an image in the record is no base64: {error}") from error


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None or value == "" else [value]
