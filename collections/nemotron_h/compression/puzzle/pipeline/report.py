"""Stage `report`: what was chosen where, what was foretold and what came of it.

    nemotron-h puzzle RECIPE --stage report

Reads all stages. Writes report.html, result.json, and model.yaml, the child's definition.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from markupsafe import Markup
from scipy.stats import spearmanr

from nemotron_h.architecture.variants import PARENT
from nemotron_h.checkpoint.definition import definition_text, read_definition
from nemotron_h.checkpoint.reader import read_record
from nemotron_h.compression.figures import recovery
from nemotron_h.compression.pipeline.text import HALVES, REPORTED
from nemotron_h.compression.puzzle import figures
from nemotron_h.compression.puzzle.context import Context
from nemotron_h.compression.puzzle.pipeline.child import CHILD
from nemotron_h.compression.puzzle.pipeline.compare import COMPARED
from nemotron_h.compression.puzzle.pipeline.costs import LATENCY
from nemotron_h.compression.puzzle.pipeline.heal import RESULTS
from nemotron_h.compression.puzzle.pipeline.library import LIBRARY
from nemotron_h.compression.puzzle.pipeline.score import read_scores
from nemotron_h.compression.puzzle.pipeline.search import SOLUTIONS
from nemotron_h.compression.recovery import sentence
from nemotron_h.compression.report import finished_stages, recovery_curve
from nemotron_h.core.files import write_json
from nemotron_h.core.page import for_both, render
from nemotron_h.launch.stages import Stage

REPORT, RESULT, DEFINITION = "report.html", "result.json", "model.yaml"

PAGE = """{% extends "page" %}{% from "parts" import facts, table, chart %}
{% block title %}{{ name }}: {{ parent.name }} compressed{% endblock %}
{% block head %}<h1>{{ name }}: {{ parent.name }} compressed</h1>
<p>Healing: <b>{{ recovery }}</b>.</p>{% endblock %}
{% block main %}
{{ facts(top) }}
<p class="note">Checkpoint <code>{{ checkpoint }}</code></p>
<h2>Layers</h2>
{{ table([("layer", "n"), ("kind", ""), ("variant", "wide"), (measure, "n"), ("parameters", "n")], layers) }}
<h2>Before and after</h2>
{{ table([("model", ""), ("accuracy", "n"), ("agreement", "n"), ("loss", "n")], rows) }}
<p class="note">On {{ "{:,}".format(tokens) }} tokens that no choice has seen ({{ text.report }}).</p>
<h2>Foretold and measured</h2>
{{ table([("", ""), ("foretold", "n"), ("measured", "n"), ("ratio", "n")], foretold) }}
{% for title, text, image in pictures %}<h2>{{ title }}</h2>{{ chart(title, text, image) }}
{% endfor %}
<h2>Stages</h2>
{{ table([("stage", ""), ("result", "wide"), ("seconds", "n")], stages) }}
{% endblock %}
{% block foot %}Written by <code>nemotron-h puzzle</code>.{% endblock %}
"""


def stage(c: Context) -> Stage:
    """Return the stage."""
    needs = ("importance", "library", "score", "costs", "search", "compare", "child", "heal")
    return Stage("report", "model definition and report", needs, (RESULT, DEFINITION), dict, partial(run, c))


def run(c: Context, folder: Path) -> str:
    """Write what came out."""
    child, healed, found = c.read("child", CHILD), c.read("heal", RESULTS), c.read("search", SOLUTIONS)
    checkpoint = Path(healed["child"]["checkpoint"])
    definition = read_definition(read_record(checkpoint), f"checkpoint {checkpoint}").counted()
    (folder / DEFINITION).write_text(definition_text(definition, f"Compressed by {c.recipe.name}."), encoding="utf-8")
    points = points_of(c.read("compare", COMPARED), found)
    pairs = [pair for group in points.values() for pair in group]
    result = {
        "recipe": c.recipe.name,
        "checkpoint": str(checkpoint),
        "parameters": child["parameters"],
        "picks": child["picks"],
        "text": HALVES,
        "validation": {"parent": healed["parent"], "pruned": child[REPORTED], "child": healed["child"]},
        "recovered": healed["recovered"],
        "spearman": float(spearmanr(*zip(*pairs, strict=True)).statistic),
        "children": len(pairs),
        "latency": child["latency"],
    }
    write_json(folder / RESULT, result)
    _write(c, folder / REPORT, definition.parameters, result, points)
    return f"{checkpoint}; {folder / REPORT}; sums of scores and true ones: Spearman {result['spearman']:.3f}"


def points_of(compared: dict[str, Any], found: dict[str, Any]) -> dict[str, list[tuple[float, float]]]:
    """Return (sum of scores, true score) of the children by how they were chosen."""
    titles = {"integer program": "solutions", "greedy": "greedy", "random": "random"}
    rows = {**found, "greedy": [found["greedy"]]}
    return {
        title: [(row["score"], lost) for row, lost in zip(rows[key], compared["lost"][key], strict=True)]
        for title, key in titles.items()
    }


def _write(c: Context, out: Path, parameters: int, result: dict[str, Any], points: dict[str, Any]) -> None:
    child, healed, found = c.read("child", CHILD), c.read("heal", RESULTS), c.read("search", SOLUTIONS)
    parent_change, scores = read_scores(c)
    measured = [
        {name: change.measured(found["measure"], parent_change) for name, change in row.items()} for row in scores
    ]
    best = c.read("compare", COMPARED)["chosen"]["solution"]
    foretold = [_row(found["measure"], *points["integer program"][best])]
    if seconds := result["latency"]:
        foretold.append(_row("seconds of a batch", seconds["foretold"], seconds["child"]))
        faster = found["parent"][LATENCY] / seconds["foretold"]
        foretold.append(_row("times as fast as the parent", faster, seconds["parent"] / seconds["child"]))
    rows = [("parent", healed["parent"]), ("child as it was put together", child[REPORTED]), ("child", healed["child"])]
    validation = result["validation"]
    page = render(
        PAGE,
        name=c.recipe.name,
        parent=c.definition,
        recovery=sentence(*(validation[key]["loss"] for key in ("parent", "pruned", "child"))),
        top=[
            ("parent", f"{c.definition.parameters:,}", "parameters"),
            ("child", f"{parameters:,}", f"{parameters / c.definition.parameters:.1%} of them"),
            ("Spearman", f"{result['spearman']:.3f}", f"sums and true scores of {result['children']} children"),
        ],
        checkpoint=result["checkpoint"],
        measure=found["measure"],
        layers=[
            (layer, block.name, _variant(pick), f"{measured[layer][pick]:.4f}", _parameters(c, layer, pick))
            for layer, (block, pick) in enumerate(zip(c.definition.blocks, child["picks"], strict=True))
        ],
        rows=[(title, *_cells(score)) for title, score in rows],
        tokens=healed["parent"]["tokens"],
        text=result["text"],
        foretold=foretold,
        pictures=list(_pictures(c, measured, child["picks"], found, points, healed)),
        stages=finished_stages(c.folder),
    )
    out.write_text(page, encoding="utf-8")


def _row(title: str, foretold: float, measured: float) -> tuple[str, ...]:
    return title, f"{foretold:.4g}", f"{measured:.4g}", f"{measured / foretold:.3f}" if foretold else ""


def _variant(pick: str) -> Any:
    return "as it is" if pick == PARENT else Markup("<b>{}</b>").format(pick.replace(",", ", "))


def _parameters(c: Context, layer: int, pick: str) -> str:
    block = c.variants[layer][pick].block
    return f"{block.parameters:,}" if block else "0"


def _cells(score: dict[str, Any]) -> list[str]:
    return [f"{score[key]:.4f}" if key in score else "" for key in ("accuracy", "agreement", "loss")]


def _pictures(
    c: Context, scores: list[dict[str, float]], picks: list[str], found: dict[str, Any], points: Any, healed: Any
) -> Iterator[tuple[str, str, Any]]:
    names = list(dict.fromkeys(name for row in scores for name in row))
    yield (
        "Variants",
        f"What the parent loses ({found['measure']}) with one layer replaced and no other; framed: the child's.",
        for_both(partial(figures.variants, names, scores, picks), "scores of variants by layer"),
    )
    yield (
        "Sums and true scores",
        "Children as they are put together, before any healing, on the text that the variants were scored on.",
        for_both(partial(figures.foretold, points, found["measure"]), "true scores over sums"),
    )
    if len(found["front"]) > 1:
        limit = found["limits"][0]
        yield (
            "Front",
            f"The smallest sum of scores for each limit of {limit['resource']}; other limits are the recipe's.",
            for_both(partial(figures.front, found["front"], limit["resource"], limit["most"]), "scores over the limit"),
        )
    entries = c.read("library", LIBRARY)
    if entries:
        yield (
            "Training of the variants",
            "Squared distance to what the parent's layer adds, of its square, on held-out text; a layer that is left "
            "out has 1.",
            for_both(partial(figures.trained, entries), "errors before and after training"),
        )
    curve = recovery_curve(Path(healed["child"]["checkpoint"]).parents[1], c.recipe)
    if curve:
        yield (
            "Healing",
            "What the distillation minimises, on its validation batches.",
            for_both(partial(recovery, *zip(*curve, strict=True)), "recovery"),
        )
