"""Documents to train on: items with their answers, of all sizes up to the largest, a tokenizer, and a blend of them."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from nemotron_h.core.errors import UserError
from nemotron_h.data.tokenizer import Tokenizer, spec_of, train_bpe
from nemotron_h.evaluation.long_context.make import Maker
from nemotron_h.evaluation.long_context.scores import PART
from nemotron_h.evaluation.long_context.tasks import TASKS
from nemotron_h.evaluation.long_context.texts import Texts
from nemotron_h.evaluation.problems.generate import TRAIN, write_blend, write_lines

#: ours: 256 bytes, special tokens, and the words of a few templates
VOCABULARY = 512
#: ours: documents of each task that it is trained on, and bytes of theirs that are taken for a token
_LEARNT, _BYTES = 1000, 3


def documents(
    task: str, count: int, length: int, seed: int, texts: Texts, size_of: Callable[[str], int]
) -> Iterator[dict[str, Any]]:
    """Yield records with a `text`: a prompt with its answer, which `nemotron-h ruler` asks for at no seed.

    Args:
        length: of the largest, with room for an answer.
        size_of: returns the length of a text.
    Errors:
        UserError: see `Maker`.
    """
    maker = Maker(task, length, seed, texts, lambda prompt, prefix: size_of(prompt + prefix), practice=True)
    rng = random.Random(f"{TRAIN} {seed} {task} sizes")
    for number in itertools.count():
        if not count:
            return
        sizes = maker.sizes[: rng.randint(1, len(maker.sizes))]
        if (fitting := maker.fitting(number, sizes)) is not None:
            draft, _ = fitting
            space = "" if draft.prefix.endswith(" ") else " "
            yield {"text": f"{draft.input}{space}{', '.join(draft.references)}\n", "task": task}
            count -= 1


def write_folder(
    folder: Path, tasks: Sequence[str], count: int, length: int, seed: int, texts: Texts, tokenizer: Tokenizer | None
) -> list[Path]:
    """Write `train/TASK.jsonl` of each task, a tokenizer, and `retrieval.yaml`, a blend of them in equal shares.

    Args:
        count: documents of each task.
        length: tokens of the largest document.
        tokenizer: None trains one on the documents.
    Errors:
        UserError: see `documents`, or a task has test questions alone; no document is written then.
    """
    if asked := [task for task in tasks if TASKS[task].rule == PART]:
        raise UserError(f"--tasks {asked[0]}: its questions are those that models are tested with", hint="leave it out")
    (folder / TRAIN).mkdir(parents=True, exist_ok=True)
    if tokenizer is None:
        (folder / "tokenizer").mkdir(exist_ok=True)
        learnt = [documents(task, _LEARNT, _BYTES * length, seed, texts, _bytes) for task in tasks]
        records = (record["text"] for several in learnt for record in several)
        tokenizer = train_bpe(records, VOCABULARY, folder / "tokenizer")
        spec = {"kind": tokenizer.kind, "path": "tokenizer"}
    else:
        spec = spec_of(tokenizer)

    def tokens(text: str) -> int:
        return len(tokenizer.text_to_ids(text))

    for task in tasks:  # what does not fit is told before anything is written
        next(documents(task, 1, length, seed, texts, tokens))
    paths = {task: f"{TRAIN}/{task}.jsonl" for task in tasks}
    for task in tasks:
        write_lines(folder / paths[task], documents(task, count, length, seed, texts, tokens))
    blend = write_blend(folder / "retrieval.yaml", paths, {}, tokenizer=spec)
    return [*(folder / path for path in paths.values()), blend]


def _bytes(text: str) -> int:
    return len(text.encode())
