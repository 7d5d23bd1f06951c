"""Log-probabilities that the reference gives to every pair, computed once and kept on disk.

The reference is the checkpoint that training starts from: the policy itself computes them before its first step, while
its weights are those, and no second model is in memory. Another reference is built beside it until they are computed.
`<data root>/<blend>/.reference/` keeps them under a key of everything that they depend on, so runs that differ in loss,
beta or learning rate share them, and anything else computes its own.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from nemo import lightning as nl
from torch import Tensor

from nemotron_h.checkpoint import folders
from nemotron_h.checkpoint.definition import read_definition
from nemotron_h.checkpoint.reader import read_record
from nemotron_h.core.errors import UserError
from nemotron_h.core.files import file_sha256, whole_file
from nemotron_h.core.units import duration
from nemotron_h.data.feed.preference_module import PairDataset, PreferenceDataModule, Reference
from nemotron_h.model.step import data_step, forward_step
from nemotron_h.schema.recipe import DPO_LOSSES
from nemotron_h.training.callbacks.run_record import plain, vars_of
from nemotron_h.training.frozen_model import frozen_model
from nemotron_h.training.stages.preference.loss import BATCH_KEYS, answer_logprobs

FORMAT = 1
FOLDER = ".reference"
#: what numpy and zipfile say of a damaged file
_UNREADABLE = (OSError, ValueError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error)
_SECONDS_BETWEEN_LINES = 10


class ReferenceLogprobs(pl.Callback):
    """Give the data module its reference before the first batch, from the cache or from the weights.

    Args:
        checkpoint: whose weights are the reference, as `find_checkpoint` returns it.
        checkpoint_sha256: of its integrity file, which lists the hashes of all others. A run that resumes knows it from
            its record: the checkpoint may be gone as long as the cache is there.
        named: the recipe's `preference.reference`; None where training starts from that checkpoint.
    """

    def __init__(self, checkpoint: Path, checkpoint_sha256: str, named: str | None = None) -> None:
        self.checkpoint, self.checkpoint_sha256, self.named = checkpoint, checkpoint_sha256, named

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Set the reference: the initial weights are loaded by now, those of a run that resumes are not yet.

        Errors:
            UserError: a run that resumes finds neither the cache nor the checkpoint that it started from.
        """
        data: PreferenceDataModule = trainer.datamodule
        if pl_module.config.loss not in DPO_LOSSES:
            data.check_rewards()
        key = reference_key(trainer, pl_module, self.checkpoint_sha256)
        path = cache_path(data, key)
        kept, reason = read(path, key) if trainer.global_rank == 0 else (None, "")
        if trainer.global_rank == 0 and kept is None:
            print(f"reference log-probs: {reason}", flush=True)
        (kept,) = _from_rank_0([kept])
        if kept is None:
            pipeline = trainer.strategy.megatron_parallel.pipeline
            if trainer.ckpt_path:
                self._check_there(path)
                if self.named is None:
                    self._load(trainer.strategy)
            if self.named is not None:
                pipeline = self._beside(pl_module)
            kept = {split: compute(trainer, data, split, pipeline) for split in data.splits()}
            if trainer.global_rank == 0:
                write(path, key, kept)
        data.reference = kept
        data.reference_record = {
            "file": str(path),
            "sha256": digest(kept),
            "checkpoint": str(self.checkpoint),
            "checkpoint_sha256": self.checkpoint_sha256,
            "named": self.named,
        }
        if trainer.global_rank == 0:
            count = sum(len(values) for sources in kept.values() for values in sources.values())
            print(f"reference log-probs of {count:,} pairs: {path}", flush=True)

    def _load(self, strategy: Any) -> None:
        """Put the reference's weights into the model of a run that resumes; its own are loaded over them after this."""
        strategy.restore_config = nl.RestoreConfig(path=str(self.checkpoint), load_optim_state=False)
        strategy.selective_restore()

    def _beside(self, pl_module: pl.LightningModule) -> list[torch.nn.Module]:
        """Return this rank's part of a reference that is not the start."""
        definition = read_definition(read_record(self.checkpoint), f"checkpoint {self.checkpoint}")
        ends = parallel_state.is_pipeline_first_stage(), parallel_state.is_pipeline_last_stage()
        model = frozen_model(pl_module.config, definition, self.checkpoint, *ends)
        return [model if pl_module.config.use_cpu_initialization else model.cuda()]

    def _check_there(self, path: Path) -> None:
        """Refuse a run that resumes where neither the cache nor the checkpoint is what it was."""
        integrity = self.checkpoint / folders.INTEGRITY
        if not integrity.is_file() or file_sha256(integrity) != self.checkpoint_sha256:
            problem = "is gone or another"
        else:
            problem = "; ".join(folders.damage(self.checkpoint)[:3])
        if problem:
            raise UserError(
                f"the run's reference log-probs cannot be had: {path} is not usable, and the checkpoint "
                f"{self.checkpoint} {'of the reference' if self.named else 'that the run started from'}: {problem}",
                hint="restore one of them, or start a new run: init.checkpoint",
            )


def reference_key(trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint_sha256: str) -> dict[str, Any]:
    """Return everything that the log-probabilities depend on, as plain containers."""
    data: PreferenceDataModule = trainer.datamodule
    sources = data.manifest.sources
    return {
        "format": FORMAT,
        "checkpoint": checkpoint_sha256,
        "model": hashlib.sha256(json.dumps(plain(vars_of(pl_module.config)), sort_keys=True).encode()).hexdigest(),
        "precision": str(getattr(trainer.precision_plugin, "recipe", trainer.precision)),
        "seq_length": data.seq_length,
        "too_long": data.too_long,
        "data": {
            f"{name}/{split}": [sources[name].splits[split].sha256_bin, sources[name].splits[split].sha256_loss]
            for split, found in data.splits().items()
            for name in sorted(found)
        },
    }


