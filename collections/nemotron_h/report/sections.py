"""The words and tables of a run's report, as rows."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
from markupsafe import Markup

from nemotron_h.architecture.definition import ModelDefinition
from nemotron_h.architecture.gemms import FP8_FORMATS, fold, gemm_table
from nemotron_h.checkpoint.definition import read_definition
from nemotron_h.core.progress import STEPS
from nemotron_h.core.units import rough, short_count
from nemotron_h.report.run import Run
from nemotron_h.schema.recipe import command_of

Fact = tuple[str, str, str]


def precision_of(run: Run) -> str:
    """Return the precision that the run trained in."""
    return run.record.get("settings", {}).get("precision") or run.recipe.get("precision", "")


def subtitle(run: Run, definition: ModelDefinition) -> str:
    """Return what was trained, in a sentence."""
    kinds = ", ".join(f"{count} {kind}" for kind, count in definition.layer_counts().items() if count)
    adapter = run.record.get("adapter") or {}
    adapted = f", {adapter['kind']} of rank {adapter['rank']}" if adapter else ""
    teacher = run.record.get("teacher", {}).get("model", {}).get("name")
    taught = f", from {teacher}" if teacher else ""
    return (
        f"{run.recipe['stage']} of {definition.name}{taught}: {definition.num_layers} layers ({kinds}){adapted}, "
        f"{precision_of(run)}"
    )


def notes(run: Run) -> Iterator[str]:
    """Yield what a reader has to know about the data of the report."""
    if not (run.folder / STEPS).is_file():
        losses = "losses are those of its TensorBoard events, rates" if run.steps else "losses and rates"
        yield f"There is no {STEPS}: {losses} are not known."
    if run.unreadable:
        lines = ", ".join(f"{number:,}" for number in run.unreadable[:5])
        more = f" and {len(run.unreadable) - 5:,} more" if len(run.unreadable) > 5 else ""
        yield f"{STEPS}: line {lines}{more} is not readable and left out (a process was killed, or the disk was full)."
    gaps = [(a.step, b.step) for a, b in pairwise(run.steps) if a.loss != a.loss or b.loss != b.loss]
    if gaps:
        yield f"The loss is not a number from step {gaps[0][1]:,} on."


def numbers(run: Run, definition: ModelDefinition) -> Iterator[Fact]:
    """Yield the numbers that are asked for first: name, value and remark."""
    steps = run.steps
    if steps:
        yield "training loss", f"{steps[-1].loss:.4f}", f"{steps[0].loss:.4f} at step {steps[0].step:,}"
    if run.validation:
        at, last = list(run.validation.items())[-1]
        best = min(run.validation, key=run.validation.__getitem__)
        remark = f"at step {at:,}" + ("" if best == at else f"; least {run.validation[best]:.4f} at {best:,}")
        yield "validation loss", f"{last:.4f}", remark
    metrics = run.record["metrics"]
    if (accuracy := metrics.get("val_reward_accuracy", metrics.get("reward_accuracy"))) is not None:
        yield "reward accuracy", f"{accuracy:.1%}", "validation" if "val_reward_accuracy" in metrics else ""
    if (kl := metrics.get("val_kl", metrics.get("kl"))) is not None:
        yield "KL to the teacher", f"{kl:.4f}", "validation, nats" if "val_kl" in metrics else "nats"
    tokens, whole = (short_count(n * run.tokens_per_step) for n in (run.last, run.max_steps))
    yield "tokens", tokens, f"{run.last:,} steps" if run.last >= run.max_steps else f"of {whole}"
    if is_known(run.values(lambda step: step.tokens_per_second)):
        rate, _, others = rates(run).partition(" tokens/s")
        yield "tokens/s", rate, others.removeprefix(", ")
    processes = len(run.starts)
    seconds = run.seconds or run.record.get("seconds", 0)
    yield "time", rough(seconds), f"in {processes} processes" if processes > 1 else ""
    trained = f"{definition.parameters:,}"
    yield "parameters", short_count(definition.parameters), trained
    name, memory = memory_of(run)
    if memory is not None:
        yield name, f"{np.nanmax(memory):,.2f} GiB", "peak"


def rates(run: Run) -> str:
    """Return the medians of tokens/s, and of TFLOP/s and MFU of each rank where they were measured."""
    measured = [f"{np.median(run.values(lambda step: step.tokens_per_second)):,.0f} tokens/s"]
    tflops, mfu = run.values("tflops_per_rank"), run.values("mfu")
    if is_known(tflops):
        each = " per rank" if run.record.get("layout", {}).get("world_size", 1) > 1 else ""
        median = float(np.nanmedian(tflops))
        rate = f"{median:,.3g} TFLOP/s" if median >= 1 else f"{1000 * median:,.3g} GFLOP/s"
        measured.append(rate + each)
    if is_known(mfu):
        measured.append(f"{np.nanmedian(mfu):.1%} MFU")
    return ", ".join(measured)


def memory_of(run: Run) -> tuple[str, np.ndarray | None]:
    """Return what the memory is of, and the peak so far at each step in GiB; None where it was not measured."""
    for name, title in (("max_memory_gib", "GPU memory"), ("max_resident_gib", "memory of rank 0")):
        values = run.values(name)
        if is_known(values):
            return title, values
    return "", None


def gemms(run: Run, definition: ModelDefinition) -> Iterator[tuple[str, str, list[tuple[Any, ...]]]]:
    """Yield title, note and rows of the matmuls' tables: of the model, and of a teacher that runs beside it."""
    options = run.recipe.get("precision_options") or {}
    layout, data = run.record.get("layout", {}), run.recipe.get("data") or {}
    models = {"": definition}
    teacher = run.record.get("teacher") or {}
    if teacher.get("model") and not teacher.get("logits"):
        models[" of the teacher"] = read_definition(teacher, f"{run.folder}: teacher")
    for whose, model in models.items():
        micro_batch = run.record.get("settings", {}).get("data.micro_batch_size") or data.get("micro_batch_size", 1)
        tokens = run.record["data"]["seq_length"] // layout.get("context", 1) * micro_batch
        edges = options.get("bf16_edge_layers", 2)
        table = gemm_table(
            model,
            precision_of(run),
            layout.get("tensor", 1),
            tokens=tokens,
            bf16_edge_layers=edges,
            sequence_parallel=layout.get("sequence", False),
        )
        rows = [
            ("" if g.kind == "output" else group.span, g.kind, g.name, f"{g.m:,} x {g.k:,} x {g.n:,}", g.dtype, g.why)
            for group in fold(table)
            for g in [group.gemm]
        ]
        emulated = " Emulated: float8 casts around float32 matmuls." if emulates(run) else ""
        note = "On each rank, for a micro-batch; a backward pass runs in the precision of its forward pass."
        yield f"Matmuls{whose}", note + emulated, rows


