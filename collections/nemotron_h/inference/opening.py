"""A checkpoint made ready to write text: its weights, its tokenizer, and what its run's record says."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemotron_h.errors import UserError

if TYPE_CHECKING:
    from nemotron_h.data.tokenizer import Tokenizer
    from nemotron_h.inference.model import GenerationModel

DTYPES = ("float32", "bfloat16")
DEVICES = ("cpu", "cuda")


@dataclass(frozen=True)
class Opened:
    """What `open_checkpoint` finds.

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

    from nemotron_h.inference.checkpoint import find_checkpoint, read_definition, read_record
    from nemotron_h.inference.model import load_model

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device != "cpu" and not torch.cuda.is_available():
        raise UserError(f"--device {device}: torch sees no GPU", hint="leave it out to run on the CPU")
    dtype = dtype or ("float32" if device == "cpu" else "bfloat16")
    checkpoint = find_checkpoint(checkpoint)
    record = read_record(checkpoint)
    vocab_size = read_definition(record, f"checkpoint {checkpoint}").vocab_size
    text = tokenizer_for(record, checkpoint, tokenizer, vocab_size)
    model = load_model(checkpoint, dtype=getattr(torch, dtype), device=device)
    return Opened(checkpoint, record, text, model, dtype)


def tokenizer_for(record: dict[str, Any], checkpoint: Path, named: Path | None, vocab_size: int) -> Tokenizer:
    """The tokenizer that was named, else the one that the run record tells of.

    Errors:
        UserError: it is not there; its size is not the model's vocabulary; or, where the record has a hash, its files
            have changed since the training, or the named one gives tokens other ids than the recorded one.
    """
    from nemotron_h.data.tokenizer import load_tokenizer

    folder = named or _recorded_tokenizer(record, checkpoint)
    found = load_tokenizer(folder)
    if found.vocab_size != vocab_size:
        raise UserError(
            f"the tokenizer in {folder} has {found.vocab_size:,} tokens, the model of {checkpoint} has a vocabulary of "
            f"{vocab_size:,}",
            hint="name the tokenizer that the model was trained with: --tokenizer DIR",
        )
    trained = (record.get("data") or {}).get("tokenizer_sha256")
    if trained is None or found.fingerprint() == trained:
        return found
    if named is None:
        raise UserError(
            f"the files of {folder} have changed: they are not the tokenizer that {checkpoint} was trained with",
            hint="restore them; or, if its tokens still have the ids of the training, name it: --tokenizer DIR",
        )
    original = _unchanged_tokenizer(record, checkpoint, trained)
    if original is not None and original.vocab != found.vocab:
        raise UserError(
            f"the tokenizer in {named} gives tokens other ids than {original.path}, with which {checkpoint} was "
            "trained",
            hint="leave --tokenizer out, or name a copy of that tokenizer",
        )
    return found


def _unchanged_tokenizer(record: dict[str, Any], checkpoint: Path, trained: str) -> Tokenizer | None:
    """The recorded tokenizer, if it is still where it was and what it was."""
    from nemotron_h.data.tokenizer import fingerprint, load_tokenizer

    with contextlib.suppress(UserError):
        folder = _recorded_tokenizer(record, checkpoint)
        if fingerprint(folder) == trained:
            return load_tokenizer(folder)
    return None


def _recorded_tokenizer(record: dict[str, Any], checkpoint: Path) -> Path:
    from nemotron_h.data.blend import load_blend
    from nemotron_h.data.manifest import load_manifest

    hint = "name its folder: --tokenizer DIR"
    recorded = (record.get("data") or {}).get("tokenizer")
    if recorded:
        folder = checkpoint / recorded  # imported checkpoints hold theirs; an absolute path stays as it is
        if not folder.is_dir():
            raise UserError(f"the tokenizer of {checkpoint} is not at {recorded} any more", hint=hint)
        return folder
    try:
        data = record["recipe"]["data"]
        return Path(load_manifest(data["root"], load_blend(data["blend"]).name).tokenizer_path())
    except KeyError as error:
        raise UserError(f"{checkpoint}/run.json does not tell the tokenizer ({error})", hint=hint) from error
    except UserError as error:
        raise UserError(f"the tokenizer of {checkpoint} is not found: {error.message}", hint=hint) from error


def recorded_template(opened: Opened) -> str | None:
    """The chat template that came with a checkpoint: the one that wrote its run's conversations, else its tokenizer's.

    Returns:
        a file's path, or None where there is none.
    """
    from nemotron_h.data.blend import load_blend
    from nemotron_h.data.manifest import TEMPLATE, data_root

    places = [Path(opened.tokenizer.path) / TEMPLATE]
    data = (opened.record.get("recipe") or {}).get("data") or {}
    if "root" in data and "blend" in data:
        with contextlib.suppress(UserError):  # the blend may not be on this machine
            places.insert(0, data_root(data["root"]) / load_blend(data["blend"]).name / TEMPLATE)
    return next((str(place) for place in places if place.is_file()), None)
