"""Write a training checkpoint as a Hugging Face folder, one safetensors file at a time.

A model that reads images has a folder for each of its parts in it: language model and encoder are each of a type that
transformers reads.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file

from nemotron_h.architecture.frozen import LANGUAGE
from nemotron_h.architecture.vision import PROJECTOR, VISION, text_only
from nemotron_h.core.errors import writing
from nemotron_h.core.files import write_json
from nemotron_h.data.tokenizer import Tokenizer
from nemotron_h.export import tokenizer as tokenizers
from nemotron_h.export import vision_config
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
        prefix: of the names here, which the files have not.
        parts: folder -> plan, of a model that reads images; `files` are then empty.
    """

    source: ModelSource
    dtype: torch.dtype
    files: dict[str, list[str]]
    index: dict[str, Any] | None
    config: dict[str, Any]
    size: int
    prefix: str = ""
    parts: dict[str, Plan] = field(default_factory=dict)


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
    definition, encoder = source.definition, source.definition.encoder
    config = to_config(
        text_only(definition),
        dtype=str(dtype).removeprefix("torch."),
        max_positions=source.seq_length or MAX_POSITIONS,
        token_ids=tokenizers.token_ids(tokenizer),
    )
    if encoder is None:
        return _laid_out(source, dtype, shard_size, config)
    name = config["torch_dtype"]
    parts = {
        LANGUAGE: _laid_out(source, dtype, shard_size, config),
        VISION: _laid_out(source, dtype, shard_size, vision_config.to_config(encoder, name), f"{VISION}."),
        PROJECTOR: _laid_out(source, dtype, shard_size, vision_config.projector_config(encoder, name), f"{PROJECTOR}."),
    }
    whole = {"model_type": vision_config.WHOLE_TYPE, "name": definition.name, "encoder": encoder.widths.name}
    whole |= {"tokens_per_tile": encoder.tokens_per_tile, "torch_dtype": name}
    return Plan(source, dtype, {}, None, whole, sum(part.size for part in parts.values()), parts=parts)


def _laid_out(
    source: ModelSource, dtype: torch.dtype, shard_size: int, config: dict[str, Any], prefix: str = ""
) -> Plan:
    """Lay out the tensors whose names begin with `prefix`; without one, the language model's."""
    others = tuple(f"{part}." for part in (VISION, PROJECTOR))
    empty = {
        name.removeprefix(prefix): torch.empty(shape, dtype=row.dtype(dtype), device="meta")
        for row in source.rows
        for name, shape in row.theirs.items()
        if (name.startswith(prefix) if prefix else not name.startswith(others))
    }
    split = split_torch_state_dict_into_shards(empty, max_shard_size=shard_size)
    size = split.metadata["total_size"]
    index = {"metadata": {"total_size": size}, "weight_map": split.tensor_to_filename} if split.is_sharded else None
    return Plan(source, dtype, split.filename_to_tensors, index, config, size, prefix)


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
        for name, part in plan.parts.items():
            (folder / name).mkdir()
            _write(part, folder / name, tokenizer if name == LANGUAGE else None, advance)
        _write(plan, folder, None if plan.parts else tokenizer, advance)


def _write(plan: Plan, folder: Path, tokenizer: Tokenizer | None, advance: Advance) -> None:
    """Write the files of a plan but its parts into a folder."""
    write_json(folder / "config.json", plan.config, INDENT)
    for name, wanted in plan.files.items():
        tensors = plan.source.read({plan.prefix + each for each in wanted}, plan.dtype)
        tensors = {each.removeprefix(plan.prefix): tensor for each, tensor in tensors.items()}
        with writing(folder / name):
            save_file(tensors, folder / name, metadata={"format": "pt"})
        shutil.copymode(folder / "config.json", folder / name)  # safetensors lets the owner alone read
        advance(sum(tensor.nbytes for tensor in tensors.values()))
        del tensors  # before the next file's are allocated
    if plan.index is not None:
        write_json(folder / INDEX, plan.index, INDENT)
    if "use_cache" not in plan.config:  # no part that generates
        return
    chat = tokenizer is not None and tokenizers.write(tokenizer, folder)
    write_json(
        folder / "generation_config.json",
        tokenizers.generation_config(tokenizer, chat, plan.config["use_cache"], plan.source.definition.vocab_size),
        INDENT,
    )
