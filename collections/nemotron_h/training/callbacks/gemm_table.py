"""Print the precision of every matmul and check it against data and machine before the model is built."""

from __future__ import annotations

import logging

import lightning.pytorch as pl
import torch
from rich.console import Console
from rich.table import Table

from nemotron_h.architecture.gemms import FP8_FORMATS, GemmGroup, check_gemms, encoder_gemms, fold, gemm_table
from nemotron_h.platform import hardware
from nemotron_h.precision.plugins import PrecisionPlugin

logger = logging.getLogger(__name__)


def as_table(groups: list[GemmGroup], whose: str = "") -> Table:
    """Return a table of the matmuls, those of equal layers in one row; `whose` ends the title."""
    title = f"matrix products{whose} on each rank"
    table = Table(box=None, padding=(0, 2, 0, 0), title_justify="left", title=title)
    for heading in ("layers", "type", "product", "tokens x inputs x outputs", "in", "why"):
        table.add_column(heading, no_wrap=True)
    for group in groups:
        g = group.gemm
        shape = f"{g.m:,} x {g.k:,} x {g.n:,}"
        table.add_row("" if g.kind == "output" else group.span, g.kind, g.name, shape, g.dtype, g.why)
    return table


class GemmTable(pl.Callback):
    """Print every matmul of an FP8 run, FP8 or BF16 and why; refuse what cannot run."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Print the table before the model is built.

        Errors:
            UserError: a shape that FP8 cannot take, GPUs without FP8 or of several kinds, no Transformer Engine.
        """
        plugin = trainer.precision_plugin
        if not isinstance(plugin, PrecisionPlugin) or plugin.recipe not in FP8_FORMATS:
            return
        strategy, data = trainer.strategy, trainer.datamodule
        tensor, edges = strategy.tensor_model_parallel_size, plugin.bf16_edge_layers
        definitions = pl_module.config.definitions()
        for definition in definitions.values():
            check_gemms(
                definition,
                plugin.recipe,
                seq_length=data.seq_length,
                micro_batch_size=data.micro_batch_size,
                tensor_parallel=tensor,
                sequence_parallel=strategy.sequence_parallel,
                context_parallel=strategy.context_parallel_size,
                bf16_edge_layers=edges,
            )
        if not plugin.emulated:
            hardware.check_engine(plugin.recipe)
            names = [torch.cuda.get_device_name()] * trainer.world_size
            if trainer.world_size > 1:
                torch.distributed.all_gather_object(names, torch.cuda.get_device_name())
            hardware.check_one_kind(names)
        if trainer.is_global_zero:
            tokens = data.seq_length // strategy.context_parallel_size * data.micro_batch_size
            # a row stays one line, in a log file too
            console = Console(width=max(Console().width, 140))
            for role, definition in definitions.items():
                table = gemm_table(
                    definition,
                    plugin.recipe,
                    tensor,
                    tokens=tokens,
                    bf16_edge_layers=edges,
                    sequence_parallel=strategy.sequence_parallel,
                )
                images = definition.encoder.tiles(data.seq_length) * data.micro_batch_size if definition.encoder else 0
                table = [*fold(encoder_gemms(definition, plugin.recipe, tensor, images)), *fold(table)]
                console.print(as_table(table, "" if role == "model" else f" of the {role}"), highlight=False)
            if plugin.emulated:
                where = "a GPU, as asked" if torch.cuda.is_available() else "the CPU"
                logger.info(f"{plugin.recipe} is emulated on {where}: float8 casts, products in float32; slow")
