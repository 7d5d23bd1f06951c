"""Write the tokens that follow what states have read."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nemotron_h.inference.graph import Stepper
from nemotron_h.inference.model import GenerationModel
from nemotron_h.inference.sampling import Sampling, choose
from nemotron_h.inference.states import States
from nemotron_h.inference.thought import Thought, bounded


class Writer:
    """Chooses a token of every sequence and reads it, one after another.

    Args:
        model, states: of one batch.
        hidden: [batch, hidden] after the last token that was read.
        sampling: how tokens are chosen.
        generators: one per row.
        thoughts: of each row, that are ended at a budget; none are where there is none.
        graph: see `Recorded`.
    """

    def __init__(
        self,
        model: GenerationModel,
        states: States,
        hidden: Tensor,
        sampling: Sampling,
        generators: list[torch.Generator],
        *,
        thoughts: Sequence[Thought] = (),
        graph: bool | None = None,
    ) -> None:
        self.model, self.states, self.sampling, self.generators = model, states, sampling, generators
        self.thoughts = thoughts
        self.stepper = Stepper(model, states, graph)
        self.scores = model.logits(hidden)
        self.chosen: Tensor | None = None

    def write(self, ended: Sequence[bool]) -> list[list[int]]:
        """Return the next tokens of every sequence, at least one; the last of them is not read yet.

        Args:
            ended: sequences whose tokens nobody reads any more.
        """
        if self.chosen is not None:
            self.scores = self.stepper.step(self.chosen)
        self.chosen = choose(self.scores, self.sampling, self.generators)
        if self.thoughts:
            open_ones = [None if over else each for each, over in zip(self.thoughts, ended, strict=True)]
            self.chosen = bounded(self.chosen, open_ones)
        return [[token] for token in self.chosen.tolist()]

    def finish(self, taken: Sequence[int]) -> None:
        """Leave the states after tokens that stay, to be read from where they are then.

        Args:
            taken: tokens of each sequence that stay, of those that `write` returned last.
        """
