"""A plan as tables on the terminal."""

from __future__ import annotations

import math
from datetime import datetime

from rich.console import Console
from rich.table import Table
from rich.text import Text

from nemotron_h.core.units import brief, gib, rough
from nemotron_h.planning.layouts import Row, best, empty_flops
from nemotron_h.planning.memory import HostInputs, largest_stage
from nemotron_h.planning.muon import MuonCost
from nemotron_h.planning.plan import Plan, parts_by_stage
from nemotron_h.planning.saves import AGREEMENT_S, FAILURES, SHARE


def _table(console: Console, title: str, *columns: str) -> Table:
    console.print(title, style="bold", markup=False)
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", no_wrap=True)
    return table


def _when(date: datetime | None) -> str:
    return "" if date is None else date.strftime("%Y-%m-%d")


def show(plan: Plan, console: Console) -> None:
    """Print the plan."""
    d, schedule = plan.definition, plan.schedule
    active = f", {d.active_parameters:,} of them active" if d.has_experts else ""
    size = f": {d.name}, {d.parameters:,} parameters{active}, {d.num_layers} layers"
    console.print(Text.assemble((plan.name, "bold"), size))
    if d.mtp_pattern:
        console.print(
            f"and {d.mtp_parameters:,} in {d.mtp_pattern}, which predicts {d.mtp_steps} further tokens: "
            f"{d.parameters + d.mtp_parameters:,} together",
            markup=False,
        )
    if d.encoder:
        console.print(
            f"and {d.encoder.parameters:,} in the image encoder {d.encoder.widths.name}, "
            f"{d.encoder.projector.parameters:,} in the projector: {d.parameters + d.vision_parameters:,} together",
            soft_wrap=True,
            highlight=False,
        )
    for key, value in d.planned_only().items():
        console.print(f"[yellow]planned only[/yellow]: training does not have model.{key} = {value}", soft_wrap=True)
    adapter = plan.layout.adapter
    if plan.layout.frozen:
        console.print(
            f"{adapter.kind} of rank {adapter.rank} on {', '.join(adapter.targets)}: {plan.trained:,} parameters are "
            f"trained, the model's are frozen",
            soft_wrap=True,
        )
    if plan.layout.untrained:
        console.print(
            f"frozen: {', '.join(plan.layout.untrained)}; {plan.trained:,} parameters are trained", soft_wrap=True
        )
    console.print(f"{d.pattern}\n", markup=False)
    _show_model(plan, console)
    if plan.layout.precision.startswith("fp8"):
        _show_gemms(plan, console)
    _show_memory(plan, console)
    _show_schedule(plan, console)
    total = sum(plan.checkpoint.values())
    kept = "all stay" if plan.keep < 0 else f"{plan.keep} stay: {gib(total * plan.keep)}"
    table = _table(console, "On disk", "", "size")
    table.add_row("checkpoint to resume from", gib(total))
    table.add_row("its adapters alone" if plan.layout.frozen else "its weights alone", gib(plan.checkpoint["weights"]))
    if plan.teacher_logits:
        table.add_row("the teacher's logits", gib(plan.teacher_logits))
    console.print(table)
    console.print(f"{schedule.checkpoints:,} checkpoints are written, {kept}\n")
    _show_saves(plan, console)
    table = _table(console, f"Inference, one sequence of {plan.context:,} tokens", "", "BF16", "FP4")
    for label, part in (
        ("weights", "weights"),
        ("keys and values", "kv_cache"),
        ("SSM states, float32", "ssm_states"),
        ("convolutions' states", "conv_states"),
        ("all", "total"),
    ):
        table.add_row(label, *(gib(getattr(memory, part)) for memory in (plan.inference, plan.inference_fp4)))
    console.print(table)
    console.print("FP4: 0.5625 bytes per weight and per key or value, its scales included")


