"""A picture with a question and its answer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from PIL import Image


@dataclass(frozen=True)
class Item:
    """A picture, what is asked of it, and the one answer."""

    image: Image.Image
    question: str
    answer: str


@dataclass(frozen=True)
class Sets:
    """The pictures of a kind.

    Args:
        train: to train on.
        tests: name -> pictures of which none is in `train`; the first has the kind's own name.
        size: of all of them.
        licence: of what they are made of.
        share: their part of a blend's tokens, beside those of other kinds.
    """

    train: Iterable[Item]
    tests: Mapping[str, Iterable[Item]]
    size: int
    licence: str
    share: int = 1
