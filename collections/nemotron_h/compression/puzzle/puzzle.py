"""Compress by Puzzle (arXiv 2411.19146): ten stages over one recipe, each a file of `pipeline/`."""

from __future__ import annotations

from typing import Any

from nemotron_h.compression.pipeline import importance
from nemotron_h.compression.puzzle.context import Context
from nemotron_h.compression.puzzle.pipeline import (
    child,
    compare,
    costs,
    heal,
    library,
    refine,
    report,
    score,
    search,
)
from nemotron_h.launch.stages import Stage

#: in order
STAGES = (importance, library, score, costs, search, compare, refine, child, heal, report)


class Puzzle(Context):
    """A compression, ready to run.

    Args:
        arguments: as of `Context`.
    Errors:
        UserError: as of `Context`; no child has as few parameters or as little memory as its limits allow.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        costs.check_sizes(self)

    def stages(self) -> list[Stage]:
        """Return the stages."""
        return [module.stage(self) for module in STAGES]
