"""One rank of the tensor-parallel test: FP8 products of a column- and a row-parallel layer, assembled on rank 0.

Run by `test_tensor_parallel.py` through torchrun: `tensor_parallel_worker.py OUT RECIPE...`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from nemotron_h.platform import cpu, quiet

quiet.hush()
cpu.install()

from megatron.core import parallel_state  # noqa: E402
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed  # noqa: E402

from nemotron_h.model.megatron_layers import CpuColumnParallelLinear, CpuRowParallelLinear  # noqa: E402
from nemotron_h.model.module import NemotronHConfig  # noqa: E402

TOKENS, INPUTS, OUTPUTS, LARGEST = 256, 256, 512, 6.0


def drawn(rows: int, columns: int, seed: int) -> torch.Tensor:
    """Scale 1, with the same largest value in each quarter along either axis, so that shards have the whole's amax."""
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).clamp(-LARGEST, LARGEST)
    for i in range(4):
        for j in range(4):
            x[i * rows // 4 + 3, j * columns // 4 + 5] = LARGEST
    return x


def gathered(t: torch.Tensor, axis: int) -> torch.Tensor:
    """The ranks' shards along an axis."""
    parts = [torch.empty_like(t) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(parts, t.contiguous())
    return torch.cat(parts, axis)


def products(kind: str, recipe: str, sequence: bool, micro_batches: int) -> dict[str, torch.Tensor]:
    """Output, input gradient and summed weight gradient of one layer, whole."""
    size, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    group = parallel_state.get_tensor_model_parallel_group()
    config = NemotronHConfig(
        hidden_size=INPUTS,
        num_attention_heads=4,
        hybrid_override_pattern="*-",
        params_dtype=torch.float32,
        bf16=False,
        sequence_parallel=sequence,
        tensor_model_parallel_size=size,
    )
    common = {"config": config, "init_method": lambda w: None, "bias": False, "is_expert": False, "tp_group": group}
    weight = drawn(OUTPUTS, INPUTS, 1)
    column = kind == "column"
    if column:
        layer = CpuColumnParallelLinear(INPUTS, OUTPUTS, gather_output=False, skip_bias_add=False, **common)
    else:
        layer = CpuRowParallelLinear(INPUTS, OUTPUTS, input_is_parallel=True, skip_bias_add=True, **common)
    layer.fp8_emulation = recipe
    layer.weight.data.copy_(weight.chunk(size, 0 if column else 1)[rank])
    found: dict[str, torch.Tensor] = {}
    for number in range(micro_batches):
        whole_x, whole_dy = drawn(TOKENS, INPUTS, 2 + number), drawn(TOKENS, OUTPUTS, 20 + number)
        # what a rank holds: its tokens with sequence parallelism, its channels where the layer splits them
        x, dy = whole_x, whole_dy
        if column:
            dy = dy.chunk(size, 1)[rank]
            x = x.chunk(size, 0)[rank] if sequence else x
        else:
            x = x.chunk(size, 1)[rank]
            dy = dy.chunk(size, 0)[rank] if sequence else dy
        x = x.unsqueeze(1).requires_grad_()
        y, _ = layer(x)
        y.backward(dy.unsqueeze(1))
        y, dx = y.detach().squeeze(1), x.grad.squeeze(1)
        if column:
            y, dx = gathered(y, 1), gathered(dx, 0) if sequence else dx
        else:
            y, dx = gathered(y, 0) if sequence else y, gathered(dx, 1)
        found |= {f"y{number}": y, f"dx{number}": dx}
    return {**found, "dw": gathered(layer.weight.grad, 0 if column else 1)}


def main(out: Path, recipes: list[str]) -> None:
    """Every layer and recipe, with and without sequence parallelism."""
    torch.distributed.init_process_group("gloo")
    torch.set_num_threads(1)
    size = torch.distributed.get_world_size()
    parallel_state.initialize_model_parallel(size)
    model_parallel_cuda_manual_seed(1)
    results = {
        (kind, recipe, sequence): products(kind, recipe, sequence, micro_batches=2)
        for kind in ("column", "row")
        for recipe in recipes
        for sequence in ((False, True) if size > 1 else (False,))
    }
    if torch.distributed.get_rank() == 0:
        torch.save(results, out)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
