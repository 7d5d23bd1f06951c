"""Questions about images: from files and a question to a prompt with image tokens in their places."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from nemotron_h.core.errors import UserError
from nemotron_h.data.chat import FAMILY_SOURCE, ChatTemplate
from nemotron_h.data.images.layout import ImageLayout
from nemotron_h.data.images.read import ImageError, read_bytes, read_image
from nemotron_h.data.images.records import PLACE, Picture
from nemotron_h.data.images.tiling import Tiling
from nemotron_h.data.messages import USER, ChatError, Conversation, Turn
from nemotron_h.inference.opening import Opened, recorded_template
from nemotron_h.inference.vision import ImageModel, Placed, load_images
from nemotron_h.schema.recipe import DataSchema


@dataclass(frozen=True)
class Asked:
    """A question as a model reads it.

    Attributes:
        ids: tokens before the answer, with the padding's at image tokens.
        placed: the image tokens; None without an image.
    """

    ids: list[int]
    placed: Placed | None


class Looking:
    """Ask a fine-tuned checkpoint about images, as its training did: in its chat template, cut into tiles as there.

    Args:
        opened: a checkpoint whose model reads images.
    Attributes:
        template: of the conversations.
        stop_ids: tokens that end an answer.
    Errors:
        UserError: its model reads text alone; the chat template cannot be used.
    """

    def __init__(self, opened: Opened) -> None:
        tokenizer = opened.tokenizer
        self.images: ImageModel = load_images(
            opened.checkpoint, dtype=getattr(torch, opened.dtype), device=str(opened.model.device)
        )
        self.template = ChatTemplate(recorded_template(tokenizer, opened.record) or FAMILY_SOURCE, tokenizer)
        encoder, chosen = self.images.encoder, _recorded(opened.record)
        tiling = Tiling(encoder.widths.image_size, chosen["max_tiles"], chosen["tiling"])
        self.layout = ImageLayout.of(tokenizer, tiling, encoder.tokens_per_tile)
        special = {*tokenizer.special_tokens.values()}
        end = [token for token in self.template.tokens(self.template.answer_end()) if token in special]
        self.stop_ids = [tokenizer.eod_id, *end[:1]]

    def ask(self, question: str, images: Sequence[Image.Image]) -> Asked:
        """Return a question behind images; errors are those of `read`."""
        text = PLACE * len(images) + "\n" * bool(images) + question
        return self.read((Turn(USER, text, images=(Picture("given"),) * len(images)),), images)

    def read(self, turns: Conversation, images: Sequence[Image.Image]) -> Asked:
        """Return a conversation before its next answer.

        Args:
            images: of its turns, in their order.
        Errors:
            UserError: the chat template refuses it.
        """
        try:
            begun = self.template.begun(turns)
        except ChatError as error:
            raise UserError(f"the chat template refuses the question: {error}", hint="ask in other words") from error
        if not images:
            return Asked(begun.ids, None)
        tiles = [self.layout.tiling.cut(image) for image in images]
        ids = np.array(begun.ids, dtype=np.int64)
        whole = self.layout.expanded(ids, np.zeros(len(ids), dtype=np.float32), begun.images, [*map(len, tiles)])
        embeddings = self.images.tokens(torch.from_numpy(np.concatenate(tiles)))
        return Asked(whole.ids.tolist(), Placed(torch.from_numpy(np.flatnonzero(whole.is_image)), embeddings))


def open_image(path: Path) -> Image.Image:
    """Return an image file as 8-bit RGB, upright.

    Errors:
        UserError: it cannot be read; says why.
    """
    try:
        return read_image(read_bytes(str(path.expanduser())))
    except ImageError as error:
        raise UserError(f"--image {path}: {error}", hint="name a file that docs/images.md lists as readable") from error


def _recorded(record: dict[str, Any]) -> dict[str, Any]:
    """Return how a run's images became tiles; a checkpoint that no training wrote has the defaults."""
    data = (record.get("recipe") or {}).get("data") or {}
    return {key: data.get(key) or getattr(DataSchema(), key) for key in ("max_tiles", "tiling")}
