"""Tasks of the paper's tables (`configs/eval/paper`), and the tables (`configs/eval/tables`).

Texts are Jinja templates, and values Jinja expressions, over the fields of a record.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment
from omegaconf import MISSING

from nemotron_h.core.errors import UserError
from nemotron_h.core.strict import nearest, typed
from nemotron_h.core.strict_yaml import read_config, read_yaml
from nemotron_h.evaluation.grading.boxed import boxed, final_number
from nemotron_h.evaluation.grading.code import entry_point_of
from nemotron_h.evaluation.grading.options import LETTERS, option_of

#: of examples: the first of their file, or at random as lm-evaluation-harness draws them
FIRST, RANDOM = "first", "random"
#: graders; `NUMBER` is `MATH` without percent, `MARKED` the text behind `####`
FIRST_LETTER, STATED_LETTER, NUMBER, MATH, MARKED, CODE = (
    "first_letter", "stated_letter", "number", "math", "marked_number", "code"
)  # fmt: skip
INSTRUCTIONS, CALLS = "instructions", "calls"
ACC, ACC_NORM = "acc", "acc_norm"


@dataclass
class Task:
    """A file of `configs/eval/paper`.

    Args:
        source: of the values.
        ours: sentences on what differs from the paper's measurement, or is not known of it.
        hub: the data set's name on the hub.
        configs: its configurations, one after another.
        test: split of the questions, which is the name of their file too.
        examples: splits of the examples, the first that is there; none where there are no examples.
        data: folder of the files, where that is another task's.
        parts: files of the questions, where they are several -> the records of each.
        fields: that records have.
        shots: examples in a prompt.
        order: `FIRST` or `RANDOM`.
        group: template of the group whose examples a question gets; empty where all have the same.
        description: template that begins a prompt.
        prompt: template of a question.
        chat: questions are asked in the checkpoint's chat template.
        system: template of a system message.
        messages: expression of a conversation's messages, in place of the prompt.
        opening: template of the text that begins an answer.
        target: template of what follows it in an example.
        separator: after an example.
        max_tokens: of the answer; 0 where likelihoods are compared.
        stop: texts that end an answer.
        grader: of answers, one of those above.
        reference: template of the right answer.
        verified: template of the right answer as Math-Verify reads it; none where it is not asked. Where it is
            installed, `NUMBER` gives way to it, and `MATH` counts what either accepts.
        graded: template of the text whose code is run; `answer` is what the model wrote.
        entry_point: template of the function's name.
        program: template of what is run; `completion` is the code.
        options: expression of the texts whose likelihoods are compared.
        contexts: expression of what stands before each of them; empty where that is the prompt.
        right: expression of the right option's number, from 0.
        metric: name of the score; `ACC_NORM` divides log-likelihoods by the characters of an option.
        rows: row of a table -> expression of the questions that it counts; of `INSTRUCTIONS`, of the verdicts, and of
            `CALLS`, of the scores (`calls.row`).
    """

    source: str = MISSING
    ours: list[str] = field(default_factory=list)
    hub: str = MISSING
    configs: list[str] = MISSING
    test: str = MISSING
    examples: list[str] = field(default_factory=list)
    data: str = ""
    parts: dict[str, int] = field(default_factory=dict)
    fields: list[str] = MISSING
    shots: int = MISSING
    order: str = FIRST
    group: str = ""
    description: str = ""
    prompt: str = ""
    chat: bool = False
    system: str = ""
    messages: str = ""
    opening: str = ""
    target: str = ""
    separator: str = "\n\n"
    max_tokens: int = 0
    stop: list[str] = field(default_factory=list)
    grader: str = ""
    reference: str = ""
    verified: str = ""
    graded: str = ""
    entry_point: str = ""
    program: str = ""
    options: str = ""
    contexts: str = ""
    right: str = ""
    metric: str = MISSING
    rows: dict[str, str] = MISSING

    @property
    def generates(self) -> bool:
        """Return whether the model writes answers; else likelihoods are compared."""
        return self.max_tokens > 0

    @property
    def runs_code(self) -> bool:
        """Return whether scoring runs what the model wrote."""
        return self.grader == CODE

    def download(self, split: str, file: Path) -> str:
        """Return a command that writes a split of the data from the hub to a file."""
        loads = ", ".join(f"d.load_dataset({self.hub!r}, {name!r}, split={split!r})" for name in self.configs)
        whole = loads if len(self.configs) == 1 else f"d.concatenate_datasets([{loads}])"
        return f'python -c "import datasets as d; {whole}.to_json({str(file)!r})"'


@dataclass(frozen=True)
class PaperTable:
    """A file of `configs/eval/tables`.

    Attributes:
        source: of the numbers.
        tasks: of the table, in order.
        models: its columns.
        rows: row -> percent of each model; None where there is none.
        unmeasured: row without a task -> why.
        lengths: row of RULER -> tokens of its items.
    """

    source: str
    tasks: list[str]
    models: list[str]
    rows: dict[str, list[float | None]]
    unmeasured: dict[str, str] = field(default_factory=dict)
    lengths: dict[str, int] = field(default_factory=dict)


def _folder() -> Path:
    return Path(str(files("nemotron_h.configs"))) / "eval"


def tables() -> list[str]:
    """Return the names of tables."""
    return sorted(path.stem for path in (_folder() / "tables").glob("*.yaml"))


def tasks() -> list[str]:
    """Return the names of their tasks."""
    return sorted(path.stem for path in (_folder() / "paper").glob("*.yaml"))


def load_table(name: str) -> PaperTable:
    """Return a table.

    Errors:
        UserError: there is none of the name.
    """
    if name not in tables():
        raise UserError(f"there is no table {name}", hint=nearest(name, tables()))
    return PaperTable(**read_yaml(_folder() / "tables" / f"{name}.yaml"))


def load(name: str) -> Task:
    """Return a task.

    Errors:
        UserError: its file has a mistake.
    """
    path = _folder() / "paper" / f"{name}.yaml"
    return typed(Task, read_config(path), str(path))


def boxed_solution(solution: str) -> str:
    """Return a solution of GSM8K's own that ends in a box, as the published examples do; these stay as they are."""
    text, marked, number = solution.rpartition("####")
    if not marked:
        return solution
    return f"{re.sub(r'<<.*?>>', '', text).strip()} So the answer is \\boxed{{{number.strip()}}}."


