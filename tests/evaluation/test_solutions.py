"""`nemotron-h data solutions` on a small model: what is kept, which pairs there are, blends, resume, refusals."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
from rich.console import Console
from save_checkpoint import save
from small_model import VOCABULARY, small_config, small_model
from two_runs import output_of

from nemotron_h.cli.solutions import solutions as command
from nemotron_h.core.errors import UserError
from nemotron_h.data.blend import PAIRS, load_blend
from nemotron_h.data.chat import ChatTemplate
from nemotron_h.data.messages import ASSISTANT, SYSTEM, USER, Turn, read_conversation
from nemotron_h.data.pairs import read_pair
from nemotron_h.data.prepare.pipeline import prepare
from nemotron_h.data.tokenizer import load_tokenizer, train_bpe
from nemotron_h.evaluation.coverage import draw as draws
from nemotron_h.evaluation.coverage.contestant import answer_watch, contestants
from nemotron_h.evaluation.coverage.samples import Demand, Samples, Solution
from nemotron_h.evaluation.problems.files import read_problems, training_problems
from nemotron_h.evaluation.problems.generate import TRAIN, generate, write_folder
from nemotron_h.evaluation.problems.solutions import ALL, RIGHT, SHORTEST, TEXT_SOURCE, Judged, Written

pytestmark = pytest.mark.usefixtures("megatron")


@pytest.fixture(scope="module")
def problems(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("problems")
    write_folder(folder, ["modular", "countdown"], 3, 2, [2], 0)
    return folder


@pytest.fixture(scope="module")
def run(megatron: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    (folder / "tokenizer").mkdir()
    texts = (p.record()["text"] for task in ("modular", "lists") for p in generate(task, 200, [2], 0, TRAIN))
    train_bpe(texts, VOCABULARY, folder / "tokenizer")
    data = {"tokenizer": str(folder / "tokenizer")}
    save(small_model(small_config()), folder / "small" / "checkpoints" / "step-000001", data=data)
    return folder / "small"


def invoke(*arguments: object) -> str:
    return output_of(command, *arguments)


def lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_what_is_kept_and_which_pairs_there_are() -> None:
    problem = generate("modular", 1, [2], 0, TRAIN)[0]
    right = [f"step {i}\nAnswer: {problem.answer}" for i in range(4)]
    wrong = [f"Answer: {1000 + i}" for i in range(6)]
    texts = [wrong[0], *right, right[1], *wrong, "no answer"]
    written = [Written(text, 9 - (text == right[2]), True) for text in texts]
    judged = Judged.of(problem, [*written, Written(f"{right[0]} more", 1, False), Written("", 1, True)])
    assert (judged.samples, judged.unfinished, judged.right_samples) == (15, 2, 5)
    assert judged.kept(RIGHT) == right
    assert judged.kept(ALL) == [*right, wrong[0], *wrong[1:], "no answer"]
    assert judged.kept(SHORTEST) == [right[2]]
    every = judged.pairs(100, 0)
    assert sorted(every) == sorted(itertools.product(right, [*wrong, "no answer"]))
    four = judged.pairs(4, 0)
    assert four == every[:4]
    assert len({chosen for chosen, _ in four}) == len({rejected for _, rejected in four}) == 4
    assert judged.pairs(4, 1) != four
    for one_sided in (right, wrong):
        alone = Judged.of(problem, [Written(text, 1, True) for text in one_sided])
        assert alone.pairs(3, 0) == []
    many = Judged.of(problem, [Written(text, 1, True) for text in (*right, *wrong)])  # 4 and 6 share a factor
    assert len({*many.pairs(24, 0)}) == 24


def test_without_a_budget_the_samples_of_a_problem_begin_together(tmp_path: Path) -> None:
    demand = Demand(Samples(tmp_path, "x", 3), float("inf"), 2, 0)
    jobs = demand.jobs(5)
    assert [(job.prompt, job.sample) for job in jobs] == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0)]
    for job in jobs:
        demand.ended(job.prompt, 0.5)
    assert demand.progress() == pytest.approx(5 / 6)
    assert not demand.is_met()
    assert [(job.prompt, job.sample) for job in demand.jobs(5)] == [(2, 1)]


def test_files_of_texts_and_of_conversations(problems: Path, run: Path, tmp_path: Path) -> None:
    """With texts that are known in place of the random model's: pairs, solutions, and their tokens once prepared."""
    asked = training_problems(problems)
    assert [p.task for p in asked] == ["countdown"] * 3 + ["modular"] * 3
    for name, options in (("plain", []), ("chat", ["--chat", "--thinking", "on"])):
        out = tmp_path / name
        options = [run, "--problems", problems, "--out", out, "--max-tokens", 12, *options]
        invoke(*options, "--samples", 2, "--pairs", 0)
        (file,) = (out / "samples").glob("*.jsonl")
        drawn = lines(file)
        assert len({(line["problem"], line["sample"]) for line in drawn}) == len(drawn) == 12
        said = [[asked[n].solution, "Answer: 5000"] for n in range(6)]
        said[0][0], said[1][1] = "Answer: 77", asked[1].solution  # all wrong, all right
        thought = "<think>\nAnswer: 3\n</think>\n" if name == "chat" else ""
        rows = [Solution(n, s, f"{thought}{said[n][s]}\n", 9, -1.0, 0.1, "answer") for n in range(6) for s in range(2)]
        file.write_text("".join(json.dumps(vars(row)) + "\n" for row in rows))
        printed = invoke(*options, "--samples", 2)
        assert "no pair: 1 problems without a wrong solution, 1 without a right one" in printed
        pairs = lines(out / "pairs.jsonl")
        assert [pair["prompt"] for pair in pairs] == [p.question for p in asked[2:]]
        assert {(pair["chosen_reward"], pair["rejected_reward"]) for pair in pairs} == {(1.0, 0.0)}
        assert [pair["chosen"] for pair in pairs] == [thought + p.solution for p in asked[2:]]
        kept = [record for task in ("countdown", "modular") for record in lines(out / TRAIN / f"{task}.jsonl")]
        assert [record["text"] for record in kept] == [f"{p.prompt}{thought}{p.solution}\n" for p in asked[1:]]
        turns = read_conversation(kept[0], "messages")
        assert [turn.role for turn in turns] == [*([SYSTEM] if thought else []), USER, ASSISTANT]
        blend = load_blend(out / "pairs.yaml")
        assert blend.holds() == PAIRS
        prepare(blend, out / "data", workers=1, force=False, console=Console(quiet=True))
        tokenizer = load_tokenizer(out / "data" / "pairs" / "tokenizer")
        template = ChatTemplate((out / "data" / "pairs" / "chat_template.jinja").read_text(), tokenizer)
        pair = read_pair(pairs[0])
        assert (pair.chosen[0] == Turn(SYSTEM, "detailed thinking on", trained=False)) is bool(thought)
        ids = template.encode(pair.chosen).ids
        (model,) = contestants([run], asked, *((True, "on") if thought else (False,)))
        assert ids[: len(model.prompts[2])] == model.prompts[2]  # what a run trains on begins with what was asked
        if not thought:
            assert ids == [*tokenizer.text_to_ids(asked[2].record()["text"]), tokenizer.eod_id]
        # another choice leaves nothing of this one
        invoke(*options, "--samples", 2, "--pairs", 0, "--keep", "shortest-right")
        assert not list(out.glob("pairs*"))


