"""Stage `report`: what each round came to, against the parent.

    nemotron-h hybridise RECIPE --stage report

Reads all stages. Writes report.html, result.json, and model.yaml, the last model's definition.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from nemotron_h.architecture.definition import ModelDefinition
from nemotron_h.checkpoint.definition import definition_text, read_definition
from nemotron_h.checkpoint.reader import read_record
from nemotron_h.compression.figures import recovery
from nemotron_h.compression.hybridise import figures
from nemotron_h.compression.hybridise.context import Context
from nemotron_h.compression.hybridise.pipeline.generation import GENERATION
from nemotron_h.compression.hybridise.pipeline.mixers import MIXERS
from nemotron_h.compression.hybridise.rounds import RESULTS, following_stages
from nemotron_h.compression.pipeline.text import HALVES
from nemotron_h.compression.recovery import sentence
from nemotron_h.compression.report import finished_stages, recovery_curve
from nemotron_h.core.files import write_json
from nemotron_h.core.page import for_both, render
from nemotron_h.core.units import gib
from nemotron_h.launch.stages import Stage

REPORT, RESULT, DEFINITION = "report.html", "result.json", "model.yaml"

PAGE = """{% extends "page" %}{% from "parts" import facts, table, chart %}
{% block title %}{{ name }}: a hybrid of {{ parent.name }}{% endblock %}
{% block head %}<h1>{{ name }}: a hybrid of {{ parent.name }}</h1>
<p>Last round: <b>{{ recovery }}</b>.</p>{% endblock %}
{% block main %}
{{ facts(top) }}
<p class="note">Checkpoint <code>{{ checkpoint }}</code></p>
<h2>Rounds</h2>
{{ table([("model", ""), ("attention", "n"), ("parameters", "n"), ("transplanted", "n"), ("mixers trained", "n"),
  ("all trained", "n"), ("perplexity", "n"), ("recovered", "n"), ("tokens/s", "n"), ("states", "n")], rounds) }}
<p class="note">Losses in nats on {{ "{:,}".format(tokens) }} tokens that no choice has seen ({{ text.report }}): with
this round's mixers in place, after the distillation of mixers alone, and of the whole. Generation of {{ scenario }}, as
many times as fast as the parent beside it on {{ machine }}; states of a sequence at its full length, keys and values in
bf16, states in fp32.</p>
{% if then %}<h2>What followed</h2>
{{ table([("recipe", "wide"), ("stage", ""), ("loss", "n"), ("perplexity", "n")], then) }}
<p class="note">On the text of the rounds, which these recipes do not train on.</p>{% endif %}
<h2>Mixers by themselves</h2>
{{ table([("round", "n"), ("layer", "n"), ("matrix", "n"), ("its training", "n"), ("transplanted", "n"),
  ("matrix trained", "n"), ("trained", "n")], mixers) }}
