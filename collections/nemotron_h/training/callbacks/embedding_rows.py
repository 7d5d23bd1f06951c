"""Name the outliers among the embedding rows that a run starts from, repair them, or say when the data meet them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import Tensor, nn

from nemotron_h.checkpoint.embedding_rows import Outliers, read_outliers, read_replacements
from nemotron_h.checkpoint.reader import WeightFile
from nemotron_h.core.errors import UserError
from nemotron_h.data.tokenizer import load_tokenizer, token_of

_NAMED = 8  # ids that a warning lists


class EmbeddingRows(pl.Callback):
    """Look at the initial weights' embedding before the first step.

    Args:
        checkpoint: of the initial weights, as `find_checkpoint` returns it.
        repair: give outliers new rows: `init.repair_embeddings`.
    """

    def __init__(self, checkpoint: Path, repair: bool) -> None:
        self.checkpoint, self.repair = checkpoint, repair
        self.outliers = Outliers({}, 0.0)
        self.rows: Tensor | None = None
        self.watched = False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Read the embedding on the first rank, and name its outliers.

        Errors:
            UserError: rows of frozen weights are to be repaired: checkpoints of an adapter do not hold them.
        """
        config = pl_module.config
        if self.repair and config.adapter is not None:
            raise UserError(
                "init.repair_embeddings with an adapter: its checkpoints do not hold the embedding",
                hint="repair what it starts from: nemotron-h import hf DIR OUT --repair-embeddings",
            )
        if trainer.global_rank == 0:
            file = WeightFile(self.checkpoint)
            self.outliers = read_outliers(file, config.vocab_size)
            if self.repair and self.outliers.norms:
                self.rows = read_replacements(file, self.outliers)
            self._announce(trainer)
        shared = [(self.outliers, self.rows)]
        if dist.is_initialized():
            dist.broadcast_object_list(shared)
        self.outliers, self.rows = shared[0]

    def _announce(self, trainer: pl.Trainer) -> None:
        if not self.outliers.norms:
            return
        token = token_of(load_tokenizer(trainer.datamodule.manifest.tokenizer_path()))
        rows = f"{len(self.outliers.norms)} embedding rows of {self.checkpoint} have outlying norms"
        then = (
            "they are replaced"
            if self.repair
            else "training diverges where the data have these tokens; init.repair_embeddings=true replaces the rows"
        )
        print(f"warning: {rows}: {self.outliers.described(token)}; {then}", flush=True)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put new rows into the weights, which are loaded by now, or watch for the tokens of the old ones."""
        if not self.outliers.norms:
            return
        ids = torch.tensor(list(self.outliers.norms))
        self.met = torch.zeros(len(ids), dtype=torch.int32)
        self.watched = self.rows is None
        for embedding in _embeddings(pl_module):
            weight, first = embedding.weight, embedding.vocab_start_index
            if self.rows is not None:
                here = (ids >= first) & (ids < embedding.vocab_end_index)
                weight.data[ids[here] - first] = self.rows[here].to(weight)
            else:
                self.met, ids = self.met.to(weight.device), ids.to(weight.device)
                embedding.register_forward_pre_hook(self._watch(ids))
        if self.rows is not None:
            for optimizer in trainer.strategy.optimizers:
                optimizer.reload_model_params()

    def _watch(self, ids: Tensor) -> Any:
        def note(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if self.watched:
                self.met |= torch.isin(ids, inputs[0]).int()

        return note

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Say once of each token that the data have it."""
        if not self.watched:
            return
        met = self.met.to(trainer.strategy.root_device)
        if dist.is_initialized():
            dist.all_reduce(met, dist.ReduceOp.MAX)
        names = [number for number, seen in zip(self.outliers.norms, met.tolist(), strict=True) if seen == 1]
        if names and trainer.global_rank == 0:
            listed = f"{', '.join(map(str, names[:_NAMED]))}{' ...' if len(names) > _NAMED else ''}"
            print(
                f"warning: step {trainer.global_step}: the data have tokens of outlying embedding rows: {listed}; "
                "init.repair_embeddings=true, in a new run, replaces the rows",
                flush=True,
            )
        self.met = torch.where(met > 0, 2, 0).int()
        self.watched = not bool((met > 0).all())

    def record(self) -> dict[str, Any]:
        """Return what the run's record tells of the rows."""
        return self.outliers.record(self.repair)


def _embeddings(pl_module: pl.LightningModule) -> Iterator[Any]:
    """Yield the input embeddings of this rank: one, or none behind the first pipeline stage."""
    for name, module in pl_module.named_modules():
        if name.endswith("embedding.word_embeddings"):
            yield module
