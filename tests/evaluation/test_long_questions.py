"""Questions to long contexts: answers follow from the text alone, no document is in two parts, training reads them."""

from __future__ import annotations

import itertools
import json
import random
import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from rich.console import Console
from typer.testing import CliRunner

from nemotron_h.cli.data import app
from nemotron_h.core.errors import UserError
from nemotron_h.data.blend import load_blend
from nemotron_h.data.prepare.pipeline import prepare
from nemotron_h.data.tokenizer import load_tokenizer, train_bpe
from nemotron_h.evaluation.long_context.item import read_items
from nemotron_h.evaluation.long_context.results import Answered, results_of
from nemotron_h.evaluation.long_questions.context import ABSENT, fill, sentences
from nemotron_h.evaluation.long_questions.folder import lengths_of
from nemotron_h.evaluation.long_questions.kinds import KINDS, kinds_named

LENGTHS = {1024: 0.4, 2048: 0.6}
SHARED = "All rights to this text are kept by those who wrote it."
BAD = '{"text": 3}\n'


def text_of(number: int) -> str:
    """A document of lines of sentences, some of them in several documents; each says whose it is."""
    rng = random.Random(number)
    words = ["".join(rng.choices("aeioubdklmnrst", k=rng.randint(4, 7))) for _ in range(40)]
    common = ["river", "mountain", "harbour", "orchard", "library", "station"]

    def sentence(place: int) -> str:
        told = [*rng.choices(words, k=6), rng.choice(common)]
        return f"Sentence {place} of text {number} has {' '.join(told)}{rng.choice('.!?')}"

    lines = [" ".join(sentence(10 * line + each) for each in range(3)) for line in range(rng.randint(2, 12))]
    return "\n\n".join([f"Title {number}", *lines, SHARED])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("long_questions")
    texts = [text_of(number) for number in range(260)]
    records = [json.dumps({"text": text}) + "\n" for text in [*texts[:200], texts[0], "too short"]]
    (folder / "web.jsonl").write_text("".join(records) + BAD)
    (folder / "books").mkdir()
    pq.write_table(pa.table({"text": texts[:3]}), folder / "again.parquet")
    for number in range(200, 260, 20):  # longer than a context
        (folder / "books" / f"{number}.txt").write_text("\n\n".join(texts[number : number + 20]))
    sources = {
        "web": {"category": "web", "format": "jsonl", "path": "web.jsonl", "licence": "ours"},
        "again": {"category": "web", "format": "parquet", "path": "again.parquet", "licence": "ours"},
        "books": {"category": "web", "format": "text", "path": "books", "licence": "theirs"},
    }
    blend = {"name": "texts", "tokenizer": {"kind": "bpe", "vocab_size": 500}, "sources": sources}
    (folder / "texts.yaml").write_text(yaml.safe_dump({**blend, "phases": [{"name": "all", "weights": {"web": 100}}]}))
    (folder / "tokenizer").mkdir()
    train_bpe(texts[:40], 500, folder / "tokenizer")
    return folder


def write(folder: Path, out: str, **options: Any) -> str:
    """Write conversations, and return what the command prints."""
    chosen = {"blend": folder / "texts.yaml", "tokenizer": folder / "tokenizer", "out": folder / out}
    chosen |= {"lengths": "1024:2,2048:3", "validation": 0.2, "absent": 0.25, **options}
    flags = [part for name, value in chosen.items() for part in (f"--{name}", str(value))]
    result = CliRunner().invoke(app, ["questions", *flags], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="module")
def printed(folder: Path) -> str:
    return write(folder, "out")


def conversations(folder: Path, out: str = "out") -> list[list[tuple[str, str]]]:
    """Questions and answers; the first question of each has the context."""
    found = []
    for line in (folder / out / "questions.jsonl").read_text().splitlines():
        texts = [message["content"] for message in json.loads(line)["messages"]]
        found.append(list(zip(texts[::2], texts[1::2], strict=True)))
    return found


def asked(prompt: str) -> tuple[dict[str, str], str]:
    """Documents by their headings, and the question behind them."""
    _, *parts = re.split(r"^\[(Document \d+)\]\n", prompt, flags=re.MULTILINE)
    documents = dict(zip(parts[::2], parts[1::2], strict=True))
    last = list(documents)[-1]
    place = max(documents[last].rfind(f"\n\n{word} ") for word in ("Which", "What", "How", "In which"))
    question = documents[last][place + 2 :]
    documents[last] = documents[last][:place]
    return {name: text.strip() for name, text in documents.items()}, question


