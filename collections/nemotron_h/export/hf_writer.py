"""Write a training checkpoint as a Hugging Face folder, one safetensors file at a time."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file

from nemotron_h.core.errors import writing
from nemotron_h.core.files import write_json
from nemotron_h.data.tokenizer import Tokenizer
from nemotron_h.export import tokenizer as tokenizers
from nemotron_h.export.config import MAX_POSITIONS
from nemotron_h.export.folder import new_folder
from nemotron_h.export.hf_types import to_config
from nemotron_h.export.source import ModelSource

INDEX = "model.safetensors.index.json"
#: of JSON, as Hugging Face's libraries write it
INDENT = 2
Advance = Callable[[int], None]


@dataclass(frozen=True)
class Plan:
    """Plan of an export to a Hugging Face folder.

    Attributes:
        source: the checkpoint.
        dtype: of the weights but the exact ones.
        files: file name -> names of its tensors.
        index: the content of the index file, or None for a single file.
        config: the content of `config.json`.
        size: bytes of all tensors.
    """

    source: ModelSource
    dtype: torch.dtype
    files: dict[str, list[str]]
    index: dict[str, Any] | None
    config: dict[str, Any]
    size: int


def plan(checkpoint: Path, tokenizer: Tokenizer | None, dtype: torch.dtype | None, shard_size: int) -> Plan:
    """Look at a checkpoint and lay out the folder; reads no weights.

    Args:
        checkpoint: as `find_checkpoint` returns it.
        tokenizer: its ids go into the configuration.
        dtype: of the weights to write; None keeps the checkpoint's.
        shard_size: largest file in bytes (a larger tensor has a file of its own).
    Errors:
        UserError: the checkpoint is damaged, or its model cannot be expressed.
    """
    source = ModelSource(checkpoint)
    dtype = dtype or source.dtype
    config = to_config(
        source.definition,
        dtype=str(dtype).removeprefix("torch."),
        max_positions=source.seq_length or MAX_POSITIONS,
        token_ids=tokenizers.token_ids(tokenizer),
    )
    empty = {
        name: torch.empty(shape, dtype=row.dtype(dtype), device="meta")
        for row in source.rows
        for name, shape in row.theirs.items()
    }
    split = split_torch_state_dict_into_shards(empty, max_shard_size=shard_size)
    size = split.metadata["total_size"]
    index = {"metadata": {"total_size": size}, "weight_map": split.tensor_to_filename} if split.is_sharded else None
    return Plan(source, dtype, split.filename_to_tensors, index, config, size)


def write(plan: Plan, out: Path, tokenizer: Tokenizer | None, advance: Advance = lambda _: None) -> None:
    """Write the folder.

    Args:
        plan: what to write.
        out: the folder; must not exist.
        tokenizer: None writes none.
        advance: told the bytes of each finished file.
    Errors:
        UserError: `out` exists, the disk is full, or the checkpoint's weights are damaged.
    """
    with new_folder(out, plan.size) as folder:
        write_json(folder / "config.json", plan.config, INDENT)
        for name, wanted in plan.files.items():
            tensors = plan.source.read(set(wanted), plan.dtype)
            with writing(folder / name):
                save_file(tensors, folder / name, metadata={"format": "pt"})
            shutil.copymode(folder / "config.json", folder / name)  # safetensors lets the owner alone read
            advance(sum(tensor.nbytes for tensor in tensors.values()))
            del tensors  # before the next file's are allocated
        if plan.index is not None:
            write_json(folder / INDEX, plan.index, INDENT)
        chat = tokenizer is not None and tokenizers.write(tokenizer, folder)
        write_json(
            folder / "generation_config.json",
            tokenizers.generation_config(tokenizer, chat, plan.config["use_cache"], plan.source.definition.vocab_size),
            INDENT,
        )
