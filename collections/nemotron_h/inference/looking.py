"""Questions about images: from a conversation to a prompt with image tokens in their places."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nemotron_h.core.errors import UserError
from nemotron_h.data.chat import FAMILY_SOURCE, ChatTemplate, Encoded
from nemotron_h.data.images.layout import ImageLayout
from nemotron_h.data.images.read import ImageError
from nemotron_h.data.images.records import Picture
from nemotron_h.data.images.tiling import Tiling
from nemotron_h.data.messages import ChatError, Conversation
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
        template: of the conversations; None is that of the checkpoint's training.
    Attributes:
        template: that.
        stop_ids: tokens that end an answer.
    Errors:
        UserError: its model reads text alone; the chat template cannot be used.
    """

    def __init__(self, opened: Opened, template: ChatTemplate | None = None) -> None:
        tokenizer = opened.tokenizer
        self.images: ImageModel = load_images(
            opened.checkpoint, dtype=opened.model.dtype, device=str(opened.model.device)
        )
        recorded = recorded_template(tokenizer, opened.record) or FAMILY_SOURCE
        self.template = template or ChatTemplate(recorded, tokenizer)
        encoder, chosen = self.images.encoder, _recorded(opened.record)
        tiling = Tiling(encoder.widths.image_size, chosen["max_tiles"], chosen["tiling"])
        self.layout = ImageLayout.of(tokenizer, tiling, encoder.tokens_per_tile)
        self._newest: tuple[np.ndarray, Tensor] | None = None
        end = self.template.end_marker()
        self.stop_ids = [tokenizer.eod_id] if end is None else [tokenizer.eod_id, end]

    def read(self, turns: Conversation) -> Asked:
        """Return a conversation before its next answer. Images of the one before are not encoded again.

        Errors:
            UserError: the chat template refuses it, or an image cannot be read.
        """
        try:
            return self._asked(*self.layout.prompt(self.template, turns))
        except (ChatError, ImageError) as error:
            raise UserError(
                f"the question cannot be asked: {error}", hint="docs/images.md tells what can be"
            ) from error

    def continued(self, begun: Encoded, pictures: Iterable[Picture]) -> Asked:
        """Return a part of a conversation whose tokens have the places of these images.

        Errors:
            ImageError: an image cannot be read.
        """
        return self._asked(*self.layout.with_images(begun, pictures))

    def _asked(self, ids: np.ndarray, places: np.ndarray, tiles: np.ndarray) -> Asked:
        if not len(tiles):
            return Asked(ids.tolist(), None)
        if self._newest is None or not np.array_equal(self._newest[0], tiles):
            self._newest = tiles, self.images.tokens(torch.from_numpy(tiles))
        return Asked(ids.tolist(), Placed(torch.from_numpy(places), self._newest[1]))


def _recorded(record: dict[str, Any]) -> dict[str, Any]:
    """Return how a run's images became tiles; a checkpoint that no training wrote has the defaults."""
    data = (record.get("recipe") or {}).get("data") or {}
    return {key: data.get(key) or getattr(DataSchema(), key) for key in ("max_tiles", "tiling")}