def solved(documents: dict[str, str], question: str) -> tuple[str, str]:
    """Return kind and answer by the texts alone; written apart from the generator."""
    whole = "\n\n".join(documents.values())
    first, _, rest = question.partition("\n")
    if first == "Which document has this sentence?":
        having = [name for name, text in documents.items() if rest in text]
        assert len(having) < 2
        assert whole.count(rest) == len(having)
        return "where", having[0] if having else ABSENT
    if first == "Which sentence follows this one in its document?":
        if rest not in whole:
            return "next", ABSENT
        assert whole.count(rest) == 1
        after = next(text for text in documents.values() if rest in text).split(rest)[1].lstrip()
        return "next", re.match(r"[^\n]*?[.!?](?=\s|$)|[^\n]*", after)[0]
    if counted := re.fullmatch(r'How many of the documents have the word "(\w+)", .*', question):
        return "count", str(sum(bool(re.search(rf"\b{counted[1]}\b", text)) for text in documents.values()))
    if first.startswith("In which order"):
        quoted = dict(line.split(". ", 1) for line in rest.split("\n"))
        assert all(whole.count(quote) == 1 for quote in quoted.values())
        return "order", ", ".join(sorted(quoted, key=lambda letter: whole.index(quoted[letter])))
    attribute, key = re.fullmatch(r"What is the (.+) of (\S+)\?", question).groups()
    steps = 0
    while True:
        stated = re.findall(rf"The {attribute} of {key} is (that of )?(\S+)\.", whole)
        assert len(stated) < 2
        if not stated:
            return ("chain" if steps else "fact"), ABSENT
        (link, value), steps = stated[0], steps + 1
        if not link:
            return ("chain" if steps > 1 else "fact"), value
        key = value


def test_answers_follow_from_the_text_alone(folder: Path, printed: str) -> None:
    kinds, lacking = Counter(), Counter()
    for several in conversations(folder):
        documents, first = asked(several[0][0])
        texts = [first, *(question for question, _ in several[1:])]
        assert len({*texts}) == len(texts) <= 8
        for text, (_, answer) in zip(texts, several, strict=True):
            kind, right = solved(documents, text)
            assert answer == right, (kind, text)
            kinds[kind] += 1
            lacking[kind] += right == ABSENT
    assert kinds.keys() == KINDS.keys()
    assert min(kinds.values()) > 0.05 * kinds.total(), kinds
    assert lacking["count"] == lacking["order"] == 0
    assert all(lacking[kind] for kind in ("where", "next", "fact", "chain"))
    assert lacking.total() / kinds.total() == pytest.approx(0.25, abs=0.08)
    told = [*map(int, re.findall(r"^(?:chain|count|fact|next|order|where) +(\d+) +\d+ +(\d+)", printed, re.M)[0])]
    assert 0 < sum(told) == kinds[re.findall(r"^(chain|count|fact|next|order|where) ", printed, re.M)[0]]


def test_lengths_shares_and_what_is_left_out(folder: Path, printed: str) -> None:
    tokenizer = load_tokenizer(folder / "tokenizer")
    sizes = [sum(len(tokenizer.text_to_ids(part)) for pair in each for part in pair) for each in conversations(folder)]
    assert all(size < 2048 for size in sizes)
    assert len(sizes) > 30
    small = [size for size in sizes if size < 1024]
    assert sum(small) / sum(sizes) == pytest.approx(0.4, abs=0.05)
    assert min(small) > 512
    assert sum(size > 1700 for size in sizes) > 0.9 * (len(sizes) - len(small))
    assert "left out: 1: documents shorter than" in printed
    assert "left out: 4: documents of the same text" in printed
    assert "left out: 1: records that cannot be read" in printed


def test_no_document_is_in_two_parts(folder: Path, printed: str) -> None:
    prepare(load_blend(folder / "out/questions.yaml"), folder / "data", workers=1, console=Console(quiet=True))
    items = read_items(folder / "out/items.jsonl")
    held_out = {item.prompt.rpartition("\n\n")[0] for item in items}
    parts: dict[bool, set[str]] = {True: set(), False: set()}
    quoted: dict[bool, set[str]] = {True: set(), False: set()}
    counts = Counter()
    for several in conversations(folder):
        part = any(several[0][0].startswith(context) for context in held_out)
        counts[part] += 1
        parts[part] |= {*re.findall(r"of text (\d+) has", several[0][0])}
        texts = [asked(several[0][0])[1], *(question for question, _ in several[1:])]
        quoted[part] |= {line for question in texts for line in question.split("\n")}
    assert counts[True] > 4
    assert not parts[True] & parts[False]
    assert SHARED not in quoted[False]
    # and preparation holds out the same conversations
    from nemotron_h.data.manifest import load_manifest

    source = load_manifest(folder / "data", "questions").sources["questions"]
    found = [source.splits[name].documents for name in ("train", "validation")]
    assert found == [counts[False], counts[True]]


