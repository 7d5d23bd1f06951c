"""`nemotron-h ruler` on two small models: answers, resume, several models, conversations."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
from small_model import VOCABULARY
from two_runs import output_of, save_two

from nemotron_h.cli.ruler import ruler as command
from nemotron_h.core.errors import UserError
from nemotron_h.data.tokenizer import load_tokenizer, train_bpe
from nemotron_h.evaluation import continuing
from nemotron_h.evaluation.long_context import answers as answers_module
from nemotron_h.evaluation.long_context.answers import line_watch
from nemotron_h.evaluation.long_context.item import read_items
from nemotron_h.evaluation.long_context.make import Maker
from nemotron_h.evaluation.long_context.scores import score
from nemotron_h.evaluation.long_context.texts import Texts
from nemotron_h.evaluation.records import Records
from nemotron_h.inference.generate import generate
from nemotron_h.inference.model import load_model
from nemotron_h.inference.sampling import Sampling

pytestmark = pytest.mark.usefixtures("megatron")

TASKS = ["--tasks", "needle,phonebook", "--lengths", "600,450"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    maker = Maker("needle", 2000, 0, Texts(), lambda prompt, prefix: len(prompt))
    train_bpe([item.input for item in maker.items(20)], VOCABULARY, folder)
    return folder


@pytest.fixture(scope="module")
def runs(megatron: None, tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return save_two(tmp_path_factory.mktemp("runs"), tokenizer)


def invoke(*arguments: object) -> str:
    return output_of(command, *arguments)


def answers_of(out: Path, name: str) -> dict[str, str]:
    lines = [json.loads(line) for line in (out / "answers" / f"{name}.jsonl").read_text().splitlines()]
    assert len({line["key"] for line in lines}) == len(lines)
    return {line["key"]: line["answer"] for line in lines}


def test_answers_are_those_of_a_prompt_alone(runs: list[Path], tokenizer: Path, tmp_path: Path) -> None:
    """Batched, greedy, in items that models of one tokenizer share; scored as they are written."""
    printed = invoke(*runs, *TASKS, "--samples", 2, "--out", tmp_path)
    (file,) = (tmp_path / "items").iterdir()
    items, text = read_items(file), load_tokenizer(tokenizer)
    assert len(items) == 2 * 2 * 2
    whole = line_watch(text)
    with (tmp_path / "ruler.csv").open() as opened:
        rows = {(row["model"], row["task"], row["length"]): float(row["score"]) for row in csv.DictReader(opened)}
    for run in runs:
        checkpoint = run / "checkpoints" / "step-000001"
        model = load_model(checkpoint, dtype=torch.float32, device="cpu", tokens=text.vocab_size)
        answers = answers_of(tmp_path, run.name)
        for item in items:
            ids = text.text_to_ids(item.input)
            assert len(ids) == item.tokens
            (alone,) = generate(model, [ids], max_tokens=24, sampling=Sampling(temperature=0), stop_ids=[text.eod_id])
            if item.task == "phonebook":  # no more than a line is looked at
                alone = next((alone[:end] for end in range(1, len(alone)) if whole(alone[:end])), alone)
            assert answers[item.key] == text.ids_to_text(alone)
        for task in ("needle", "phonebook"):
            scores = [
                score(item.rule, answers[item.key], item.references)
                for item in items
                if (item.task, item.length) == (task, 450)
            ]
            assert rows[run.name, task, "450"] == 100 * sum(scores) / 2
        assert f"{run.name}" in printed
    assert "transformer" in (tmp_path / "depths.svg").read_text()


def test_resumed_is_straight(runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through a stop in the middle and half a line; more samples and lengths run what is new."""
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    invoke(runs[0], *TASKS, "--samples", 3, "--out", straight)
    add = Records.add

    def stopped(self: Records, record: object) -> None:
        add(self, record)
        if len(self.records) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(Records, "add", stopped)
    with pytest.raises((KeyboardInterrupt, AssertionError)):
        invoke(runs[0], *TASKS, "--samples", 2, "--out", resumed)
    monkeypatch.undo()
    assert len(answers_of(resumed, "hybrid")) == 4
    file = resumed / "answers" / "hybrid.jsonl"
    file.write_text(file.read_text()[:-20])  # a process that was killed in the middle of a line
    first = file.read_text().rpartition("\n")[0]
    invoke(runs[0], *TASKS, "--samples", 3, "--out", resumed)
    assert answers_of(resumed, "hybrid") == answers_of(straight, "hybrid")
    assert file.read_text().startswith(first)
    assert (resumed / "ruler.csv").read_text() == (straight / "ruler.csv").read_text()
    # nothing is new: no model is loaded
    monkeypatch.setattr(continuing, "load_model", lambda *a, **k: pytest.fail("the model was loaded"))
    invoke(runs[0], "--tasks", "needle", "--lengths", 450, "--samples", 2, "--out", resumed)
    with pytest.raises(UserError, match=r"hybrid\.jsonl was written with chat = false, now it is true"):
        invoke(runs[0], *TASKS, "--samples", 1, "--chat", "--out", resumed)


def test_conversations(runs: list[Path], tokenizer: Path, tmp_path: Path) -> None:
    """The family's template where a checkpoint has none, counted in the length; the prefix begins the answer."""
    items = tmp_path / "items.jsonl"
    invoke(runs[0], "--tasks", "needle", "--lengths", 900, "--samples", 2, "--chat", "--export", items)
    text = load_tokenizer(tokenizer)
    (model,) = answers_module.answerers(runs[:1], chat=True)
    for item in read_items(items):
        ids = model.ids(item.prompt, item.prefix)
        assert len(ids) == item.tokens > len(text.text_to_ids(item.input))
        asked = text.ids_to_text(ids)
        assert asked.startswith("<SPECIAL_11>User")
        assert asked.endswith(f"Assistant\n{item.prefix}")
        assert item.prompt in asked
    invoke(runs[0], "--items", items, "--chat", "--out", tmp_path / "out")
    assert len(answers_of(tmp_path / "out", "hybrid")) == 2
    text.ids_to_text = lambda ids: "".join("x" for _ in ids)
    model.subject = type(model.subject)(model.subject.checkpoint, model.subject.definition, text, {})
    with pytest.raises(UserError, match="does not give back an item of needle"):
        model.check(read_items(items))


def test_a_line_is_whole_when_it_ends(tokenizer: Path) -> None:
    text = load_tokenizer(tokenizer)
    ids = text.text_to_ids("\n 555-0199\nWhat is")
    whole = line_watch(text)
    ends = [text.ids_to_text(ids[:end]) for end in range(1, len(ids) + 1) if whole(ids[:end])]
    assert ends == ["\n 555-0199\n"]
