"""Cut an image into tiles of one size, as many as its shape asks for, and a thumbnail of the whole behind them.

Axes: n tiles, 3 channels (RGB), s the side of a tile in pixels; a grid is c columns by r rows.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from nemotron_h.core.strict import Range, check_number, check_one_of
from nemotron_h.schema.vision import AREA, CLOSEST, MOST_TILES, TILINGS

#: most tiles of each image where a conversation is longer than its window, step by step (Megatron-LM's multimodal
#: examples)
FEWER_TILES = (8, 6, 4, 2, 1)
_AREA_SHARE = 0.6  # of the image's area: a grid that covers more of it is no better for that (Megatron-LM)


@dataclass(frozen=True)
class Tiling:
    """Choose grids for images, and cut these into tiles.

    Args:
        size: side of a tile in pixels: the vision encoder's image size.
        max_tiles: of a grid; the thumbnail is one more. 1: the whole image is the only tile.
        by: how a grid is chosen: `closest` in its ratio of width to height (paper 4, NVLM), or `area`, which weighs
            that with the share of the image's pixels that the grid can hold.
    Errors:
        UserError: a value is none of these.
    """

    size: int = 448
    max_tiles: int = MOST_TILES
    by: str = CLOSEST

    def __post_init__(self) -> None:
        check_number("tile size", self.size, Range(least=1, most=4096))
        check_number("max_tiles", self.max_tiles, Range(least=1, most=MOST_TILES))
        check_one_of("tiling", self.by, TILINGS)

    def at_most(self, max_tiles: int) -> Tiling:
        """Return it with fewer tiles."""
        return replace(self, max_tiles=min(max_tiles, self.max_tiles))

    def fewer(self) -> list[Tiling]:
        """Return those with fewer tiles, down to one."""
        return [self.at_most(count) for count in FEWER_TILES if count < self.max_tiles]

    def grid(self, width: int, height: int) -> tuple[int, int]:
        """Return columns and rows of the grid for an image of so many pixels."""
        return _grid(self, width, height)

    def count(self, width: int, height: int) -> int:
        """Return the number of tiles of an image, its thumbnail included."""
        columns, rows = self.grid(width, height)
        return columns * rows + (columns * rows > 1)

    def cut(self, image: Image.Image) -> np.ndarray:
        """Return the tiles of an image row by row, and behind several of them the thumbnail, uint8 [n, 3, s, s]."""
        columns, rows = self.grid(*image.size)
        s = self.size
        resized = image.resize((columns * s, rows * s), Image.Resampling.BICUBIC)
        pixels = np.asarray(resized).reshape(rows, s, columns, s, 3)
        tiles = pixels.transpose(0, 2, 4, 1, 3).reshape(rows * columns, 3, s, s)
        if len(tiles) == 1:
            return tiles
        thumbnail = np.asarray(image.resize((s, s), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
        return np.concatenate([tiles, thumbnail[None]])


@functools.cache
def grids(max_tiles: int) -> tuple[tuple[int, int], ...]:
    """Return all grids of at most so many tiles, columns and rows, from few tiles to many."""
    sides = range(1, max_tiles + 1)
    return tuple(sorted(((c, r) for c in sides for r in sides if c * r <= max_tiles), key=lambda g: (g[0] * g[1], g)))


@functools.lru_cache(maxsize=1 << 16)
def _grid(tiling: Tiling, width: int, height: int) -> tuple[int, int]:
    """Return a grid as Megatron-LM's `image_processing.py` chooses it (NVLM, 2409.11402 3.1, and InternVL 1.5)."""
    ratio, area = width / height, width * height
    candidates = grids(tiling.max_tiles)
    if tiling.by == AREA:
        return max(candidates, key=lambda g: _fit(g, tiling.size, ratio, area))  # the first of equals
    best, least = candidates[0], float("inf")
    for columns, rows in candidates:
        difference = abs(ratio - columns / rows)
        enough = area > 0.5 * tiling.size**2 * columns * rows  # pixels for the larger one of two of the same ratio
        if difference < least or (difference == least and enough):
            best, least = (columns, rows), difference
    return best


def _fit(grid: tuple[int, int], size: int, ratio: float, area: int) -> float:
    columns, rows = grid
    share = min(columns * rows * size**2 / area, _AREA_SHARE)
    return share * min(columns / rows / ratio, ratio / (columns / rows))
