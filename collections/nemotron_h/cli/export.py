"""`nemotron-h export ...` and `nemotron-h import ...`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from nemotron_h.core.errors import UserError
from nemotron_h.core.progress import StageProgress

if TYPE_CHECKING:
    from nemotron_h.data.tokenizer import Tokenizer
    from nemotron_h.schema.vision import VisionSchema

export_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)
import_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)

DTYPES = {"bf16": "bfloat16", "fp32": "float32"}
GGUF_DTYPES = ("f32", "f16", "bf16", "q8_0")
CheckpointArgument = Annotated[
    Path, typer.Argument(help="A checkpoint (runs/NAME/checkpoints/step-000100), or a run: its newest checkpoint.")
]
TokenizerOption = Annotated[
    Path | None, typer.Option(help="Folder of the tokenizer.", show_default="the one that the run was trained with")
]
BaseOption = Annotated[
    Path | None, typer.Option(help="Where the checkpoint it was trained on is now.", show_default="where it was")
]
NoTokenizerOption = Annotated[bool, typer.Option("--no-tokenizer", help="Leave the tokenizer out.")]


@export_app.callback()
@import_app.callback()
def _group() -> None:
    """Keep this a group even while it has one command."""


def progress(title: str, size: int) -> StageProgress:
    """Return a bar over so many bytes."""
    return StageProgress(Console(stderr=True), title, size, "bytes")


@export_app.command("hf")
def export_hf(
    checkpoint: CheckpointArgument,
    out: Annotated[Path, typer.Argument(help="The folder to write; must not exist.")],
    dtype: Annotated[
        str | None, typer.Option(help="bf16 or fp32, of the weights.", show_default="the checkpoint's")
    ] = None,
    shard_size: Annotated[str, typer.Option(help="Largest weight file: 5GB, 500MB. About the memory needed.")] = "5GB",
    tokenizer: TokenizerOption = None,
    no_tokenizer: NoTokenizerOption = False,
) -> None:
    """Write a checkpoint as a Hugging Face folder, for transformers (5.15.1 or newer) and what reads its folders."""
    _check_dtype(dtype, DTYPES)
    size = _bytes_of(shard_size)
    checkpoint, text = _find(checkpoint, tokenizer, no_tokenizer)
    import torch

    from nemotron_h.export import hf_writer

    plan = hf_writer.plan(checkpoint, text, getattr(torch, DTYPES[dtype]) if dtype else None, size)
    with progress("exporting", plan.size) as bar:
        hf_writer.write(plan, out, text, bar.advance)
    files = f"{len(plan.files)} weight file" + "s" * (len(plan.files) > 1)
    typer.echo(f"{out}: {files}, {plan.size / 1e9:,.2f} GB in {plan.config['torch_dtype']}, of {checkpoint}")


@export_app.command("gguf")
def export_gguf(
    checkpoint: CheckpointArgument,
    out: Annotated[Path, typer.Argument(metavar="OUT.gguf", help="The file to write; must not exist.")],
    dtype: Annotated[
        str | None, typer.Option(help="f32, f16, bf16 or q8_0, of the matrices.", show_default="the checkpoint's")
    ] = None,
    tokenizer: TokenizerOption = None,
    no_tokenizer: NoTokenizerOption = False,
) -> None:
    """Write a checkpoint as one GGUF file, for llama.cpp and what is built on it."""
    _check_dtype(dtype, GGUF_DTYPES)
    checkpoint, text = _find(checkpoint, tokenizer, no_tokenizer)
    from nemotron_h.export import gguf_writer

    plan = gguf_writer.plan(checkpoint, text, dtype)
    with progress("exporting", plan.size) as bar:
        gguf_writer.write(plan, out, bar.advance)
    typer.echo(f"{out}: {len(plan.weights)} tensors, {plan.size / 1e9:,.2f} GB, of {checkpoint}")


@export_app.command("peft")
def export_peft(
    checkpoint: CheckpointArgument,
    out: Annotated[Path, typer.Argument(help="The folder to write; must not exist.")],
    base: BaseOption = None,
    base_model: Annotated[
        str | None,
        typer.Option(help="The exported base (a folder or a hub's name), for adapter_config.json.", show_default=False),
    ] = None,
) -> None:
    """Write a LoRA or DoRA checkpoint as an adapter of Hugging Face's PEFT, over the base as `export hf` writes it.

    PEFT puts no adapter on out_proj of Mamba-2 layers: their merged matrices are in the file whole.
    """
    from nemotron_h.checkpoint.reader import find_checkpoint
    from nemotron_h.export import peft_writer

    plan = peft_writer.plan(find_checkpoint(checkpoint), base, base_model)
    with progress("exporting", plan.size) as bar:
        peft_writer.write(plan, out, bar.advance)
    names = [*plan.config["target_modules"], *plan.config.get("target_parameters", ())]
    adapters = f"adapters of {', '.join(names)}"
    whole = f", {plan.whole} whole matrices of {peft_writer.WHOLE}" if plan.whole else ""
    typer.echo(f"{out}: {adapters}{whole}, {plan.size / 1e9:,.2f} GB, of {plan.weights.adapter.checkpoint}")


def _check_dtype(dtype: str | None, known: Iterable[str]) -> None:
    if dtype is not None and dtype not in known:
        raise UserError(f"--dtype {dtype} is unknown", hint=f"use one of {', '.join(known)}")


def _find(checkpoint: Path, tokenizer: Path | None, no_tokenizer: bool) -> tuple[Path, Tokenizer | None]:
    """Return the checkpoint, which can be written, and its tokenizer unless it is left out."""
    if tokenizer and no_tokenizer:
        raise UserError("--tokenizer and --no-tokenizer exclude each other")
    from nemotron_h.checkpoint.definition import read_definition
    from nemotron_h.checkpoint.reader import find_checkpoint, read_record
    from nemotron_h.export.tokenizer import check_exportable
    from nemotron_h.inference.trained_tokenizer import tokenizer_for

    checkpoint = find_checkpoint(checkpoint)
    if no_tokenizer:
        return checkpoint, None
    record = read_record(checkpoint)
    vocabulary = read_definition(record, f"checkpoint {checkpoint}").vocab_size
    text = tokenizer_for(record, checkpoint, tokenizer, vocabulary)
    check_exportable(text)
    return checkpoint, text


def _bytes_of(text: str) -> int:
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
    number, unit = text[:-2].strip(), text[-2:].upper()
    if unit not in units or not number.isdigit() or int(number) == 0:
        raise UserError(f"--shard-size {text} is not a size", hint="write 5GB, 500MB or 100KB")
    return int(number) * units[unit]


@import_app.command("hf")
def import_hf(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="DIR",
            help="A Hugging Face folder of a Nemotron-H model, or hub:organisation/name@revision to download one.",
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Argument(
            help="The checkpoint folder to write; must not exist.",
            show_default="of a hub: model the cache, where a run with this init.checkpoint finds it",
        ),
    ] = None,
    name: Annotated[str | None, typer.Option(help="Of the model definition.", show_default="the folder's")] = None,
    repair_embeddings: Annotated[
        bool,
        typer.Option(
            "--repair-embeddings",
            help="Give rows of the embedding whose norm is 1,000 times off the direction of the output layer's row.",
        ),
    ] = False,
) -> None:
    """Read a Hugging Face folder into a checkpoint: weights, model definition (model.yaml), tokenizer.

    Of a model on the Hub (HF_TOKEN, HF_ENDPOINT, HF_HOME) the safetensors, configuration and tokenizer are downloaded,
    and compared with the Hub's hashes.
    """
    from nemotron_h.core import hub
    from nemotron_h.data.tokenizer import token_of
    from nemotron_h.export import hf_reader, hub_import
    from nemotron_h.export.folder import check_new

    if hub.is_hub(folder):
        repository = hub.parse(str(folder), "import hf")
        if out is None:
            if name is not None or repair_embeddings:
                option = "--repair-embeddings" if name is None else "--name"
                raise UserError(f"{option} is for an OUT: in the cache a model is as its repository", "Name an OUT.")
            hub_import.obtain(str(folder), "import hf", say=typer.echo)
            typer.echo(f"{hub_import.folder_of(repository)}: {folder}")
            return
        check_new(out)
        source = hub_import.examine(repository, name, typer.echo)
    elif out is None:
        raise UserError("OUT is missing", hint=f"nemotron-h import hf {folder} OUT")
    else:
        source = hf_reader.examine(folder, name)
    with progress("importing", source.size) as bar:
        outliers = hf_reader.write(source, out, bar.advance, repair_embeddings)
    if outliers.norms:
        then = "replaced" if repair_embeddings else "kept; --repair-embeddings replaces them"
        typer.echo(f"outlying embedding rows, {then}: {outliers.described(token_of(source.tokenizer))}", err=True)
    parameters = f"{source.definition.parameters:,} parameters"
    typer.echo(f"{out}: {source.definition.name}, {parameters} in {str(source.dtype).removeprefix('torch.')}")


@import_app.command("vision")
def import_vision(
    checkpoint: CheckpointArgument,
    vision: Annotated[
        str,
        typer.Argument(
            metavar="VISION",
            help="Folder of an InternViT, hub:organisation/name@revision to download one, or an encoder of "
            "configs/vision that begins anew: internvit_tiny.",
        ),
    ],
    out: Annotated[Path, typer.Argument(help="The checkpoint folder to write; must not exist.")],
    projector: Annotated[
        int | None,
        typer.Option(help="Inner width of the projector.", show_default="the language model's ffn_hidden_size"),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Of the model definition.", show_default="the language model's, and _vlm")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the weights that begin anew: the projector's.")] = 1234,
) -> None:
    """Put an image encoder in front of a language model: a checkpoint that training with images begins from.

    nemotron-h import vision runs/nemotron_h_8b_sft hub:OpenGVLab/InternViT-300M-448px-V2_5@main vlm_8b
    """
    from nemotron_h.checkpoint.reader import find_checkpoint
    from nemotron_h.core import hub
    from nemotron_h.export import vision_import
    from nemotron_h.export.folder import check_new
    from nemotron_h.recipe.compose import known_encoders, read_encoder
    from nemotron_h.schema.vision import ProjectorSchema

    check_new(out)
    checkpoint = find_checkpoint(checkpoint)
    origin = None
    if hub.is_hub(vision):
        from nemotron_h.export.hub_import import download

        repository = hub.parse(vision, "import vision")
        found, commit = download(repository, typer.echo)
        origin = f"{repository.name}@{commit}"
    else:
        found = _encoder(vision)
    part = ProjectorSchema(projector or 0)
    shipped = map(read_encoder, known_encoders())
    composition = vision_import.plan(checkpoint, found, part, name, origin, shipped)
    with progress("composing", composition.size) as bar:
        vision_import.write(composition, out, seed, bar.advance)
    d = composition.definition
    typer.echo(
        f"{out}: {d.name}, {d.parameters:,} parameters of {checkpoint}, {d.encoder.parameters:,} of the encoder "
        f"{d.vision.name}{'' if composition.vision else ' (new)'}, {d.encoder.projector.parameters:,} of a new "
        "projector"
    )


def _encoder(vision: str) -> Path | VisionSchema:
    """Return an encoder's folder, or the widths of a shipped one.

    Errors:
        UserError: it is neither.
    """
    from nemotron_h.core.strict import nearest
    from nemotron_h.recipe.compose import known_encoders, read_encoder

    if Path(vision).is_dir():
        return Path(vision)
    known = known_encoders()
    if vision not in known:
        raise UserError(
            f"there is no folder {vision}, and no encoder of that name",
            hint=f"{nearest(vision, known)}Known: {', '.join(known)}.",
        )
    return read_encoder(vision)


def merge_adapter(
    checkpoint: CheckpointArgument,
    out: Annotated[Path, typer.Argument(help="The checkpoint folder to write; must not exist.")],
    base: BaseOption = None,
) -> None:
    """Write a LoRA or DoRA checkpoint as a whole one: its base's weights with the adapter's changes added.

    Every other weight stays as it is, bit for bit. `generate` and `export` read a checkpoint of an adapter as it is;
    a new run, or a move to another place without the base, needs a merged one.
    """
    from nemotron_h.checkpoint.reader import find_checkpoint
    from nemotron_h.export import merge

    plan = merge.plan(find_checkpoint(checkpoint), base)
    with progress("merging", plan.size) as bar:
        merge.write(plan, out, bar.advance)
    changed = f"{len(plan.weights.adapted)} of {len(plan.weights.shapes)} tensors changed"
    typer.echo(f"{out}: {plan.size / 1e9:,.2f} GB, {changed}, of {plan.checkpoint} and {plan.weights.base}")
