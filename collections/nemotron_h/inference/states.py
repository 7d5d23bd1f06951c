"""State of a model after the tokens it has read: constant size for Mamba-2, keys and values for attention."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nemotron_h.architecture.definition import ATTENTION, MAMBA, ModelDefinition


@dataclass
class MambaState:
    """State of one Mamba-2 layer.

    Attributes:
        conv: [batch, conv_kernel - 1, channels], the last inputs of the convolution, in the model's dtype.
        ssm: [batch, heads, head_dim, state], float32 (float64 for a float64 model).
    """

    conv: Tensor
    ssm: Tensor


@dataclass
class KeyValueCache:
    """Keys and values of one attention layer, [batch, groups, capacity, head_dim]; zeros where not yet written."""

    keys: Tensor
    values: Tensor


class States:
    """The states of all layers for a batch of sequences, each at its own position.

    Attributes:
        layers: one entry per layer; None for an FFN.
        lengths: int64 [batch] in host memory, the tokens that each sequence has read.
        positions: the same numbers on the device; on the CPU the same memory.
    """

    def __init__(self, layers: list[MambaState | KeyValueCache | None], lengths: np.ndarray, positions: Tensor) -> None:
        self.layers, self.lengths, self.positions = layers, lengths, positions

    @classmethod
    def empty(
        cls, definition: ModelDefinition, batch: int, capacity: int, dtype: torch.dtype, device: torch.device
    ) -> States:
        """Return the states before the first token.

        Args:
            batch: sequences.
            capacity: tokens that the longest sequence may reach.
        """
        d = definition
        ssm_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        kv_shape = (batch, d.num_query_groups, capacity, d.head_dim)

        def layer(symbol: str) -> MambaState | KeyValueCache | None:
            if symbol == MAMBA:
                conv = torch.zeros(batch, d.conv_kernel - 1, d.conv_channels, dtype=dtype, device=device)
                ssm_shape = (batch, d.mamba_num_heads, d.mamba_head_dim, d.mamba_state_dim)
                return MambaState(conv, torch.zeros(ssm_shape, dtype=ssm_dtype, device=device))
            if symbol == ATTENTION:
                # zeros, not empty: a masked position is weighed with 0, and 0 * NaN is NaN
                return KeyValueCache(*(torch.zeros(kv_shape, dtype=dtype, device=device) for _ in range(2)))
            return None

        lengths = np.zeros(batch, dtype=np.int64)
        positions = torch.from_numpy(lengths)
        return cls([layer(symbol) for symbol in d.pattern], lengths, positions.to(device))

    def rows(self, begin: int, end: int) -> States:
        """Return a view of some of the sequences: changes to it are changes to the whole."""

        def view(layer: MambaState | KeyValueCache | None) -> MambaState | KeyValueCache | None:
            return None if layer is None else type(layer)(*(t[begin:end] for t in vars(layer).values()))

        return States([view(layer) for layer in self.layers], self.lengths[begin:end], self.positions[begin:end])

    def reserve(self, capacity: int) -> None:
        """Make room for sequences of so many tokens; what was read stays. Doubles the room, so that growing is rare."""
        for layer in self.layers:
            if isinstance(layer, KeyValueCache) and layer.keys.shape[2] < capacity:
                for name, old in vars(layer).items():
                    room = max(capacity, 2 * old.shape[2])
                    new = old.new_zeros(*old.shape[:2], room, old.shape[3])
                    new[:, :, : old.shape[2]] = old
                    setattr(layer, name, new)

    def advance(self, tokens: int, on_device: bool = True) -> None:
        """Count so many more tokens as read by every sequence.

        Args:
            on_device: False where the device has counted them already (a CUDA graph does).
        """
        self.lengths += tokens
        if on_device and self.positions.device.type != "cpu":
            self.positions += tokens

    def bytes(self) -> int:
        """Return the memory of all states."""
        return sum(t.nbytes for layer in self.layers if layer is not None for t in vars(layer).values())
