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
from nemotron_h.data.messages import ROLES, SYSTEM, USER, Turn
from nemotron_h.evaluation.grading import calls as grading_calls
from nemotron_h.evaluation.grading import instructions, packages
from nemotron_h.evaluation.tables import calls
from nemotron_h.evaluation.tables.task import CALLS, INSTRUCTIONS, RANDOM, Task, evaluate, render
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
        prompt: that an answer follows; empty in a conversation and where likelihoods are compared.
        turns: of a conversation, in which the model answers; none where it continues the prompt.
        opening: text that begins the answer in a conversation.
        begin: of the prompt: what a task says of itself, and the examples.
        options: context and text of each option; none where the model writes an answer.
        reference: the right answer; empty without one.
        right: number of the right option; -1 without options.
    """

    record: dict[str, Any] = field(repr=False)
    key: str
    prompt: str = ""
    turns: tuple[Turn, ...] = ()
    opening: str = ""
    begin: str = field(default="", repr=False)
    options: tuple[tuple[str, str], ...] = ()
    reference: str = ""
    right: int = -1

    @property
    def text(self) -> str:
        """Return what the model reads, with the right option."""
        spoken = "".join(turn.content for turn in self.turns) + self.opening
        return self.prompt + spoken + "".join(self.options[self.right] if self.options else ())


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
    sentences = _packages_lacking(task)
    if task.parts:
        return [*sentences, *calls.lacking(folder / (task.data or name), task.parts)]
    test = _file(name, task, folder, task.test)
    if not test.is_file():
        sentences.append(f"no {test}; to write it: {task.download(task.test, test)}")
    if task.shots and _examples_file(name, task, folder) is None:
        first, *others = task.examples
        file = _file(name, task, folder, first)
        if first.startswith(EXEMPLARS):
            lacks = f"no {file} with the {task.shots} published examples, as records of {', '.join(task.fields)}"
            if others:
                instead = task.download(others[0], _file(name, task, folder, others[0]))
                lacks += f"; other examples, whose score is not comparable: {instead}"
            sentences.append(lacks)
        else:
            sentences.append(f"no {file}; to write it: {task.download(first, file)}")
    return sentences


def _packages_lacking(task: Task) -> list[str]:
    needed = packages.LANGUAGE if task.grader == INSTRUCTIONS else ()
    missing = [name for name in needed if not packages.version(name)]
    return [f"{', '.join(missing)} not installed: {packages.INSTALL}"] if missing else []


def _file(name: str, task: Task, folder: Path, split: str) -> Path:
    return folder / (task.data or name) / f"{split}.jsonl"


def _examples_file(name: str, task: Task, folder: Path) -> Path | None:
    files = (_file(name, task, folder, split) for split in task.examples)
    return next((file for file in files if file.is_file()), None)


def examined(name: str, task: Task, folder: Path, limit: int | None) -> Examined:
    """Return a task with the questions of its files.

    Args:
        limit: questions; None takes all.
    Errors:
        UserError: names the line and the field that is missing or not what the task needs.
    """
    source = folder / (task.data or name)
    if task.parts:
        records, remarks = calls.records(source, task.parts, limit)
    else:
        records, remarks = _records(_file(name, task, folder, task.test), task), []
        if limit is not None and limit < len(records):
            remarks.append(f"the first {limit:,} of {len(records):,} questions")
            records = records[:limit]
    if task.verified and not packages.version(packages.MATH_VERIFY):
        remarks.append(f"Math-Verify, which the paper grades by, is not installed: {packages.INSTALL}")
    examples: dict[str, list[tuple[str, str]]] = {}
    if task.shots:
        file = _examples_file(name, task, folder)
        for origin, record in _records(file, task):
            with_group = _told(origin, lambda record=record: (render(task.group, record), _example(task, record)))
            examples.setdefault(with_group[0], []).append((origin, with_group[1]))
        if file.stem != task.examples[0]:
            remarks.append(f"examples of {file.name}, not the published ones")
    rng, questions = random.Random(SEED), []
    for origin, record in records:
        group = _told(origin, lambda record=record: render(task.group, record))
        shots = _shots(task, examples.get(group, []), rng, f"{origin}: {source} has", group)
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
    if check := {INSTRUCTIONS: instructions.check, CALLS: grading_calls.check}.get(task.grader):
        check(record)
    if task.generates:
        prompt, reference = before + render(task.prompt, record), render(task.reference, record)
        if task.reference and reference in ("", "None"):
            raise ValueError("no right answer is in it")
        ends = [task.max_tokens, list(task.stop)]
        if not task.chat:
            return Question(record, key_of([prompt, *ends]), prompt, begin=before, reference=reference)
        turns, opening = _turns(task, record, prompt), render(task.opening, record)
        key = key_of([[(turn.role, turn.content) for turn in turns], opening, *ends])
        return Question(record, key, turns=turns, opening=opening, reference=reference)
    texts = evaluate(task.options, record)
    contexts = evaluate(task.contexts, record) if task.contexts else [render(task.prompt, record)] * len(texts)
    options = tuple((before + context, text) for context, text in zip(contexts, texts, strict=True))
    right = evaluate(task.right, record)
    if not 0 <= right < len(options):
        raise ValueError(f"option {right} of {len(options)} is the right one")
    return Question(record, key_of(options), options=options, right=right)


def _turns(task: Task, record: dict[str, Any], prompt: str) -> tuple[Turn, ...]:
    """Return the messages of a conversation; the task's system message begins that of the record."""
    messages = [{"role": USER, "content": prompt}]
    if task.messages:
        messages = evaluate(task.messages, record)
    turns = tuple(Turn(ROLES[message["role"]], message["content"]) for message in messages)
    if not task.system:
        return turns
    system = render(task.system, record)
    if turns[0].role == SYSTEM:
        return (Turn(SYSTEM, f"{system}\n\n{turns[0].content}"), *turns[1:])
    return (Turn(SYSTEM, system), *turns)


def key_of(content: Any) -> str:
    """Return a hash of what an answer depends on."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
