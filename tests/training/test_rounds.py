"""`nemotron-h reason`: rounds of sampling, pairs, preference training and measurement; the end, resuming, refusals."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from small_run import Small

from nemotron_h.core.errors import UserError
from nemotron_h.evaluation.coverage import draw as draws
from nemotron_h.evaluation.problems.files import read_problems, training_problems
from nemotron_h.evaluation.problems.generate import write_folder
from nemotron_h.launch.runs import Run, write_recipe
from nemotron_h.reasoning.rounds import Rounds
from nemotron_h.recipe.compose import compose

pytestmark = pytest.mark.slow

STEPS, SAMPLES = 2, 4


def recipe_file(small: Small, name: str = "reason") -> Path:
    """The recipe of `Small` as two rounds from the run `straight`."""
    return small.variant(
        name,
        ("- /base/pretrain", "- /base/preference"),
        (
            "tokens: 6144 # 12 steps",
            f"stage: reason\ntokens: {STEPS * 1024}\npreference: {{loss: dpo}}\nreason:\n"
            f"  start: {small.run_dir('straight')}\n  problems: {small.folder / 'problems'}\n"
            f"  rounds: 2\n  samples: {SAMPLES}\n  pairs: 3\n  max_tokens: 3",
        ),
        (str(small.folder / "words.yaml"), "rounds"),
        ("seq_length: 64", "seq_length: 256"),
        ("global_batch_size: 8", "global_batch_size: 4"),
        ("peak_lr: 1e-2, final_lr: 1e-4, warmup_tokens: 1024", "peak_lr: 1e-3, final_lr: 1e-4, warmup_tokens: 512"),
        ("validation_batches: 1", "validation_batches: 0"),
    )


class Played:
    """Trains nothing: a run's checkpoint is the one that it starts from. Keeps the runs."""

    def __init__(self) -> None:
        self.runs: list[Run] = []

    def __call__(self, run: Run, title: str, console: Console) -> Path:
        self.runs.append(run)
        shutil.copytree(run.recipe.init.checkpoint, run.folder / "checkpoints" / "step-000001", dirs_exist_ok=True)
        return run.folder


@pytest.fixture(scope="module")
def start(small: Small, straight: dict[int, dict]) -> Small:
    write_folder(small.folder / "problems", ["modular", "countdown"], 4, 3, [1], 0)
    return small


@pytest.fixture
def answers(start: Small, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, list[bool]]]:
    """What the model's samples of each problem are in place of its own: right or wrong, by question."""
    problems = training_problems(start.folder / "problems") + read_problems(start.folder / "problems/test.jsonl")[0]
    by_question = {problem.question: problem for problem in problems}
    right = {question: [sample % 2 == 0 for sample in range(SAMPLES)] for question in by_question}
    own = draws._solution

    def played(sample: Any, contestant: Any) -> Any:
        text = contestant.subject.tokenizer.ids_to_text(contestant.prompts[sample.job.prompt])
        question = re.search(r"(?:What|Take|Reach) .*", text)[0]
        said = by_question[question].solution if right[question][sample.job.sample] else "Answer: 5000"
        drawn = vars(own(sample, contestant))
        return draws.Solution(**{**drawn, "text": f"{said}\n" if drawn["text"] else said, "ended_by": "answer"})

    monkeypatch.setattr(draws, "_solution", played)
    return right


def made(small: Small, folder: Path, *overrides: str, train: Any = None) -> tuple[Rounds, io.StringIO]:
    said = io.StringIO()
    recipe = compose(str(recipe_file(small)), [f"log.dir={folder}", *overrides])
    return Rounds(recipe, Console(file=said, width=200), train or Played()), said


