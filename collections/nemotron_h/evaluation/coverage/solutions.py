"""Sample solutions of problems from one model, and judge them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from nemotron_h.data.tokenizer import spec_of
from nemotron_h.evaluation.asking import template_of
from nemotron_h.evaluation.coverage.contestant import Contestant, contestants
from nemotron_h.evaluation.coverage.draw import Settings, draw
from nemotron_h.evaluation.coverage.samples import Samples
from nemotron_h.evaluation.problems.files import keep_problems
from nemotron_h.evaluation.problems.problem import Problem
from nemotron_h.evaluation.problems.solutions import TEXT_SOURCE, Form, Judged, Written
from nemotron_h.inference.pool import LENGTH

SAMPLES = "samples"


def sampled(
    run: Path, problems: Sequence[Problem], samples: int, settings: dict[str, Any], folder: Path, console: Console
) -> tuple[Contestant, Samples]:
    """Draw the samples that are missing in a folder, so many of each problem.

    Args:
        settings: of `Settings.of`, beside budgets and samples.
    Errors:
        UserError: as `contestants`, `keep_problems` and `draw`.
    """
    chosen = Settings.of(budgets=(math.inf,), most=samples, **settings)
    (model,) = contestants([run], problems, chosen.chat, chosen.thinking)
    if model.longest > chosen.max_tokens:
        console.print(f"{model.name}: solutions have up to {model.longest:,} tokens, samples {chosen.max_tokens:,}")
    keep_problems(folder, problems)
    return model, draw(model, chosen, folder / SAMPLES, console)


def judged(problems: Sequence[Problem], samples: Samples, most: int) -> list[Judged]:
    """Judge the first samples of each problem.

    Args:
        most: of each.
    """
    found = []
    for problem, drawn in zip(problems, samples.by_problem, strict=True):
        solutions = [drawn[number] for number in sorted(drawn)[:most]]
        written = [Written(each.text.strip(), each.tokens, each.ended_by != LENGTH) for each in solutions]
        found.append(Judged.of(problem, written))
    return found


def form_of(model: Contestant, chat: bool, thinking: str | None) -> Form:
    """Return the way in which a model is asked."""
    source, system = template_of(model.subject, thinking) if chat else (TEXT_SOURCE, "")
    return Form(source, system, spec_of(model.subject.tokenizer))
