"""A checkpoint made ready to write text: its weights, its tokenizer, and what its run's record says."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemotron_h.core.errors import UserError

if TYPE_CHECKING:
    from nemotron_h.data.tokenizer import Tokenizer
    from nemotron_h.inference.model import GenerationModel

DTYPES = ("float32", "bfloat16")
DEVICES = ("cpu", "cuda")


@dataclass(frozen=True)
class Opened:
    """Parts of a checkpoint that `open_checkpoint` returns.

    Attributes:
        checkpoint: its folder.
        record: run.json beside the weights.
        tokenizer: the run's, or the one that was named.
        model: with the weights loaded.
        dtype: its name.
    """

    checkpoint: Path
    record: dict[str, Any]
    tokenizer: Tokenizer
    model: GenerationModel
    dtype: str

    def __str__(self) -> str:
        return f"{self.checkpoint.name}, {self.dtype} on {self.model.device}"


def open_checkpoint(checkpoint: Path, tokenizer: Path | None, dtype: str | None, device: str | None) -> Opened:
    """Load a checkpoint or a run's newest one.

    Args:
        tokenizer: a tokenizer's folder; None is the run's.
        dtype: one of `DTYPES`; None is bfloat16 on a GPU and float32 on the CPU.
        device: `cpu` or `cuda`, maybe with a number; None is a GPU where there is one.
    Errors:
        UserError: a value is unknown, or something is not there or damaged. The weights are read last.
    """
    if dtype not in (None, *DTYPES):
        raise UserError(f"--dtype {dtype} is unknown", hint=f"use one of {', '.join(DTYPES)}")
    if device is not None and device.split(":")[0] not in DEVICES:
        raise UserError(f"--device {device} is unknown", hint=f"use one of {', '.join(DEVICES)}")
    import torch

    from nemotron_h.checkpoint.definition import read_definition
    from nemotron_h.checkpoint.reader import find_checkpoint, read_record
    from nemotron_h.inference.model import load_model
    from nemotron_h.inference.trained_tokenizer import tokenizer_for

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device != "cpu" and not torch.cuda.is_available():
        raise UserError(f"--device {device}: torch sees no GPU", hint="leave it out to run on the CPU")
    dtype = dtype or ("float32" if device == "cpu" else "bfloat16")
    checkpoint = find_checkpoint(checkpoint)
    record = read_record(checkpoint)
    vocab_size = read_definition(record, f"checkpoint {checkpoint}").vocab_size
    text = tokenizer_for(record, checkpoint, tokenizer, vocab_size)
    model = load_model(checkpoint, dtype=getattr(torch, dtype), device=device, tokens=text.vocab_size)
    return Opened(checkpoint, record, text, model, dtype)


def recorded_template(opened: Opened) -> str | None:
    """Return the chat template that came with a checkpoint: the one that wrote its run's conversations, else its
    tokenizer's.

    Returns:
        Jinja text, or None where there is none.
    """
    from nemotron_h.data.blend import load_blend
    from nemotron_h.data.hf_tokenizer import template_of
    from nemotron_h.data.manifest import data_root

    folders = [Path(opened.tokenizer.path)]
    data = (opened.record.get("recipe") or {}).get("data") or {}
    if "root" in data and "blend" in data:
        with contextlib.suppress(UserError):  # the blend may not be on this machine
            folders.insert(0, data_root(data["root"]) / load_blend(data["blend"]).name)
    return next((template for folder in folders if (template := template_of(folder)) is not None), None)
