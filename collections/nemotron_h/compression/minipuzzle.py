"""Compress by MiniPuzzle (paper 3): seven stages over one recipe, each a file of `pipeline/`."""

from __future__ import annotations

from nemotron_h.compression.pipeline import candidates, distil, export, importance, score, select, short_distil
from nemotron_h.compression.pipeline.context import Context
from nemotron_h.launch.stages import Stage

#: in order
STAGES = (importance, candidates, score, short_distil, select, distil, export)


class MiniPuzzle(Context):
    """A compression, ready to run; arguments and errors as of `Context`."""

    def stages(self) -> list[Stage]:
        """Return the stages."""
        return [module.stage(self) for module in STAGES]
