"""The keys of a sweep file, strict. Imports no torch, NeMo or Megatron."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from nemotron_h.core.strict import number, within
from nemotron_h.schema.ranges import COUNT, SEED

#: columns of every row beside the swept keys
MEASURED = ("parameters", "tokens", "flops", "loss", "train_loss", "validation_loss", "seconds")
#: x of a figure that shows losses over a run
TOKENS_SEEN = "tokens_seen"
AXES = ("x", "y")


@dataclass
class FigureSchema:
    """A picture of a sweep: means over seeds, with their spread.

    Attributes:
        x: a column of the table, or `tokens_seen`: losses over the run.
        y: a column; `loss` is the validation loss where there is one, else the training loss.
        line: a column, of which each value has a line.
        log: axes with a logarithmic scale: `x`, `y`.
        title: over the picture.
    """

    x: str = MISSING
    y: str = "loss"
    line: str | None = None
    log: list[str] = field(default_factory=list)
    title: str | None = None


@dataclass
class FitSchema:
    """A fit over the rows of a sweep.

    Attributes:
        name: of the fit.
        columns: name that the fit reads -> column of the table, where they differ.
        line: a column, of which each value has a fit of its own.
    """

    name: str = MISSING
    columns: dict[str, str] = field(default_factory=dict)
    line: str | None = None


@dataclass
class SweepSchema:
    """Runs that differ in keys of a recipe.

    Attributes:
        recipe: a shipped recipe, or the path of a YAML file.
        settings: recipe key -> value, of all runs.
        grid: recipe key -> its values; or the name of an axis -> mappings of recipe keys, each with a `name`.
        runs: mappings of recipe keys, each with a `name` if one is wanted; every one is combined with the grid.
        seeds: of initial weights and data (`init_seed`, `data.seed`), for every combination.
        at_once: most runs at a time, which share GPUs where these are fewer; null takes as many as the ranks and the
            memory of this machine allow.
        dir: parent of the sweep's folder.
        keep_checkpoints: false removes those of a run when it has finished.
        figures, fits: of the finished runs.
    """

    recipe: str = MISSING
    settings: dict[str, Any] = field(default_factory=dict)
    grid: dict[str, Any] = field(default_factory=dict)
    runs: list[Any] = field(default_factory=list)
    seeds: list[int] = field(default_factory=list, metadata=within(least=0, most=SEED))
    at_once: int | None = number(None, least=1, most=COUNT)
    dir: str = "runs"
    keep_checkpoints: bool = True
    figures: list[FigureSchema] = field(default_factory=list)
    fits: list[FitSchema] = field(default_factory=list)