def _show_model(plan: Plan, console: Console) -> None:
    d = plan.definition
    table = _table(console, "Layers", "type", "layers", "parameters", "share")
    for name, counted in plan.layers().items():
        share = counted["parameters"] / d.parameters
        table.add_row(name, str(counted["layers"]), f"{counted['parameters']:,}", f"{share:.1%}")
    rest = d.parameters - sum(counted["parameters"] for counted in plan.layers().values())
    table.add_row("embedding, output, final norm", "", f"{rest:,}", f"{rest / d.parameters:.1%}")
    console.print(table, "")
    lengths = plan.layout.lengths
    sequences = " and ".join(
        f"{length:,}" + f" ({share:.1%})" * (len(lengths) > 1) for length, share in lengths.items()
    )
    table = _table(
        console, f"FLOPs per token, forward and backward, sequences of {sequences}", "part", "GFLOP", "share"
    )
    for name, share in plan.flops.shares().items():
        if share:
            table.add_row(name.replace("_", " "), f"{getattr(plan.flops, name) / 1e9:,.3f}", f"{share:.1%}")
    table.add_row("all", f"{plan.flops.total / 1e9:,.3f}", "")
    table.add_row("  in the layers' linear projections", f"{plan.flops.linear / 1e9:,.3f}", "")
    console.print(table)
    if len(lengths) > 1:
        alone = ", ".join(f"{flops / 1e9:,.3f} in sequences of {length:,}" for length, flops in plan.flops_of.items())
        console.print(f"a token takes {alone}", soft_wrap=True, highlight=False)
    if d.encoder:
        tile, seq = d.encoder, plan.layout.seq_length
        flops = sum(tile.flops_per_tile(frozen=plan.layout.untrained).values()) / 1e9
        console.print(
            f"a tile of {tile.widths.image_size} x {tile.widths.image_size} is {tile.tokens_per_tile:,} tokens and "
            f"{flops:,.1f} GFLOP before the language model; planned with {tile.tiles(seq):,} tiles a sequence, the "
            "most that it holds",
            soft_wrap=True,
            highlight=False,
        )
    teacher = plan.layout.teacher
    if teacher is not None:
        console.print(
            f"and {plan.teacher_flops.total / 1e9:,.3f} GFLOP in the forward of the teacher {teacher.name}, "
            f"{teacher.parameters:,} parameters",
            soft_wrap=True,
        )
    if plan.muon is not None:
        _show_muon(plan, plan.muon, console)
    console.print()


def _show_muon(plan: Plan, muon: MuonCost, console: Console) -> None:
    schedule = plan.schedule
    share = muon.flops / (plan.flops.total * schedule.tokens / schedule.steps)
    rows, columns = muon.largest
    console.print(
        f"Muon orthogonalizes {muon.parameters:,} parameters, the largest part {rows:,} x {columns:,}, in "
        f"{muon.flops / 1e12:,.3g} TFLOP a step, {share:.2%} of forward and backward, {muon.rank_flops / 1e12:,.3g} of "
        f"them on one GPU; a GPU sends {gib(muon.sent)} a step for it, and has {gib(muon.saved)} less of moments than "
        "with AdamW",
        soft_wrap=True,
        highlight=False,
    )


def _show_gemms(plan: Plan, console: Console) -> None:
    table = _table(
        console, f"Matrix products of one rank, {plan.layout.precision}", "product", "precision", "m", "n", "k", "why"
    )
    for group in plan.gemms:
        gemm = group.gemm
        table.add_row(f"{gemm.name} ({group.span})", gemm.dtype, f"{gemm.m:,}", f"{gemm.n:,}", f"{gemm.k:,}", gemm.why)
    console.print(table, "")


def _show_memory(plan: Plan, console: Console) -> None:
    layout, largest = plan.layout, plan.largest
    experts = f", experts over {layout.expert}" if plan.definition.has_experts else ""
    context = f"context {layout.context} x " if layout.context > 1 else ""
    words = (
        f"tensor {layout.tensor}{' with sequence parallel' if layout.sequence else ''} x pipeline {layout.pipeline} x "
        f"{context}data {layout.data} = {layout.ranks:,} GPUs{experts}, micro-batch {layout.micro_batch}, "
        f"{layout.micro_batches} per step"
    )
    shown = plan.stages if len(plan.stages) <= 4 else [largest]
    table = _table(console, f"Memory per GPU: {words}", "part", *(f"stage {stage.stage}" for stage in shown))
    for name in parts_by_stage(shown):
        table.add_row(name, *(gib(stage.parts().get(name, 0)) for stage in shown))
    table.add_row("peak", *(gib(stage.peak) for stage in shown))
    table.add_row("  reached in", *(stage.at for stage in shown))
    console.print(table)
    if layout.context > 1:
        empty = empty_flops(plan.definition, layout) / plan.flops.total
        filled = f"; empty heads of attention add {empty:.1%} to the FLOPs" if empty else ""
        console.print(f"context-parallel ranks exchange {gib(plan.exchanged)} per GPU and step, sent by each{filled}")
    if plan.host_inputs:
        _show_host_inputs(plan, plan.host_inputs, console)
    limit = plan.gpu.memory
    if plan.fits:
        console.print(f"[green]fits[/green] {plan.gpu.name}: {gib(limit)}, {gib(limit - largest.peak)} left\n")
        return
    if largest.peak <= limit:
        console.print("[red]does not fit[/red] the memory of a node: leave recompute.offload out, or take more GPUs\n")
        return
    console.print(f"[red]does not fit[/red] {plan.gpu.name}: {gib(limit)}, {gib(largest.peak - limit)} too much")
    for remedy in plan.remedies:
        console.print(f"  would fit with {remedy.settings}: {gib(remedy.peak)}", markup=False, soft_wrap=True)
    if not plan.remedies:
        console.print("  nothing tried makes it fit: take more GPUs (--sweep), or a smaller data.seq_length")
    console.print()


