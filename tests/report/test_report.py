"""The report of a run's folder: what of its lines counts, what is said of it, and how a browser shows it."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import PROGRAM, Browser
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter
from typer.testing import CliRunner

from nemotron_h.cli.main import app
from nemotron_h.core import locks
from nemotron_h.core.errors import UserError
from nemotron_h.core.progress import STEPS, Step
from nemotron_h.report.page import write
from nemotron_h.report.run import read_run

#: a record of an earlier version: no hardware, no word of how it ended
RECORD = Path(__file__).parents[1] / "compat/written/runs/small/run.json"
OLD = ("validation_step", "metrics", "time", "began")
TOTAL = 8


def step(number: int, loss: float, validation: float = math.nan, at: int | None = None, began: float = 100.0) -> Step:
    metrics = {"grad_norm": 1 / number, "max_memory_gib": 3.5, "tflops_per_rank": 412.0, "mfu": 0.41}
    return Step(
        number, TOTAL, loss, validation, [], 1234.5, 1e-3 / number, 1.0, at, metrics, began + 10 * number, began
    )


def line(reported: Step, old: bool = False) -> str:
    content = dataclasses.asdict(reported)
    return json.dumps({key: value for key, value in content.items() if not (old and key in OLD)}) + "\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run without steps; a test writes them."""
    run = tmp_path / "runs" / "small"
    run.mkdir(parents=True)
    record = json.loads(RECORD.read_text())
    (run / "run.json").write_text(json.dumps({**record, "step": 4, "max_steps": TOTAL}))
    (run / "recipe.yaml").write_text("name: small\n")
    return run


def test_a_resumed_run_counts_its_last_steps_and_time_in_training(folder: Path) -> None:
    killed = [step(1, 9.0, 9.5, 0), step(2, 8.0, 9.5, 0), step(2, 8.0, 8.5, 2), step(3, 7.0, 8.5, 2)]
    killed += [step(4, 6.5, 8.5, 2), step(4, 6.5, 6.6, 4)]
    resumed = [step(number, 7.5 - number / 10, 6.0 if number > 4 else math.nan, 4, 5000.0) for number in range(3, 9)]
    (folder / STEPS).write_text("".join(map(line, [*killed, *resumed])))
    run = read_run(folder)
    assert [(s.step, s.loss) for s in run.steps[:4]] == [(1, 9.0), (2, 8.0), (3, 7.2), (4, 7.1)]
    assert run.validation == {0: 9.5, 2: 8.5, 4: 6.0}, "the killed process's of step 4 is not of this run"
    assert run.starts == [0, 2]
    assert run.seconds == 40 + 80
    assert run.state == ("finished", "")


def test_lines_of_an_earlier_version_are_read_as_they_were_meant(folder: Path) -> None:
    record = json.loads((folder / "run.json").read_text())
    record["recipe"]["log"]["validate_every_steps"] = 3
    record["metrics"]["val_loss"] = 5.25
    (folder / "run.json").write_text(json.dumps(record))
    old = [step(1, 9.0, 9.5), step(2, 8.0, 9.5), step(5, 7.0, 6.5), step(8, 6.0, 5.75)]
    (folder / STEPS).write_text("".join(line(each, old=True) for each in old))
    run = read_run(folder)
    assert run.validation == {0: 9.5, 3: 6.5, 6: 5.75, 8: 5.25}
    page = write(folder).page.read_text()
    assert all(title in page for title in ("Learning rate", "Throughput", "Matmuls"))
    assert "Gradient norm" not in page, "it was not measured"


def test_a_broken_line_is_named_on_the_page_and_on_the_terminal(folder: Path) -> None:
    lines = [line(step(1, 9.0)), '{"step": 2, "loss"' + line(step(2, 8.0)), '{"step": "3"}\n', line(step(4, 7.0))]
    (folder / STEPS).write_text("".join(lines) + "\xff")
    result = CliRunner().invoke(app, ["report", str(folder)], catch_exceptions=False)
    assert f"note: {STEPS}: line 2, 3, 5 is not readable and left out" in result.output
    page = (folder / "report.html").read_text()
    assert "line 2, 3, 5 is not readable" in page
    assert "stopped at step 4 of\n8" in page
    assert "No reason is recorded" in page


def test_a_loss_that_is_no_number_is_named(folder: Path) -> None:
    (folder / STEPS).write_text(line(step(1, 9.0)) + line(step(2, math.nan)))
    assert "The loss is not a number from step 2 on." in write(folder).page.read_text()


