"""Statistics of FP8's casts at chosen steps, by operand: amax, and the shares that underflow, saturate and overflow."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.utils import get_attr_wrapped_model
from torch import Tensor, nn

from nemotron_h.architecture.gemms import CAST_STATISTICS, FP8_FORMATS, gemm_table
from nemotron_h.core.files import write_json
from nemotron_h.ops.norm import rms_norm
from nemotron_h.precision.plugins import PrecisionPlugin
from nemotron_h.precision.statistics import CastStatistics, as_statistics, cast_counts

#: matmuls whose inputs sequence parallelism gathers; of the others it splits the outputs
COLUMN_PARALLEL = ("in_proj", "linear_qkv", "linear_fc1")
#: (layer, matmul, operand)
Key = tuple[int, str, str]


class CastStatisticsCallback(pl.Callback):
    """Measure the operands of every FP8 matmul in the first micro-batch of some steps.

    Operands are quantised once more beside the run's own matmul, with the emulation's arithmetic, which has the
    scales of Transformer Engine, so a GPU's run is measured alike. Activation and gradient are those of the layer's
    input and output, the gradient that of one micro-batch as the backward pass has it. Where a norm is fused into the
    matmul it is computed again, in the model's dtype. Writes `<run>/cast_statistics.json` and, with a logger, scalars
    `fp8_<statistic>_<operand>/layer_<number>_<matmul>`.

    Args:
        steps: to measure, from 1.
    """

    def __init__(self, steps: list[int]) -> None:
        super().__init__()
        self.steps = frozenset(steps)
        self.recipe = ""
        self.hooks: list[Any] = []
        self.counts: dict[Key, Tensor] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find the matmuls that are in FP8."""
        plugin = trainer.precision_plugin
        self.recipe = plugin.recipe if isinstance(plugin, PrecisionPlugin) and plugin.recipe in FP8_FORMATS else ""
        if not self.recipe:
            return
        definition = pl_module.config.definition()
        table = gemm_table(definition, self.recipe, tokens=1, bf16_edge_layers=plugin.bf16_edge_layers)
        self.measured = {(gemm.layer, gemm.name) for gemm in table if gemm.dtype == "FP8"}
        self.kinds = {number: block.name for number, block in enumerate(definition.blocks)}

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, index: int) -> None:
        """Watch this step's matmuls, if it is one to measure."""
        if not self.recipe or trainer.global_step + 1 not in self.steps:
            return
        for layer, name, module in self._products(pl_module):
            self.hooks.append(module.register_forward_hook(self._watch(layer, name)))

    def on_megatron_step_start(self, step: Any) -> None:
        """Begin to count, anew where a step is run again."""
        if self.hooks:
            self.counts = {}

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, index: int
    ) -> None:
        """Put the ranks' counts together and write them."""
        if not self.hooks:
            return
        self._release()
        own = {key: as_statistics(counts) for key, counts in self.counts.items()}
        everyone: list[dict[Key, CastStatistics]] = [own]
        if trainer.world_size > 1:
            everyone = [{} for _ in range(trainer.world_size)]
            torch.distributed.all_gather_object(everyone, own)
        if trainer.is_global_zero:
            rows = list(self._rows(trainer.global_step, together(everyone)))
            write(Path(trainer.checkpoint_callback.dirpath).parent / CAST_STATISTICS, trainer.global_step, rows)
            scalars = {
                f"fp8_{name}_{row['operand']}/layer_{row['layer']:03d}_{row['product']}": row[name]
                for row in rows
                for name in ("amax", "underflow", "saturation", "overflow")
            }
            for logger in trainer.loggers:
                logger.log_metrics(scalars, trainer.global_step - 1)  # the step that Lightning gives this loss

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Stop watching: other callbacks may run the model again to say what went wrong."""
        self._release()

    def _release(self) -> None:
        for hook in self.hooks:
            hook.remove()
        self.hooks = []

    def _products(self, pl_module: pl.LightningModule) -> Iterator[tuple[int, str, nn.Module]]:
        """Yield this rank's FP8 matmuls."""
        model = get_attr_wrapped_model(pl_module, "decoder", return_model_obj=True)
        for layer in model.decoder.layers:
            for path, module in layer.named_modules():
                name = path.rsplit(".", 1)[-1]
                if (layer.layer_number - 1, name) in self.measured:
                    yield layer.layer_number - 1, name, module

    def _watch(self, layer: int, name: str) -> Any:
        """Return a hook that counts a matmul's operands the first time that it sees each."""
        column = name in COLUMN_PARALLEL

        def count(operand: str, x: Tensor, split: bool) -> None:
            key = (layer, name, operand)
            if key not in self.counts:
                # the amax of a tensor that is split over tokens is that of all its parts
                whole = gather_from_sequence_parallel_region(x.detach()) if split else x
                self.counts[key] = cast_counts(whole, operand, self.recipe)

        @torch.no_grad()
        def forward(module: nn.Module, args: tuple[Tensor, ...], output: Any) -> None:
            split = module.sequence_parallel
            count("activation", operand_of(module, args[0]), split and column)
            count("weight", module.weight, False)
            result = output[0] if isinstance(output, tuple) else output
            if result.requires_grad and (layer, name, "gradient") not in self.counts:  # not in a pass to be recomputed
                result.register_hook(lambda gradient: count("gradient", gradient, split and not column))

        return forward

    def _rows(self, step: int, merged: dict[Key, CastStatistics]) -> Iterator[dict[str, Any]]:
        forward, backward = FP8_FORMATS[self.recipe]
        for (layer, name, operand), statistics in sorted(merged.items()):
            yield {
                "step": step,
                "layer": layer,
                "type": self.kinds[layer],
                "product": name,
                "operand": operand,
                "format": backward if operand == "gradient" else forward,
                "amax": statistics.amax,
                **statistics.shares(),
                "nonzero": statistics.nonzero,
            }


def operand_of(module: nn.Module, x: Tensor) -> Tensor:
    """Return a matmul's operand from its module's input, which Transformer Engine may normalise first."""
    weight = getattr(module, "layer_norm_weight", None)
    return x if weight is None else rms_norm(x, weight, eps=module.eps)


def together(ranks: Iterable[dict[Key, CastStatistics]]) -> dict[Key, CastStatistics]:
    """Add up the ranks' statistics. Values that several ranks hold alike count several times, so no share changes."""
    merged: dict[Key, CastStatistics] = {}
    for part in ranks:
        for key, statistics in part.items():
            merged[key] = merged[key] + statistics if key in merged else statistics
    return merged


def write(path: Path, step: int, rows: list[dict[str, Any]]) -> None:
    """Add a step's rows to the file; those of this step and later ones, of a process that was killed, go."""
    kept = [row for row in json.loads(path.read_text()) if row["step"] < step] if path.is_file() else []
    write_json(path, [*kept, *rows])
