"""What a recipe may ask of the pipeline beside its defaults, on a tiny model whose distillations are played."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from tiny_pipeline import Tiny

from nemotron_h.compression.pipeline import candidates
from nemotron_h.core.errors import UserError
from nemotron_h.launch.runs import Run

pytestmark = pytest.mark.slow


class Played:
    """Trains nothing: a run's checkpoint is the one that it starts from. Keeps the runs."""

    def __init__(self) -> None:
        self.runs: dict[str, Run] = {}

    def __call__(self, run: Run, title: str, console: Console) -> Path:
        self.runs[run.name] = run
        shutil.copytree(run.recipe.init.checkpoint, run.folder / "checkpoints" / "step-000001", dirs_exist_ok=True)
        return run.folder


def compress(tiny: Tiny, folder: Path, *overrides: str, last: str = "export") -> tuple[Any, Played]:
    """Run the pipeline in a folder of its own, up to a stage."""
    played = Played()
    made = tiny.made(f"log.dir={folder}", *overrides, train=played)
    for stage in made.pipeline.stages:
        made.pipeline.run(stage.name)
        if stage.name == last:
            break
    return made, played


def kept(made: Any) -> dict[str, set[int]]:
    """Layers that the candidates keep, by name."""
    return {row["name"]: set(row["layers"]) for row in made.read("candidates", "candidates.json")}


def evaluation(folder: Path, body: str) -> str:
    """A command that runs this on a checkpoint's `run.json` as `model`, and prints `scores`; it counts its calls."""
    lines = ["import json, pathlib, sys", "here = pathlib.Path(sys.argv[1])"]
    lines += ["model = json.loads((here / 'run.json').read_text())['model']", body]
    lines += [f"open({str(folder / 'calls')!r}, 'a').write(model['name'] + chr(10))"]
    lines += ["print('a line before'); print(json.dumps(scores))"]
    script = folder / "task.py"
    script.write_text("\n".join(lines))
    return f"minipuzzle.evaluate={sys.executable} {script} {{checkpoint}}"


def test_a_command_chooses(tiny: Tiny, tmp_path: Path) -> None:
    """It likes narrow FFNs, which accuracy does not."""
    command = evaluation(tmp_path, "scores = {'narrow': 1 / model['ffn_hidden_size'], 'half': 0.5}")
    made, _ = compress(tiny, tmp_path, command)
    ranking = made.read("score", "ranking.json")
    by_rank = sorted(ranking["candidates"], key=lambda row: row["place"])
    assert by_rank[0]["ffn_hidden_size"] == 48
    narrow = [row["name"] for row in by_rank if row["ffn_hidden_size"] == 32]
    assert ranking["chosen"][0] == narrow[0]  # of equal ones the better by rank
    assert by_rank[0]["evaluated"]["mean"] == pytest.approx((1 / 48 + 0.5) / 2)
    winner = made.read("select", "winner.json")
    assert (winner["name"], winner["by"]) == (narrow[0], "evaluation")
    assert winner["short"]["evaluated"] == {"narrow": 1 / 32, "half": 0.5, "mean": (1 / 32 + 0.5) / 2}
    page = (made.folder / "export" / "report.html").read_text()
    assert '<th class="n">narrow</th>' in page
    assert "by which the winner was chosen" in page
    assert not list((made.folder / "score").glob("*-pruned"))
    # four candidates untrained; each of two before and after its distillation; the child
    assert len((tmp_path / "calls").read_text().splitlines()) == 4 + 4 + 1


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("raise SystemExit('no such task')", "exit code 1: no such task"),
        ("raise SystemExit()", "no scores: it printed nothing"),
        ("scores = 3", "no scores: 3"),
        ("scores = {}", "no scores: {}"),
        ("scores = {'a': 'high'}", 'could not convert string to float: \'high\': {"a": "high"}'),
    ],
)
def test_a_command_that_fails(tiny: Tiny, tmp_path: Path, body: str, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)) as raised:
        compress(tiny, tmp_path, evaluation(tmp_path, body))
    assert ": minipuzzle.evaluate: " in raised.value.message
    assert raised.value.hint == "it has to print a JSON object of task scores in its last line"


def test_a_measured_speed(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Anything is a hundredth as fast as the parent, and nothing a thousand times."""
    measured = ("minipuzzle.budget.speedup_by=measured", "minipuzzle.budget.speedup=0.01")
    made, _ = compress(tiny, tmp_path, *measured, last="score")
    rows = made.read("candidates", "candidates.json")
    assert len(rows) == 4
    assert all(0.1 < row["speedup"] < 10 for row in rows)
    # what was measured is kept, and decides: only the two of five layers stay
    speeds = {row["name"]: 2.0 if row["mamba"] + row["ffn"] == 4 else 1.0 for row in rows}
    monkeypatch.setattr(candidates, "generation_speed", lambda model, _: speeds.get(model.definition.name[5:], 1.0))
    made, _ = compress(tiny, tmp_path, measured[0], "minipuzzle.budget.speedup=1.5", last="score")
    assert set(kept(made)) == {name for name, speed in speeds.items() if speed == 2}
    with pytest.raises(UserError, match=r"minipuzzle.budget.speedup = 1000: no candidate generates as fast") as raised:
        compress(tiny, tmp_path, measured[0], "minipuzzle.budget.speedup=1000")
    assert "2.000 times the parent" in raised.value.message
    assert raised.value.hint == "lower it to 2.000 or less, or widen the grid"


def test_where_the_long_distillation_starts(tiny: Tiny, tmp_path: Path) -> None:
    made, played = compress(tiny, tmp_path, last="distil")
    winner = made.read("select", "winner.json")
    assert played.runs["small"].recipe.init.checkpoint == winner["pruned"]["checkpoint"]
    assert winner["pruned"]["checkpoint"].endswith("-pruned")
    made, again = compress(tiny, tmp_path, "minipuzzle.start=short", last="distil")
    assert list(again.runs) == ["small"]  # the stages before do not depend on it
    assert again.runs["small"].recipe.init.checkpoint == winner["short"]["checkpoint"]
    assert winner["short"]["checkpoint"] == str(played.runs[winner["name"]].folder / "checkpoints" / "step-000001")


@pytest.mark.parametrize("order", ["reversed", "random"])
def test_orders_that_mean_nothing(tiny: Tiny, tmp_path: Path, order: str) -> None:
    """Whole pipelines whose candidates keep what that order says, where `importance` keeps the opposite or others."""
    made, _ = compress(tiny, tmp_path, f"minipuzzle.order={order}")
    scores, measured, pattern = made.scores.layers, made.importance.scores().layers, made.definition.pattern
    if order == "reversed":
        assert np.array_equal(np.argsort(scores), np.argsort(measured)[::-1])
    else:
        assert not np.array_equal(np.argsort(scores), np.argsort(measured))
    for row in made.read("candidates", "candidates.json"):
        for symbol, count in (("M", row["mamba"]), ("-", row["ffn"])):
            layers = [n for n, letter in enumerate(pattern) if letter == symbol]
            best = sorted(layers, key=lambda n: -scores[n])[:count]
            assert [n for n in row["layers"] if n in layers] == sorted(best)
    result = json.loads((made.folder / "export" / "result.json").read_text())
    assert np.isfinite(result["validation"]["child"]["loss"])
