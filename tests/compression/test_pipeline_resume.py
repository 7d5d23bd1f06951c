"""Each stage interrupted in its middle and continued comes to what it comes to in one go."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny_pipeline import Tiny
from typer.testing import Result

from nemotron_h.checkpoint import folders
from nemotron_h.compression import unfinished
from nemotron_h.compression.pipeline import context
from nemotron_h.compression.pipeline import select as select_stage
from nemotron_h.core.errors import UserError
from nemotron_h.core.progress import StageProgress

pytestmark = pytest.mark.slow
Patch = pytest.MonkeyPatch


def in_call(
    patch: Patch, owner: object, name: str, number: int, matches: Callable[..., bool] = lambda *_: True
) -> None:
    """Interrupt the `number`-th matching call of a function, from 1; it is made first."""
    original, calls = getattr(owner, name), 0

    def interrupted(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        result = original(*arguments, **named)
        if matches(*arguments):
            calls += 1
            if calls == number:
                raise KeyboardInterrupt
        return result

    patch.setattr(owner, name, interrupted)


def counting(patch: Patch, title: str, number: int) -> None:
    """Interrupt a stage when its progress has been told of so much."""
    in_call(patch, StageProgress, "advance", number, lambda bar, *_: bar.title == title)


def importance(tiny: Tiny, patch: Patch) -> None:
    patch.setattr(unfinished, "WRITE_EVERY_S", 0)
    counting(patch, "windows through the model", 2)  # the layers are measured, the widths not


def candidates(tiny: Tiny, patch: Patch) -> None:
    in_call(patch, context, "child_definition", 2)


def score(tiny: Tiny, patch: Patch) -> None:
    counting(patch, "candidates", 5)  # two for each


def short_distil(tiny: Tiny, patch: Patch) -> None:
    """The second run is killed between two checkpoints."""
    tiny.options[chosen(tiny)[1]] = ["kill=3"]


def select(tiny: Tiny, patch: Patch) -> None:
    original = select_stage.write_json

    def half(path: Path, content: object) -> None:
        original(path.with_name("unfinished.json"), content)
        raise KeyboardInterrupt

    patch.setattr(select_stage, "write_json", half)


def distil(tiny: Tiny, patch: Patch) -> None:
    tiny.options["small"] = ["kill=5"]


def export(tiny: Tiny, patch: Patch) -> None:
    counting(patch, "orders", 7)


STAGES = {
    "importance": importance,
    "candidates": candidates,
    "score": score,
    "short-distil": short_distil,
    "select": select,
    "distil": distil,
    "export": export,
}


def chosen(tiny: Tiny) -> list[str]:
    return json.loads((tiny.root / "score" / "ranking.json").read_text())["chosen"]


def left_behind(folder: Path, names: list[str]) -> None:
    """What was done before the interruption is there.

    Args:
        folder: of the stage.
        names: of the candidates that are distilled.
    """
    if folder.name == "importance":
        assert (folder / "unfinished").is_file()
    elif folder.name == "score":
        assert len((folder / "scores.jsonl").read_text().splitlines()) == 1 + 2  # a heading, two of four
    elif folder.name == "short-distil":
        assert folders.finished(folder / names[0])[0].name == "step-000004"
        assert folders.finished(folder / names[1])[0].name == "step-000002"
    elif folder.name == "distil":
        assert folders.finished(folder / "small")[0].name == "step-000004"
    elif folder.name == "export":
        assert list((folder / "hf").glob("*.safetensors"))


def weights_of(folder: Path) -> dict[str, bytes]:
    """Files that hold weights, by their place."""
    endings = (".distcp", ".safetensors")
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.suffix in endings}


@pytest.fixture
def put_back(compressed: tuple[Tiny, Result], tmp_path: Path) -> Iterator[Path]:
    """A folder to keep a stage in; it lies where it was at the end, whatever happened."""
    tiny, _ = compressed
    yield tmp_path
    for kept in tmp_path.iterdir():
        for name in (kept.name, f"{kept.name}.before"):
            shutil.rmtree(tiny.root / name, ignore_errors=True)
        shutil.move(kept, tiny.root / kept.name)


@pytest.mark.parametrize("stage", STAGES)
def test_an_interrupted_stage_comes_to_the_same(
    stage: str, compressed: tuple[Tiny, Result], launched: Tiny, put_back: Path, monkeypatch: Patch
) -> None:
    tiny, _ = compressed
    folder, in_one_go = tiny.root / stage, put_back / stage
    names = chosen(tiny)
    shutil.move(folder, in_one_go)
    with monkeypatch.context() as patch:
        STAGES[stage](tiny, patch)
        with pytest.raises((KeyboardInterrupt, UserError)):
            tiny.made().pipeline.run()
    again = tiny.made().pipeline
    assert again.states()[stage].word == "interrupted"
    left_behind(folder, names)
    tiny.options.clear()
    tiny.started.clear()
    again.run()
    before, after = (json.loads((place / "stage.json").read_text()) for place in (in_one_go, folder))
    assert after["outputs"] == before["outputs"]
    assert after["result"] == before["result"]
    assert weights_of(folder) == weights_of(in_one_go)
    # finished runs are not repeated, and the stages that follow find their inputs unchanged
    assert tiny.started == {"short-distil": names[1:], "distil": ["small"]}.get(stage, [])
    assert {state.word for state in again.states().values()} == {"done"}
