"""Write a training checkpoint as a Hugging Face folder, one safetensors file at a time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor

from nemotron_h.data.tokenizer import Tokenizer
from nemotron_h.export import tokenizer as tokenizers
from nemotron_h.export.config import MAX_POSITIONS, to_config
from nemotron_h.export.folder import new_folder
from nemotron_h.export.names import Weight, weights
from nemotron_h.inference.checkpoint import WeightFile, read_definition, read_record

INDEX = "model.safetensors.index.json"
Advance = Callable[[int], None]


@dataclass(frozen=True)
class Plan:
    """What an export will write.

    Attributes:
        rows: the table of weights.
        file: the checkpoint's weights.
        dtype: of the weights but the exact ones.
        files: file name -> names of its tensors.
        index: the content of the index file, or None for a single file.
        config: the content of `config.json`.
        size: bytes of all tensors.
    """

    rows: list[Weight]
    file: WeightFile
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
    record = read_record(checkpoint)
    definition = read_definition(record, f"checkpoint {checkpoint}")
    file = WeightFile(checkpoint)
    rows = list(weights(definition))
    dtype = dtype or file.dtypes[next(iter(rows[0].ours))]
    config = to_config(
        definition,
        dtype=str(dtype).removeprefix("torch."),
        max_positions=(record.get("data") or {}).get("seq_length") or MAX_POSITIONS,
        token_ids=tokenizers.token_ids(tokenizer),
    )
    empty = {
        name: torch.empty(shape, dtype=row.dtype(dtype), device="meta")
        for row in rows
        for name, shape in row.theirs.items()
    }
    split = split_torch_state_dict_into_shards(empty, max_shard_size=shard_size)
    size = split.metadata["total_size"]
    index = {"metadata": {"total_size": size}, "weight_map": split.tensor_to_filename} if split.is_sharded else None
    return Plan(rows, file, dtype, split.filename_to_tensors, index, config, size)


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
        write_json(folder / "config.json", plan.config)
        for name, wanted in plan.files.items():
            tensors = read_theirs(plan, set(wanted))
            save_file(tensors, folder / name, metadata={"format": "pt"})
            shutil.copymode(folder / "config.json", folder / name)  # safetensors lets the owner alone read
            advance(sum(tensor.nbytes for tensor in tensors.values()))
            del tensors  # before the next file's are allocated
        if plan.index is not None:
            write_json(folder / INDEX, plan.index)
        chat = tokenizer is not None and tokenizers.write(tokenizer, folder)
        write_json(
            folder / "generation_config.json",
            tokenizers.generation_config(tokenizer, chat, plan.config["use_cache"]),
        )


def read_theirs(plan: Plan, wanted: set[str]) -> dict[str, Tensor]:
    """These tensors of the folder, read from the checkpoint."""
    targets: dict[str, Tensor] = {}
    wholes: list[tuple[Weight, Tensor]] = []
    for row in plan.rows:
        if wanted.isdisjoint(row.theirs):
            continue
        ours = _names_in(row, plan.file)
        lengths = [shape[0] for shape in ours.values()]
        shape = next(iter(ours.values()))
        whole = torch.empty(sum(lengths), *shape[1:], dtype=row.dtype(plan.dtype))
        targets.update(zip(ours, whole.split(lengths), strict=True))
        wholes.append((row, whole))
    plan.file.read(targets)
    return {name: tensor for row, whole in wholes for name, tensor in _theirs(row, whole, wanted)}


def _theirs(row: Weight, whole: Tensor, wanted: set[str]) -> Iterable[tuple[str, Tensor]]:
    rows = sum(shape[0] for shape in row.theirs.values())
    for name, tensor in row.to_theirs(whole[:rows]).items():
        if name in wanted:
            # several tensors of one memory cannot be saved
            yield name, tensor if len(row.theirs) == 1 else tensor.clone()


def _names_in(row: Weight, file: WeightFile) -> dict[str, tuple[int, ...]]:
    """The row's names and shapes in this checkpoint: with Transformer Engine's names, and the vocabulary's padding."""
    if row.fused in file.shapes:
        return {row.fused: next(iter(row.ours.values()))}
    if row.padded:
        ((name, shape),) = row.ours.items()
        return {name: (max(shape[0], file.shapes.get(name, (0,))[0]), *shape[1:])}
    return row.ours


def write_json(path: Path, content: object) -> None:
    """Indented, as Hugging Face's libraries write it."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
