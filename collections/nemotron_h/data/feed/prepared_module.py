"""The base of every stage's data module: the prepared blend, its tokenizer, and how a rank's loader is made.

A module's arguments are fields: those of the recipe's `data`, and its own. Classes between NeMo's `IOMixin` and a
module have no constructor, so what `IOMixin` records of a module is what it was made with.
"""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from nemo.lightning.io.mixin import IOMixin
from nemo.lightning.pytorch.plugins import MegatronDataSampler
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from nemotron_h.core.children import ready_loader_worker
from nemotron_h.core.errors import UserError
from nemotron_h.core.strict import check_number
from nemotron_h.data.blend import Blend
from nemotron_h.data.manifest import Manifest, check_manifest, preparation
from nemotron_h.data.tokenizer import Tokenizer, fingerprint, nemo_tokenizer
from nemotron_h.schema.recipe import DataSchema

ENDLESS = 2**48  # length of the training data, which has no end: the trainer's `max_steps` ends the run

logger = logging.getLogger(__name__)


@rank_zero_only
def say(message: str) -> None:
    """Log a line once, not once a rank."""
    logger.info(message)


def of_sample(number: int, error: UserError) -> UserError:
    """Return an error of reading a sample with the sample's number before it."""
    return UserError(f"sample {number:,}: {error.message}", error.hint)


class PreparedDataSampler(MegatronDataSampler):
    """Answers to `MegatronStrategy` about batches: sizes and the sampler of a loader."""

    def __init__(self, data: PreparedDataModule) -> None:
        super().__init__(data.seq_length, data.micro_batch_size, data.global_batch_size)
        self._data = data

    @staticmethod
    def data_parallel() -> tuple[int, int]:
        """Rank and number of the data-parallel ranks."""
        from megatron.core import parallel_state

        return parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()

    @abstractmethod
    def micro_batches(
        self, dataset: Dataset, first: Callable[[], int], samples: int | None, rank: int, size: int
    ) -> Sampler[list[int]]:
        """Return the micro-batches of a data-parallel rank, from sample `first()` on; `samples` None is endless."""

    def transform_dataloader(self, dataloader: DataLoader, consumed_samples: int = 0) -> DataLoader:
        """Return a loader of the same data in this rank's micro-batches, without `consumed_samples`: see the module."""
        rank, size = self.data_parallel()
        if self.global_batch_size % (self.micro_batch_size * size):
            raise UserError(
                f"global_batch_size {self.global_batch_size} is not a multiple of micro_batch_size "
                f"{self.micro_batch_size} x {size} data-parallel ranks"
            )
        dataset = dataloader.dataset
        first, samples = (self._data.next_sample, None) if dataset.training else (int, len(dataset))
        return DataLoader(
            dataset,
            batch_sampler=self.micro_batches(dataset, first, samples, rank, size),
            num_workers=dataloader.num_workers,
            pin_memory=dataloader.pin_memory,
            persistent_workers=dataloader.persistent_workers,
            collate_fn=dataloader.collate_fn,
            worker_init_fn=ready_loader_worker,
        )


class FieldsAsArguments:
    """Make dataclasses of the modules: a decorator would come after NeMo's hooks, which give a class a constructor."""

    # of a module, not of its arguments
    __eq__, __hash__ = object.__eq__, object.__hash__

    def __init_subclass__(cls) -> None:
        dataclass(eq=False)(cls)
        super().__init_subclass__()
        # `IOMixin` sets it on a class whose constructor it has wrapped, and would find that of a parent
        cls.__wrapped_init__ = False


