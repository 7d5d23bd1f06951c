"""State of a model after the tokens it has read: constant size for Mamba-2, keys and values for attention."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from nemotron_h.model.blocks.running import Running, State


class States:
    """The states of all layers for a batch of sequences, each at its own position.

    Attributes:
        layers: one entry per layer; None where a layer remembers nothing.
        lengths: int64 [batch] in host memory, the tokens that each sequence has read.
        positions: the same numbers on the device; on the CPU the same memory.
    """

    def __init__(self, layers: list[State | None], lengths: np.ndarray, positions: Tensor) -> None:
        self.layers, self.lengths, self.positions = layers, lengths, positions

    @classmethod
    def empty(
        cls, layers: Sequence[Running], batch: int, capacity: int, dtype: torch.dtype, device: torch.device
    ) -> States:
        """Return the states before the first token.

        Args:
            layers: of the model.
            batch: sequences.
            capacity: tokens that the longest sequence may reach.
        """
        lengths = np.zeros(batch, dtype=np.int64)
        positions = torch.from_numpy(lengths)
        of_layers = [layer.state(batch, capacity, dtype, device) for layer in layers]
        return cls(of_layers, lengths, positions.to(device))

    def rows(self, begin: int, end: int) -> States:
        """Return a view of some of the sequences: changes to it are changes to the whole."""
        layers = [None if layer is None else layer.rows(begin, end) for layer in self.layers]
        return States(layers, self.lengths[begin:end], self.positions[begin:end])

    def taken(self, rows: Sequence[int]) -> States:
        """Return some of the sequences, in this order, each as often as it is named: a copy."""
        index = torch.tensor(rows, device=self.positions.device)
        layers = [None if layer is None else layer.taken(index) for layer in self.layers]
        lengths = self.lengths[rows]
        return States(layers, lengths, torch.from_numpy(lengths).to(index.device))

    def put(self, rows: Sequence[int], other: States) -> None:
        """Replace some of the sequences by all those of other states of the same capacity, in place."""
        index = torch.tensor(rows, device=self.positions.device)
        for mine, theirs in zip(self.layers, other.layers, strict=True):
            if mine is not None:
                mine.put(index, theirs)
        self.lengths[rows] = other.lengths
        self.positions[index] = other.positions

    def reserve(self, capacity: int) -> None:
        """Make room for sequences of so many tokens; what was read stays."""
        for layer in self.layers:
            if layer is not None:
                layer.reserve(capacity)

    def advance(self, tokens: int | np.ndarray, on_device: bool = True) -> None:
        """Count so many more tokens as read by every sequence.

        Args:
            tokens: of all sequences alike, or where the device has counted int64 [batch].
            on_device: False where the device has counted them already (a CUDA graph does).
        """
        self.lengths += tokens
        if on_device and self.positions.device.type != "cpu":
            self.positions += tokens

    def bytes(self) -> int:
        """Return the memory of all states."""
        return sum(t.nbytes for layer in self.layers if layer is not None for t in vars(layer).values())