def test_resumed_is_straight_and_refusals(
    problems: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = problems / TRAIN / "modular.jsonl"
    options = [run, "--problems", file, "--max-tokens", 8, "--batch", 4, "--temperature", 1]
    invoke(*options, "--samples", 3, "--out", tmp_path / "straight")
    invoke(*options, "--samples", 1, "--out", tmp_path / "resumed")
    invoke(*options, "--samples", 3, "--out", tmp_path / "resumed")
    straight, resumed = (
        {(line["problem"], line["sample"]): line["text"] for line in lines(tmp_path / each / "samples" / "small.jsonl")}
        for each in ("straight", "resumed")
    )
    assert straight == resumed
    assert len(straight) == 9
    monkeypatch.setattr(draws, "load_model", lambda *a, **k: pytest.fail("the model was loaded"))
    out = ["--out", tmp_path / "straight"]
    for arguments, words in (
        (["--keep", "best"], "--keep = 'best'"),
        (["--temperature", 0], "--temperature 0 draws the same sample 4 times"),
        (["--thinking", "on"], "--thinking on is for conversations"),
        (["--chat", "--thinking", "maybe"], "--thinking = 'maybe'"),
        (["--thought-budget", 4], "was written with thought_budget = null, now it is 4"),
        (["--problems", problems / "test.jsonl"], "has other problems than this command asks for"),
        (["--problems", tmp_path], r"has no train/\*.jsonl"),
    ):
        with pytest.raises(UserError, match=words):
            invoke(*options, *out, *arguments)


def test_problems_that_ask_for_thoughts_and_for_none(tmp_path: Path) -> None:
    """The answer stands behind the thought, which has the steps; the problems can be read again."""
    write_folder(tmp_path, ["arithmetic"], 6, 1, [2], 0, thoughts=True)
    records = lines(tmp_path / TRAIN / "arithmetic.jsonl")
    asked = training_problems(tmp_path)
    assert asked == generate("arithmetic", 6, [2], 0, TRAIN) == read_problems(tmp_path / TRAIN / "arithmetic.jsonl")[0]
    for number, (record, problem) in enumerate(zip(records, asked, strict=True)):
        system, user, answer = (message["content"] for message in record["messages"])
        assert user == problem.question
        assert system == f"detailed thinking {'off' if number % 2 else 'on'}"
        thought = "" if number % 2 else "\n" + "\n".join(problem.steps) + "\n"
        assert answer == f"<think>{thought}</think>\nAnswer: {problem.answer}"
        assert record["text"] == problem.record()["text"]


def test_a_sample_goes_on_behind_an_answer_in_a_thought(run: Path) -> None:
    tokenizer = load_tokenizer(run.parent / "tokenizer")
    text = "4 + 1\nAnswer: 5\n</think>\nso\nAnswer: 6\n"
    for opening, said in (("<think>\n", text), ("", f"<think>\n{text}")):
        complete, ids = answer_watch(tokenizer, opening), tokenizer.text_to_ids(said)
        assert [count for count in range(1, len(ids) + 1) if complete(ids[:count])] == [len(ids)]


def test_a_template_that_begins_a_thought(problems: Path, run: Path, tmp_path: Path) -> None:
    """Its prompts do, and samples are kept with what it wrote before them."""
    source = TEXT_SOURCE + "{% if add_generation_prompt %}{{ '<think>\n' }}{% endif %}"
    (run.parent / "tokenizer" / "chat_template.jinja").write_text(source)
    try:
        (model,) = contestants([run], training_problems(problems), True)
        assert model.opening == "<think>\n"
        assert model.subject.tokenizer.ids_to_text(model.prompts[0]).endswith("\n<think>\n")
        options = ["--samples", 1, "--max-tokens", 4, "--chat", "--thought-budget", 0]
        invoke(run, "--problems", problems, "--out", tmp_path, *options)
        texts = [line["text"] for line in lines(tmp_path / "samples" / "small.jsonl")]
        end = model.subject.tokenizer.ids_to_text(model.subject.tokenizer.text_to_ids("</think>")[:4])
        assert texts == [f"<think>\n{end}"] * 6  # a prompt that ends a line: the thought ends before it has begun
    finally:
        (run.parent / "tokenizer" / "chat_template.jinja").unlink()