def test_a_run_of_a_version_that_reported_no_steps_has_the_losses_of_its_events(folder: Path) -> None:
    writer = EventFileWriter(str(folder / "tensorboard"))
    for number, tag, value in ((0, "reduced_train_loss", 9.0), (1, "reduced_train_loss", 8.0), (1, "val_loss", 7.5)):
        summary = Summary(value=[Summary.Value(tag=tag, simple_value=value)])
        writer.add_event(Event(wall_time=100.0 + number, step=number, summary=summary))
    writer.close()
    run = read_run(folder)
    assert ([(s.step, s.loss) for s in run.steps], run.validation) == ([(1, 9.0), (2, 8.0)], {2: 7.5})
    page = write(folder).page.read_text()
    assert "losses are those of its TensorBoard events, rates are not known" in page
    assert "Throughput" not in page


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is no run: there is no"),
        ("{", "run.json is not JSON"),
        ('{"recipe": {}, "model": {}, "data": {}, "metrics": [], "step": 1}', "metrics, max_steps missing"),
        (
            '{"recipe": {}, "model": {}, "data": {}, "metrics": {}, "step": 1, "max_steps": 2}',
            "data.seq_length, data.global_batch_size missing",
        ),
        (
            '{"recipe": {}, "model": {}, "metrics": {}, "step": 1, "max_steps": 2, '
            '"data": {"seq_length": 1, "global_batch_size": 1}}',
            "its record of the model is not readable",
        ),
        (
            RECORD.read_text().replace('"sha256_bin"', '"digest"'),
            "is no whole record of a run: KeyError 'sha256_bin'",
        ),
    ],
)
def test_a_folder_that_holds_no_run_is_refused(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "run.json").write_text(content)
    with pytest.raises(UserError, match=message):
        write(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_a_run_without_steps_and_one_that_trains(folder: Path, tmp_path: Path) -> None:
    report = write(folder)
    assert report.picture is None
    assert "losses and rates are not known" in report.page.read_text()
    held = locks.acquire(folder, "trained", "the run")
    try:
        (folder / STEPS).write_text(line(step(1, 9.0)))
        assert read_run(folder).state[0] == "running"
        elsewhere = write(folder, tmp_path / "new" / "place")
    finally:
        locks.release(held)
    assert f"pid {os.getpid()} on" in elsewhere.page.read_text()
    assert {path.name for path in elsewhere.page.parent.iterdir()} == {"report.html", "loss.svg"}


def test_values_of_a_run_are_text_on_its_page(folder: Path) -> None:
    record = json.loads((folder / "run.json").read_text())
    record["recipe"]["name"] = "<script>alert(1)</script>"
    record["ended"] = "<b>because</b>"
    (folder / "run.json").write_text(json.dumps(record))
    (folder / STEPS).write_text(line(step(1, 9.0)))
    report = write(folder)
    assert "<script" not in report.page.read_text()
    assert "<b>because" not in report.page.read_text()
    assert "<script" not in report.picture.read_text()


def test_it_imports_no_torch_and_takes_a_second_of_work(folder: Path) -> None:
    (folder / STEPS).write_text("".join(line(step(number, 9 / number)) for number in range(1, TOTAL)))
    code = (
        "import sys, time\nfrom nemotron_h.cli.main import app\n"
        f"app(['report', {str(folder)!r}], standalone_mode=False)\n"
        "assert not {'torch', 'nemo', 'megatron', 'matplotlib.pyplot'} & set(sys.modules)\n"
        "assert time.process_time() < 3, time.process_time()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def test_a_long_run_is_drawn_from_few_points(folder: Path) -> None:
    record = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**record, "step": 20_000, "max_steps": 20_000}))
    (folder / STEPS).write_text("".join(line(step(number, 2 + 9 / number)) for number in range(1, 20_001)))
    began = time.process_time()
    report = write(folder)
    assert time.process_time() - began < 5
    assert report.page.stat().st_size < 600_000
    assert "The first losses, of up to 11.00, are above the" in report.page.read_text()
    assert report.picture.stat().st_size < 120_000


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if PROGRAM is None:
        pytest.skip("no Chromium here: apt-get install chromium")
    shown = Browser()
    yield shown
    shown.close()


TEXT_SIZE = """Math.min(...[...document.querySelectorAll('svg text')].filter(t => t.getClientRects().length)
.map(t => parseFloat(getComputedStyle(t).fontSize) * t.ownerSVGElement.getBoundingClientRect().width
/ t.ownerSVGElement.viewBox.baseVal.width))"""
GROUND = "getComputedStyle(document.body).backgroundColor"


def test_a_browser_shows_it(folder: Path, browser: Browser) -> None:
    """On a phone and a desk: nothing overflows, no message, nothing fetched, texts of pictures of a readable size."""
    (folder / STEPS).write_text("".join(line(step(number, 9 / number)) for number in range(1, TOTAL + 1)))
    page = write(folder).page
    for width in (390, 1280):
        for scheme, ground in (("light", "rgb(245, 247, 249)"), ("dark", "rgb(14, 18, 24)")):
            look = browser.look(page, width, scheme, TEXT_SIZE, GROUND)
            assert look.messages == []
            assert look.width <= width
            assert look.values[0] >= 9
            assert look.values[1] == ground
    assert browser.look(page, 900, "dark", GROUND, media="print").values == ["rgba(0, 0, 0, 0)"]


def test_the_browser_would_say_what_is_wrong(tmp_path: Path, browser: Browser) -> None:
    page = tmp_path / "wrong.html"
    page.write_text(
        '<!doctype html><meta name="viewport" content="width=device-width"><div style="width:2000px">wide</div>'
        '<img src="http://127.0.0.1:9/x.png"><script>console.error("words"); throw Error("thrown")</script>'
    )
    look = browser.look(page, 390)
    assert look.width > 2000
    assert all(any(word in said for said in look.messages) for word in ("words", "Uncaught", "asks for http"))