def emulates(run: Run) -> bool:
    """Tell whether FP8 was emulated: as asked, or for the lack of a GPU."""
    backend = (run.recipe.get("precision_options") or {}).get("fp8_backend")
    without = "hardware" in run.record and not run.record["hardware"].get("gpus")
    return precision_of(run) in FP8_FORMATS and (backend == "emulate" or (backend == "auto" and without))


def commands(run: Run) -> Iterator[tuple[str, str]]:
    """Yield what a command does, and the command."""
    recipe = run.folder / "recipe.yaml"
    if recipe.is_file():
        again = command_of(run.recipe["stage"], recipe)
        if run.state[0] == "finished":
            yield "To train on:", f"{again} tokens={2 * run.max_steps * run.tokens_per_step}"
        else:
            yield "To go on from the newest checkpoint:", again
        yield "To repeat it from its first step:", f"{again} log.dir=ANOTHER"


def changes(run: Run) -> Iterator[tuple[str, str, str, str]]:
    """Yield the settings that resumes changed."""
    for change in run.record.get("changes") or []:
        for key, pair in change.items():
            if key != "from_step":
                yield f"{change['from_step']:,}", key, str(pair[0]), str(pair[1])


def machine(run: Run) -> Iterator[tuple[str, Any]]:
    """Yield hardware, layout, versions and the commit."""
    record, hardware = run.record, run.record.get("hardware") or {}
    if hardware:
        gpus: list[str] = hardware.get("gpus") or []
        names = ", ".join(f"{gpus.count(name)} x {name}" for name in dict.fromkeys(gpus))
        cpu = f"{hardware.get('cpu') or 'CPU'}, {hardware.get('cores')} cores, {hardware.get('memory_gib')} GiB"
        yield "hardware", f"{names}; {cpu}" if names else cpu
    layout = record.get("layout") or {}
    if layout:
        ranks = layout.get("world_size", 1)
        yield (
            "ranks",
            (
                f"{ranks:,}: tensor {layout.get('tensor')}, pipeline {layout.get('pipeline')}"
                f"{', context ' + str(layout['context']) if 'context' in layout else ''}"
                f"{', sequence parallel' if layout.get('sequence') else ''}"
            ),
        )
    yield "started", f"{record.get('started', '')}"
    if record.get("command"):
        yield "command", Markup("<code>{}</code>").format(" ".join(map(str, record["command"])))
    git = record.get("git")
    if git:
        yield (
            "commit",
            Markup("<code>{}</code>{}").format(
                git.get("commit"), ", with changed files" if git.get("modified") else ""
            ),
        )
    yield "versions", ", ".join(f"{name} {version}" for name, version in (record.get("versions") or {}).items())


def data_note(run: Run) -> str:
    """Return the blend, its hash and its tokenizer's, in a sentence."""
    data = run.record["data"]
    return (
        f"Blend {data.get('blend')} (hash {str(data.get('blend_hash'))[:12]}), tokenizer "
        f"{str(data.get('tokenizer_sha256'))[:12]}, sequences of {data['seq_length']:,} tokens, "
        f"{data['global_batch_size']:,} a step, seed {data.get('seed')}."
    )


def sources(run: Run) -> Iterator[tuple[Any, ...]]:
    """Yield each source: tokens and hash of its training text and of its validation text."""
    for name, splits in (run.record["data"].get("sources") or {}).items():
        cells: list[Any] = []
        for split in ("train", "validation"):
            entry = splits.get(split)
            digest = entry["sha256_bin"] if entry else ""
            cells += [
                f"{entry['tokens']:,}" if entry else "",
                Markup('<code title="{}">{}</code>').format(digest, digest[:16]),
            ]
        yield name, *cells


def is_known(values: np.ndarray) -> bool:
    """Tell whether some value was measured."""
    return bool(np.isfinite(values).any())
