"""In place of Transformer Engine's grouped linear layers, which need a GPU: the same names, arguments and layout."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.utils import replace_prefix_for_sharding
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn


class GroupedLinear(nn.Module):
    """Matrices `weight0`, ... of a rank's experts, each applied to its share of the rows."""

    def __init__(self, num_gemms: int, input_size: int, output_size: int, *, config: Any, **_: Any) -> None:
        super().__init__()
        self.num_gemms = num_gemms
        for index in range(num_gemms):
            weight = nn.Parameter(torch.empty(output_size, input_size, dtype=config.params_dtype))
            weight.allreduce = config.expert_model_parallel_size == 1
            self.register_parameter(f"weight{index}", weight)

    def forward(self, x: Tensor, m_splits: list[int]) -> tuple[Tensor, None]:
        """Return the outputs [tokens, outputs], of rows by expert."""
        parts = x.split(m_splits)
        return torch.cat([F.linear(part, getattr(self, f"weight{n}")) for n, part in enumerate(parts)]), None

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """Return Megatron's layout of a grouped layer's weights: its own names, of a `SequentialMLP` outside."""
        state: dict[str, Any] = {}
        total = self.num_gemms * parallel_state.get_expert_model_parallel_world_size()
        first = self.num_gemms * parallel_state.get_expert_model_parallel_rank()
        weights = self.state_dict(keep_vars=True)
        for index in range(self.num_gemms):
            own = {f"{index}.weight": weights[f"weight{index}"]}
            offsets = (*sharded_offsets, (len(sharded_offsets), first + index, total))
            made = make_sharded_tensors_for_checkpoint(own, "", {}, offsets)
            replace_prefix_for_sharding(made, f"{index}.", prefix)
            (tensor,) = made.values()
            tensor.replica_id = (*tensor.replica_id[:2], parallel_state.get_expert_data_parallel_rank())
            state[f"{prefix}weight{index}"] = tensor
        return state
