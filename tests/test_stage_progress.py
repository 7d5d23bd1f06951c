"""The one progress bar: lines now and then where there is no terminal, a bar on one."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from nemotron_h.core import progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that a test sets."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


@pytest.mark.parametrize(
    ("unit", "total", "line"),
    [("", 4000, "  code: 1,000 of 4,000, 30 s left\n"), ("bytes", 4e9, "  code: 1,000 of 4,000 MB, 30 s left\n")],
)
def test_plain_lines(clock: list[float], unit: str, total: float, line: str) -> None:
    console = Console(file=io.StringIO(), force_terminal=False)
    with progress.StageProgress(console, "text", total, unit) as bar:
        bar.advance(0, "code")
        clock[0] = 10.0
        bar.advance(0)  # nothing is done: no pace yet
        bar.advance(total / 4)
        bar.advance(total / 4)  # at once: no second line
        bar.say("  [said]")
    assert console.file.getvalue() == line + "  [said]\n"


@pytest.mark.parametrize(("unit", "shown"), [("", "2/8"), ("bytes", "2/8 bytes")])
def test_a_bar_on_a_terminal(unit: str, shown: str) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    with progress.StageProgress(console, "text", 8, unit) as bar:
        bar.advance(2, "code")
        bar.bar.refresh()
    text = console.file.getvalue()
    assert "code" in text
    assert shown in text
