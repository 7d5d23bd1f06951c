"""`nemotron-h coverage` on two small models: samples, resume, measures, files, and errors before any work."""

from __future__ import annotations

import csv
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from small_model import VOCABULARY
from two_runs import output_of, save_two

from nemotron_h.cli.coverage import coverage as command
from nemotron_h.core.errors import UserError
from nemotron_h.data.tokenizer import train_bpe
from nemotron_h.evaluation.coverage import draw as draws
from nemotron_h.evaluation.coverage.contestant import answer_watch, longest_solution
from nemotron_h.evaluation.coverage.results import Tally
from nemotron_h.evaluation.coverage.samples import Demand, Samples, Solution
from nemotron_h.evaluation.problems.files import read_problems
from nemotron_h.evaluation.problems.generate import TRAIN, generate
from nemotron_h.inference import pool

pytestmark = pytest.mark.usefixtures("megatron")

TASKS = ["--tasks", "modular,countdown", "--count", 3, "--difficulty", 2]
OPTIONS = [*TASKS, "--seconds", "20,40", "--max-tokens", 12, "--temperature", 1]
#: texts in place of those of the random models
RIGHT, WRONG, SILENT = "right", "Answer: 5000\n", "no answer"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    texts = (p.record()["text"] for task in ("modular", "lists") for p in generate(task, 200, [2], 0, TRAIN))
    train_bpe(texts, VOCABULARY, folder)
    return folder


