"""megatron-core's word embedding without a dense gradient."""

from __future__ import annotations

from megatron.core.tensor_parallel import (
    VocabParallelEmbedding,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor

from nemotron_h.ops.embedding import lookup


class AccumulatingEmbedding(VocabParallelEmbedding):
    """megatron-core's embedding, whose gradient goes right into Megatron's gradient buffer. It adds no state."""

    def forward(self, input_: Tensor) -> Tensor:
        """Look up ids, int [batch, sequence]: [batch, sequence, hidden], with sequence parallelism [sequence / ranks,
        batch, hidden].
        """
        ids = input_ - self.vocab_start_index
        outside = (ids < 0) | (ids >= self.num_embeddings_per_partition)  # with one rank none
        rows = lookup(ids.masked_fill(outside, 0), self.weight).masked_fill(outside.unsqueeze(-1), 0)
        if self.reduce_scatter_embeddings:
            rows = rows.transpose(0, 1).contiguous()
            return reduce_scatter_to_sequence_parallel_region(rows, group=self.tp_group)
        return reduce_from_tensor_model_parallel_region(rows, group=self.tp_group)
