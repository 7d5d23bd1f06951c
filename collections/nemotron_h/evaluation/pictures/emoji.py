"""Emoji with their names in Unicode: drawn in colour by one font, and by another hand in black and white to test on."""

from __future__ import annotations

import functools
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from nemotron_h.data.fetch_spec import Fetch
from nemotron_h.data.prepare.fetch import fetch
from nemotron_h.evaluation.pictures.item import Item, Sets

#: Debian's fonts: Google's drawings, of bitmaps of one size, and George Douros's outlines
_NOTO = Fetch(package="fonts-noto-color-emoji", kind="apt", members=["*/NotoColorEmoji.ttf"])
_SYMBOLA = Fetch(package="fonts-symbola", kind="apt", members=["*/Symbola*.ttf"])
LICENCE = "Noto Color Emoji (OFL-1.1), from Debian; emoji_style: Symbola (free for any use), from Debian"
#: blocks of Unicode with pictures: symbols, dingbats, pictographs to their extension
_BLOCKS = ((0x2600, 0x27BF), (0x1F300, 0x1F64F), (0x1F680, 0x1F6FF), (0x1F900, 0x1F9FF))
_BITMAP = 109  # the one size of Noto's bitmaps, 136 x 128 pixels each
_TURN = 15.0  # ours: degrees either way
_SCALES = (0.7, 1.0)  # ours: of a picture's side
_QUESTIONS = ("What is this?", "What does the image show?", "Name the emoji.")

#: draws a character, RGBA and as large as its ink
Draw = Callable[[str], Image.Image]


def emoji(count: int, test_count: int, size: int, seed: int, say: Callable[[str], None]) -> Sets:
    """Return emoji on paper of any colour, turned, resized and moved; the answer is the name. Tests: `emoji`, other
    pictures of the same drawings; `emoji_style`, the same emoji in the other drawing style, which is never trained on.

    Errors:
        UserError: as `fetch`; it needs `apt-get`.
    """
    [(_, bitmaps)], [(_, outlines)] = fetch(_NOTO, say), fetch(_SYMBOLA, say)
    outlined = {*_characters(outlines)}
    characters = [each for each in _characters(bitmaps) if each in outlined]
    colour = _drawn(ImageFont.truetype(bitmaps, _BITMAP))
    plain = _drawn(ImageFont.truetype(outlines, _BITMAP))
    tests = {
        "emoji": _placed(characters, colour, test_count, size, [seed, 1]),
        "emoji_style": _placed(characters, plain, test_count, size, [seed, 2]),
    }
    return Sets(_placed(characters, colour, count, size, [seed, 0]), tests, count + 2 * test_count, LICENCE)


def _characters(font: Path) -> list[str]:
    """Return the emoji that a font draws, each of one code point, in the order of Unicode."""
    from fontTools.ttLib import TTFont

    with TTFont(font, lazy=True) as file:
        drawn = file.getBestCmap()
    points = (point for first, last in _BLOCKS for point in range(first, last + 1) if point in drawn)
    return [chr(point) for point in points if unicodedata.category(chr(point)) == "So"]


def _drawn(font: ImageFont.FreeTypeFont) -> Draw:
    """Return what draws with a font; each character is drawn once."""

    @functools.cache
    def draw(character: str) -> Image.Image:
        canvas = Image.new("RGBA", (2 * _BITMAP, 2 * _BITMAP))
        place = (_BITMAP // 2, _BITMAP // 2)
        ImageDraw.Draw(canvas).text(place, character, fill="black", font=font, embedded_color=True)
        return canvas.crop(canvas.getbbox())

    return draw


def _placed(characters: Sequence[str], draw: Draw, count: int, size: int, seed: Sequence[int]) -> Iterator[Item]:
    rng = np.random.default_rng(seed)
    for number in range(count):
        if number % len(characters) == 0:
            order = rng.permutation(len(characters))
        character = characters[order[number % len(characters)]]
        image = draw(character).rotate(rng.uniform(-_TURN, _TURN), Image.Resampling.BICUBIC, expand=True)
        side = size * rng.uniform(*_SCALES) / max(image.size)
        image = image.resize([max(round(side * each), 1) for each in image.size], Image.Resampling.LANCZOS)
        paper = Image.new("RGB", (size, size), tuple(rng.integers(180, 256, 3).tolist()))
        paper.paste(image, tuple(int(rng.integers(size - each + 1)) for each in image.size), image)
        yield Item(paper, str(rng.choice(_QUESTIONS)), unicodedata.name(character).lower())
