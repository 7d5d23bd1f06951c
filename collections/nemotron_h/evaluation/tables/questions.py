"""Questions of a task, made of a user's files: `FOLDER/<task>/<split>.jsonl` with the fields that the hub has."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nemotron_h.core.errors import UserError
from nemotron_h.evaluation.tables.task import RANDOM, Task, evaluate, render
from nemotron_h.evaluation.tasks import read_records

#: lm-evaluation-harness': of the examples that are taken at random
SEED = 1234
#: file of examples that are published with no data set
EXEMPLARS = "exemplars"


@dataclass(frozen=True)
class Question:
    """A question as the model reads it.

    Attributes:
        record: of the data.
        key: a hash of all that the model's answer depends on.
        prompt: that an answer follows; empty where likelihoods are compared.
        options: context and text of each option; none where the model writes an answer.
        reference: the right answer; empty without one.
        right: number of the right option; -1 without options.
    """

    record: dict[str, Any] = field(repr=False)
    key: str
    prompt: str = ""
    options: tuple[tuple[str, str], ...] = ()
    reference: str = ""
    right: int = -1


@dataclass(frozen=True)
class Examined:
    """A task with its questions.

    Attributes:
        name: of the task.
        questions: in the order of the file.
        remarks: sentences on why its score cannot be compared with the paper's, besides the task's own.
    """

    name: str
    task: Task
    questions: list[Question]
    remarks: list[str]


def lacking(name: str, task: Task, folder: Path) -> list[str]:
    """Return what a task's files lack, in sentences; none where all are there."""
    sentences = []
    test = folder / name / f"{task.test}.jsonl"
    if not test.is_file():
        sentences.append(f"no {test}; to write it: {task.download(task.test, test)}")
    if task.shots and _examples_file(name, task, folder) is None:
        first, *others = task.examples
        file = folder / name / f"{first}.jsonl"
        if first == EXEMPLARS:
            instead = folder / name / f"{others[0]}.jsonl"
            sentences.append(
                f"no {file} with the {task.shots} published examples, as records of {', '.join(task.fields)}; other "
                f"examples, whose score is not comparable: {task.download(others[0], instead)}"
            )
        else:
            sentences.append(f"no {file}; to write it: {task.download(first, file)}")
    return sentences


def _examples_file(name: str, task: Task, folder: Path) -> Path | None:
    return next((file for split in task.examples if (file := folder / name / f"{split}.jsonl").is_file()), None)


def examined(name: str, task: Task, folder: Path, limit: int | None) -> Examined:
    """Return a task with the questions of its files.

    Args:
        limit: questions; None takes all.
    Errors:
        UserError: names the line and the field that is missing or not what the task needs.
    """
    test = folder / name / f"{task.test}.jsonl"
    records, remarks = _records(test, task), []
    if limit is not None and limit < len(records):
        remarks.append(f"the first {limit:,} of {len(records):,} questions")
    examples: dict[str, list[tuple[str, str]]] = {}
    if task.shots:
        source = _examples_file(name, task, folder)
        for origin, record in _records(source, task):
            with_group = _told(origin, lambda record=record: (render(task.group, record), _example(task, record)))
            examples.setdefault(with_group[0], []).append((origin, with_group[1]))
        if source.stem != task.examples[0]:
            remarks.append(f"examples of {source.name}, not the published ones")
    rng, questions = random.Random(SEED), []
    for origin, record in records[:limit]:
        group = _told(origin, lambda record=record: render(task.group, record))
        shots = _shots(task, examples.get(group, []), rng, f"{origin}: {test.parent} has", group)
        questions.append(_told(origin, lambda record=record, shots=shots: _question(task, record, shots)))
    return Examined(name, task, questions, remarks)


def _records(file: Path, task: Task) -> list[tuple[str, dict[str, Any]]]:
    """Return the records of a file with their places."""
    found = []
    for number, record in enumerate(read_records(file), 1):
        origin = f"{file}, record {number}"
        if not isinstance(record, dict) or (missing := [name for name in task.fields if name not in record]):
            lacks = missing[0] if isinstance(record, dict) else "all fields"
            raise UserError(f"{origin} lacks {lacks}", hint=f"write it as {task.hub} has it: {', '.join(task.fields)}")
        found.append((origin, record))
    if not found:
        raise UserError(f"{file} has no records")
    return found


def _told(origin: str, make: Any) -> Any:
    """Return what is made of a record; its errors name the place."""
    try:
        return make()
    except UserError:
        raise
    except Exception as error:  # of templates over data that are not as the hub has them
        raise UserError(
            f"{origin} is not as the task needs it: {type(error).__name__}: {error}",
            hint="its fields have to be of the types that the hub has",
        ) from error


def _example(task: Task, record: Mapping[str, Any]) -> str:
    return render(task.prompt, record) + render(task.target, record) + task.separator


def _shots(task: Task, there: list[tuple[str, str]], rng: random.Random, place: str, group: str) -> str:
    if len(there) < task.shots:
        raise UserError(
            f"{place} {len(there)} examples{f' of {group}' if group else ''}, {task.shots} are needed",
            hint="write the whole split",
        )
    chosen = rng.sample(there, task.shots) if task.order == RANDOM else there[: task.shots]
    return "".join(text for _, text in chosen)


def _question(task: Task, record: dict[str, Any], shots: str) -> Question:
    before = render(task.description, record) + shots
    if task.generates:
        prompt, reference = before + render(task.prompt, record), render(task.reference, record)
        if task.reference and reference in ("", "None"):
            raise ValueError("no right answer is in it")
        return Question(record, _key([prompt, task.max_tokens, list(task.stop)]), prompt, reference=reference)
    texts = evaluate(task.options, record)
    contexts = evaluate(task.contexts, record) if task.contexts else [render(task.prompt, record)] * len(texts)
    options = tuple((before + context, text) for context, text in zip(contexts, texts, strict=True))
    right = evaluate(task.right, record)
    if not 0 <= right < len(options):
        raise ValueError(f"option {right} of {len(options)} is the right one")
    return Question(record, _key(options), options=options, right=right)


def _key(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
