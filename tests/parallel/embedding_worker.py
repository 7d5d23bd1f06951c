"""One rank of the embedding's test: outputs and the summed gradient of two micro-batches, assembled on rank 0.

Run by `test_embedding.py` through torchrun: `embedding_worker.py OUT`.
"""

from __future__ import annotations

import sys

import torch

from nemotron_h.platform import cpu, quiet

quiet.hush()
cpu.install()

from megatron.core import parallel_state  # noqa: E402
from megatron.core.tensor_parallel import VocabParallelEmbedding, model_parallel_cuda_manual_seed  # noqa: E402

from nemotron_h.model.megatron_layers import AccumulatingEmbedding  # noqa: E402
from nemotron_h.model.module import NemotronHConfig  # noqa: E402

WORDS, HIDDEN, LENGTH, BATCH = 64, 16, 24, 2


def gathered(t: torch.Tensor) -> torch.Tensor:
    """The ranks' shards along the first axis."""
    parts = [torch.empty_like(t) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(parts, t.contiguous())
    return torch.cat(parts)


def looked_up(kind: type, sequence: bool) -> dict[str, torch.Tensor]:
    """[sequence, batch, hidden] of the last micro-batch, and the gradient [words, hidden] of both."""
    size, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    config = NemotronHConfig(
        hidden_size=HIDDEN,
        num_attention_heads=4,
        hybrid_override_pattern="*-",
        params_dtype=torch.float32,
        bf16=False,
        sequence_parallel=sequence,
        tensor_model_parallel_size=size,
    )
    layer = VocabParallelEmbedding(
        WORDS, HIDDEN, init_method=lambda w: None, reduce_scatter_embeddings=sequence, config=config
    )
    layer.__class__ = kind
    rng = torch.Generator().manual_seed(1)
    layer.weight.data.copy_(torch.randn(WORDS, HIDDEN, generator=rng).chunk(size)[rank])
    layer.weight.main_grad = torch.zeros_like(layer.weight)
    out = torch.empty(0)
    for _ in range(2):
        ids = torch.randint(WORDS, (BATCH, LENGTH), generator=rng)
        upstream = torch.randn(LENGTH, BATCH, HIDDEN, generator=rng)
        layer.weight.grad_added_to_main_grad, layer.weight.grad = False, None
        out = layer(ids)
        if sequence:
            out.backward(upstream.chunk(size)[rank])
            out = gathered(out.detach())
        else:
            out.backward(upstream.transpose(0, 1))
            out = out.detach().transpose(0, 1)
        if not layer.weight.grad_added_to_main_grad:
            layer.weight.main_grad += layer.weight.grad
    return {"output": out, "gradient": gathered(layer.weight.main_grad)}


def main(out: str) -> None:
    """Both classes in every layout of so many ranks."""
    torch.distributed.init_process_group("gloo")
    parallel_state.initialize_model_parallel(torch.distributed.get_world_size())
    model_parallel_cuda_manual_seed(1)
    found = {
        (kind.__name__, sequence): looked_up(kind, sequence)
        for kind in (VocabParallelEmbedding, AccumulatingEmbedding)
        for sequence in ((False, True) if torch.distributed.get_world_size() > 1 else (False,))
    }
    if torch.distributed.get_rank() == 0:
        torch.save(found, out)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
