"""Pictures with known answers: what is held out, values read back from pixels, and a blend that preparation reads."""

from __future__ import annotations

import hashlib
import json
import unicodedata
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from inline_pool import one_worker_here
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from nemotron_h.cli.data import app
from nemotron_h.core.errors import UserError
from nemotron_h.data.blend import load_blend
from nemotron_h.data.prepare.pipeline import prepare
from nemotron_h.data.tokenizer import train_bpe
from nemotron_h.evaluation.pictures import digits, emoji, words
from nemotron_h.evaluation.pictures.charts import COLOURS
from nemotron_h.evaluation.pictures.folder import KINDS, write_folder
from nemotron_h.evaluation.pictures.measure import Judged
from nemotron_h.evaluation.pictures.questions import OWN, Question

QUIET = Console(quiet=True)


@pytest.fixture(autouse=True)
def downloads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file like MNIST's, of 20 images of each digit, and fonts of matplotlib, in the place of the downloads."""
    fonts = Path(matplotlib.get_data_path()) / "fonts/ttf"
    of = {emoji._NOTO.package: fonts / "DejaVuSans.ttf", emoji._SYMBOLA.package: fonts / "DejaVuSans-Bold.ttf"}
    monkeypatch.setattr(emoji, "fetch", lambda spec, say: [("a font", of[spec.package])])
    rng = np.random.default_rng(0)
    rows = [[*rng.integers(0, 256, 784), digit] for digit in range(10) for _ in range(20)]
    np.savetxt(tmp_path / "mnist.csv.gz", rows, fmt="%d", delimiter=",")
    monkeypatch.setattr(digits, "fetch", lambda spec, say: [(spec.members[0], tmp_path / "mnist.csv.gz")])


def read(folder: Path, name: str) -> list[tuple[Image.Image, str, str]]:
    """Image, question and answer of every record of a set."""
    records = map(json.loads, (folder / f"{name}.jsonl").read_text().splitlines())
    found = []
    for record in records:
        (image, question), (asked, answered) = record["messages"][0]["content"], record["messages"]
        assert (asked["role"], answered["role"], answered["content"]) == ("user", "assistant", record["answer"])
        found.append((Image.open((folder / name).parent / image["image"]), question["text"], record["answer"]))
    return found


def test_a_folder_of_every_kind_is_prepared_and_holds_out_what_it_says(tmp_path: Path) -> None:
    out = tmp_path / "out"
    files = write_folder(out, list(KINDS), 60, 10, 28, 1, QUIET)
    assert [f"{file.parent.name}/{file.stem}" for file in files[:-1]] == [
        *("train/digits", "test/digits", "test/digits_others", "train/numbers", "test/numbers"),
        *("train/words", "test/words", "test/words_fonts", "train/signs", "test/signs", "test/signs_fonts"),
        *("train/charts", "test/charts", "train/emoji", "test/emoji", "test/emoji_style"),
    ]
    train = {kind: read(out / "train", kind) for kind in KINDS}
    test = {file.stem: read(out / "test", file.stem) for file in files if file.parent.name == "test"}
    assert {len(items) for items in train.values()} == {60}
    assert {len(items) for items in test.values()} == {10}
    for kind in ("digits", "numbers"):  # no image of a digit is on both sides
        squares = [
            {np.asarray(image)[:, x : x + 28].tobytes() for image, _, _ in items for x in range(0, image.width, 28)}
            for items in (train[kind], test[kind])
        ]
        assert all(squares)
        assert not squares[0] & squares[1]
    images, labels = digits._read(tmp_path / "mnist.csv.gz", 28)
    answers = {image.tobytes(): str(label) for image, label in zip(images, labels, strict=True)}
    for image, _, answer in train["numbers"]:
        assert answer == "".join(answers[np.asarray(image)[:, x : x + 28].tobytes()] for x in range(0, image.width, 28))
    assert not {word for _, _, word in train["words"]} & {word for _, _, word in test["words"] + test["words_fonts"]}
    assert not {*words.TRAIN_FONTS} & {*words.TEST_FONTS}
    for image, _, word in train["words"] + test["words_fonts"]:
        assert image.height == 28
        assert image.width % 28 == 0
        assert np.ptp(np.asarray(image)) > 60, word
    signs = test["signs"] + test["signs_fonts"]
    assert not {word for _, _, word in train["signs"]} & {word for _, _, word in signs}
    assert {len(word.split()) for _, _, word in signs} == {3, 4}
    for image, _, word in train["signs"] + signs:
        assert image.size == (28, 28)
        assert all(len(letter) == 1 and letter.isupper() for letter in word.split())
        assert np.ptp(np.asarray(image)) > 60, word
        ink = np.abs(np.asarray(image).astype(int) - int(np.median(np.asarray(image)))) > 30
        assert not ink[:2].any(), "in the middle of the paper"
    for image, question, answer in train["charts"] + test["charts"]:
        assert answer == looked_up(np.asarray(image), question)
    names = {name for _, _, name in train["emoji"] + test["emoji"] + test["emoji_style"]}
    assert {unicodedata.category(unicodedata.lookup(name)) for name in names} == {"So"}
    for image, _, name in train["emoji"] + test["emoji"] + test["emoji_style"]:
        assert image.size == (28, 28)
        assert np.ptp(np.asarray(image.convert("L"))) > 60, name
    (out / "train/digits/none.png").touch()
    before = digest(out)
    write_folder(out, list(KINDS), 60, 10, 28, 1, QUIET)
    assert not (out / "train/digits/none.png").exists()
    assert {**digest(out), "train/digits/none.png": before["train/digits/none.png"]} == before
    root = tmp_path / "data"
    tokenizer = root / "sample_small/tokenizer"
    tokenizer.mkdir(parents=True)
    train_bpe(["What digit is this? Read the word."] * 9, 262, tokenizer)
    blend = load_blend(out / "pictures.yaml")
    assert blend.sources["digits"].licence.startswith("MNIST")
    weights = blend.phases[0].weights
    assert weights["signs"] == pytest.approx(2 * weights["digits"])
    with one_worker_here():
        manifest = prepare(blend, root, workers=1, console=QUIET)
    assert {n: sum(s.images for s in source.splits.values()) for n, source in manifest.sources.items()} == {
        kind: 60 for kind in KINDS
    }


