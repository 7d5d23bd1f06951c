"""Keep what a training step computes from beside the weights, so that it can be run again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from megatron.core.tensor_parallel import random


class StepInputs:
    """The micro-batches of a step, by reference and as the data module gave them, and the states of torch's and
    Megatron's generators before its first one. Float8 scales are of the tensors at hand, so there are none to keep.

    Attributes:
        batches: of this rank, until the next step begins.
    """

    def __init__(self) -> None:
        self.batches: list[Any] = []
        self._repeating = False

    def take(self, batches: Iterator[Any]) -> Iterator[Any]:
        """Begin a step and return its micro-batches; inside `repeated` the last step's, with its generators."""
        if self._repeating:
            random._set_all_rng_states(*self._generators)
            return iter(self.batches)
        self.batches, self._generators = [], random._get_all_rng_states()
        return self._recorded(batches)

    def _recorded(self, batches: Iterator[Any]) -> Iterator[Any]:
        for batch in batches:
            self.batches.append(batch)
            yield batch

    @contextmanager
    def repeated(self) -> Iterator[None]:
        """Have steps inside the block take the last step's inputs."""
        self._repeating = True
        try:
            yield
        finally:
            self._repeating = False
