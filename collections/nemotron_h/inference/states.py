"""What a model remembers of the tokens it has read: constant size for Mamba-2, keys and values for attention."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nemotron_h.model.definition import ATTENTION, MAMBA, ModelDefinition


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
        positions: int64 [batch] in host memory, the tokens that each sequence has read.
    """

    def __init__(self, layers: list[MambaState | KeyValueCache | None], positions: Tensor) -> None:
        self.layers, self.positions = layers, positions

    @classmethod
    def empty(
        cls, definition: ModelDefinition, batch: int, capacity: int, dtype: torch.dtype, device: torch.device
    ) -> States:
        """States before the first token.

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

        return cls([layer(symbol) for symbol in d.pattern], torch.zeros(batch, dtype=torch.int64))

    def first(self, rows: int) -> States:
        """The first `rows` sequences: a view, so what is done to it is done to the whole."""

        def view(layer: MambaState | KeyValueCache | None) -> MambaState | KeyValueCache | None:
            return None if layer is None else type(layer)(*(t[:rows] for t in vars(layer).values()))

        return States([view(layer) for layer in self.layers], self.positions[:rows])

    def bytes(self) -> int:
        """Memory of all states."""
        return sum(t.nbytes for layer in self.layers if layer is not None for t in vars(layer).values())