def long_thought(solution: str) -> str:
    """Return a solution of DeepSeek-R1 in the form of the published examples.

    Errors:
        ValueError: it is in another form.
    """
    places = [solution.find(f"<|{mark}_of_{part}|>") for part in ("thought", "solution") for mark in ("begin", "end")]
    if -1 in places or places != sorted(places) or boxed(solution) is None:
        raise ValueError(
            "the solution is not <|begin_of_thought|> ... <|end_of_thought|> <|begin_of_solution|> ... "
            "<|end_of_solution|> with a box"
        )
    return solution


def without_titles(text: str) -> str:
    """Return a text without the marks of WikiHow's titles and other brackets (lm-evaluation-harness' hellaswag)."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


@functools.cache
def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    environment.filters |= {
        "boxed": boxed,
        "boxed_solution": boxed_solution,
        "entry_point": entry_point_of,
        "final_number": final_number,
        "long_thought": long_thought,
        "spaced": lambda text: f" {text}",
        "without_titles": without_titles,
    }
    environment.globals |= {"letters": LETTERS, "option_of": option_of}
    return environment


@functools.cache
def _template(text: str) -> jinja2.Template:
    return _environment().from_string(text)


@functools.cache
def _expression(text: str) -> Callable[..., Any]:
    return _environment().compile_expression(text, undefined_to_none=False)


def render(text: str, values: Mapping[str, Any]) -> str:
    """Return a template with values in it.

    Errors:
        Exception: of Jinja or Python, where the values are not what the template needs.
    """
    return _template(text).render(values)


def evaluate(text: str, values: Mapping[str, Any]) -> Any:
    """Return the value of an expression. Errors: as `render`."""
    return _expression(text)(**values)
