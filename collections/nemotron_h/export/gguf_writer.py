"""Write a training checkpoint as one GGUF file for llama.cpp, one tensor at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import torch

from nemotron_h.core.errors import UserError
from nemotron_h.data.tokenizer import Tokenizer
from nemotron_h.export import gguf_model, gguf_tokenizer
from nemotron_h.export.config import MAX_POSITIONS
from nemotron_h.export.folder import new_file
from nemotron_h.export.gguf_format import BF16, F16, F32, Q8_0, Value, begin, numbers_of
from nemotron_h.export.gguf_model import GgufWeight
from nemotron_h.export.source import ModelSource

Advance = Callable[[int], None]
TYPES = {"f32": F32, "f16": F16, "bf16": BF16, "q8_0": Q8_0}


@dataclass(frozen=True)
class Plan:
    """Plan of an export to GGUF.

    Attributes:
        source: the checkpoint.
        values: of the file's head.
        weights: the file's tensors, in order.
    """

    source: ModelSource
    values: Mapping[str, Value]
    weights: list[GgufWeight]

    @property
    def size(self) -> int:
        """Bytes of the tensors."""
        return sum(weight.entry.size for weight in self.weights)


def plan(checkpoint: Path, tokenizer: Tokenizer | None, type_name: str | None) -> Plan:
    """Look at a checkpoint and lay out the file; reads no weights.

    Args:
        checkpoint: as `find_checkpoint` returns it.
        tokenizer: goes into the file; None leaves it out.
        type_name: of the matrices, a key of `TYPES`; None keeps the checkpoint's.
    Errors:
        UserError: the checkpoint is damaged, or llama.cpp has no such model or tokenizer.
    """
    source = ModelSource(checkpoint)
    kind = TYPES[type_name] if type_name else BF16 if source.dtype == torch.bfloat16 else F32
    values = gguf_model.values(source.definition, seq_length=source.seq_length or MAX_POSITIONS, file_type=kind)
    rows = source.definition.vocab_size
    values |= gguf_tokenizer.NONE if tokenizer is None else gguf_tokenizer.values(tokenizer, rows)
    return Plan(source, values, gguf_model.weights(source.definition, source.rows, kind))


def write(plan: Plan, out: Path, advance: Advance = lambda _: None) -> None:
    """Write the file.

    Args:
        plan: what to write.
        out: the file; must not exist.
        advance: told the bytes of each finished tensor.
    Errors:
        UserError: `out` exists, the disk is full, the checkpoint's weights are damaged, or too large for float16.
    """
    entries = [weight.entry for weight in plan.weights]
    with new_file(out, plan.size) as temporary, closing(begin(temporary, plan.values, entries)) as file:
        for _, of_row in groupby(plan.weights, key=lambda weight: id(weight.row)):
            together = list(of_row)
            wanted = {name for weight in together for name in weight.theirs}
            tensors = plan.source.read(wanted, plan.source.dtype)
            for weight in together:
                tensor = weight.convert([tensors.pop(name) for name in weight.theirs])
                if weight.entry.type in (F16, Q8_0):
                    _check_range(tensor, weight)
                file.write_tensor_data(numbers_of(tensor, weight.entry.type))
                advance(weight.entry.size)


def _check_range(tensor: torch.Tensor, weight: GgufWeight) -> None:
    largest = tensor.abs().max().item()
    limit = torch.finfo(torch.float16).max * (127 if weight.entry.type is Q8_0 else 1)
    if not largest <= limit:
        raise UserError(f"{weight.theirs[0]} holds {largest:.3g}, beyond {limit:,.0f}", hint="use --dtype bf16 or f32")
