"""Pictures as conversations, to train on and to test: the folder that preparation reads."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from rich.console import Console

from nemotron_h.core.progress import StageProgress
from nemotron_h.core.strict import check_one_of
from nemotron_h.data.chat import FAMILY_TEMPLATE
from nemotron_h.evaluation.pictures.charts import charts
from nemotron_h.evaluation.pictures.digits import digits, numbers
from nemotron_h.evaluation.pictures.emoji import emoji
from nemotron_h.evaluation.pictures.item import Item, Sets
from nemotron_h.evaluation.pictures.words import signs, words
from nemotron_h.evaluation.problems.generate import TEST, TRAIN, write_blend, write_lines

#: kind -> what makes its sets: of counts to train on and of each test, the side of a square, a seed, and where it is
#: said what is downloaded
KINDS: dict[str, Callable[[int, int, int, int, Callable[[str], None]], Sets]] = {
    "digits": digits,
    "numbers": numbers,
    "words": words,
    "signs": signs,
    "charts": charts,
    "emoji": emoji,
}
#: ours: the language model's, which learns from the pictures; edit it in the blend
_TOKENIZER = {"kind": "bpe", "blend": "sample_small"}


def write_folder(
    folder: Path, kinds: Sequence[str], count: int, test_count: int, size: int, seed: int, console: Console
) -> list[Path]:
    """Write pictures of each kind, conversations about them, and a blend of those to train on.

    Args:
        count, test_count: pictures of each kind, and of each of its tests.
        size: side of the squares that pictures are made of, in pixels: the side of a tile, best.
    Returns:
        the files: `train/KIND.jsonl`, `test/NAME.jsonl` (with `answer`), each beside a folder of images of its name,
        and `pictures.yaml`.
    Errors:
        UserError: an unknown kind; one has fewer pictures, or its files cannot be had. Nothing is written then.
    """
    for kind in kinds:
        check_one_of("--kinds", kind, KINDS)

    def say(text: str) -> None:
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    pictures = {kind: KINDS[kind](count, test_count, size, seed, say) for kind in kinds}
    files = []
    with StageProgress(console, "writing", sum(sets.size for sets in pictures.values())) as progress:
        for kind, sets in pictures.items():
            say(f"{kind}: licence: {sets.licence}")
            files.append(_write(folder / TRAIN, kind, sets.train, progress))
            files += [_write(folder / TEST, name, items, progress) for name, items in sets.tests.items()]
    paths = {kind: f"{TRAIN}/{kind}.jsonl" for kind in kinds}
    form = {"chat": "messages", "images": ".", "validation": 0.02}
    licences = {kind: {"licence": sets.licence} for kind, sets in pictures.items()}
    shares = {kind: sets.share for kind, sets in pictures.items()}
    blend = {"tokenizer": _TOKENIZER, "chat_template": FAMILY_TEMPLATE}
    return [*files, write_blend(folder / "pictures.yaml", paths, form, licences, shares, **blend)]


def _write(folder: Path, name: str, items: Iterable[Item], progress: StageProgress) -> Path:
    """Write a set's images, in the place of those of before, and then its records."""
    shutil.rmtree(folder / name, ignore_errors=True)
    (folder / name).mkdir(parents=True)

    def records() -> Iterator[dict[str, object]]:
        for number, item in enumerate(items):
            path = f"{name}/{number:06d}.png"
            item.image.save(folder / path)
            asked = [{"type": "image", "image": path}, {"type": "text", "text": item.question}]
            turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": item.answer}]
            yield {"messages": turns, "answer": item.answer}
            progress.advance(title=name)

    write_lines(folder / f"{name}.jsonl", records())
    return folder / f"{name}.jsonl"
