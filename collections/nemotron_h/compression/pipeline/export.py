"""Stage `export`: the child as a Hugging Face folder and a model definition, and the report.

    nemotron-h minipuzzle RECIPE --stage export

Reads all stages. Writes hf/, model.yaml, report.html, result.json; `orders.json` holds the curves of the report.
"""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

from nemotron_h.checkpoint.definition import definition_text, read_definition
from nemotron_h.checkpoint.reader import read_record
from nemotron_h.compression import report
from nemotron_h.compression.child import Child
from nemotron_h.compression.pipeline.context import Context
from nemotron_h.compression.pipeline.distil import RESULTS
from nemotron_h.compression.pipeline.select import WINNER
from nemotron_h.compression.pipeline.text import HALVES, REPORTED
from nemotron_h.compression.scoring import predict
from nemotron_h.compression.slicing import slice_model
from nemotron_h.core.files import write_json
from nemotron_h.core.progress import StageProgress
from nemotron_h.export import hf_writer
from nemotron_h.inference.trained_tokenizer import tokenizer_for
from nemotron_h.launch.stages import Stage

RESULT, DEFINITION, REPORT, HF = "result.json", "model.yaml", "report.html", "hf"
#: ours: validation windows that the orders of the report are compared on
ORDER_WINDOWS = 8
#: ours: the largest weight file, the command's default
SHARD = 5 * 10**9


def stage(c: Context) -> Stage:
    """Return the stage."""
    needs = ("importance", "candidates", "score", "short-distil", "select", "distil")
    return Stage(
        "export", "Hugging Face folder, model definition, report", needs, (RESULT, DEFINITION), dict, partial(run, c)
    )


def run(c: Context, folder: Path) -> str:
    """Write the child in its forms, and what came out."""
    winner, distilled = c.read("select", WINNER), c.read("distil", RESULTS)
    checkpoint = Path(distilled["child"]["checkpoint"])
    record = read_record(checkpoint)
    definition = read_definition(record, f"checkpoint {checkpoint}").counted()
    tokenizer = tokenizer_for(record, checkpoint, None, definition.vocab_size)
    plan = hf_writer.plan(checkpoint, tokenizer, None, SHARD)
    shutil.rmtree(folder / HF, ignore_errors=True)  # an attempt that was interrupted
    hf_writer.write(plan, folder / HF, tokenizer)
    (folder / DEFINITION).write_text(definition_text(definition, f"Compressed by {c.recipe.name}."), encoding="utf-8")
    models = {"pruned": winner["pruned"], "short": winner["short"], "child": distilled["child"]}
    result = {
        "recipe": c.recipe.name,
        "child": {"name": winner["name"], "checkpoint": str(checkpoint), "pattern": definition.pattern},
        "parameters": {"parent": c.definition.parameters, "child": definition.parameters},
        "text": HALVES,
        "validation": {
            "parent": distilled["parent"],
            **{word: {key: model[key] for key in distilled["parent"]} for word, model in models.items()},
        },
        "recovered": distilled["recovered"],
        "orders": orders(c, folder / "orders.json"),
        "order_tokens": c.text.held_out[REPORTED][:ORDER_WINDOWS, 1:].size,
    }
    write_json(folder / RESULT, result)
    report.write(c.folder, c.recipe, c.definition, result, folder / REPORT)
    return f"{checkpoint}; {folder / HF}; {folder / REPORT}"


def orders(c: Context, path: Path) -> dict[str, list[float]]:
    """Return loss without 0, 1, 2, ... layers, half of them at most: dropped in the order of importance, in random
    orders (the mean of three) and in the reversed one. Kept in `path`.
    """
    if path.exists():
        return json.loads(path.read_text())
    importance, depth = c.importance.scores(), c.definition.num_layers // 2
    text = c.text.held_out[REPORTED][:ORDER_WINDOWS]
    controls = {
        "importance": [importance],
        "random": [importance.shuffle(n) for n in range(3)],
        "reversed": [importance.reverse()],
    }
    losses: dict[str, list[float]] = {}
    with StageProgress(c.console, "orders", 5 * (depth + 1)) as bar:
        for name, scores in controls.items():
            curves = []
            for each in scores:
                order = each.layers.argsort(kind="stable")
                curve = []
                for count in range(depth + 1):
                    child = Child.whole(c.definition, tuple(sorted(int(n) for n in order[count:])))
                    curve.append(predict(slice_model(c.parent.model, child), text, len(text)).loss)
                    bar.advance()
                curves.append(curve)
            losses[name] = [sum(values) / len(values) for values in zip(*curves, strict=True)]
    write_json(path, losses)
    return losses
