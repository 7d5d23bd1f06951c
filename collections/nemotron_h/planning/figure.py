"""A plan's memory as a picture: one bar per pipeline stage, stacked by part."""

from __future__ import annotations

from pathlib import Path

from nemotron_h.core import plot as style
from nemotron_h.core.units import GIB
from nemotron_h.planning.plan import Plan, parts_by_stage


@style.styled
def plot(plan: Plan, path: Path) -> None:
    """Write the picture; the suffix decides the format.

    Errors:
        UserError: the file cannot be written, or there is no such format.
    """
    figure, axes = style.canvas(300 + 58 * len(plan.stages), 380)
    names, parts = [str(stage.stage) for stage in plan.stages], parts_by_stage(plan.stages)
    bottom = [0.0] * len(names)
    for part, colour in zip(parts, style.colours(len(parts)), strict=True):
        sizes = [stage.parts().get(part, 0) / GIB for stage in plan.stages]
        axes.bar(names, sizes, bottom=bottom, label=part, width=0.6, color=colour, edgecolor=style.SURFACE)
        bottom = [below + size for below, size in zip(bottom, sizes, strict=True)]
    axes.axhline(plan.gpu.memory / GIB, color=style.INK, linestyle="--", linewidth=1, label=plan.gpu.name)
    axes.set(xlabel="pipeline stage", ylabel="memory per GPU at the peak, GiB", title=plan.name)
    figure.legend(loc="outside right center")
    style.save(figure, path, f"{plan.name}: memory per GPU by pipeline stage", "--out")