def digest(folder: Path) -> dict[str, str]:
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def looked_up(pixels: np.ndarray, question: str) -> str:
    """Answer by counting pixels of each colour from the ground up."""
    heights = {}
    for name, colour in COLOURS.items():
        inside = (pixels == colour).all(2)
        if inside.any():
            heights[name] = inside.any(1).sum()
    if "high is" in question:
        height = heights[question.split()[4]]
        return str(round((height - 1) / ((len(pixels) - 2) / 9.5)))
    return (max if "highest" in question else min)(heights, key=heights.get)


def test_spaces_of_a_spelled_answer_are_no_characters_that_are_right() -> None:
    for answer, right, exact, similarity in (
        ("H A S U", "H A S U", 1, 1),
        ("HASU", "H A S U", 1, 1),
        ("H A S O", "H A S U", 0, 3 / 4),
        ("H A D O", "H A S U", 0, 1 / 2),
        ("T A D O", "H A S U", 0, 0),  # with its spaces 5 of 7 characters would be right
        ("a  Cat", "A cat", 1, 1),
        ("acat", "A cat", 0, 4 / 5),  # a space of words counts
        ("7", "7", 1, 1),
    ):
        judged = Judged("run", OWN, Question("test", 0, (), right), answer)
        assert (judged.exact, judged.similarity) == (exact, pytest.approx(similarity)), answer


def test_digits_of_others_and_mistakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images, labels = digits.other_digits()
    assert images.shape == (1797, 8, 8)
    assert np.bincount(labels).min() > 170
    assert images.max() == 255
    run = CliRunner()
    for arguments, reason in {
        ("--kinds", "digits,digits"): "names none, or one twice",
        ("--kinds", "digit"): r"--kinds = 'digit'",
        ("--test-count", "21"): "--test-count 21: 20 digits are held out",
    }.items():
        result = run.invoke(app, ["pictures", *arguments, "--out", str(tmp_path / "x")])
        assert isinstance(result.exception, UserError)
        assert reason in str(result.exception)
    assert not (tmp_path / "x").exists()
    items = list(digits.digits(400, 1, 28, 0, print).train)
    labels = {pixels.tobytes(): str(label) for pixels, label in zip(*digits.mnist(print)[0], strict=True)}
    seen = [labels.get(item.image.tobytes()) for item in items]
    assert seen[:180] == [item.answer for item in items[:180]]
    assert set(seen[180:]) == {None}, "further ones are changed"
    assert {item.image.size for item in items} == {(28, 28)}
    assert [sum(item.answer == str(digit) for item in items[180:360]) for digit in range(10)] == [18] * 10
    upright = Image.fromarray(np.pad(np.full((14, 8), 255, np.uint8), ((7, 7), (10, 10))))
    changed = np.asarray(digits._changed(upright, np.random.default_rng(1))).astype(int)
    assert 0.5 < (changed * np.asarray(upright)).sum() / (255 * changed.sum()) < 1  # the most of it in its place
    monkeypatch.setattr(digits, "_OTHERS_SHA256", "0" * 64)
    with pytest.raises(UserError, match="is not the file that is expected"):
        digits.other_digits()
