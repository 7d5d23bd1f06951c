"""Write the report of a compression: one HTML page with its pictures inside, made of what the stages left."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

from markupsafe import Markup
from rich.console import Console

from nemotron_h.architecture.definition import ModelDefinition
from nemotron_h.compression import figures
from nemotron_h.compression.candidates import Candidate, candidate_of, whole
from nemotron_h.compression.importance import Importance
from nemotron_h.compression.recovery import sentence
from nemotron_h.compression.scoring import pareto
from nemotron_h.core.errors import UserError
from nemotron_h.core.page import for_both, render
from nemotron_h.core.paired import read_losses
from nemotron_h.core.units import parse_count
from nemotron_h.schema.recipe import RecipeConfig

PAGE = """{% extends "page" %}{% from "parts" import facts, table, chart %}
{% block title %}{{ name }}: {{ parent.name }} compressed{% endblock %}
{% block head %}<h1>{{ name }}: {{ parent.name }} compressed</h1>
<p>Distillation: <b>{{ recovery }}</b>.</p>{% endblock %}
{% block main %}
{{ facts([
  ("parent", parent.parameters | count, "{:,} parameters".format(parent.parameters)),
  ("child", child.parameters | count, "{:,} parameters".format(child.parameters)),
  ("child of parent", "{:.1%}".format(child.parameters / parent.parameters), "of its parameters")]) }}
{{ table([("", ""), ("layers", "wide"), ("widths", "wide")], models) }}
<p class="note">Checkpoint <code>{{ checkpoint }}</code></p>
<h2>Before and after</h2>
{{ table(columns, rows) }}
<p class="note">On {{ "{:,}".format(tokens) }} tokens that no choice has seen ({{ text.report }}; candidates and winner
were chosen on the first half): next-token accuracy, agreement with the parent's greedy prediction, cross-entropy in
nats{% if tasks %}, and the recipe's evaluation, by which the winner was chosen{% endif %}. An arrow goes from the
pruned candidate to its short distillation (as the paper's table 6).</p>
{% for title, text, image in pictures %}<h2>{{ title }}</h2>{{ chart(title, text, image) }}
{% endfor %}
<h2>Stages</h2>
{{ table([("stage", ""), ("result", "wide"), ("seconds", "n")], stages) }}
{% endblock %}
{% block foot %}Written by <code>nemotron-h minipuzzle</code>.{% endblock %}
"""


def write(folder: Path, recipe: RecipeConfig, parent: ModelDefinition, result: dict[str, Any], out: Path) -> None:
    """Write the page.

    Args:
        folder: of the compression; its stages but the last are finished.
        recipe: of the compression.
        parent: its model.
        result: of the last stage, `export/result.json`.
        out: the page.
    """

    def read(*path: str) -> Any:
        return json.loads(folder.joinpath(*path).read_text())

    ranking, short = read("score", "ranking.json"), read("short-distil", "results.json")
    winner, distilled = read("select", "winner.json"), read("distil", "results.json")
    chosen = ranking["chosen"]
    row = next(r for r in ranking["candidates"] if r["name"] == winner["name"])
    importance = Importance.load(folder / "importance")
    parent_score, child = distilled["parent"], distilled["child"]
    tasks = sorted(child.get("evaluated", {}))
    rows = [("parent", [*_cells(parent_score), *[""] * len(tasks)])]
    for name in chosen:
        before, after = short[name]["pruned"], short[name]["short"]
        pairs = [f"{a} → {b}" for a, b in zip(_cells(before), _cells(after), strict=True)]
        rows.append((name, pairs + [f"{before['evaluated'][t]:.3f} → {after['evaluated'][t]:.3f}" for t in tasks]))
    rows.append(("child", _cells(child) + [f"{child['evaluated'][t]:.3f}" for t in tasks]))
    out.write_text(
        render(
            PAGE,
            name=recipe.name,
            parent=parent,
            child=row,
            models=[
                (title, Markup("<code>{}</code>").format(pattern), _widths(candidate))
                for title, pattern, candidate in (
                    ("parent", parent.pattern, whole(parent)),
                    ("child", row["pattern"], candidate_of(row)),
                )
            ],
            checkpoint=child["checkpoint"],
            recovery=sentence(
                distilled["parent"]["loss"], result["validation"]["pruned"]["loss"], distilled["child"]["loss"]
            ),
            columns=[("model", ""), *((name, "n") for name in ("accuracy", "agreement", "loss", *tasks))],
            tasks=tasks,
            rows=[(title, *values) for title, values in rows],
            tokens=parent_score["tokens"],
            text=result["text"],
            pictures=list(_pictures(recipe, parent, importance, ranking, child, result)),
            stages=finished_stages(folder),
        ),
        encoding="utf-8",
    )


def finished_stages(folder: Path) -> list[tuple[str, str, str]]:
    """Return name, result and seconds of each finished stage of a pipeline's folder, in their order."""
    stages = ((path.parent.name, json.loads(path.read_text())) for path in folder.glob("*/stage.json"))
    return [
        (name, stage["result"], f"{stage['seconds']:,.0f}")
        for name, stage in sorted(stages, key=lambda item: item[1]["finished"])
        if not name.endswith(".before")
    ]


def _widths(candidate: Candidate) -> str:
    return ", ".join(f"{key} {width:,}" for key, width in candidate.widths.items() if width)


def _cells(score: dict[str, Any]) -> list[str]:
    return [f"{score['accuracy']:.4f}", f"{score['agreement']:.4f}", f"{score['loss']:.4f}"]


def _pictures(
    recipe: RecipeConfig,
    parent: ModelDefinition,
    importance: Importance,
    ranking: dict[str, Any],
    child: dict[str, Any],
    result: dict[str, Any],
) -> Any:
    part, rows = recipe.minipuzzle, ranking["candidates"]
    values = importance.layers.mean(0).tolist()
    yield (
        "Importance of the layers",
        f"What removing each layer changes, the mean over {len(importance.layers)} samples (paper, figure 9).",
        for_both(partial(figures.importance, parent.pattern, values, importance.metric.upper()), "importance"),
    )
    by_memory = part.budget.memory_gib is not None
    cost, label = ("memory_gib", "memory of inference, GiB") if by_memory else ("parameters", "parameters")
    limit = part.budget.memory_gib if by_memory else parse_count(part.budget.parameters)
    front = pareto([r[cost] for r in rows], [r["accuracy"] for r in rows])
    yield (
        "Candidates",
        f"{len(rows)} within the budget, scored on {result['text']['choice']}; the circled ones were distilled "
        "(paper, figure 10).",
        for_both(partial(figures.candidates, rows, cost, label, limit, ranking["chosen"], front), "candidates"),
    )
    layers = {r["name"]: set(r["layers"]) for r in rows}
    dropped = {name: sorted(set(range(parent.num_layers)) - layers[name]) for name in ranking["chosen"]}
    yield (
        "Layers that the chosen candidates drop",
        "Dotted lines are the parent's layers (paper, figure 11).",
        for_both(lambda width, _: figures.patterns(parent.pattern, dropped, width), "dropped layers"),
    )
    yield (
        "Does the order mean anything?",
        "Whole layers dropped one after the other, the least important first, in a random order (the mean of three), "
        f"and the most important first; on {result['order_tokens']:,} validation tokens.",
        for_both(partial(figures.orders, result["orders"], result["orders"]["importance"][0]), "orders"),
    )
    curve = recovery_curve(Path(child["checkpoint"]).parents[1], recipe)
    if curve:
        yield (
            "Recovery",
            "What the distillation minimises (forward KL from the parent), on its validation batches.",
            for_both(partial(figures.recovery, *zip(*curve, strict=True)), "recovery"),
        )


def recovery_curve(run: Path, recipe: RecipeConfig) -> list[tuple[int, float]]:
    """Return (tokens, validation loss of the distillation) of a run; nothing where it kept no events."""
    per_step = recipe.data.seq_length * recipe.data.global_batch_size
    try:
        losses = read_losses(run, parse_count(recipe.tokens) // per_step).validation
    except UserError as error:
        Console(stderr=True).print(f"no recovery curve: {error.message}", markup=False)
        return []
    return [(step * per_step, loss) for step, loss in losses.items()]