def _show_host_inputs(plan: Plan, inputs: HostInputs, console: Console) -> None:
    memory, layout = plan.saves.node_memory, plan.layout
    there = "not known" if memory is None else gib(memory)
    layers = math.ceil(plan.definition.num_layers / layout.pipeline) * layout.micro_batches
    layer = plan.schedule.step_seconds / layers / 4  # a forward, once more, and a backward of twice that
    console.print(
        f"host memory keeps {inputs.count} layers' inputs, {gib(inputs.bytes)} per GPU; with the copies of a save "
        f"{gib(plan.node_host_bytes)} per node, which has {there}\n"
        f"copying an input takes {1e3 * inputs.size / plan.gpu.to_host_gb_s / 1e9:,.3g} ms at "
        f"{plan.gpu.to_host_gb_s:g} GB/s, beside a layer's forward of {1e3 * layer:,.3g} ms",
        soft_wrap=True,
    )


def _show_schedule(plan: Plan, console: Console) -> None:
    schedule = plan.schedule
    table = _table(console, "Schedule", "", "first step", "steps", "begins")
    table.add_row("warm-up", "0", f"{schedule.warmup_steps:,}", _when(schedule.date(0)))
    for span in schedule.phases:
        table.add_row(span.name, f"{span.first_step:,}", f"{span.steps:,}", _when(schedule.date(span.first_step)))
    table.add_row("end", f"{schedule.steps:,}", "", _when(schedule.date(schedule.steps)))
    console.print(table, markup=False)  # a phase's name may have brackets
    console.print(
        f"{schedule.tokens:,} tokens at {plan.mfu:.1%} of the peak ({plan.mfu_source}):\n"
        f"{schedule.tokens_per_second / schedule.gpus:,.0f} tokens/s per GPU, {schedule.step_seconds:,.3f} s per step, "
        f"{rough(schedule.seconds)}, [bold]{schedule.gpu_hours:,.0f} GPU-hours[/bold]\n"
    )


def _show_saves(plan: Plan, console: Console) -> None:
    cost, gpu = plan.saves, plan.gpu
    table = _table(console, "A checkpoint", "in all", "per node", "per GPU")
    table.add_row(gib(cost.bytes), gib(cost.node_bytes), gib(cost.rank_bytes))
    console.print(table)

    def steps(number: int) -> str:
        return f"{number:,} steps ({brief(number * cost.step_seconds)})"

    late = cost.stopped_seconds > AGREEMENT_S
    lines = (
        f"{cost.files:,} files and an index of {gib(cost.index_bytes)}; host memory stages what a node writes",
        f"training stops {brief(cost.stopped_seconds)} to plan the save{' and copy it' * late}; copied beside the "
        f"next step in {brief(cost.copy_seconds)}, at {gpu.to_host_gb_s:g} GB/s per GPU",
        f"written beside training in {brief(cost.write_seconds)}, at {cost.storage_gb_s:g} GB/s per node (--storage), "
        f"{cost.nodes:,} node{'s' if cost.nodes > 1 else ''}",
        f"to end before the next save a write needs {cost.needed_gb_s:.2g} GB/s of all nodes together",
        f"checkpoint.every_steps = {steps(cost.every_steps)}: {100 * cost.share:.2g} % of the time; under "
        f"{100 * SHARE:g} % from {steps(cost.least_steps)} on",
        f"a failure every {rough(cost.failure_seconds)} ({FAILURES} in 54 days of 16,384 GPUs) costs "
        f"{brief(cost.lost_seconds)} of training",
        f"Young's interval, which loses least to saves and failures: {steps(cost.young_steps)}",
    )
    for line in lines:
        console.print(line, soft_wrap=True, markup=False)
    for warning in cost.warnings:
        console.print(f"[yellow]warning[/yellow]: {warning}", soft_wrap=True)
    console.print()


def show_sweep(plan: Plan, rows: list[Row], console: Console) -> None:
    """Print the layouts, and mark the best."""
    chosen, experts = best(rows), plan.definition.has_experts
    table = _table(
        console,
        f"Layouts on {plan.layout.ranks:,} x {plan.gpu.name} ({gib(plan.gpu.memory)})",
        "TP x PP x CP x DP" + (" / EP" if experts else ""),
        "recompute",
        "memory",
        "",
        "s/step",
        "tokens/s",
        "",
    )
    for row in rows:
        at = row.layout
        note = "[bold]best[/bold]" if row is chosen else row.refused
        table.add_row(
            f"{at.tensor} x {at.pipeline} x {at.context} x {at.data}" + (f" / {at.expert}" if experts else ""),
            row.recompute,
            gib(row.peak),
            "[green]fits[/green]" if row.fits else "[red]no[/red]",
            f"{row.step_seconds:,.3f}",
            f"{row.tokens_per_second:,.0f}",
            note,
        )
    console.print(table)
    console.print(
        "Speed is a simple model (docs/planning.md): the recipe's own layout has the stated MFU; pipeline bubbles, "
        "4 % per doubling of tensor parallel and recomputed operations are counted against each other layout."
    )
    if chosen is None:
        need = gib(min(row.peak for row in rows)) if rows else gib(largest_stage(plan.definition, plan.layout).peak)
        console.print(f"none fits: the smallest needs {need}")
