"""Stages: run once, resumed where they were interrupted, run again when an input changes and only then."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemotron_h.core.errors import UserError
from nemotron_h.core.locks import locked
from nemotron_h.launch.jobs import Job
from nemotron_h.launch.stages import Pipeline, Stage


class Chain:
    """Three stages of numbers: `a` doubles a setting, `b` halves it again (rounded down), `c` adds another setting."""

    def __init__(self, folder: Path) -> None:
        self.settings = {"a": 3, "c": 1}
        self.ran: list[str] = []
        self.said: list[str] = []
        self.interrupt: str | None = None
        stages = [
            Stage("a", "double", (), ("n",), lambda: {"setting": self.settings["a"]}, self.a),
            Stage("b", "quarter", ("a",), ("n",), dict, self.b),
            Stage("c", "add", ("b",), ("n",), lambda: {"more": self.settings["c"]}, self.c),
        ]
        self.pipeline = Pipeline(folder, stages, self.said.append)

    def step(self, name: str, folder: Path, value: int) -> str:
        self.ran.append(name)
        half = folder / "half"  # what an interrupted run leaves behind
        if not half.exists():
            half.write_text(str(value))
            if self.interrupt == name:
                self.interrupt = None
                raise KeyboardInterrupt
        (folder / "n").write_text(half.read_text())
        return f"n is {value}"

    def number(self, name: str) -> int:
        return int((self.pipeline.path(name) / "n").read_text())

    def a(self, folder: Path) -> str:
        return self.step("a", folder, 2 * self.settings["a"])

    def b(self, folder: Path) -> str:
        return self.step("b", folder, self.number("a") // 4)

    def c(self, folder: Path) -> str:
        return self.step("c", folder, self.number("b") + self.settings["c"])

    def words(self) -> list[str]:
        return [state.word for state in self.pipeline.states().values()]


@pytest.fixture
def chain(tmp_path: Path) -> Chain:
    return Chain(tmp_path)


def test_runs_once(chain: Chain) -> None:
    with locked(chain.pipeline.folder, "written", ""), pytest.raises(UserError, match="is being written by another"):
        chain.pipeline.run()
    assert chain.words() == ["to do", "waiting", "waiting"]
    chain.pipeline.run()
    chain.pipeline.run()
    assert chain.ran == ["a", "b", "c"]
    assert chain.number("c") == 2
    assert chain.words() == ["done"] * 3
    assert chain.said[-1] == "[3/3] c: done before; n is 2"


@pytest.mark.parametrize("name", ["a", "b", "c"])
def test_an_interrupted_stage_is_continued(chain: Chain, name: str) -> None:
    chain.interrupt = name
    with pytest.raises(KeyboardInterrupt):
        chain.pipeline.run()
    assert chain.said[-1] == "stopped: the same command continues; finished stages are kept"
    assert chain.pipeline.states()[name].word == "interrupted"
    chain.ran.clear()
    chain.pipeline.run()
    assert chain.ran[0] == name
    assert chain.number("c") == 2


def test_a_changed_input_runs_what_follows(chain: Chain) -> None:
    chain.pipeline.run()
    chain.ran.clear()
    chain.settings["c"] = 5
    assert chain.words() == ["done", "done", "changed"]
    assert chain.pipeline.states()["c"].why == "more: 1 before, 5 now"
    chain.pipeline.run()
    assert (chain.ran, chain.number("c")) == (["c"], 6)
    assert (chain.pipeline.folder / "c.before" / "n").read_text() == "2"


def test_equal_outputs_leave_what_follows_done(chain: Chain) -> None:
    chain.settings["a"] = 2
    chain.pipeline.run()
    chain.ran.clear()
    chain.settings["a"] = 3  # 6 // 4 is 4 // 4
    chain.pipeline.run()
    assert chain.ran == ["a", "b"]


def test_an_edited_output_is_noticed(chain: Chain) -> None:
    chain.pipeline.run()
    (chain.pipeline.path("b") / "n").write_text("7")
    assert chain.pipeline.states()["b"].why == "n was edited"
    chain.pipeline.run()
    assert chain.number("b") == 1


def test_an_interrupted_stage_of_other_inputs_starts_anew(chain: Chain) -> None:
    chain.interrupt = "a"
    with pytest.raises(KeyboardInterrupt):
        chain.pipeline.run()
    chain.settings["a"] = 10
    chain.pipeline.run()
    assert chain.number("a") == 20


def test_a_single_stage_needs_those_before_it(chain: Chain) -> None:
    with pytest.raises(UserError, match="stage b waits for a"):
        chain.pipeline.run("b")
    chain.pipeline.run("a")
    chain.pipeline.run("b")
    assert chain.ran == ["a", "b"]
    with pytest.raises(UserError, match="there is no stage 'd'"):
        chain.pipeline.run("d")


def test_a_folder_that_a_job_still_writes_to_is_not_cleared(chain: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    queued = ["RUNNING"]
    monkeypatch.setattr(Job, "state", lambda job: queued[0] if job.id == "7" else "")
    chain.pipeline.run()
    folder = chain.pipeline.path("a")
    Job("6", "/logs").record(folder / "ended.job.json")
    Job("7", "/logs").record(folder / "child.job.json")
    chain.settings["a"] = 8
    with pytest.raises(UserError, match=r"child of .* with other inputs, and its job 7 is in the queue") as raised:
        chain.pipeline.run()
    assert raised.value.hint.startswith("end it: scancel 7")
    queued[0] = ""
    chain.pipeline.run()
    assert (chain.number("a"), chain.number("c")) == (16, 5)
