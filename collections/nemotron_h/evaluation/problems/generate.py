"""Problems by seed, in two parts that share none, and the folder that training reads."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from nemotron_h.core.errors import UserError
from nemotron_h.core.files import whole_file
from nemotron_h.core.strict import check_one_of
from nemotron_h.data.chat import FAMILY_SOURCE, FAMILY_TEMPLATE
from nemotron_h.data.thoughts import OFF, ON, switched, with_thought
from nemotron_h.evaluation.problems.answers import ANSWER
from nemotron_h.evaluation.problems.problem import Problem
from nemotron_h.evaluation.problems.tasks import HARDEST, TASKS

TRAIN, TEST = "train", "test"
#: ours: one problem of so many is a test problem
_TEST_SHARE = 16
#: ours: problems drawn one after the other that are all known already, at which there are taken to be no more
_FRUITLESS = 2000
#: ours: tokens of the generated blends' tokenizer: 256 bytes, special tokens, the most frequent words
VOCABULARY = 280


def part_of(key: str) -> str:
    """Return the part that a problem is in, by its key alone: whatever seed or count draws it, it is in no other."""
    return TEST if hashlib.sha256(key.encode()).digest()[0] % _TEST_SHARE == 0 else TRAIN


def difficulties(text: str) -> range:
    """Return the difficulties of `2` or `1-3`.

    Errors:
        UserError: it is neither, or outside of what there is.
    """
    first, _, last = text.partition("-")
    if not (first.isdecimal() and (last or first).isdecimal()):
        raise UserError(f"--difficulty {text[:40]!r} is no difficulty", hint=f"write 2, or 1-3; {HARDEST} is the most")
    chosen = range(int(first), int(last or first) + 1)
    if not chosen or chosen[0] < 1 or chosen[-1] > HARDEST:
        raise UserError(f"--difficulty {text[:40]} is not within 1-{HARDEST}, from the easier to the harder")
    return chosen


def generate(task: str, count: int, levels: Sequence[int], seed: int, part: str) -> list[Problem]:
    """Return different problems of a task: the same ones for the same arguments.

    Args:
        levels: difficulties, which take turns.
        part: `TRAIN` or `TEST`.
    Errors:
        UserError: the task is unknown, or has fewer problems than that.
    """
    check_one_of("--tasks", task, TASKS)
    rng, seen, problems, fruitless = random.Random(f"{seed} {task} {part}"), set(), [], 0
    while len(problems) < count:
        level = levels[len(problems) % len(levels)]
        problem, key = TASKS[task](rng, level)
        if part_of(key) != part:
            continue
        if key not in seen:
            seen.add(key)
            problems.append(problem)
            fruitless = 0
            continue
        fruitless += 1
        if fruitless == _FRUITLESS:
            raise UserError(
                f"{task} has no {count:,} different {part} problems: of difficulty {level} hardly more than "
                f"{sum(problem.difficulty == level for problem in problems):,}",
                hint="ask for fewer, or for more difficult ones: --difficulty 2-3",
            )
    return problems


def write_folder(
    folder: Path,
    tasks: Sequence[str],
    count: int,
    test_count: int,
    levels: Sequence[int],
    seed: int,
    thoughts: bool = False,
) -> list[Path]:
    """Write problems for training and for tests, and blends of the former.

    Args:
        count, test_count: problems of each task.
        thoughts: conversations ask for a thought and for none by turns; see `thinking`.
    Returns:
        the files: `train/TASK.jsonl` (`text` and `messages`), `test.jsonl`, and blends of texts and of conversations.
    Errors:
        UserError: see `generate`; nothing is written then.
    """
    train = {task: generate(task, count, levels, seed, TRAIN) for task in tasks}
    test = [problem for task in tasks for problem in generate(task, test_count, levels, seed, TEST)]
    (folder / TRAIN).mkdir(parents=True, exist_ok=True)
    files = []
    for task, problems in train.items():
        files.append(folder / TRAIN / f"{task}.jsonl")
        record = thinking if thoughts else lambda problem, _: problem.record()
        write_lines(files[-1], [record(problem, number) for number, problem in enumerate(problems)])
    files.append(folder / f"{TEST}.jsonl")
    write_lines(files[-1], [vars(problem) for problem in test])
    paths = {task: f"{TRAIN}/{task}.jsonl" for task in tasks}
    chat = {"tokenizer": {"kind": "bpe", "blend": "problems"}, "chat_template": FAMILY_TEMPLATE}
    files.append(write_blend(folder / "problems.yaml", paths, {}, tokenizer={"kind": "bpe", "vocab_size": VOCABULARY}))
    files.append(write_blend(folder / "problems_chat.yaml", paths, {"chat": "messages"}, **chat))
    return files


def write_blend(
    file: Path,
    paths: Mapping[str, str],
    form: Mapping[str, Any],
    own: Mapping[str, Mapping[str, Any]] | None = None,
    shares: Mapping[str, int] | None = None,
    **more: Any,
) -> Path:
    """Write a blend of sources, in equal shares by default, and return its file.

    Args:
        paths: source -> file of its records.
        form: keys of each source beside these.
        own: source -> keys of that one alone.
        shares: source -> its part of the tokens; 1 where it is not named.
        more: keys of the blend.
    """
    sources = {
        source: {"category": source, "format": "jsonl", "path": path, "licence": "generated", **form}
        | dict((own or {}).get(source, {}))
        for source, path in paths.items()
    }
    phases = [{"name": "all", "weights": dict.fromkeys(paths, 1) | dict(shares or {}), "normalize": True}]
    content = {"name": file.stem, **more, "sources": sources, "phases": phases}
    with whole_file(file) as temporary:
        temporary.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return file


def thinking(problem: Problem, number: int) -> dict[str, Any]:
    """Return a problem's record whose conversation asks for a thought, which has the steps, or for none, which is the
    answer alone: every second one.
    """
    steps = "\n".join(problem.steps) if number % 2 == 0 else ""
    system = switched(OFF if number % 2 else ON, FAMILY_SOURCE)[1]
    answer = with_thought(steps, f"{ANSWER} {problem.answer}")
    return {**problem.record(), **problem.told(problem.solution, system, answer)}


def write_lines(file: Path, records: Iterable[object]) -> None:
    """Write records as JSONL."""
    with whole_file(file) as temporary, temporary.open("w", encoding="utf-8") as opened:
        opened.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
