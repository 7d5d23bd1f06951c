"""The files of a cache of a teacher's logits: written whole, and read one window at a time beside the run's windows."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from functools import lru_cache
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import Dataset

from nemotron_h.architecture.rank import padded_vocabulary
from nemotron_h.core.errors import UserError
from nemotron_h.core.files import whole_file
from nemotron_h.data.feed.datamodule import BlendDataModule, WindowDataset
from nemotron_h.training.stages.distillation.teacher_cache import Header, check_complete, check_fits, shard_path

OPEN_FILES = 16


def text_digest(tokens: Tensor) -> int:
    """Hash a window's tokens, int64 [seq_length], to a number."""
    digest = hashlib.blake2b(tokens.to(torch.int32).numpy().tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def write_shard(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write the windows of a file, whole or not at all.

    Args:
        tensors: `values` [windows, seq_length, k], `ids` likewise (not where all logits are kept), `logsumexp` float32
            [windows, seq_length], `text` int64 [windows] of `text_digest`.
    """
    # the teacher's probability of the kept tokens, sum_k exp(x_k) / Z, Z the sum over all: logsumexp is log Z
    probability = tensors["values"].float().sub(tensors["logsumexp"].unsqueeze(-1)).exp().sum(-1).mean()
    with whole_file(path) as temporary:
        save_file(tensors, temporary, {"kept": f"{float(probability):.6f}", "windows": str(len(tensors["text"]))})


def kept_probability(folder: Path, header: Header) -> float:
    """Average the teacher's probability of the kept tokens over the training windows."""
    total = windows = 0.0
    for number in header.shards("train"):
        with safe_open(shard_path(folder, "train", number), framework="pt") as file:
            about = file.metadata()
        total += float(about["kept"]) * int(about["windows"])
        windows += int(about["windows"])
    return total / windows


@lru_cache(maxsize=OPEN_FILES)
def _opened(path: Path, process: int) -> dict[str, Any]:
    """Open a file's tensors, which are read when they are sliced; a forked worker opens its own."""
    file = safe_open(path, framework="pt")
    return {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 -- no mapping


class WithTeacher(Dataset):
    """Windows with the teacher's logits: adds `teacher_values` [seq_length, k], and `teacher_ids` int32 likewise where
    not all are kept, to the items of a `WindowDataset`.
    """

    def __init__(self, windows: WindowDataset, folder: Path, header: Header, split: str) -> None:
        self.windows, self.folder, self.header, self.split = windows, folder, header, split
        self.training = windows.training

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        item = self.windows[index]
        number, row = divmod(index, self.header.shard_windows)
        path = shard_path(self.folder, self.split, number)
        try:
            held = _opened(path, os.getpid())
            found = {name: held[name][row : row + 1][0] for name in held if name != "logsumexp"}
        except (OSError, SafetensorError, IndexError) as error:
            raise UserError(
                f"distill.teacher_logits: {path} is damaged: {error}",
                "Remove the file; nemotron-h distill-cache RECIPE writes it again.",
            ) from error
        if int(found["text"]) != text_digest(item["tokens"]):
            raise UserError(
                f"distill.teacher_logits: {path} holds another text than the run's window {index:,} of {self.split}",
                "Write a cache of this run: nemotron-h distill-cache RECIPE distill.teacher_logits=ANOTHER_DIR.",
            )
        item["teacher_values"] = found["values"]
        if "ids" in found:
            item["teacher_ids"] = found["ids"].to(torch.int32)
        return item


def wanted_header(config: Any, data: BlendDataModule, steps: int, precision: str) -> Header:
    """Return the header that a run needs a cache to have.

    Args:
        config: its `DistillationConfig`.
        data: its data, set up.
        steps: its length.
        precision: the recipe's.
    """
    student = config.definition()
    return Header(
        teacher=config.known_teacher(),
        plan=dataclasses.asdict(data.order.plan),
        validation=data.manifest.texts("validation"),
        document_reset=data.document_reset,
        top_k=config.top_k,
        vocabulary=padded_vocabulary(student, config.tensor_model_parallel_size),
        precision=precision,
        steps=steps,
        validation_windows=data.validation_samples,
    )


class ReadTeacher(pl.Callback):
    """Have the run's windows come with the teacher's logits, of a cache that was written for them."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check the cache and attach it to the windows, before the model is built.

        Errors:
            UserError: the cache is of another run, or not complete.
        """
        config, data = pl_module.config, trainer.datamodule
        folder, held = Path(config.teacher_logits).expanduser(), config.stored
        wanted = wanted_header(config, data, trainer.max_steps, held.precision)
        check_fits(folder, held, wanted)
        check_complete(folder, held, wanted)
        data.beside = lambda windows, split: WithTeacher(windows, folder, held, split)
