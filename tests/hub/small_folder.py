"""A Hugging Face folder of a small model with random weights, as files of a repository."""

from __future__ import annotations

import json

import torch
from safetensors.torch import save

from nemotron_h.architecture.definition import ModelDefinition
from nemotron_h.checkpoint.names import weights
from nemotron_h.export.config import to_config
from nemotron_h.export.hf_writer import INDEX


def model_files(definition: ModelDefinition) -> dict[str, bytes]:
    """Path -> content: configuration, weights in two files, and files that an import leaves where they are."""
    rng = torch.Generator().manual_seed(0)
    rows = list(weights(definition))
    halves = ({}, {})
    for number, row in enumerate(rows):
        for name, shape in row.theirs.items():
            dtype = torch.float32 if row.exact else torch.bfloat16
            halves[number > len(rows) // 2][name] = (torch.rand(shape, generator=rng) * 0.1).to(dtype)
    names = [f"model-{n}-of-2.safetensors" for n in (1, 2)]
    index = {"weight_map": {name: file for file, half in zip(names, halves, strict=True) for name in half}}
    ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    config = to_config(definition, dtype="bfloat16", max_positions=64, token_ids=ids)
    return {
        "config.json": json.dumps(config).encode(),
        INDEX: json.dumps(index).encode(),
        **{file: save(half) for file, half in zip(names, halves, strict=True)},
        "modeling_nemotron_h.py": b"raise SystemExit('never run')",
        "nemo/weights.safetensors": b"another format",
    }
