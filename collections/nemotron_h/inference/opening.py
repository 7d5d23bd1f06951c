"""A checkpoint made ready to write text: its weights, its tokenizer, and what its run's record says."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemotron_h.core.errors import UserError

if TYPE_CHECKING:
    import torch

    from nemotron_h.architecture.definition import ModelDefinition
    from nemotron_h.data.tokenizer import Tokenizer
    from nemotron_h.inference.drafts import Draft
    from nemotron_h.inference.model import GenerationModel

#: float8: the layers' matrices, and bfloat16 for all else; the CPU emulates it
FLOAT8 = "float8"
DTYPES = ("float32", "bfloat16", FLOAT8)
DEVICES = ("cpu", "cuda")
#: drafts that are no checkpoint: copies from the text, and the model's own first layers before its head
LOOKUP, LAYERS = "lookup", "layers:"


@dataclass(frozen=True)
class Opened:
    """Parts of a checkpoint that `open_checkpoint` returns.

    Attributes:
        checkpoint: its folder.
        record: run.json beside the weights.
        tokenizer: the run's, or the one that was named.
        model: with the weights loaded.
        dtype: its name.
        draft: what was named to draft tokens.
    """

    checkpoint: Path
    record: dict[str, Any]
    tokenizer: Tokenizer
    model: GenerationModel
    dtype: str
    draft: Draft | None = None

    def __str__(self) -> str:
        drafted = f", {self.draft.tokens} tokens drafted by {self.draft.name}" if self.draft else ""
        emulated = " emulated" * (self.dtype == FLOAT8 and self.model.device.type == "cpu")
        return f"{self.checkpoint.name}, {self.dtype}{emulated} on {self.model.device}{drafted}"


def dtype_and_device(dtype: str | None, device: str | None) -> tuple[str, str]:
    """Return dtype and device as `open_checkpoint` takes them, with those that are None chosen.

    Errors:
        UserError: one is unknown, or is not there.
    """
    if dtype not in (None, *DTYPES):
        raise UserError(f"--dtype {dtype} is unknown", hint=f"use one of {', '.join(DTYPES)}")
    if device is not None and device.split(":")[0] not in DEVICES:
        raise UserError(f"--device {device} is unknown", hint=f"use one of {', '.join(DEVICES)}")
    import torch

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device != "cpu" and not torch.cuda.is_available():
        raise UserError(f"--device {device}: torch sees no GPU", hint="leave it out to run on the CPU")
    if dtype == FLOAT8 and device != "cpu":
        from nemotron_h.ops.float8_matrix import CAPABILITY

        if torch.cuda.get_device_capability(device) < CAPABILITY:
            raise UserError(
                f"--dtype {FLOAT8}: {device} has no units for it",
                hint="take a GPU of compute capability 8.9 or above (Ada, Hopper), or bfloat16",
            )
    return dtype or ("float32" if device == "cpu" else "bfloat16"), device


def torch_dtype(name: str) -> torch.dtype:
    """Return one of `DTYPES` as `load_model` takes it."""
    import torch

    return torch.float8_e4m3fn if name == FLOAT8 else getattr(torch, name)


def open_checkpoint(
    checkpoint: Path,
    tokenizer: Path | None,
    dtype: str | None,
    device: str | None,
    draft: str | None = None,
    draft_tokens: int | None = None,
) -> Opened:
    """Load a checkpoint or a run's newest one.

    Args:
        tokenizer: a tokenizer's folder; None is the run's.
        dtype: one of `DTYPES`; None is bfloat16 on a GPU and float32 on the CPU.
        device: `cpu` or `cuda`, maybe with a number; None is a GPU where there is one.
        draft: a checkpoint or run, `lookup`, `layers:N`, or None.
        draft_tokens: drafted per pass; None is `DRAFT_TOKENS`.
    Errors:
        UserError: a value is unknown, something is not there or damaged, or the draft cannot draft for the model. The
            weights are read last.
    """
    _check_draft(draft, draft_tokens)
    dtype, device = dtype_and_device(dtype, device)
    from nemotron_h.checkpoint.definition import read_definition
    from nemotron_h.checkpoint.reader import find_checkpoint, read_record
    from nemotron_h.inference.model import load_model
    from nemotron_h.inference.trained_tokenizer import tokenizer_for

    checkpoint = find_checkpoint(checkpoint)
    record = read_record(checkpoint)
    definition = read_definition(record, f"checkpoint {checkpoint}")
    text = tokenizer_for(record, checkpoint, tokenizer, definition.vocab_size)
    options = {"dtype": torch_dtype(dtype), "device": device, "tokens": text.vocab_size}
    if draft is None:
        return Opened(checkpoint, record, text, load_model(checkpoint, **options), dtype)

    from nemotron_h.inference.drafts import DRAFT_TOKENS, Draft, check_takes_back

    check_takes_back(definition, checkpoint)
    if draft == LOOKUP:
        model, drafting, name = load_model(checkpoint, **options), None, LOOKUP
    elif draft.startswith(LAYERS):
        count = int(draft.removeprefix(LAYERS))
        if not 0 < count < definition.num_layers:
            raise UserError(
                f"--draft {draft}: {checkpoint} has {definition.num_layers} layers",
                hint=f"name 1 to {definition.num_layers - 1} of them",
            )
        model = load_model(checkpoint, **options)
        drafting, name = model.first_layers(count), f"its first {count} layers"
    else:
        ahead = find_checkpoint(Path(draft))
        check_takes_back(_draft_definition(ahead, checkpoint, text), ahead)
        model, drafting, name = load_model(checkpoint, **options), load_model(ahead, **options), str(ahead)
    return Opened(checkpoint, record, text, model, dtype, Draft(drafting, draft_tokens or DRAFT_TOKENS, name))


def _check_draft(draft: str | None, tokens: int | None) -> None:
    """Check what can be before anything is read."""
    hint = f"name a run or checkpoint, {LOOKUP}, or {LAYERS}N with a number of layers"
    if draft is None:
        if tokens is not None:
            raise UserError("--draft-tokens: there is no --draft that drafts them", hint=hint)
        return
    if draft.startswith(LAYERS) and not draft.removeprefix(LAYERS).isdecimal():
        raise UserError(f"--draft {draft}: {draft.removeprefix(LAYERS)!r} is no number of layers", hint=hint)


def _draft_definition(ahead: Path, checkpoint: Path, text: Tokenizer) -> ModelDefinition:
    """Return the definition of a checkpoint that is to draft for another one.

    Errors:
        UserError: it was trained with another tokenizer than `text`, or nothing tells with which.
    """
    from nemotron_h.checkpoint.definition import read_definition
    from nemotron_h.checkpoint.reader import read_record
    from nemotron_h.inference.trained_tokenizer import has_ids_of

    record = read_record(ahead)
    definition = read_definition(record, f"checkpoint {ahead}")
    same = has_ids_of(record, ahead, text)
    named = (record.get("data") or {}).get("tokenizer") or "another"
    if same is False or (same and definition.vocab_size < text.vocab_size):
        raise UserError(
            f"--draft {ahead}: it was trained with the tokenizer {named}, which gives tokens other ids than "
            f"{text.path}, the tokenizer of {checkpoint}",
            hint=f"draft with a model of the same tokenizer, or with --draft {LOOKUP}",
        )
    if not same:
        raise UserError(
            f"--draft {ahead}: its run.json does not tell its tokenizer, which has to be {checkpoint}'s: {text.path}",
            hint="name a checkpoint whose record tells it",
        )
    return definition


def recorded_template(tokenizer: Tokenizer, record: dict[str, Any]) -> str | None:
    """Return the chat template that came with a checkpoint: the one that wrote its run's conversations, else its
    tokenizer's.

    Returns:
        Jinja text, or None where there is none.
    """
    from nemotron_h.data.blend import load_blend
    from nemotron_h.data.hf_tokenizer import template_of
    from nemotron_h.data.manifest import data_root

    folders = [Path(tokenizer.path)]
    data = (record.get("recipe") or {}).get("data") or {}
    if "root" in data and "blend" in data:
        with contextlib.suppress(UserError):  # the blend may not be on this machine
            folders.insert(0, data_root(data["root"]) / load_blend(data["blend"]).name)
    return next((template for folder in folders if (template := template_of(folder)) is not None), None)