<p class="note">Errors on held-out text: of the matrix by which heads mix tokens, |M<sub>p</sub> - M<sub>c</sub>| of
|M<sub>p</sub>|, when it is transplanted and after its training; then of what the layer adds, squared, of its squares. A
layer that is left out has 1.</p>
{% for title, text, image in pictures %}<h2>{{ title }}</h2>{{ chart(title, text, image) }}
{% endfor %}
<h2>Stages</h2>
{{ table([("stage", ""), ("result", "wide"), ("seconds", "n")], stages) }}
{% endblock %}
{% block foot %}Written by <code>nemotron-h hybridise</code>.{% endblock %}
"""


def stage(c: Context) -> Stage:
    """Return the stage."""
    rounds = [name for each in c.rounds for name in (each.mixers, each.distil)]
    needs = (*rounds, *(name for name, _ in following_stages(c.recipe)), "generation")
    return Stage("report", "model definition and report", needs, (RESULT, DEFINITION), dict, partial(run, c))


def run(c: Context, folder: Path) -> str:
    """Write what came out."""
    rounds, timed = [row_of(c, number) for number in range(len(c.rounds))], c.read("generation", GENERATION)
    then = [c.read(name, RESULTS) for name, _ in following_stages(c.recipe)]
    checkpoint = Path((then or rounds)[-1]["child"]["checkpoint"])
    definition = read_definition(read_record(checkpoint), f"checkpoint {checkpoint}").counted()
    text = definition_text(definition, f"Made of {c.definition.name} by {c.recipe.name}.")
    (folder / DEFINITION).write_text(text, encoding="utf-8")
    parent = c.read(c.rounds[-1].distil, RESULTS)["parent"]
    result = {
        "recipe": c.recipe.name,
        "start": c.part.start,
        "checkpoint": str(checkpoint),
        "pattern": definition.pattern,
        "parameters": {"parent": c.definition.parameters, "child": definition.parameters},
        "text": HALVES,
        "parent": {**parent, "perplexity": math.exp(parent["loss"])},
        "rounds": rounds,
        "then": then,
        "generation": {key: value for key, value in timed.items() if key != "rounds"},
    }
    write_json(folder / RESULT, result)
    _write(c, folder / REPORT, definition, result)
    last = rounds[-1]
    return f"{checkpoint}; {folder / REPORT}; loss {last['child']['loss']:.3f}, the parent's {parent['loss']:.3f}"


def row_of(c: Context, place: int) -> dict[str, Any]:
    """Return what a round came to."""
    each = c.rounds[place]
    made, distilled = c.read(each.mixers, MIXERS), c.read(each.distil, RESULTS)
    timed = c.read("generation", GENERATION)["rounds"][place]
    return {
        **{key: made[key] for key in ("share", "stay", "go", "pattern", "errors")},
        "parameters": c.model_of(each).parameters,
        "transplanted": made["measured"],
        **{key: distilled[key] for key in ("frozen", "child", "recovered")},
        "perplexity": math.exp(distilled["child"]["loss"]),
        "generation": timed["model"],
        "faster": timed["model"]["tokens_per_second"] / timed["parent"]["tokens_per_second"],
        "parent_generation": timed["parent"],
    }


def _write(c: Context, out: Path, model: ModelDefinition, result: dict[str, Any]) -> None:
    rounds, parent, timed = result["rounds"], result["parent"], result["generation"]
    last = rounds[-1]
    losses = (parent["loss"], last["transplanted"]["loss"], last["child"]["loss"])
    of_parent = last["parent_generation"]
    page = render(
        PAGE,
        name=c.recipe.name,
        parent=c.definition,
        recovery=sentence(*losses),
        top=[
            ("parent", f"{losses[0]:.3f}", f"loss; {len(last['stay'])} of its attention layers stay"),
            ("hybrid", f"{losses[2]:.3f}", f"loss; {model.parameters:,} parameters"),
            ("tokens per second", f"{last['faster']:.2f}x", f"{last['generation']['tokens_per_second']:,.0f}"),
            ("states", gib(last["generation"]["state_bytes"]), f"a sequence; {gib(of_parent['state_bytes'])} before"),
        ],
        checkpoint=result["checkpoint"],
        rounds=[
            _parent(c.definition, parent, gib(of_parent["state_bytes"])),
            *(_round(row) for row in rounds),
        ],
        tokens=parent["tokens"],
        text=result["text"],
        scenario=f"{timed['output']:,} tokens after {timed['prompt']:,}, {timed['batch']} sequences at once",
        machine=timed["machine"]["processor"],
        then=[
            (row["recipe"], row["stage"], f"{row['child']['loss']:.3f}", f"{math.exp(row['child']['loss']):.2f}")
            for row in result["then"]
        ],
        mixers=[
            (number, layer, *_mixer(error))
            for number, row in enumerate(rounds, 1)
            for layer, error in row["errors"].items()
        ],
        pictures=list(_pictures(c, result)),
        stages=finished_stages(c.folder),
    )
    out.write_text(page, encoding="utf-8")


def _parent(model: ModelDefinition, score: dict[str, Any], states: str) -> tuple[str, ...]:
    losses = ("", "", f"{score['loss']:.3f}", f"{score['perplexity']:.2f}")
    return (model.pattern, "100.0%", f"{model.parameters:,}", *losses, "", "1.00", states)


def _round(row: dict[str, Any]) -> tuple[str, ...]:
    frozen, share = row["frozen"], row["recovered"]
    return (
        row["pattern"],
        f"{row['share']:.1%}",
        f"{row['parameters']:,}",
        f"{row['transplanted']['loss']:.3f}",
        f"{frozen['loss']:.3f}" if frozen else "",
        f"{row['child']['loss']:.3f}",
        f"{row['perplexity']:.2f}",
        "" if share is None else f"{share:.1%}",
        f"{row['faster']:.2f}",
        gib(row["generation"]["state_bytes"]),
    )


def _mixer(error: dict[str, Any]) -> tuple[str, ...]:
    matrix = error["matrix"]
    of_matrix = (f"{matrix['transplanted']:.3f}", f"{matrix['trained']:.3f}") if matrix else ("", "")
    output = f"{matrix['output']:.3f}" if matrix else ""
    return (*of_matrix, f"{error['transplanted']:.3f}", output, f"{error['trained']:.3f}")


def _pictures(c: Context, result: dict[str, Any]) -> Iterator[tuple[str, str, Any]]:
    rounds, shares = result["rounds"], [row["share"] for row in result["rounds"]]
    losses = {"as transplanted": [row["transplanted"]["loss"] for row in rounds]}
    if all(row["frozen"] for row in rounds):
        losses["mixers alone trained"] = [row["frozen"]["loss"] for row in rounds]
    losses["all trained"] = [row["child"]["loss"] for row in rounds]
    yield (
        "Loss by share of attention",
        "Each round begins with what the one before it made.",
        for_both(partial(figures.by_share, shares, losses, result["parent"]["loss"], "loss, nats"), "loss by share"),
    )
    faster = {"tokens per second": [row["faster"] for row in rounds]}
    yield (
        "Generation by share of attention",
        "Tokens per second over the parent's.",
        for_both(partial(figures.by_share, shares, faster, 1.0, "times the parent's tokens/s"), "generation by share"),
    )
    for number, row in enumerate(rounds, 1):
        if curve := recovery_curve(Path(row["child"]["checkpoint"]).parents[1], c.recipe):
            yield (
                f"Round {number}: the distillation of all",
                "What it minimises, on its validation batches.",
                for_both(partial(recovery, *zip(*curve, strict=True)), f"recovery {number}"),
            )