@pytest.fixture(scope="module")
def runs(megatron: None, tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return save_two(tmp_path_factory.mktemp("runs"), tokenizer)


def invoke(*arguments: object) -> str:
    return output_of(command, *arguments)


def texts_of(out: Path, name: str) -> dict[tuple[int, int], tuple[str, int]]:
    lines = [json.loads(line) for line in (out / "samples" / f"{name}.jsonl").read_text().splitlines()]
    assert len({(line["problem"], line["sample"]) for line in lines}) == len(lines)
    return {(line["problem"], line["sample"]): (line["text"], line["tokens"]) for line in lines}


def test_resumed_is_straight(runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through more samples, a stop in the middle, and half a line; samples that are there are not drawn again."""
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    invoke(runs[0], *OPTIONS, "--samples", 4, "--batch", 5, "--out", straight)
    printed = invoke(runs[0], *OPTIONS, "--samples", 2, "--batch", 5, "--out", resumed)
    first = texts_of(resumed, "hybrid")
    assert len(first) == 2 * 6
    assert re.search(r"hybrid: solutions have up to \d+ tokens, samples 12", printed)
    file = resumed / "samples" / "hybrid.jsonl"
    before = file.read_text()
    ended = Demand.ended

    def stopped(self: Demand, problem: int, seconds: float) -> None:
        ended(self, problem, seconds)
        if sum(self._ended) == 15:
            raise KeyboardInterrupt

    monkeypatch.setattr(Demand, "ended", stopped)
    with pytest.raises((KeyboardInterrupt, AssertionError)):
        invoke(runs[0], *OPTIONS, "--samples", 4, "--out", resumed)
    monkeypatch.undo()
    assert len(texts_of(resumed, "hybrid")) == 15
    assert file.read_text().startswith(before)
    file.write_text(file.read_text()[:-20])  # a process that was killed in the middle of a line
    invoke(runs[0], *OPTIONS, "--samples", 4, "--out", resumed)
    assert texts_of(resumed, "hybrid") == texts_of(straight, "hybrid")
    assert file.read_text().startswith(before)
    # nothing is wanted: no model is loaded
    monkeypatch.setattr(draws, "load_model", lambda *a, **k: pytest.fail("the model was loaded"))
    invoke(runs[0], *OPTIONS, "--samples", 3, "--out", resumed)


def _stored(
    out: Path, name: str, text_of: Callable[[int, int], str], cost: float, samples: int, log_of: Callable[[str], float]
) -> None:
    """Replace what a model wrote, so that what it comes to is known."""
    problems, _ = read_problems(out / "problems.jsonl")
    rows = []
    for number, problem in enumerate(problems):
        for sample in range(samples):
            text = text_of(number, sample)
            said = problem.solution + "\n" if text == RIGHT else text
            rows.append(Solution(number, sample, said, 10, log_of(text), cost, "answer"))
    file = out / "samples" / f"{name}.jsonl"
    file.write_text("".join(json.dumps(vars(row)) + "\n" for row in rows))


def test_measures_files_and_crossing(runs: list[Path], tmp_path: Path) -> None:
    """The quick model solves half of its problems with its first samples; the slow one all of them, in the end."""
    out = tmp_path / "out"
    invoke(*runs, *OPTIONS, "--samples", 1, "--out", out)

    def quick(problem: int, sample: int) -> str:
        return (RIGHT if sample % 2 else SILENT) if problem % 2 else WRONG

    def slow(problem: int, sample: int) -> str:
        return RIGHT if sample == 0 else WRONG

    _stored(out, "hybrid", quick, 0.5, 16, lambda text: -1.0 if text == RIGHT else -2.0)
    _stored(out, "transformer", slow, 1.0, 8, lambda text: -1.0 if text == WRONG else -2.0)
    options = [*TASKS, "--max-tokens", 12, "--temperature", 1, "--out", out]
    printed = invoke(*runs, *options, "--samples", 16, "--seconds", "1,2,4,8")
    with (out / "coverage.csv").open() as file:
        rows = {(r["model"], r["task"], r["by"], float(r["at"])): r for r in csv.DictReader(file)}
    for at in (1, 2, 4, 8):
        fast, late = rows["hybrid", "all", "seconds", at], rows["transformer", "all", "seconds", at]
        assert (float(fast["samples"]), float(late["samples"])) == (2 * at, at)
        # half of 16 samples are right, of half of the problems; 1 of 8, of each
        share = 1 - np.prod([(8 - i) / (16 - i) for i in range(2 * at)])
        assert float(fast["coverage"]) == pytest.approx(0.5 * share)
        assert float(late["coverage"]) == pytest.approx(at / 8)
        # silent samples do not vote: one right sample is the majority. The others are outvoted, or tie
        assert float(fast["majority"]) == pytest.approx(0.5 * share, abs=0.02)
        # a score that tells right samples finds each; one that tells wrong ones none, where there is another
        assert float(fast["best_of"]) == pytest.approx(0.5 * share)
        assert float(late["best_of"]) == pytest.approx(1 / 8 if at == 1 else 0)
        assert float(fast["coverage_low"]) <= float(fast["coverage"]) <= float(fast["coverage_high"])
        assert rows["hybrid", "modular", "seconds", at]["problems"] == "3"
        assert fast["lower_bound"] == late["lower_bound"] == "False"
    assert float(rows["transformer", "all", "seconds", 1]["majority"]) == pytest.approx(1 / 8)
    assert float(rows["transformer", "all", "seconds", 2]["majority"]) == pytest.approx(2 / 8 / 2)
    assert {at for model, task, by, at in rows if (model, task, by) == ("hybrid", "all", "samples")} == {1, 2, 4, 8, 16}
    content = json.loads((out / "coverage.json").read_text())
    assert {name: each["dtype"] for name, each in content["settings"]["models"].items()} == {
        "hybrid": "float32",
        "transformer": "float32",
    }
    crossing = content["crossings"][0]
    assert crossing["models"] == ["hybrid", "transformer"]
    # 0.5 x (1 - 1 / C(16, 8)) against 4 of 8
    assert crossing["seconds"] == pytest.approx(4.0)
    assert crossing["changes"] == 1
    assert f"crossing at {crossing['seconds']:.3g} s; at 1 s hybrid solves" in printed
    assert "at 8 s transformer solves 0.500 more" in printed
    for name in ("coverage.svg", "report.html"):
        assert "transformer" in (out / name).read_text()
    # ten tokens a sample: at these costs of a token both models' budgets pay as many
    invoke(*runs, *options, "--samples", 8, "--seconds", "1,2", "--token-seconds", "0.1,0.1")
    with (out / "coverage.csv").open() as file:
        rows = {(r["model"], r["task"], r["by"], float(r["at"])): r for r in csv.DictReader(file)}
    assert [float(rows[name, "all", "seconds", 2]["samples"]) for name in ("hybrid", "transformer")] == [2, 2]
    with pytest.raises(UserError, match="--token-seconds has 1 numbers for 2 models"):
        invoke(*runs, *options, "--seconds", "1", "--token-seconds", "0.1")
    # a budget that pays more than there is may draw: here --samples forbids, and it is said
    printed = invoke(*runs, *options, "--samples", 8, "--seconds", "4,16")
    assert "≥ 1.000" in printed
    assert "there are samples for less than two budgets of both" not in printed


def test_samples_end_at_the_answer_s_line(tokenizer: Path) -> None:
    from nemotron_h.data.tokenizer import load_tokenizer

    text = load_tokenizer(tokenizer)
    complete = answer_watch(text)
    ids = text.text_to_ids("4 + 1 = 5\nThe Answer: 3\nAnswer: 5\nQuestion: more\n")
    ended = [count for count in range(1, len(ids) + 1) if complete(ids[:count])]
    assert [text.ids_to_text(ids[:count]) for count in ended] == ["4 + 1 = 5\nThe Answer: 3\nAnswer: 5\n"]


def test_a_conversation_s_prompt(runs: list[Path], tmp_path: Path) -> None:
    """Questions as turns, in the family's template where a checkpoint has none; a setting that stays."""
    invoke(runs[0], *OPTIONS, "--samples", 1, "--chat", "--out", tmp_path)
    assert json.loads((tmp_path / "samples" / "hybrid.json").read_text())["chat"] is True
    with pytest.raises(UserError, match="was written with chat = true, now it is false"):
        invoke(runs[0], *OPTIONS, "--samples", 1, "--out", tmp_path)


def test_demand_goes_round_and_ends_with_the_budget(tmp_path: Path) -> None:
    samples = Samples(tmp_path, "x", 3)
    demand = Demand(samples, budget=1.0, most=10, seed=0)
    jobs = demand.jobs(7)
    assert [(job.problem if hasattr(job, "problem") else job.prompt, job.sample) for job in jobs] == [
        (0, 0), (1, 0), (2, 0), (0, 1), (1, 1), (2, 1), (0, 2),
    ]  # fmt: skip
    assert len({job.seed for job in jobs}) == 7
    for job in jobs:
        demand.ended(job.prompt, 0.6 if job.prompt == 0 else 0.3)
    assert [(job.prompt, job.sample) for job in demand.jobs(10)] == [(1, 2), (2, 2), (1, 3), (2, 3)]
    assert demand.is_met()
    with pytest.raises(UserError, match=r"--seconds 0\.2 is less than a sample of x takes: 0\.3 s"):
        demand.check_budget("x", 0.2)
    demand.check_budget("x", 0.4)
    assert demand.progress() == pytest.approx((1 + 0.6 + 0.6) / 3)


def test_budget_below_one_sample(runs: list[Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--seconds 1e-09 is less than a sample of hybrid takes"):
        invoke(runs[0], *TASKS, "--max-tokens", 4, "--seconds", "1e-9,1", "--samples", 2, "--out", tmp_path)
    assert len(texts_of(tmp_path, "hybrid")) >= 6


def test_refusals(runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = ["--out", tmp_path / "out"]
    copy = tmp_path / "elsewhere" / "hybrid"
    shutil.copytree(runs[0], copy)
    for arguments, words in (
        ([runs[0], "--seconds", "1", "--tasks", "arithmetics"], "--tasks = 'arithmetics'"),
        ([runs[0], "--seconds", "1", "--tasks", "absent.jsonl"], "absent.jsonl: No such file"),
        ([runs[0], "--seconds", "1;2"], "--seconds '1;2' is no list of seconds"),
        ([runs[0], "--seconds", "0,1"], "--seconds '0,1' is no list of seconds"),
        ([runs[0], "--seconds", "nan"], "--seconds 'nan' is no list of seconds"),
        ([runs[0], "--seconds", "1", "--top-p", "0"], "top-p = 0"),
        ([runs[0], "--seconds", "1", "--temperature", "0"], "--temperature 0 draws the same sample 256 times"),
        ([runs[0], "--seconds", "1", "--dtype", "int8"], "--dtype int8 is unknown"),
        ([runs[0], runs[0], "--seconds", "1"], "is named twice"),
        ([runs[0], copy, "--seconds", "1"], "two runs have the name hybrid-1"),
        ([tmp_path / "none", "--seconds", "1"], "none"),
    ):
        with pytest.raises(UserError, match=re.escape(words)):
            invoke(*arguments, *out)
    monkeypatch.setattr(pool, "available", lambda device: 10**4)
    with pytest.raises(UserError, match="no room for a sequence of"):
        invoke(runs[0], *OPTIONS, *out)
    monkeypatch.undo()
    invoke(runs[0], *OPTIONS, "--samples", 1, *out)
    for changed, words in (
        (["--temperature", 0.5], "was written with temperature = 1.0, now it is 0.5"),
        (["--seed", 3], "problems.jsonl has other problems than this command asks for"),
        (["--batch", 2], "was written with batch = 256, now it is 2"),
    ):
        with pytest.raises(UserError, match=re.escape(words)):
            invoke(runs[0], *OPTIONS, *changed, *out)
    file = tmp_path / "out" / "samples" / "hybrid.jsonl"
    file.write_text("{}\n" + file.read_text())
    with pytest.raises(UserError, match=r"hybrid\.jsonl, line 1 is no solution"):
        invoke(runs[0], *OPTIONS, *out)


def test_a_tokenizer_that_lacks_characters() -> None:
    lossy = SimpleNamespace(path="tok", text_to_ids=lambda text: list(text), ids_to_text=lambda ids: "".join(ids))
    problems = generate("modular", 2, [2], 0, TRAIN)
    assert longest_solution(lossy, problems) == max(len(problem.solution) for problem in problems)
    lossy.ids_to_text = lambda ids: "".join(ids).replace("(", "<unk>").replace(")", "<unk>")
    with pytest.raises(UserError, match=r'tokenizer in tok .* a problem of modular: it lacks "\(\)"'):
        longest_solution(lossy, problems)
    lossy.ids_to_text = lambda ids: "".join(ids).replace("\n", " ")
    with pytest.raises(UserError, match=r'it lacks "\\n"'):
        longest_solution(lossy, problems)


def test_a_tally_counts_samples_that_have_no_answer(tmp_path: Path) -> None:
    problem = generate("countdown", 1, [2], 0, TRAIN)[0]
    samples = Samples(tmp_path, "x", 1)
    samples.settings = {"batch": 4}
    for number, text in enumerate((problem.solution, "Answer: 1 + 1\n", "Answer: none\n", "")):
        samples.by_problem[0][number] = Solution(0, number, text, 5, -0.5, 0.25, "end")
    tally = Tally.of("x", samples, [problem])
    assert tally.right[0].tolist() == [1, 0, 0, 0]
    assert [vote is None for vote in tally.votes[0]] == [False, False, True, True]
    assert tally.affordable(0.75).tolist() == [3]
    assert tally.coverage(np.array([3])).tolist() == [0.75]
    elsewhere = Tally.of("x", samples, [problem], token_seconds=0.1)
    assert elsewhere.affordable(1.5).tolist() == [3], "a sample has five tokens"
    assert elsewhere.seconds == pytest.approx(2)