def test_items_are_scored_by_their_only_answer(folder: Path, printed: str) -> None:
    items = read_items(folder / "out/items.jsonl")
    for item in items:
        assert (item.task, item.references[0]) == solved(*asked(item.prompt))
        assert all(0 <= depth <= 1 for depth in item.depths)
    right = {item.key: f" {item.references[0]}\nand more" for item in items}
    wrong = {item.key: f"It is {item.references[0]}" for item in items}
    for texts, score in ((right, 100), (wrong, 0)):
        results = results_of({"model": Answered(items, texts)})
        assert {row["score"] for row in results.rows} == {score}
        assert {*results.tasks} == {*KINDS}
    assert any("no task of RULER" in remark for remark in results.remarks)


def test_the_same_seed_writes_the_same_files(folder: Path, printed: str) -> None:
    for out, options in (("again", {}), ("other", {"seed": 1}), ("few", {"tokens": 20_000, "kinds": "next,order"})):
        write(folder, out, **options)
    first, again, other, few = (conversations(folder, out) for out in ("out", "again", "other", "few"))
    assert first == again != other
    assert {solved(*asked(pairs[0][0]))[0] for pairs in few} == {"next", "order"}
    assert len(few) < 0.5 * len(first)
    assert "of blue" not in few[0][0][0]


def test_packed_windows_learn_the_answers_alone(folder: Path, printed: str) -> None:
    from nemotron_h.data.feed.sft_module import ConversationDataModule

    sizes = {"seq_length": 2048, "global_batch_size": 4, "too_long": "drop", "seed": 5}
    data = ConversationDataModule(blend=str(folder / "out/questions.yaml"), root=str(folder / "data"), **sizes)
    data.trainer = SimpleNamespace(global_step=0, max_steps=10, limit_val_batches=1.0)
    data.setup()
    data.data_sampler.data_parallel = lambda: (0, 1)
    batches = [*itertools.islice(data.data_sampler.transform_dataloader(data.train_dataloader()), 4)]
    told = []
    for batch in batches:
        for row, mask in zip(batch["labels"], batch["loss_mask"], strict=True):
            text = data.tokenizer.ids_to_text(row[mask > 0].tolist())
            told += [part.strip() for part in text.split("<SPECIAL_11>") if part.strip()]
    answers = {answer for several in conversations(folder) for _, answer in several}
    assert len(told) > 16
    assert not {*told} - answers
    assert any(int(batch["seq_idx"].max()) > 0 for batch in batches)  # several conversations in a window


def test_documents_are_used_up_in_whole_sentences() -> None:
    texts = ["One two. Three four five. " * 200, "x " * 5000, "First. Second."]
    pool, chosen, passed = list(texts), [], 0
    while pool:
        found, unfit = fill(pool, 150, lambda text: len(text.split()))
        passed += unfit
        chosen += found
    assert passed == 1
    assert chosen[0] == texts[2]
    assert "".join(chosen[1:]).replace(" ", "") == texts[0].replace(" ", "")
    assert all(len(part.split()) <= 150 and part[-1] in ". " for part in chosen)
    text = "A b. C d!  E\n\nF. G"
    assert [text[begin:end] for begin, end in sentences(text)] == ["A b.", "C d!", "E", "F.", "G"]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda folder: lengths_of("512"), "1,024 tokens or more"),
        (lambda folder: lengths_of("4k,4000"), "there twice"),
        (lambda folder: kinds_named("where,wher"), "where"),
        (lambda folder: write(folder, "none", lengths="1M"), "give no context of 1,000,000"),
        (lambda folder: write(folder, "none", blend="sft_sample"), "holds conversations"),
        (lambda folder: write(folder, "none", tokens="many"), "--tokens"),
    ],
)
def test_mistakes_are_told(folder: Path, call: Any, words: str) -> None:
    with pytest.raises(UserError, match=re.escape(words)):
        call(folder)
    assert not (folder / "none/questions.jsonl").exists()
