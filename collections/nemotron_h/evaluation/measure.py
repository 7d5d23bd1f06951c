"""Evaluate a checkpoint: print what comes out and add it to the run's record."""

from __future__ import annotations

import math
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from nemotron_h.core.errors import UserError
from nemotron_h.core.progress import StageProgress
from nemotron_h.data.blend import IMAGES, PAIRS, Blend, load_blend
from nemotron_h.data.manifest import Manifest, check_manifest
from nemotron_h.data.tokenizer import load_tokenizer
from nemotron_h.evaluation import harness, heldout, record
from nemotron_h.evaluation.harness import Invocation, Settings
from nemotron_h.evaluation.subject import Subject
from nemotron_h.evaluation.tasks import PERPLEXITY, STOCK, load_task, local_tasks, write_task
from nemotron_h.export import hf_writer
from nemotron_h.export.tokenizer import check_exportable
from nemotron_h.inference.model import load_model
from nemotron_h.inference.opening import torch_dtype


def measure_blend(
    subject: Subject,
    blend_name: str | None,
    root: Path | None,
    tokens: int,
    settings: Settings,
    console: Console,
) -> None:
    """Measure the held-out loss by category, print it and add it to the record.

    Args:
        subject: the checkpoint.
        blend_name: None takes the run's.
        root: of the prepared data; None takes the run's.
        tokens: of each category; 0 takes all.
        settings: dtype and device.
        console: for the progress.
    Errors:
        UserError: the blend is unknown, not prepared, of another tokenizer, or holds nothing out.
    """
    blend, manifest, seq_length = _prepared(subject, blend_name, root)
    text_of = heldout.HeldOut.of(blend, manifest, seq_length)
    model = load_model(subject.checkpoint, dtype=torch_dtype(settings.dtype), device=settings.device)
    started, scores = time.perf_counter(), {}
    sizes = {name: _wanted(manifest, sources, tokens) for name, sources in text_of.sources.items()}
    with StageProgress(console, "held-out text", sum(sum(wanted.values()) for wanted in sizes.values())) as bar:
        for category, wanted in sizes.items():
            bar.advance(0, category)
            reset = bool(subject.recipe_data.get("document_reset"))
            texts = (
                sequence
                for source, count in wanted.items()
                for sequence in heldout.sequences(manifest, source, seq_length, reset, count)
            )
            scores[category] = heldout.score(model, subject.tokenizer, texts, bar.advance)
    loss, stderr = heldout.weighted(scores, text_of.shares)
    table = Table(
        "category", "share", "tokens", "loss", "±", "perplexity", "bits/byte", title=f"held out of {blend.name}"
    )
    for column in table.columns[1:]:
        column.justify = "right"
    whole = math.fsum(text_of.shares.values())
    for category, score in scores.items():
        table.add_row(
            category,
            f"{text_of.shares[category] / whole:.1%}",
            f"{score.tokens:,}",
            f"{score.loss:.4f}",
            f"{score.stderr:.4f}",
            f"{score.perplexity:,.2f}",
            f"{score.bits_per_byte:.4f}",
        )
    table.add_section()
    table.add_row("all, by share", "100.0%", "", f"{loss:.4f}", f"{stderr:.4f}", f"{math.exp(loss):,.2f}", "")
    Console().print(table)
    if text_of.left_out:
        console.print(f"left out, without held-out text of {seq_length:,} tokens: {', '.join(text_of.left_out)}")
    details = {
        "blend": blend.name,
        "seq_length": seq_length,
        "dtype": settings.dtype,
        "seconds": round(time.perf_counter() - started, 1),
    }
    entries = [
        {
            "task": f"{PERPLEXITY}/{category}",
            "metrics": {
                "loss": [score.loss, None if math.isnan(score.stderr) else score.stderr],
                "perplexity": [score.perplexity, None],
                "bits_per_byte": [score.bits_per_byte, None],
            },
            "samples": score.tokens,
            **details,
        }
        for category, score in scores.items()
    ]
    of_all = {"loss": [loss, None if math.isnan(stderr) else stderr], "perplexity": [math.exp(loss), None]}
    counted = sum(score.tokens for score in scores.values())
    entries.append({"task": f"{PERPLEXITY}/all", "metrics": of_all, "samples": counted, **details})
    typer.echo(f"added to {record.add(subject.checkpoint, entries)}")