def test_two_rounds_and_what_a_change_does_again(
    start: Small, answers: dict[str, list[bool]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each round trains on pairs that the model of the round before has sampled; measures are those of the samples."""
    played = Played()
    rounds, said = made(start, tmp_path, train=played)
    rounds.pipeline.run()
    folder = tmp_path / "small"
    assert [run.name for run in played.runs] == ["small-1", "small-2"]
    first, second = (run.recipe for run in played.runs)
    assert Path(second.init.checkpoint) == folder / "train-1/small-1/checkpoints/step-000001"
    assert Path(first.init.checkpoint).parents[1] == start.run_dir("straight")
    assert (first.stage, first.reason, first.preference.loss) == ("preference", None, "dpo")
    pairs = [json.loads(line) for line in (folder / "pairs-1/pairs.jsonl").read_text().splitlines()]
    assert len(pairs) == 8  # of 8 problems; equal solutions are one, so there is one pair of each
    assert {pair["rejected"] for pair in pairs} == {"Answer: 5000"}
    assert (folder / "train-1/data/pairs/manifest.json").is_file()
    assert (folder / "sample-2/samples/small-1.jsonl").is_file()  # by the first round's model
    with (folder / "report/rounds.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["round"] for row in rows] == ["0", "1", "2"]
    for row in rows:
        assert float(row["pass_1"]) == 0.5
        assert float(row["pass_k"]) == 1
        assert float(row["majority"]) == 0.5  # two of four say one thing, two the other
        assert (float(row["gain"]), float(row["gain_low"])) == (0, 0)
    assert [row["right_samples"] for row in rows[1:]] == ["0.5", "0.5"]
    page = (folder / "report/report.html").read_text()
    assert "pass@4" in page
    assert "dpo with beta 0.2" in page
    # the same again does nothing; another loss trains again, and what follows waits
    monkeypatch.setattr(draws, "load_model", lambda *a, **k: pytest.fail("a model was loaded"))
    again, said = made(start, tmp_path)
    again.pipeline.run()
    assert said.getvalue().count("done before") == len(again.pipeline.stages)
    monkeypatch.undo()
    changed, _ = made(start, tmp_path, "preference.beta=0.5")
    states = {name: state.word for name, state in changed.pipeline.states().items()}
    assert states["sample-1"] == states["pairs-1"] == states["measure-0"] == "done"
    assert states["train-1"] == "changed"
    assert states["measure-1"] == states["sample-2"] == states["report"] == "waiting"


def test_rounds_end_where_there_are_no_pairs(start: Small, answers: dict[str, list[bool]], tmp_path: Path) -> None:
    tests = {problem.question for problem in read_problems(start.folder / "problems/test.jsonl")[0]}
    rounds, said = made(start, tmp_path)
    for name in ("measure-0", "sample-1", "pairs-1", "train-1", "measure-1"):
        rounds.pipeline.run(name)
    for number, (question, given) in enumerate(answers.items()):
        given[:] = [question in tests or number % 2 == 0] * SAMPLES
    rounds.pipeline.run()
    why = "ended in round 2: no pairs are left (4 problems have no wrong solution, 4 no right one)"
    assert said.getvalue().count(why) == 4  # pairs, training, measurement and the report's line
    assert not (tmp_path / "small/train-2/data").exists()
    with (tmp_path / "small/report/rounds.csv").open() as file:
        assert [row["round"] for row in csv.DictReader(file)] == ["0", "1"]
    assert why in (tmp_path / "small/report/report.html").read_text()


def test_a_round_that_trains(start: Small, answers: dict[str, list[bool]], tmp_path: Path) -> None:
    """The training is an ordinary one from the start's weights, on all pairs, in plain text as the start was."""

    def train(run: Run, title: str, console: Console) -> Path:
        write_recipe(run)
        start.train(run.name, recipe=run.recipe_file)
        return run.folder

    rounds, said = made(start, tmp_path, "reason.rounds=1", train=train)
    rounds.pipeline.run()
    results = rounds.read("train-1")
    assert Path(results["checkpoint"]).name == f"step-{STEPS:06d}"
    record = json.loads((Path(results["checkpoint"]) / "run.json").read_text())
    assert record["recipe"]["stage"] == "preference"
    steps = [json.loads(line) for line in (tmp_path / "small/train-1/steps.jsonl").read_text().splitlines()]
    losses = [float.fromhex(step["loss"]) for step in steps]
    assert losses[0] == pytest.approx(np.log(2), abs=1e-6)  # it starts at its reference
    assert losses[-1] < losses[0]
    template = (tmp_path / "small/train-1/data/pairs/chat_template.jinja").read_text()
    assert "Question: " in template
    assert rounds.read("measure-1")["checkpoint"] == results["checkpoint"]
    assert "pass@1 0.500 -> 0.500 in 1 rounds" in said.getvalue()


def test_refusals(start: Small, tmp_path: Path) -> None:
    for overrides, words in (
        (["reason.start=absent"], r"reason\.start: .*absent.*"),
        (["reason.problems=absent"], r"reason\.problems: there is no folder absent"),
        (["model.init_std=0.2"], r"reason\.start: .*step-000012 is another model: init_std"),
        (["reason.thinking=on"], r"reason\.thinking = on is for conversations"),
        (["data.blend=preference_sample"], r"data\.blend = preference_sample is unused: each round writes"),
        (["init.checkpoint=there"], r"init\.checkpoint is unused: reason\.start"),
        (["reason.thinking=maybe"], r"reason\.thinking = 'maybe'"),
        (["reason.samples=1"], r"reason\.samples"),
        (["preference.gt_reward_scale=3"], r"preference\.gt_reward_scale is unused: dpo reads no rewards"),
    ):
        with pytest.raises(UserError, match=words):
            made(start, tmp_path, *overrides)
