"""Questions about images with known answers, read from files of conversations, and their controls."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from nemotron_h.core.errors import UserError
from nemotron_h.core.files import parse_json, read_text
from nemotron_h.data.images.read import ImageError
from nemotron_h.data.images.records import PLACE, Picture, beside, read_illustrated
from nemotron_h.data.messages import ASSISTANT, ChatError, Conversation

#: how a question is asked: with its images, with those of another question, with none
OWN, OTHERS, NONE = CONTROLS = ("own images", "others' images", "no images")


@dataclass(frozen=True)
class Question:
    """A conversation up to its last answer.

    Attributes:
        test: name of the file it is of.
        number: in that file, from 0.
        turns: before the answer.
        answer: the right one.
    """

    test: str
    number: int
    turns: Conversation
    answer: str

    @property
    def pictures(self) -> tuple[Picture, ...]:
        """Return its images, in their order."""
        return tuple(picture for turn in self.turns for picture in turn.images)

    @property
    def text(self) -> str:
        """Return the last question, without its images' places."""
        return self.turns[-1].content.replace(PLACE, "").strip()

    def with_pictures(self, pictures: Sequence[Picture]) -> Question:
        """Return it about other images, as many."""
        left = iter(pictures)
        return replace(self, turns=tuple(replace(t, images=tuple(next(left) for _ in t.images)) for t in self.turns))

    def without_pictures(self) -> Question:
        """Return it without images."""
        turns = (replace(t, content=t.content.replace(PLACE, "").lstrip("\n"), images=()) for t in self.turns)
        return replace(self, turns=tuple(turns))


def read_questions(file: Path, count: int | None) -> list[Question]:
    """Return the questions of a file of conversations in the shape `messages`, each with an image (docs/images.md).

    Args:
        count: the first ones alone; None is all.
    Errors:
        UserError: the file or an image cannot be read, or a line is no such conversation; names it.
    """
    locate, questions = beside(str(file), "."), []
    for number, line in enumerate(read_text(file).splitlines()):
        if not line.strip() or (count is not None and len(questions) == count):
            continue
        origin = f"{file}, line {number + 1}"
        record = parse_json(line, origin)
        try:
            turns = read_illustrated(record, "messages", locate)
            question = Question(file.stem, len(questions), turns[:-1], turns[-1].content)
            if turns[-1].role != ASSISTANT or not question.pictures:
                raise ChatError("it does not end with an answer, or has no image")
            for picture in question.pictures:
                picture.read()
        except (ChatError, ImageError) as error:
            raise UserError(f"{origin}: {error}", hint="docs/images.md shows conversations with images") from error
        questions.append(question)
    if not questions:
        raise UserError(f"{file} has no question", hint="nemotron-h data pictures writes some: OUT/test/NAME.jsonl")
    return questions


def controlled(questions: Sequence[Question], control: str) -> list[Question]:
    """Return a file's questions as a control asks them; of others' images each has those of the next with as many."""
    if control == OWN:
        return list(questions)
    if control == NONE:
        return [question.without_pictures() for question in questions]
    alike: dict[int, list[Question]] = {}
    for question in questions:
        alike.setdefault(len(question.pictures), []).append(question)
    after = {group[n].number: group[(n + 1) % len(group)] for group in alike.values() for n in range(len(group))}
    return [question.with_pictures(after[question.number].pictures) for question in questions]


def digest(question: Question) -> str:
    """Return a hash of all that an answer depends on beside the model."""
    whole = hashlib.sha256()
    for turn in question.turns:
        for part in (turn.role, turn.content, *(picture.read() for picture in turn.images)):
            data = part.encode() if isinstance(part, str) else part
            whole.update(len(data).to_bytes(8, "little") + data)
    return whole.hexdigest()
