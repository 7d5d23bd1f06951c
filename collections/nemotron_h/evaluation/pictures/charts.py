"""Bar charts of known values, read off an axis: how high a bar is, and which is the highest or the lowest."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from PIL import Image, ImageDraw

from nemotron_h.evaluation.pictures.item import Item, Sets
from nemotron_h.evaluation.problems.generate import TEST, TRAIN, part_of

LICENCE = "generated"
COLOURS = {
    "red": (214, 39, 40),
    "green": (44, 160, 44),
    "blue": (31, 119, 180),
    "orange": (255, 127, 14),
    "purple": (148, 103, 189),
    "black": (0, 0, 0),
}
_MOST = 9  # ours: the highest bar; every chart's axis ends there
_BARS = (3, 6)  # ours: bars of a chart, the second excluded


def charts(count: int, test_count: int, size: int, seed: int, say: Callable[[str], None]) -> Sets:
    """Return bar charts of two squares by two; no combination of bars is on both sides."""
    tests = {"charts": _drawn(test_count, TEST, size, [seed, 1])}
    return Sets(_drawn(count, TRAIN, size, [seed, 0]), tests, count + test_count, LICENCE)


def _drawn(count: int, part: str, size: int, seed: Sequence[int]) -> Iterator[Item]:
    rng = np.random.default_rng(seed)
    while count:
        colours = rng.permutation(list(COLOURS))[: rng.integers(*_BARS)].tolist()
        heights = (rng.permutation(_MOST)[: len(colours)] + 1).tolist()  # no two are equal
        bars = dict(zip(colours, heights, strict=True))
        if part_of(repr(bars)) == part:
            count -= 1
            yield Item(chart(bars, 2 * size), *_asked(bars, rng))


def _asked(bars: dict[str, int], rng: np.random.Generator) -> tuple[str, str]:
    kind = int(rng.integers(4))
    if kind > 1:
        colour = str(rng.choice(list(bars)))
        return f"How high is the {colour} bar?", str(bars[colour])
    return (
        ("Which bar is the highest?", max(bars, key=bars.get))
        if kind
        else (
            "Which bar is the lowest?",
            min(bars, key=bars.get),
        )
    )


def chart(bars: dict[str, int], side: int) -> Image.Image:
    """Return a square chart: lines at every unit, thicker ones at 5, bars from left to right."""
    image = Image.new("RGB", (side, side), "white")
    draw = ImageDraw.Draw(image)
    unit, width = (side - 2) / (_MOST + 0.5), side / len(bars)
    for value in range(_MOST + 1):
        y = round(side - 1 - value * unit)
        draw.line((0, y, side, y), fill=(140, 140, 140) if value % 5 == 0 else (220, 220, 220))
    for number, (colour, value) in enumerate(bars.items()):
        left, right = round((number + 0.2) * width), round((number + 0.8) * width)
        draw.rectangle((left, round(side - 1 - value * unit), right, side - 1), fill=COLOURS[colour])
    return image
