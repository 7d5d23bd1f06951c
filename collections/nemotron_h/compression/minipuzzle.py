"""Compress by MiniPuzzle (paper 3): seven stages over one recipe, each a file of `pipeline/`."""

from __future__ import annotations

from functools import cached_property

from nemotron_h.compression.pipeline import candidates, distil, export, importance, score, select, short_distil
from nemotron_h.compression.pipeline.context import Context
from nemotron_h.compression.stages import Pipeline

#: in order
STAGES = (importance, candidates, score, short_distil, select, distil, export)


class MiniPuzzle(Context):
    """A compression, ready to run; arguments and errors as of `Context`."""

    @cached_property
    def pipeline(self) -> Pipeline:
        """Return the stages."""
        stages = [module.stage(self) for module in STAGES]
        return Pipeline(
            self.folder, stages, lambda line: self.console.print(line, highlight=False, markup=False, soft_wrap=True)
        )
