"""Stage `generation`: tokens per second and bytes of states, of the parent and of each round's model.

    nemotron-h hybridise RECIPE --stage generation

It is of this machine, of the models' widths with random weights, as speed is that of any. Parent and
model take turns, the shortest of which count. Writes generation.json.
"""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from nemotron_h.architecture.definition import ModelDefinition
from nemotron_h.compression.hybridise.context import Context
from nemotron_h.compression.hybridise.pipeline.mixers import MIXERS
from nemotron_h.core.files import write_json
from nemotron_h.core.progress import StageProgress
from nemotron_h.inference.layer_costs import placement, random_model, seconds, this_machine
from nemotron_h.launch.stages import Stage
from nemotron_h.planning.inference import Serving, inference_memory
from nemotron_h.schema.layer_costs import Scenario

GENERATION = "generation.json"


def stage(c: Context) -> Stage:
    """Return the stage."""
    needs = tuple(each.mixers for each in c.rounds)
    title = "tokens per second and bytes of states against the parent"
    return Stage("generation", title, needs, (GENERATION,), partial(inputs, c), partial(run, c))


def inputs(c: Context) -> dict[str, Any]:
    """Return what the result depends on, beside the models."""
    return {f"hybridise.generation.{key}": value for key, value in asdict(c.part.generation).items()}


def run(c: Context, folder: Path) -> str:
    """Measure each round's model beside the parent."""
    c.release()
    rows = []
    with StageProgress(c.console, "models timed", len(c.rounds)) as bar:
        for each in c.rounds:
            parent, model = timed(c, [c.definition, c.model_of(each)])
            rows.append({"round": each.number, "parent": parent, "model": model})
            bar.advance()
    machine = this_machine("here")
    about = {key: getattr(machine, key) for key in ("processor", "threads", "dtype", "torch")}
    write_json(folder / GENERATION, {**asdict(c.part.generation), "machine": about, "rounds": rows})
    left, last = len(c.read(c.rounds[-1].mixers, MIXERS)["stay"]), rows[-1]
    faster = last["model"]["tokens_per_second"] / last["parent"]["tokens_per_second"]
    smaller = last["model"]["state_bytes"] / last["parent"]["state_bytes"]
    return f"with {left} attention layers {faster:.2f} times the parent's tokens/s, {smaller:.2f} of its states"


def timed(c: Context, definitions: list[ModelDefinition]) -> list[dict[str, float]]:
    """Return what models take in the scenario, in turns: generated tokens per second of a batch over prompt and answer,
    seconds of a prefill and of a step, and bytes of a sequence's states at its full length.
    """
    part, (device, dtype) = c.part.generation, placement()
    models = [random_model(definition, dtype, device) for definition in definitions]
    rows = []
    times = seconds(models, Scenario(part.batch, part.prompt, part.output))
    for definition, (prefill, step) in zip(definitions, times, strict=True):
        rows.append(
            {
                "tokens_per_second": part.batch * part.output / (prefill + part.output * step),
                "prefill": prefill,
                "step": step,
                "state_bytes": inference_memory(definition, Serving(part.prompt + part.output)).cache,
            }
        )
    return rows