def _wanted(manifest: Any, sources: list[str], tokens: int) -> dict[str, int]:
    """Return the number of predicted tokens of each source of a category, in proportion to its held-out text."""
    held = manifest.tokens("validation")
    whole = sum(held[name] for name in sources)
    if not tokens or tokens >= whole:
        return {name: held[name] - 1 for name in sources}
    return {name: max(1, tokens * held[name] // whole) for name in sources}


def measure_tasks(subject: Subject, runs: list[Invocation], settings: Settings, python: Path, console: Console) -> None:
    """Run tasks of lm-evaluation-harness on the exported model, print the results and add them to the record.

    Args:
        subject: the checkpoint.
        runs: which tasks.
        settings: how.
        python: interpreter of the harness.
        console: for the progress.
    Errors:
        UserError: the model cannot be exported, data cannot be fetched, or the harness fails.
    """
    check_exportable(subject.tokenizer)
    with tempfile.TemporaryDirectory(prefix="nemotron_h_eval_") as temporary:
        work = Path(temporary)
        (work / "tasks").mkdir()
        for name in (name for run in runs if run.local for name in run.tasks):
            write_task(name, work / "tasks", console.print)
        console.print(f"exporting {subject.checkpoint}", markup=False)
        plan = hf_writer.plan(
            subject.checkpoint, subject.tokenizer, getattr(torch, settings.dtype), shard_size=5 * 10**9
        )
        hf_writer.write(plan, work / "model", subject.tokenizer)
        for number, run in enumerate(runs):
            console.print(f"[{number + 1}/{len(runs)}] {', '.join(run.tasks)}", markup=False)
            out = work / f"results_{number}"
            out.mkdir()
            line = harness.command(python, work / "model", run, settings, work / "tasks", out)
            started = time.perf_counter()
            entries = harness.run(line, local=run.local, out=out)
            details = {
                "dtype": settings.dtype,
                "limit": settings.limit,
                "remarks": [] if run.local else [STOCK],
                "seconds": round(time.perf_counter() - started, 1),
                "command": harness.shown(harness.command("python", "MODEL", run, settings, "TASKS", "RESULTS")),
            }
            # after every run, so that a suite that is stopped keeps what is done
            path = record.add(subject.checkpoint, [{**entry, **details} for entry in entries])
            _print(entries, "" if run.local else STOCK)
    typer.echo(f"added to {path}")


def _print(entries: list[dict[str, Any]], remark: str) -> None:
    table = Table("task", "shots", "samples", "metric", "value", "±", "chance", caption=remark)
    for entry in entries:
        chance = load_task(entry["task"]).chance if entry["task"] in local_tasks() else None
        for metric, (value, error) in entry["metrics"].items():
            table.add_row(
                entry["task"],
                "" if entry["shots"] is None else str(entry["shots"]),
                "" if entry["samples"] is None else f"{entry['samples']:,}",
                metric,
                f"{value:.4f}",
                "" if error is None else f"{error:.4f}",
                f"{chance:.2f}" if chance else "",
            )
    Console().print(table)


def _prepared(subject: Subject, blend_name: str | None, root: Path | None) -> tuple[Blend, Manifest, int]:
    """Return the blend, its prepared data and the run's sequence length."""
    data, written, record_file = subject.data, subject.recipe_data, subject.checkpoint / "run.json"
    if not (named := blend_name or written.get("blend")):
        raise UserError(f"{record_file} does not tell the blend of the run", hint="name it: --blend NAME")
    if not (seq_length := data.get("seq_length") or written.get("seq_length")):
        raise UserError(f"{record_file} does not tell the run's sequence length")
    blend = load_blend(named)
    if (holds := blend.holds()) in (PAIRS, IMAGES):
        raise UserError(
            f"blend {blend.name!r} holds {holds}: held-out loss is of text or conversations",
            hint="name such a blend: --blend NAME; the loss of others is in the run's own validations",
        )
    manifest = check_manifest(root or data.get("root") or written.get("root"), blend)
    prepared = load_tokenizer(manifest.tokenizer_path())
    if subject.tokenizer.ids_sha256() != prepared.ids_sha256():
        raise UserError(
            f"blend {blend.name!r} was prepared with another tokenizer than {subject.tokenizer.path}",
            hint="name a blend that was prepared with the model's tokenizer: --blend NAME, --root DIR",
        )
    return blend, manifest, seq_length