def cache_path(data: PreferenceDataModule, key: dict[str, Any]) -> Path:
    """Return the path of the values under this key."""
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    return Path(data.manifest.folder) / FOLDER / f"{name}.npz"


def read(path: Path, key: dict[str, Any]) -> tuple[dict[str, Reference] | None, str]:
    """Read the values under a key; None with the reason where nothing usable is there."""
    if not path.is_file():
        others = sorted(path.parent.glob("*.npz"), key=os.path.getmtime)
        if not others:
            return None, "none are kept for this blend yet; computing them"
        try:
            with np.load(others[-1]) as content:
                then = json.loads(str(content["key"]))
            changed = ", ".join(name for name in key if then.get(name) != key[name])
        except _UNREADABLE:
            changed = "unreadable"
        return None, f"those kept in {others[-1]} are not this run's ({changed} differs); computing them anew"
    try:
        with np.load(path) as content:
            found: dict[str, Reference] = {}
            for name in content.files:
                if name not in ("key", "sha256"):
                    split, source = name.split("/", 1)
                    found.setdefault(split, {})[source] = content[name]
            whole = json.loads(str(content["key"])) == key and str(content["sha256"]) == digest(found)
    except _UNREADABLE as error:
        return None, f"{path} cannot be read ({error}); computing them anew"
    return (found, "") if whole else (None, f"the content of {path} changed since it was written; computing them anew")


def write(path: Path, key: dict[str, Any], values: dict[str, Reference]) -> None:
    """Write values under a key; the file appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {f"{split}/{source}": array for split, sources in values.items() for source, array in sources.items()}
    with whole_file(path) as temporary, temporary.open("wb") as file:
        np.savez(file, key=np.array(json.dumps(key)), sha256=np.array(digest(values)), **arrays)


def digest(values: dict[str, Reference]) -> str:
    """Return the sha256 of all values."""
    found = hashlib.sha256()
    for split in sorted(values):
        for source in sorted(values[split]):
            found.update(f"{split}/{source}".encode())
            found.update(np.ascontiguousarray(values[split][source]).tobytes())
    return found.hexdigest()


@torch.no_grad()
def compute(trainer: pl.Trainer, data: PreferenceDataModule, split: str, model: Sequence[torch.nn.Module]) -> Reference:
    """Compute log-probabilities of a split's pairs under the weights that a model has now; every rank returns all.

    The windows are shared out over the data-parallel ranks and go through Megatron's forward schedule.

    Args:
        model: this rank's part of it, as Megatron's schedules take it.
    """
    dataset = data.reference_dataset(split)
    rank, size = data.data_sampler.data_parallel()
    step = data.micro_batch_size * size
    found = {name: np.full((len(s.lengths), 2), np.nan) for name, s in dataset.sources.items()}
    started = said = time.perf_counter()
    windows = dataset.windows.filled
    for first in range(0, windows, step):
        mine = range(first + rank * data.micro_batch_size, first + (rank + 1) * data.micro_batch_size)
        batch = torch.utils.data.default_collate([dataset[number] for number in mine])
        (logprobs,) = _forward(model, batch, data) or (None,)  # [windows, slots, 2]
        if logprobs is not None:
            _store(found, dataset, mine, logprobs.cpu().numpy())
        now = time.perf_counter()
        if trainer.global_rank == 0 and now - said > _SECONDS_BETWEEN_LINES:
            done = min(first + step, windows)
            left = duration((now - started) / done * (windows - done))
            print(f"reference log-probs, {split}: {done:,} of {windows:,} windows  ETA {left}", flush=True)
            said = now
    return _gathered(found)


def _forward(model: Any, batch: dict[str, Tensor], data: PreferenceDataModule) -> list[Tensor]:
    """Return [windows, slots, 2] on the last pipeline stage, nothing on the others."""

    def step(iterator: Any, chunk: torch.nn.Module) -> tuple[Tensor, Any]:
        moved = data_step(iterator, BATCH_KEYS)

        def sums(losses: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            slots = moved["reference"].shape[1]
            logprobs = answer_logprobs(losses, moved["loss_mask"], moved["seq_idx"], slots)
            return losses.new_zeros(()), torch.tensor(1, dtype=torch.int, device=losses.device), logprobs

        return forward_step(chunk, moved), sums

    return get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=iter([batch]),
        model=model,
        num_microbatches=1,
        seq_length=data.seq_length,
        micro_batch_size=data.micro_batch_size,
        forward_only=True,
    )


def _store(found: Reference, dataset: PairDataset, windows: range, logprobs: np.ndarray) -> None:
    for row, number in enumerate(windows):
        for place, item in enumerate(dataset.windows.window(number)):
            found[item.source][item.number] = logprobs[row, place]


def _gathered(found: Reference) -> Reference:
    """Gather every rank's part. Tensor-parallel ranks have the same values: the lowest rank's are taken."""
    parts: list[Reference] = [{}] * torch.distributed.get_world_size()
    last = parallel_state.is_pipeline_last_stage()
    torch.distributed.all_gather_object(parts, found if last else {})
    whole = {name: np.full_like(values, np.nan) for name, values in found.items()}
    for part in reversed(parts):
        for name, values in part.items():
            whole[name] = np.where(np.isnan(values), whole[name], values)
    missing = sum(int((~np.isfinite(values)).any(1).sum()) for values in whole.values())
    if missing:
        raise UserError(f"the reference gives {missing:,} pairs no finite log-probability: is the checkpoint sound?")
    return whole


def _from_rank_0(values: list[Any]) -> list[Any]:
    torch.distributed.broadcast_object_list(values, src=0)
    return values
