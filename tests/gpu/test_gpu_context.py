"""Two context-parallel ranks on a GPU each, or on one that they share: losses and gradients are those of one.

`python tests/gpu/test_gpu_context.py` prints what it measures. Ranks that share a GPU speak through gloo, which NCCL
refuses. Without a GPU the script tries itself on the plain stack.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "parallel")]
from test_packed_documents import DEVICE, LENGTH, MODELS, difference, model, said, seq_idx, start, tokens  # noqa: E402

try:
    import pytest

    pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]
except ImportError:
    pytest = None  # type: ignore[assignment]

#: of `MODELS`; with heads of 128 both ranks get the one head of keys and values
NAMES = ("hybrid", "hybrid, recomputed", "attention, heads of 128", "attention, rotary")
#: ours: the convolution, scan and norm of one rank are one kernel, which rounds to BF16 elsewhere
BOUNDS = {"losses": 2e-2, "gradients": 6e-2}


def batch(documents: bool) -> dict[str, torch.Tensor]:
    """Two rows, not every token of which counts."""
    ids = tokens()
    mask = (torch.arange(LENGTH, device=DEVICE) % 5 > 0).float().expand(2, -1)
    found = {"tokens": ids[:, :-1], "position_ids": ids[:, :-1], "labels": ids[:, 1:], "loss_mask": mask}
    return {**found, "seq_idx": seq_idx(65)} if documents else found


def results(name: str, ranks: int, documents: bool) -> dict[str, torch.Tensor]:
    """Losses of all tokens, and the gradients of their sum, in float32, of so many context-parallel ranks."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
    from process_groups import leave_model_parallel

    from nemotron_h.model.step import data_step, forward_step

    parallel_state.initialize_model_parallel(context_parallel_size=ranks)
    model_parallel_cuda_manual_seed(1)
    built = model(*MODELS[name], context_parallel_size=ranks)
    own = data_step(iter([batch(documents)]))
    losses = forward_step(built, own)
    (losses * own["loss_mask"]).sum().backward()
    gradients = {f"gradient of {n}": p.grad.float() for n, p in built.named_parameters() if p.grad is not None}
    parts = [losses.detach()]
    if ranks > 1:
        parts = [torch.empty_like(losses) for _ in range(ranks)]
        torch.distributed.all_gather(parts, losses.detach().contiguous())
        for gradient in gradients.values():
            torch.distributed.all_reduce(gradient)
    leave_model_parallel()
    return {"losses": torch.cat(parts, dim=1), **gradients}


def check() -> None:
    """Compare one rank with two, each model with and without documents."""
    start(2)
    from process_groups import leave_model_parallel

    leave_model_parallel()
    backend, wrong = torch.distributed.get_backend(), []
    for name in NAMES:
        for documents in (False, True):
            found = difference(results(name, 2, documents), results(name, 1, documents))
            if torch.distributed.get_rank() == 0:
                print(f"{name}, {'documents' if documents else 'whole rows'}, {backend}: {said(found)}", flush=True)
            wrong += [name] * any(found[kind] > bound for kind, bound in BOUNDS.items())
    assert not wrong, wrong


def test_two_ranks_are_one() -> None:
    ranks = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__, "--rank"]
    done = subprocess.run([sys.executable, *ranks], capture_output=True, text=True, timeout=600)
    print(done.stdout[-3000:], flush=True)
    assert done.returncode == 0, done.stderr[-3000:]


if __name__ == "__main__":
    check() if "--rank" in sys.argv else test_two_ranks_are_one()
