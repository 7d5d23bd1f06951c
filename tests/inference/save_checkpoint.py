"""Write a checkpoint folder as training does: weights in Megatron's `torch_dist` format, run.json, integrity.json.

Run on two ranks, `save_checkpoint.py OUT LAYOUT...` writes one folder per layout (`tp2`, `pp2`).
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import torch


def save(model, folder: Path, data: dict | None = None) -> Path:
    """Save a Megatron model from every rank; rank 0 writes the small files."""
    from megatron.core import dist_checkpointing

    from nemotron_h.checkpoint import folders
    from nemotron_h.platform import megatron_fixes

    megatron_fixes.install()
    rank = torch.distributed.get_rank()
    if rank == 0:
        (folder / "weights").mkdir(parents=True)
    torch.distributed.barrier()
    dist_checkpointing.save(model.sharded_state_dict(prefix="module."), str(folder / "weights"))
    torch.distributed.barrier()
    if rank == 0:
        record = {"model": dataclasses.asdict(model.config.definition()), "data": data}
        (folder / folders.RECORD).write_text(json.dumps(record))
        finish(folder)
    return folder


def finish(folder: Path) -> None:
    """Write the file that ends a checkpoint."""
    from nemotron_h.checkpoint import folders

    folders.write_integrity(folder, folders.describe(folder, folders.content(folder)))


def main(out: Path, layouts: list[str]) -> None:
    """One folder per layout, all of the same initial weights."""
    from nemotron_h.platform import cpu, quiet

    quiet.hush()
    cpu.install()
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
    from small_model import small_config

    torch.distributed.init_process_group("gloo")
    torch.set_num_threads(1)
    for layout in layouts:
        sizes = {"tp2": (2, 1), "pp2": (1, 2)}[layout]
        parallel_state.initialize_model_parallel(*sizes)
        model_parallel_cuda_manual_seed(1)
        config = small_config(tensor_model_parallel_size=sizes[0], pipeline_model_parallel_size=sizes[1])
        save(config.configure_model(None), out / layout)
        parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    # not `__file__`: a fork that runs this has none
    sys.path.insert(0, str(Path(sys.path[0]).parent / "model"))
    main(Path(sys.argv[1]), sys.argv[2:])
