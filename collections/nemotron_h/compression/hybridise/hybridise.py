"""Make a hybrid of a Transformer in rounds (Mamba in the Llama, arXiv 2408.15237; MOHAWK, 2408.10189): stages over one
recipe, each a file of `pipeline/`.
"""

from __future__ import annotations

from nemotron_h.compression.hybridise.context import Context
from nemotron_h.compression.hybridise.pipeline import distil, generation, mixers, report, then
from nemotron_h.compression.hybridise.rounds import following_stages
from nemotron_h.launch.stages import Stage


class Hybridise(Context):
    """A hybrid, ready to be made; arguments and errors as of `Context`."""

    def stages(self) -> list[Stage]:
        """Return the stages."""
        rounds = [make(self, each) for each in self.rounds for make in (mixers.stage, distil.stage)]
        after = [then.stage(self, *each) for each in following_stages(self.recipe)]
        return [*rounds, *after, generation.stage(self), report.stage(self)]