class PreparedDataModule(FieldsAsArguments, DataSchema, pl.LightningDataModule, IOMixin):
    """A prepared blend, checked; a stage's module adds the order of its samples.

    Args:
        persistent_workers: keep the processes that load data between validations.

    The others are those of `DataSchema`.

    Errors:
        UserError: a number out of its range, or values that contradict each other; `setup` raises it for data that is
            missing, damaged or not prepared with this tokenizer, and resuming for a checkpoint of other data.
    """

    persistent_workers: bool = False
    sampler_type: ClassVar[type[PreparedDataSampler]]
    tiles_per_window: ClassVar[float] = 0.0  # of images: none

    def __post_init__(self) -> None:
        pl.LightningDataModule.__init__(self)
        for each in fields(self):
            if "range" in each.metadata and (value := getattr(self, each.name)) is not None:
                check_number(f"data.{each.name}", value, each.metadata["range"])
        if self.global_batch_size % self.micro_batch_size:
            raise UserError(
                f"data.global_batch_size {self.global_batch_size} is not a multiple of micro_batch_size "
                f"{self.micro_batch_size}"
            )
        self.data_sampler = self.sampler_type(self)
        self._opened = False

    @property
    @abstractmethod
    def blend_spec(self) -> Blend:
        """Return the blend as written."""

    @property
    @abstractmethod
    def _validation(self) -> tuple[Any, int]:
        """Return the order of the validation samples, and their number."""

    @abstractmethod
    def next_sample(self) -> int:
        """Return the sample that the trainer's next step begins with."""

    def lengths(self, step: int) -> dict[int, float]:
        """Return tokens of a sequence -> share of a step's tokens that are in such sequences."""
        return {self.seq_length: 1.0}

    def settings(self) -> dict[str, Any]:
        """Return what a resumed run may change of its batches, by recipe key."""
        return {"data.micro_batch_size": self.micro_batch_size}

    @property
    def validation_samples(self) -> int:
        """Return the number of windows that a validation reads."""
        return self._validation[1] if self.trainer.limit_val_batches else 0

    @cached_property
    def manifest(self) -> Manifest:
        """Return the prepared data, checked."""
        return check_manifest(self.root, self.blend_spec)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Return the tokenizer that the data was prepared with."""
        path, expected = self.manifest.tokenizer_path(), self.manifest.tokenizer.sha256
        if fingerprint(path) != expected:
            raise UserError(
                f"{path} is not the tokenizer that the data of blend {self.blend_spec.name!r} was made with",
                preparation(self.root, self.blend_spec.path or self.blend_spec.name),
            )
        return nemo_tokenizer(path)

    def reconfigure_limit_batches(self) -> None:
        """Count Lightning's limits in micro-batches, not batches; NeMo calls this once their number is known."""
        from megatron.core.num_microbatches_calculator import get_num_microbatches

        trainer, microbatches = self.trainer, get_num_microbatches()
        if isinstance(trainer.limit_train_batches, int):
            trainer.limit_train_batches *= microbatches
        if trainer.limit_val_batches:
            trainer.limit_val_batches = self._validation[1] // self.global_batch_size * microbatches
        trainer.num_sanity_val_steps *= microbatches

    def _prepared_record(self, horizon_tokens: int) -> dict[str, Any]:
        """Return the record that every blend has: its name and hash, the tokenizer, the sha256 of every file."""
        manifest = self.manifest
        return {
            "blend": self.blend_spec.name,
            "blend_file": self.blend_spec.path,
            "blend_hash": self.blend_spec.hash(),
            "root": str(Path(manifest.folder).parent),
            "tokenizer": str(manifest.tokenizer_path()),
            "tokenizer_sha256": manifest.tokenizer.sha256,
            "tokenizer_ids_sha256": self.tokenizer.ids_sha256(),
            "seq_length": self.seq_length,
            "global_batch_size": self.global_batch_size,
            "seed": self.seed,
            "horizon_tokens": horizon_tokens,
            "sources": {
                name: {split: {"tokens": s.tokens, "sha256_bin": s.sha256_bin} for split, s in source.splits.items()}
                for name, source in manifest.sources.items()
            },
        }

    def _loader(self, dataset: Dataset, collate: Callable[[list[Any]], Any] = default_collate) -> DataLoader:
        """Return a plain loader, which `PreparedDataSampler.transform_dataloader` splits over the ranks.

        Args:
            collate: makes a micro-batch of samples.
        """
        return DataLoader(
            dataset,
            num_workers=self.workers,
            pin_memory=torch.accelerator.is_available(),
            persistent_workers=self.persistent_workers and self.workers > 0,
            collate_fn=collate,
        )
