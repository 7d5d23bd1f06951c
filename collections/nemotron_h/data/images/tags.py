"""Texts around an image and before each of its tiles, as tokens: a tile's number tells the model where it was cut.

All tags have the same number of tokens, so the length of a conversation depends on numbers of tiles alone.
"""

from __future__ import annotations

import numpy as np

from nemotron_h.core.errors import UserError
from nemotron_h.data.tokenizer_base import Tokenizer

#: stand before and behind an image's tiles (NVLM, 2409.11402, figures 11 and 12)
BEFORE, BEHIND = "<Image>", "</Image>"
#: Megatron-LM's tags for its `nemotron*` prompts, which Nemotron-H's tokenizer makes equally long (NVLM 3.1: one number
#: per tile, the best of three kinds of tags)
_TILE, _THUMBNAIL = "<tile_{:02d}>", "<tile_global_thumbnail>"


def tile_tags(tokenizer: Tokenizer, max_tiles: int) -> np.ndarray:
    """Return the tags as token ids, int64 [max_tiles + 1, length]: that of the thumbnail, then of tile 1 and so on.

    Where the tokenizer makes tags of different lengths, the thumbnail is tile 00, and digits are tokens of their own;
    what is still shorter is filled up with its last token.

    Errors:
        UserError: the tokenizer does not tell two tags apart.
    """
    tags = [tokenizer.text_to_ids(text) for text in (_THUMBNAIL, *map(_TILE.format, range(1, max_tiles + 1)))]
    if len(set(map(len, tags))) > 1:
        tags = [_in_pieces(tokenizer, _TILE.format(number)) for number in range(max_tiles + 1)]
    longest = max(map(len, tags))
    tags = [[*tag, *tag[-1:] * (longest - len(tag))] for tag in tags]
    if len({*map(tuple, tags)}) < len(tags):
        raise UserError("the tokenizer writes two tags of tiles alike: it has no tokens for digits")
    return np.array(tags, dtype=np.int64)


def tag_rows(tiles: int) -> list[int]:
    """Return the rows of `tile_tags` that stand before the tiles of an image: the thumbnail is last, or alone."""
    return [*range(1, tiles), 0]


def _in_pieces(tokenizer: Tokenizer, tag: str) -> list[int]:
    begin, digits, end = tag[:-3], tag[-3:-1], tag[-1]
    return [i for piece in (begin, *digits, end) for i in tokenizer.text_to_ids(piece)]
