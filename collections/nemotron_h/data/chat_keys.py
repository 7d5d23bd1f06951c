"""The keys of sources whose records are conversations: shapes, formats, images, and checks of the last."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nemotron_h.data.blend import Source

PREFERENCE = "preference"  # pairs of answers, read by `data.pairs`
CAPTION = "caption"  # an image and a text, read by `data.images.records`
#: all but these two are read by `data.messages`
CHAT_SHAPES = ("messages", "sharegpt", "alpaca", "prompt_response", CAPTION, PREFERENCE)
CHAT_FORMATS = ("jsonl", "json", "parquet", "webdataset")


def image_problems(key: str, source: Source) -> Iterator[str]:
    """Yield the contradictions of a source's keys of images, each as one line naming the key."""
    if source.prompts and source.chat != CAPTION:
        yield f"{key}.prompts: only for chat: {CAPTION}"
    if source.chat == CAPTION and not source.has_images():
        yield f"{key}.images: missing: captions are of images; write . where their paths start at the records' file"
    if not source.has_images():
        return
    if source.format == "webdataset" and source.images:
        yield f"{key}.images: the archives of a webdataset hold their images"
    if not source.chat or source.chat == PREFERENCE:
        yield f"{key}.images: only for conversations: chat is {source.chat or 'missing'}"
    if source.extend:
        yield f"{key}.extend: not with images: how many positions one takes is the model's affair"
    if source.fetch and source.images:
        yield f"{key}.images: not with fetch: download and unpack the files, and give their path"
