"""The charts of a run's report, those of its stage among them: title, note and picture."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np
from markupsafe import Markup

from nemotron_h.core.page import for_both, inline
from nemotron_h.core.units import short_count
from nemotron_h.report import figures
from nemotron_h.report.run import Run
from nemotron_h.report.sections import is_known, memory_of, rates

Chart = tuple[str, str, Markup]
#: metrics of stages: title, metrics by name, axis, percent
_STAGES = (
    ("Reward accuracy", {"reward_accuracy": "training"}, "pairs with a positive margin", True),
    ("Reward margin", {"reward_margin": "training"}, "margin, chosen less rejected", False),
    ("Terms of the loss", {"kl": "KL", "lm": "language model", "hidden": "hidden states"}, "nats per token", False),
)


def hero(run: Run) -> tuple[Markup, str]:
    """Return the picture of the loss, and the note below."""
    phases = ", ".join(f"{p.name} to {short_count(p.end * run.tokens_per_step)}" for p in run.phases)
    note = f"Phases of the data, in tokens: {phases}." if len(run.phases) > 1 else ""
    if (limits := figures.shown_losses(run)) is not None:
        most = np.nanmax(run.values(lambda step: step.loss))
        note += f" The first losses, of up to {most:.2f}, are above the {limits[1]:.2f} that the picture ends at."
    return for_both(partial(figures.loss, run), "loss", wide=380, narrow=330), note


def charts(run: Run) -> Iterator[Chart]:
    """Yield the small charts, of what was measured."""
    yield from _of_the_stage(run)
    lr, throughput = (run.values(lambda step, of=name: getattr(step, of)) for name in ("lr", "tokens_per_second"))
    if is_known(lr):
        yield _chart(run, "Learning rate", "", lr, "learning rate", zero=True)
    if is_known(throughput):
        note = f"Median: {rates(run)}."
        yield _chart(run, "Throughput", note, throughput, "tokens/s, all ranks", zero=True, counts=True)
    mfu = run.values("mfu")
    if is_known(mfu):
        yield _chart(run, "MFU", "Of the data sheet's peak in the dtype of the matmuls.", mfu, "MFU", percent=True)
    norm = run.values("grad_norm")
    if is_known(norm):
        yield _chart(run, "Gradient norm", "Before clipping.", norm, "norm", log=True)
    name, memory = memory_of(run)
    if memory is not None:
        yield _chart(run, "Memory", f"The peak so far: {name}.", memory, "GiB", zero=True)


def _chart(run: Run, title: str, note: str, values: np.ndarray, ylabel: str, **style: bool) -> Chart:
    return title, note, inline(figures.over_tokens(run, [("", values)], ylabel, **style), title)


def _of_the_stage(run: Run) -> Iterator[Chart]:
    for title, names, ylabel, percent in _STAGES:
        known = {name: label for name, label in names.items() if is_known(run.values(name))}
        if not known or run.recipe["stage"] not in ("preference", "distill"):
            continue
        series = [(label, run.values(name)) for name, label in known.items()]
        only = len(series) == 1
        validated = [
            ("validation" if only else f"{label}, validation", run.validated(f"val_{name}"))
            for name, label in known.items()
        ]
        figure = figures.over_tokens(
            run, series, ylabel, percent=percent, validated=[v for v in validated if len(v[1][0])]
        )
        yield title, "", inline(figure, title)
