"""A plan's memory as a picture: one bar per pipeline stage, stacked by part."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot as plt

from nemotron_h.core.errors import UserError
from nemotron_h.core.units import GIB
from nemotron_h.planning.plan import Plan, parts_by_stage


def plot(plan: Plan, path: Path) -> None:
    """Write the picture; the suffix decides the format.

    Errors:
        UserError: the file cannot be written, or there is no such format.
    """
    figure, axes = plt.subplots(figsize=(3.5 + 0.8 * len(plan.stages), 5), layout="constrained")
    names = [str(stage.stage) for stage in plan.stages]
    bottom = [0.0] * len(names)
    for part in parts_by_stage(plan.stages):
        sizes = [stage.parts().get(part, 0) / GIB for stage in plan.stages]
        axes.bar(names, sizes, bottom=bottom, label=part, width=0.6)
        bottom = [below + size for below, size in zip(bottom, sizes, strict=True)]
    axes.axhline(plan.gpu.memory / GIB, color="black", linestyle="--", linewidth=1, label=plan.gpu.name)
    axes.set(xlabel="pipeline stage", ylabel="GiB per GPU at the peak", title=plan.name)
    figure.legend(loc="outside right center", fontsize="small")
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise UserError(f"--out {path}: {getattr(error, 'strerror', None) or error}") from error
    finally:
        plt.close(figure)
