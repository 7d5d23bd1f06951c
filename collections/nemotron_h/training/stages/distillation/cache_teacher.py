"""Write a cache of a teacher's logits: forward passes over the windows of a distillation, in the order of the run.

`python -m nemotron_h.training.stages.distillation.cache_teacher RECIPE.yaml`, of which torchrun starts one for each
GPU: the teacher is split over `parallel.tensor` ranks, and the files are shared out among what remains.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from nemotron_h.platform import quiet

quiet.hush()

import fiddle as fdl  # noqa: E402
import torch  # noqa: E402
from megatron.core import parallel_state  # noqa: E402
from megatron.core.tensor_parallel import (  # noqa: E402
    gather_from_sequence_parallel_region,
    model_parallel_cuda_manual_seed,
)
from nemo.lightning.pytorch.plugins.mixed_precision import update_config_with_dtype_overrides  # noqa: E402
from rich.console import Console  # noqa: E402
from torch.utils.data import default_collate  # noqa: E402

from nemotron_h.checkpoint import folders  # noqa: E402
from nemotron_h.core.errors import UserError, report  # noqa: E402
from nemotron_h.core.progress import StageProgress  # noqa: E402
from nemotron_h.core.units import gib  # noqa: E402
from nemotron_h.data.feed.datamodule import BlendDataModule  # noqa: E402
from nemotron_h.export.hub_import import obtain  # noqa: E402
from nemotron_h.inference.trained_tokenizer import check_data  # noqa: E402
from nemotron_h.model.module import NemotronHMegatronModel  # noqa: E402
from nemotron_h.ops.distillation_loss import HiddenTeacher  # noqa: E402
from nemotron_h.ops.teacher_logits import kept_logits  # noqa: E402
from nemotron_h.planning.teacher_logits import ids_dtype  # noqa: E402
from nemotron_h.platform import cpu, megatron_fixes  # noqa: E402
from nemotron_h.recipe.compose import compose  # noqa: E402
from nemotron_h.schema.recipe import RecipeConfig  # noqa: E402
from nemotron_h.training.stages.distillation import stage, teacher_cache  # noqa: E402
from nemotron_h.training.stages.distillation.model import DistillationConfig  # noqa: E402
from nemotron_h.training.stages.distillation.teacher_cache import Header  # noqa: E402
from nemotron_h.training.stages.distillation.teacher_shards import (  # noqa: E402
    kept_probability,
    text_digest,
    wanted_header,
    write_shard,
)


class Writing:
    """Sources of a cache: teacher, data, and the header.

    Args:
        recipe: of stage distill, with `distill.teacher_logits`.
    Errors:
        UserError: as a run's start has them; a cache of another run is in the folder; the layout has pipeline stages.
    """

    def __init__(self, recipe: RecipeConfig) -> None:
        if recipe.parallel.pipeline > 1:
            raise UserError(
                f"parallel.pipeline = {recipe.parallel.pipeline}: a cache is written by whole teachers",
                hint="split it over tensor-parallel ranks: parallel.pipeline=1 parallel.tensor=8",
            )
        if recipe.parallel.context > 1:
            raise UserError(
                f"parallel.context = {recipe.parallel.context}: a cache is written by teachers of whole sequences",
                hint="split the teacher over tensor-parallel ranks: parallel.context=1 parallel.tensor=8",
            )
        self.folder = Path(recipe.distill.teacher_logits).expanduser()
        task = stage.build(recipe)
        task.model.config.teacher_logits = None
        strategy, plugin = task.trainer.strategy, fdl.build(task.trainer.plugins)
        self.config: DistillationConfig = fdl.build(task.model.config)
        self.config.tensor_model_parallel_size = strategy.tensor_model_parallel_size
        self.config.sequence_parallel = strategy.sequence_parallel
        self.config = update_config_with_dtype_overrides(plugin.dtype_config, self.config)
        layout = SimpleNamespace(
            tensor_model_parallel_size=strategy.tensor_model_parallel_size,
            pipeline_model_parallel_size=1,
            context_parallel_size=1,
            expert_model_parallel_size=strategy.expert_model_parallel_size,
            sequence_parallel=strategy.sequence_parallel,
        )
        trainer = SimpleNamespace(strategy=layout, num_devices=recipe.parallel.devices, num_nodes=1)
        obtain(self.config.teacher, "distill.teacher", int(os.environ.get("RANK", 0)))
        stage.check_teacher(self.config, trainer)
        self.data: BlendDataModule = fdl.build(task.data)
        self.data.trainer = SimpleNamespace(
            max_steps=task.trainer.max_steps, limit_val_batches=task.trainer.limit_val_batches
        )
        check_data(self.config.teacher_checkpoint, self.data.manifest, "distill.teacher")
        self.data.setup()
        wanted = wanted_header(self.config, self.data, task.trainer.max_steps, recipe.precision)
        self.header = self._continued(wanted.sized())

    def _continued(self, wanted: Header) -> Header:
        """Return the header that is there, extended where the run is longer; else the wanted one."""
        if not (self.folder / teacher_cache.HEADER).is_file():
            if self.folder.is_dir() and any(self.folder.glob("*.safetensors")):
                raise UserError(
                    f"distill.teacher_logits: {self.folder} has files and no {teacher_cache.HEADER}",
                    hint="remove the folder, or name another one",
                )
            return wanted
        held = teacher_cache.read_header(self.folder)
        teacher_cache.check_fits(self.folder, held, wanted)
        windows = max(held.validation_windows, wanted.validation_windows)
        if wanted.steps <= held.steps:
            return dataclasses.replace(held, validation_windows=windows)
        return dataclasses.replace(held, plan=wanted.plan, steps=wanted.steps, validation_windows=windows)

    def missing(self) -> list[tuple[str, int]]:
        """Return the files to write: split and number."""
        return teacher_cache.missing(self.folder, self.header)

    def windows(self, files: list[tuple[str, int]]) -> int:
        """Return the number of windows in some files."""
        return sum(len(self.header.shards(split)[number]) for split, number in files)

    def check_disk(self) -> str:
        """Check that the missing files fit on the disk, and return a line with the cache's size.

        Errors:
            UserError: the disk has less room.
        """
        header = self.header
        need = self.windows(self.missing()) * header.window_bytes
        whole = (header.windows("train") + header.windows("validation")) * header.window_bytes
        free = shutil.disk_usage(self.folder).free
        kept = f"all {header.vocabulary:,}" if header.top_k is None else f"{header.top_k:,} of {header.vocabulary:,}"
        line = (
            f"{header.windows('train'):,} training and {header.windows('validation'):,} validation windows of "
            f"{header.seq_length:,} tokens, {kept} logits each: {gib(whole)} in {self.folder}, "
            f"{gib(need)} to write, {gib(free)} free"
        )
        if free < need:
            raise UserError(line, hint="lower distill.top_k or tokens, or write elsewhere: distill.teacher_logits=DIR")
        return line


def write(recipe: RecipeConfig, console: Console) -> None:
    """Write what is missing, as one of the ranks that the environment names, or alone.

    Errors:
        UserError: see `Writing`; the teacher is damaged; the disk is full.
    """
    megatron_fixes.install()
    if not torch.cuda.is_available():
        cpu.install()
    _join(recipe.parallel.tensor)
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    try:
        writing = Writing(recipe)
        problems = folders.damage(writing.config.teacher_checkpoint, rank, ranks)
        if problems:
            raise UserError(f"distill.teacher: {writing.config.teacher_checkpoint}: {'; '.join(problems[:3])}")
        if rank == 0:
            writing.folder.mkdir(parents=True, exist_ok=True)
            console.print(writing.check_disk())
            teacher_cache.write_header(writing.folder, writing.header)
        torch.distributed.barrier()
        _write_missing(writing, console, recipe.data.micro_batch_size)
        torch.distributed.barrier()
        if rank == 0:
            kept = kept_probability(writing.folder, writing.header)
            console.print(f"complete; the kept tokens have {kept:.2%} of the teacher's probability, on average")
    finally:
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()


def _join(tensor: int) -> None:
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if "LOCAL_RANK" in os.environ:
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.distributed.init_process_group(backend)
    else:
        torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel(tensor)
    model_parallel_cuda_manual_seed(1)


def _write_missing(writing: Writing, console: Console, micro_batch: int) -> None:
    mine = writing.missing()[parallel_state.get_data_parallel_rank() :: parallel_state.get_data_parallel_world_size()]
    if not mine:
        return
    teacher = writing.config.teacher_model(True, True)
    first = parallel_state.get_tensor_model_parallel_rank() == 0
    quietly = Console(quiet=True) if torch.distributed.get_rank() else console
    datasets = {split: writing.data.windows(split) for split in teacher_cache.SPLITS}
    with StageProgress(quietly, "windows through the teacher", writing.windows(mine)) as bar:
        for split, number in mine:
            windows = writing.header.shards(split)[number]
            made: dict[str, list[torch.Tensor]] = {}
            for start in range(windows.start, windows.stop, micro_batch):
                rows = range(start, min(start + micro_batch, windows.stop))
                for name, part in _of(teacher, [datasets[split][row] for row in rows], writing.header):
                    if first:
                        made.setdefault(name, []).append(part)
                bar.advance(len(rows))
            if first:
                path = teacher_cache.shard_path(writing.folder, split, number)
                write_shard(path, {name: torch.cat(parts) for name, parts in made.items()})


def _of(teacher: NemotronHMegatronModel, items: list[dict[str, Any]], header: Header) -> Iterator:
    """Yield name and values [windows, ...] of what is kept of some windows."""
    device = teacher.output_weight.device
    batch = {name: value.to(device) for name, value in default_collate(items).items()}
    group = teacher.pg_collection.tp
    with torch.no_grad():
        hidden = teacher.hidden_states(batch["tokens"], batch["position_ids"], batch.get("seq_idx"))  # [s, b, width]
        if teacher.config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, group=group)
    side = HiddenTeacher(hidden.flatten(0, 1), teacher.output_weight)
    kept = kept_logits(side, header.top_k, group, teacher.words)
    for name, value in kept._asdict().items():
        if value is not None:
            # [s * b, k] to [b, s, k]
            value = value.unflatten(0, hidden.shape[:2]).transpose(0, 1)
            if name == "ids":
                value = value.to(getattr(torch, ids_dtype(header.vocabulary)))
            yield name, value.cpu().contiguous()
    yield "text", torch.tensor([text_digest(item["tokens"]) for item in items])


def main(recipe: str) -> None:
    """Write the cache of a recipe, as a process that torchrun starts."""
    try:
        write(compose(recipe), Console(highlight=False, soft_wrap=True))
    except UserError as error:
        if int(os.environ.get("RANK", 0)) == 0:
            report(error)
        sys.exit(error.EXIT_CODE)


if __name__ == "__main__":
    main(sys.argv[1])
