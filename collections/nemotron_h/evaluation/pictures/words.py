"""Made-up words in several fonts: no model knows them from texts. Words and fonts are held out."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from nemotron_h.evaluation.pictures.item import Item, Sets
from nemotron_h.evaluation.problems.generate import TEST, TRAIN, part_of

#: matplotlib's own; those of tests are of other families
TRAIN_FONTS = (
    "DejaVuSans.ttf",
    "DejaVuSans-Bold.ttf",
    "DejaVuSans-Oblique.ttf",
    "DejaVuSansMono.ttf",
    "DejaVuSerif.ttf",
    "DejaVuSerif-Bold.ttf",
    "cmr10.ttf",
    "cmss10.ttf",
)
TEST_FONTS = ("STIXGeneral.ttf", "STIXGeneralBol.ttf", "STIXGeneralItalic.ttf", "cmtt10.ttf")
LICENCE = "generated; fonts of matplotlib: DejaVu (Bitstream Vera), Computer Modern (BaKoMa), STIX"
_LETTERS = ("bcdfghjklmnprstvwz", "aeiou")
_LENGTHS = (3, 7)  # ours: letters of a word, the second excluded
_SIGN_LENGTHS = (3, 5)  # ours: of a sign
_SIGN_SHARE = 2  # ours: a letter has 23 values at each of four places, a digit ten at one
_QUESTIONS = ("What word is this?", "Which word does the image show?", "Read the word.")
_SPELLING = ("Spell it.", "Spell the word.", "Which letters?")


def words(count: int, test_count: int, size: int, seed: int, say: Callable[[str], None]) -> Sets:
    """Return images of words, grey on grey; tests have held-out words in the fonts of training, and in held-out ones
    (`words_fonts`).
    """
    tests = {
        "words": _drawn(test_count, TEST, TRAIN_FONTS, size, [seed, 1]),
        "words_fonts": _drawn(test_count, TEST, TEST_FONTS, size, [seed, 2]),
    }
    return Sets(_drawn(count, TRAIN, TRAIN_FONTS, size, [seed, 0]), tests, count + 2 * test_count, LICENCE)


def signs(count: int, test_count: int, size: int, seed: int, say: Callable[[str], None]) -> Sets:
    """Return short words in capitals, each within one square, and spelled in the answer: a letter is a token of any
    tokenizer then, where it would else be part of some pair or not, by its neighbours. Tests have held-out words in
    the fonts of training, and in held-out ones (`signs_fonts`).
    """
    tests = {
        "signs": _signs(test_count, TEST, TRAIN_FONTS, size, [seed, 3]),
        "signs_fonts": _signs(test_count, TEST, TEST_FONTS, size, [seed, 4]),
    }
    train = _signs(count, TRAIN, TRAIN_FONTS, size, [seed, 5])
    return Sets(train, tests, count + 2 * test_count, LICENCE, _SIGN_SHARE)


def word(rng: np.random.Generator, part: str, lengths: tuple[int, int] = _LENGTHS) -> str:
    """Return a word of a part: consonants and vowels by turns."""
    while True:
        first, length = int(rng.integers(2)), int(rng.integers(*lengths))
        text = "".join(rng.choice(list(_LETTERS[(first + n) % 2])) for n in range(length))
        if part_of(text) == part:
            return text


def _drawn(count: int, part: str, fonts: Sequence[str], size: int, seed: Sequence[int]) -> Iterator[Item]:
    rng = np.random.default_rng(seed)
    for _ in range(count):
        text = word(rng, part)
        font = _font(str(rng.choice(fonts)), int(rng.integers(size // 2, size * 7 // 10 + 1)))
        yield Item(_image(text, font, size, rng), str(rng.choice(_QUESTIONS)), text)


def _signs(count: int, part: str, fonts: Sequence[str], size: int, seed: Sequence[int]) -> Iterator[Item]:
    rng = np.random.default_rng(seed)
    for _ in range(count):
        text = word(rng, part, _SIGN_LENGTHS).upper()
        name, points = str(rng.choice(fonts)), int(rng.integers(size // 2, size * 7 // 10 + 1))
        while _width(text, _font(name, points)) > size - 2:
            points -= 1
        yield Item(_image(text, _font(name, points), size, rng, size // 4), str(rng.choice(_SPELLING)), " ".join(text))


def _width(text: str, font: ImageFont.FreeTypeFont) -> int:
    left, _, right, _ = font.getbbox(text)
    return right - left


def _image(
    text: str, font: ImageFont.FreeTypeFont, size: int, rng: np.random.Generator, slack: int | None = None
) -> Image.Image:
    """Return a word on paper of `size` by as many squares as it needs, at a random place of it.

    Args:
        slack: pixels by which its height differs at most, in the middle of the paper; None is as many as there are.
    """
    left, top, right, bottom = font.getbbox(text)
    width = -(-(right - left + 2) // size) * size
    paper, ink = int(rng.integers(170, 256)), int(rng.integers(0, 86))
    if rng.random() < 0.3:
        paper, ink = ink, paper
    image = Image.new("L", (width, size), paper)
    rooms = (width - (right - left), max(size - (bottom - top), 0))
    free = (rooms[0], rooms[1] if slack is None else min(rooms[1], slack))
    place = [(room - own) // 2 + int(rng.integers(0, own + 1)) for room, own in zip(rooms, free, strict=True)]
    ImageDraw.Draw(image).text((place[0] - left, place[1] - top), text, fill=ink, font=font)
    return image


@functools.lru_cache(maxsize=1024)
def _font(name: str, points: int) -> ImageFont.FreeTypeFont:
    import matplotlib

    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts/ttf" / name, points)
