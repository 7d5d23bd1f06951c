"""`nemotron-h generate`: continue a prompt with a checkpoint."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from nemotron_h.errors import UserError

if TYPE_CHECKING:
    from nemotron_h.data.tokenizer import Tokenizer

DTYPES = ("float32", "bfloat16")


def generate(
    checkpoint: Annotated[
        Path, typer.Argument(help="A checkpoint (runs/NAME/checkpoints/step-000100), or a run: its newest checkpoint.")
    ],
    prompt: Annotated[str, typer.Argument(help="The text to continue.")],
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest continuation.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 always takes the most probable token.")] = 0.8,
    top_k: Annotated[int, typer.Option(min=0, help="Sample from the k most probable tokens; 0: from all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Sample from the most probable tokens that sum to this share.")] = 0.95,
    seed: Annotated[int, typer.Option(help="The same seed gives the same text.")] = 0,
    tokenizer: Annotated[
        Path | None, typer.Option(help="Folder of the tokenizer.", show_default="the one that the run was trained with")
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16, of weights and activations.")] = "float32",
    device: Annotated[str | None, typer.Option(help="cpu or cuda.", show_default="cuda where a GPU is visible")] = None,
) -> None:
    """Continue a prompt. The text goes to the standard output as it comes, the speed to the standard error."""
    if dtype not in DTYPES:
        raise UserError(f"--dtype {dtype} is unknown", hint=f"use one of {', '.join(DTYPES)}")
    import torch

    from nemotron_h.inference.checkpoint import find_checkpoint, read_definition, read_record
    from nemotron_h.inference.generate import TextStream, stream
    from nemotron_h.inference.model import load_model
    from nemotron_h.inference.sampling import Sampling

    sampling = Sampling(temperature, top_k, top_p, seed)
    checkpoint = find_checkpoint(checkpoint)
    record = read_record(checkpoint)
    text = tokenizer_for(record, checkpoint, tokenizer, read_definition(record, f"checkpoint {checkpoint}").vocab_size)
    model = load_model(
        checkpoint,
        dtype=getattr(torch, dtype),
        device=device or ("cuda" if torch.cuda.is_available() else "cpu"),
    )

    # nothing to continue: begin a document, as the token that ends the one before it does
    ids = text.text_to_ids(prompt) or [text.eod_id]
    shown = TextStream(text.ids_to_text)
    count, started, first = 0, time.perf_counter(), 0.0
    for (token,) in stream(model, [ids], max_tokens=max_tokens, sampling=sampling, stop_id=text.eod_id):
        first = first or time.perf_counter()
        count += 1
        typer.echo(shown.add(token), nl=False)
    finished = time.perf_counter()
    typer.echo(shown.finish())
    reason = "end of document" if count < max_tokens else "--max-tokens"
    steps = f"{(count - 1) / (finished - first):,.0f} tokens/s" if count > 1 else "no steps"
    Console(stderr=True, soft_wrap=True, highlight=False).print(
        f"[dim]{len(ids):,} tokens read in {(first or finished) - started:.2f} s, {count:,} generated at {steps}, "
        f"ended by {reason}; {checkpoint.name}, {dtype} on {model.device}[/dim]"
    )


def tokenizer_for(record: dict[str, Any], checkpoint: Path, named: Path | None, vocab_size: int) -> Tokenizer:
    """The tokenizer that was named, else the one that the run record tells of.

    Errors:
        UserError: it is not there, or its size is not the model's vocabulary.
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
    return found


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
