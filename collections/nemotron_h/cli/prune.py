"""`nemotron-h importance` and `nemotron-h prune`: one child of one's own choice, without a search."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from nemotron_h.core.errors import UserError
from nemotron_h.core.progress import StageProgress

CheckpointArgument = Annotated[
    Path, typer.Argument(help="A checkpoint (runs/NAME/checkpoints/step-000100), or a run: its newest checkpoint.")
]
#: a measurement that was interrupted; beside OUT, which appears when it is complete
UNFINISHED = ".unfinished.safetensors"


def importance(
    checkpoint: CheckpointArgument,
    out: Annotated[Path, typer.Argument(help="The folder to write; must not exist.")],
    blend: Annotated[str, typer.Option(help="Text to measure on: the training text of a prepared blend.")],
    root: Annotated[
        Path | None, typer.Option(help="Where blends are prepared.", show_default="$NEMOTRON_H_DATA or ./data")
    ] = None,
    seq_length: Annotated[int | None, typer.Option(help="Tokens of a sample.", show_default="as in training")] = None,
    layer_samples: Annotated[int, typer.Option(help="Samples for layers (paper 3.2: 128).")] = 128,
    neuron_samples: Annotated[
        int, typer.Option(help="Samples for neurons and other channels (paper 3.2: 1024).")
    ] = 1024,
    metric: Annotated[
        str, typer.Option(help="What removing a layer changes: mse (activations) or kl (logits).")
    ] = "mse",
) -> None:
    """Measure how much each layer, expert, neuron, Mamba-2 head and channel matters, by forward passes alone.

    Run it again after an interruption and it goes on. With a GPU it computes there in BF16 with one layer's weights at
    a time, so the model has to fit into host memory only.
    """
    if out.exists():
        raise UserError(f"{out} exists already", hint="name another OUT; nothing was measured")
    if min(layer_samples, neuron_samples) < 1:
        raise UserError("--layer-samples and --neuron-samples are 1 or more")
    import torch

    from nemotron_h.architecture.vision import check_text_only
    from nemotron_h.checkpoint.definition import read_definition
    from nemotron_h.checkpoint.folders import INTEGRITY
    from nemotron_h.checkpoint.reader import find_checkpoint, read_record
    from nemotron_h.compression.importance import measure_text
    from nemotron_h.core.files import file_sha256
    from nemotron_h.data.blend import load_blend
    from nemotron_h.data.feed.calibration import text_record
    from nemotron_h.data.manifest import check_manifest
    from nemotron_h.export.folder import new_folder
    from nemotron_h.inference.model import load_model

    checkpoint = find_checkpoint(checkpoint)
    record = read_record(checkpoint)
    check_text_only(read_definition(record, f"checkpoint {checkpoint}"), f"checkpoint {checkpoint}")
    length = seq_length or (record.get("data") or {}).get("seq_length")
    if not length:
        raise UserError(f"{checkpoint} does not tell its sequence length", hint="give --seq-length")
    text = load_blend(blend)
    manifest = check_manifest(root, text)
    on_gpu = torch.cuda.is_available()
    measured = measure_text(
        lambda: load_model(checkpoint, dtype=torch.bfloat16 if on_gpu else torch.float32),
        text,
        manifest,
        length,
        (layer_samples, neuron_samples),
        console=Console(stderr=True),
        metric=metric,
        settings={
            "checkpoint": str(checkpoint.absolute()),
            "checkpoint_sha256": file_sha256(checkpoint / INTEGRITY),
            **text_record(text, manifest),
        },
        device="cuda" if on_gpu else None,
        unfinished=out.with_name(out.name + UNFINISHED),
    )
    with new_folder(out, 0) as folder:
        measured.save(folder)
    samples = f"{layer_samples} and {neuron_samples} samples of {length:,} tokens"
    typer.echo(f"{out}: {samples}; least important: {measured.least()}")


def prune(
    checkpoint: CheckpointArgument,
    out: Annotated[Path, typer.Argument(help="The checkpoint folder to write; must not exist.")],
    importance: Annotated[Path, typer.Option(help="A folder of `nemotron-h importance`.")],
    attention: Annotated[int | None, typer.Option(help="Attention layers that stay.", show_default="all")] = None,
    mamba: Annotated[int | None, typer.Option(help="Mamba-2 layers that stay.", show_default="all")] = None,
    ffn: Annotated[int | None, typer.Option(help="Feed-forward layers that stay.", show_default="all")] = None,
    ffn_hidden_size: Annotated[
        int | None, typer.Option(help="Neurons of each feed-forward layer.", show_default="all")
    ] = None,
    hidden_size: Annotated[int | None, typer.Option(help="Channels between layers.", show_default="all")] = None,
    mamba_num_heads: Annotated[int | None, typer.Option(help="Heads of each Mamba-2.", show_default="all")] = None,
    mamba_head_dim: Annotated[int | None, typer.Option(help="Channels of each head.", show_default="all")] = None,
    num_experts: Annotated[int | None, typer.Option(help="Routed experts of each mixture.", show_default="all")] = None,
    expert_hidden_size: Annotated[
        int | None, typer.Option(help="Neurons of each routed expert.", show_default="all")
    ] = None,
    shared_expert_hidden_size: Annotated[
        int | None, typer.Option(help="Neurons of each shared expert.", show_default="all")
    ] = None,
    order: Annotated[str, typer.Option(help="importance, or a control: random or reversed.")] = "importance",
    seed: Annotated[int, typer.Option(help="Of a random order.")] = 0,
    name: Annotated[str | None, typer.Option(help="Of the model definition.", show_default="the folder's")] = None,
) -> None:
    """Prune a checkpoint to a smaller model: the most important layers and channels stay.

    The child is an ordinary checkpoint with a definition of its own (model.yaml): it is fine-tuned, generates and is
    exported as any other. It is written only if it computes what the parent computes without what was pruned.
    """
    from nemotron_h.architecture.pruned_widths import check_width
    from nemotron_h.architecture.vision import check_text_only
    from nemotron_h.checkpoint.definition import read_definition
    from nemotron_h.checkpoint.reader import find_checkpoint, read_record
    from nemotron_h.compression import slicing
    from nemotron_h.compression.candidates import WIDTHS, Candidate, Candidates, whole
    from nemotron_h.compression.importance import RECORD, Importance
    from nemotron_h.compression.selection import child_of
    from nemotron_h.core.files import file_sha256
    from nemotron_h.export.config import definition_name
    from nemotron_h.schema.minipuzzle import BudgetSchema, GridSchema

    checkpoint = find_checkpoint(checkpoint)
    parent = read_definition(read_record(checkpoint), f"checkpoint {checkpoint}")
    check_text_only(parent, f"checkpoint {checkpoint}")
    found = Importance.load(importance, parent)
    given = {
        "attention": attention,
        "mamba": mamba,
        "ffn": ffn,
        "ffn_hidden_size": ffn_hidden_size,
        "hidden_size": hidden_size,
        "mamba_num_heads": mamba_num_heads,
        "mamba_head_dim": mamba_head_dim,
        "num_experts": num_experts,
        "expert_hidden_size": expert_hidden_size,
        "shared_expert_hidden_size": shared_expert_hidden_size,
    }
    stated = {key: value for key, value in given.items() if value is not None}
    most = whole(parent)
    for key, value in stated.items():
        option = f"--{key.replace('_', '-')}"
        if key in WIDTHS:
            check_width(parent, key, value, option)
        elif not 0 <= value <= getattr(most, key):
            raise UserError(f"{option} has {value}; {parent.name} has {getattr(most, key)}", hint="it can only shrink")
    grid = GridSchema(**{key: [value] for key, value in stated.items()})
    (candidate,) = Candidates(parent, grid, BudgetSchema())
    if candidate == most or not sum(candidate[:3]):
        raise UserError(
            "nothing is cut" if candidate == most else "no layer is left",
            hint=f"give one or more of {', '.join('--' + key.replace('_', '-') for key in Candidate._fields)}",
        )
    child = child_of(parent, found.scores().ordered(order, seed), candidate)
    settings = {"importance_sha256": file_sha256(importance / RECORD), "order": order}
    with StageProgress(Console(stderr=True), "pruning", slicing.child_size(checkpoint, child), "bytes") as bar:
        made = slicing.write_child(
            checkpoint,
            child,
            out,
            name or definition_name(out.absolute().name),
            settings,
            bar.advance,
        )
    share = made.parameters / parent.parameters
    typer.echo(
        f"{out}: {made.name}, {candidate.counts}, {made.parameters:,} parameters, {share:.1%} of {parent.name}'s"
    )
