"""Read the documents of a blend for contexts: different texts, in the two parts that preparation would put them in."""

from __future__ import annotations

import itertools
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from rich.console import Console

from nemotron_h.core.errors import UserError
from nemotron_h.core.progress import StageProgress
from nemotron_h.data.blend import TEXTS, Blend
from nemotron_h.data.prepare.inputs import Input, find_inputs
from nemotron_h.data.prepare.shards import document_hash, is_validation
from nemotron_h.data.prepare.sources import Bad, is_line_based, plan_shards, read_documents, scan
from nemotron_h.evaluation.long_questions.context import HEADING, quotable, sentences

#: ours: characters of the shortest document that is worth a heading
SHORTEST = 200


class Part(NamedTuple):
    """Documents to train on, and those held out: no text is in both."""

    train: list[str]
    validation: list[str]


@dataclass
class Corpus:
    """Texts of a blend.

    Attributes:
        documents: in the order of the sources, without repetition.
        held_out: hashes of the sentences of held-out documents, which no question to train on quotes.
        skipped: why a document was left out -> how many were.
        licences: of the sources.
    """

    documents: Part = field(default_factory=lambda: Part([], []))
    held_out: set[bytes] = field(default_factory=set)
    skipped: Counter[str] = field(default_factory=Counter)
    licences: list[str] = field(default_factory=list)


def read_corpus(blend: Blend, validation: float, console: Console) -> Corpus:
    """Return all documents of a blend of texts; they stay in memory.

    Args:
        validation: share of documents that are held out, by their hashes.
        console: told of downloads and of files that are left out; for the progress.
    Errors:
        UserError: the blend has no texts, files are not there, or more of a source is unreadable than its `max_bad`.
    """
    if blend.holds() != TEXTS:
        raise UserError(f"--blend {blend.path} holds {blend.holds()}", hint="name a blend of texts")
    if ready := [name for name, source in blend.sources.items() if source.format == "megatron"]:
        raise UserError(f"{blend.path}: sources.{ready[0]} is tokens (format: megatron)", hint="name one of text files")

    def say(text: str) -> None:
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    corpus, seen = Corpus(), set()
    inputs = {name: find_inputs(blend, name, say) for name in blend.sources}
    size = sum(os.path.getsize(file.path) for files in inputs.values() for file in files)
    with StageProgress(console, "reading", size, "bytes") as bar:
        for name, files in inputs.items():
            _read(corpus, seen, blend, name, files, validation, bar)
    corpus.held_out.update(map(document_hash, itertools.chain.from_iterable(map(quotes, corpus.documents.validation))))
    return corpus


def _read(
    corpus: Corpus,
    seen: set[bytes],
    blend: Blend,
    name: str,
    files: Sequence[Input],
    validation: float,
    bar: StageProgress,
) -> None:
    """Add the documents of a source that are in none before."""
    source, bad, total = blend.sources[name], [], 0
    corpus.licences.append(source.licence or "not stated")
    for file in files:
        shards = plan_shards(source, [file], [scan(file.path, is_line_based(source, file.path))])
        for item in read_documents(source, [*itertools.chain.from_iterable(shards)]):
            total += 1
            if isinstance(item, Bad):
                bad.append(item)
                continue
            text = item.text.replace("\r\n", "\n").strip()
            digest = document_hash(text)
            if reason := _reason(text, digest in seen):
                corpus.skipped[reason] += 1
                continue
            seen.add(digest)
            corpus.documents[is_validation(digest, validation)].append(text)
        bar.advance(os.path.getsize(file.path), f"reading {name}")
    if len(bad) > source.max_bad * total:
        raise UserError(
            f"{blend.path}: sources.{name}: {len(bad):,} of {total:,} records cannot be read (max_bad is "
            f"{source.max_bad:.2%}); the first: {bad[0].file}, {bad[0].position}: {bad[0].reason}",
            hint="check format and text_fields, or raise max_bad",
        )
    corpus.skipped["records that cannot be read"] += len(bad)


def quotes(text: str) -> Iterator[str]:
    """Yield the sentences of a text that a question may quote."""
    return (text[begin:end] for begin, end in sentences(text) if quotable(text[begin:end]))


def _reason(text: str, repeated: bool) -> str:
    """Return why a document is left out, or an empty text."""
    if len(text) < SHORTEST:
        return f"documents shorter than {SHORTEST} characters"
    if repeated:
        return "documents of the same text as an earlier one"
    return "documents with headings as contexts have" if HEADING.search(text) else ""
