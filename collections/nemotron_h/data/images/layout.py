"""Positions that images take among the tokens of a conversation: before each tile its tag, then the tile's embeddings.

Axes: m tokens as prepared, with one for each image; k tokens in all; n tiles of s by s pixels; t embeddings.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from nemotron_h.data.chat import ChatTemplate, Encoded
from nemotron_h.data.images.read import read_image
from nemotron_h.data.images.tags import tag_rows, tile_tags
from nemotron_h.data.images.tiling import Tiling
from nemotron_h.data.messages import Conversation
from nemotron_h.data.tokenizer_base import Tokenizer

if TYPE_CHECKING:
    from nemotron_h.data.images.records import Picture


@dataclass(frozen=True)
class Expanded:
    """A conversation with room for its images.

    Args:
        ids: token ids, int64 [k]; at embeddings the padding's.
        learnt: of each token whether it is in the loss, float32 [k].
        is_image: positions of embeddings, bool [k].
        blocks: begin and end of each image, tags included, int64 [images, 2].
    """

    ids: np.ndarray
    learnt: np.ndarray
    is_image: np.ndarray
    blocks: np.ndarray


@dataclass(frozen=True)
class ImageLayout:
    """Make room for images in sequences of tokens.

    Args:
        tiling: how it becomes tiles.
        tile_tokens: embeddings of a tile.
        tags: token ids before each tile, int64 [max_tiles + 1, tag], as `tile_tags` gives them.
        pad_id: the token at embeddings.
    """

    tiling: Tiling
    tile_tokens: int
    tags: np.ndarray
    pad_id: int

    @classmethod
    def of(cls, tokenizer: Tokenizer, tiling: Tiling, tile_tokens: int) -> ImageLayout:
        """Return the layout with a tokenizer's tags.

        Errors:
            UserError: as `tile_tags`.
        """
        return cls(tiling, tile_tokens, tile_tags(tokenizer, tiling.max_tiles), tokenizer.pad_id)

    @property
    def positions(self) -> int:
        """Return the positions of a tile with its tag."""
        return self.tags.shape[1] + self.tile_tokens

    def prompt(self, template: ChatTemplate, turns: Conversation) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return what a model reads before the next answer, as in training on conversations that fit.

        Args:
            template: over the tokenizer that the tags are of.
            turns: the last is the user's; `records.asked` makes one of a text and files.
        Returns:
            token ids, int64 [k]; the positions of embeddings, int64 [t]; tiles, uint8 [n, 3, s, s], in their order.
        Errors:
            ChatError: as `ChatTemplate.begun`.
            ImageError: an image cannot be read.
        """
        return self.with_images(template.begun(turns), [picture for turn in turns for picture in turn.images])

    def with_images(self, begun: Encoded, pictures: Iterable[Picture]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return what `prompt` does of tokens and the images whose places they have.

        Errors:
            ImageError: an image cannot be read.
        """
        tiles = [np.zeros((0, 3, self.tiling.size, self.tiling.size), dtype=np.uint8)]
        for picture in pictures:
            tiles.append(self.tiling.cut(read_image(picture.read())))
        ids = np.array(begun.ids, dtype=np.int64)
        whole = self.expanded(ids, np.zeros(len(ids), dtype=np.float32), begun.images, [len(t) for t in tiles[1:]])
        return whole.ids, np.flatnonzero(whole.is_image), np.concatenate(tiles)

    def expanded(self, ids: np.ndarray, learnt: np.ndarray, places: Sequence[int], tiles: Sequence[int]) -> Expanded:
        """Return a conversation with its images' tags and embeddings in their places.

        Args:
            ids: token ids, int64 [m].
            learnt: whether each is in the loss, float32 [m].
            places: of images among them, ascending.
            tiles: of each image, its thumbnail included.
        """
        parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        blocks, begin, length = [], 0, 0
        for place, count in zip([*places, len(ids)], [*tiles, 0], strict=True):
            text = slice(begin, place)
            parts.append((ids[text], learnt[text], np.zeros(place - begin, dtype=bool)))
            length, begin = length + place - begin, place + 1
            if count:
                block = np.full((count, self.positions), self.pad_id, dtype=np.int64)
                block[:, : self.tags.shape[1]] = self.tags[tag_rows(count)]
                is_image = np.zeros(block.shape, dtype=bool)
                is_image[:, self.tags.shape[1] :] = True
                parts.append((block.ravel(), np.zeros(block.size, dtype=learnt.dtype), is_image.ravel()))
                blocks.append((length, length := length + block.size))
        joined = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        return Expanded(*joined, np.array(blocks, dtype=np.int64).reshape(-1, 2))
