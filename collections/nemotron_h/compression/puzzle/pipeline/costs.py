"""Stage `costs`: parameters, memory and times of every variant in the scenario of the recipe (2411.19146, 4.1).

    nemotron-h puzzle RECIPE --stage costs

Depends on the widths of the parent and its variants alone, and with times on this machine. Writes costs.json; the times
are in times.yaml, which a command measures further where it was interrupted.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from nemotron_h.architecture.blocks.block import Block
from nemotron_h.architecture.variants import PARENT
from nemotron_h.compression.puzzle.context import Context
from nemotron_h.compression.puzzle.costs import measure_blocks, model_blocks, scaled_to, total
from nemotron_h.core.errors import UserError
from nemotron_h.core.files import write_json
from nemotron_h.core.progress import StageProgress
from nemotron_h.core.units import BYTES, GIB, count_of
from nemotron_h.inference.layer_costs import seconds
from nemotron_h.inference.model import GenerationModel
from nemotron_h.launch.stages import Stage
from nemotron_h.planning.gpus import gpu
from nemotron_h.planning.inference import Serving, layer_memory
from nemotron_h.planning.latency import Latency
from nemotron_h.recipe.stages.puzzle import OF_TIME
from nemotron_h.schema.layer_costs import ENDS, Scenario

COSTS, TABLE = "costs.json", "times.yaml"
#: resources of a layer
PARAMETERS, MEMORY, LATENCY = "parameters", "memory", "latency"
#: ours: times of a model over the sum of its layers' that noise does not explain; 0.9 to 1.5 on two idle cores
FAR_APART = 2.0


def stage(c: Context) -> Stage:
    """Return the stage."""
    return Stage("costs", "what every variant costs", (), (COSTS,), partial(inputs, c), partial(run, c))


def inputs(c: Context) -> dict[str, Any]:
    """Return what the result depends on; limits are the search's."""
    names = ("batch", "prompt", "output", "weights", "kv_cache", "states", "times", "gpu")
    keys = {f"puzzle.costs.{key}": getattr(c.part.costs, key) for key in names}
    return {**keys, "variants": [[str(v.block) for v in of_layer.values()] for of_layer in c.variants]}


def serving(c: Context) -> Serving:
    """Return the scenario's state and bytes per value."""
    costs = c.part.costs
    return Serving(
        costs.prompt + costs.output,
        costs.batch,
        weight_bytes=BYTES[costs.weights],
        kv_bytes=BYTES[costs.kv_cache],
        ssm_bytes=BYTES[costs.states],
    )


def check_sizes(c: Context) -> None:
    """Check limits that need no times, before anything is made.

    Errors:
        UserError: the child of the smallest variants is larger; names what it takes.
    """
    outside = _outside(c)
    for resource, most in size_limits(c).items():
        of_layers = (
            min(0 if v.block is None else _costs(c, v.block, {})[resource] for v in of_layer.values())
            for of_layer in c.variants
        )
        least = outside[resource] + sum(of_layers)
        if least > most:
            key = {PARAMETERS: "parameters", MEMORY: "memory_gib"}[resource]
            needed = f"{least:,.0f}" if resource == PARAMETERS else f"{least / GIB:.3f} GiB"
            raise UserError(
                f"{c.origin}: puzzle.costs.{key} = {getattr(c.part.costs, key)}: the smallest variants of all layers "
                f"make {needed} with embedding and output",
                hint="raise it, or add smaller variants to puzzle.library",
            )


def size_limits(c: Context) -> dict[str, float]:
    """Return resource -> the most of it, of the recipe's limits that need no times."""
    costs, most = c.part.costs, {}
    if costs.parameters is not None:
        most[PARAMETERS] = float(count_of(costs.parameters, "puzzle.costs.parameters", c.origin))
    if costs.memory_gib is not None:
        most[MEMORY] = costs.memory_gib * GIB
    return most


def _outside(c: Context) -> dict[str, float]:
    """Return what embedding, output matrix and final norm take."""
    parameters = c.definition.other_parameters
    return {PARAMETERS: parameters, MEMORY: parameters * serving(c).weight_bytes}


def scenario(c: Context) -> Scenario:
    """Return the sequences that times are of."""
    costs = c.part.costs
    return Scenario(costs.batch, costs.prompt, costs.output)


def _timed(c: Context, blocks: dict[str, Block], path: Path) -> tuple[dict[str, dict[str, float]], str]:
    """Return seconds by name of a block, and of what is outside of the layers, and what to say of them; nothing where
    no times are asked for.

    Errors:
        UserError: a limit needs times, and other work on the machine hides them.
    """
    asked = c.part.costs
    if asked.times == "none":
        return {}, ""
    said = f"; times {asked.times}: {scenario(c)}"
    if asked.times == "modelled":
        costs = model_blocks(blocks, c.definition, scenario(c), gpu(asked.gpu))
    else:
        c.parent.release()
        with StageProgress(c.console, "layers timed", len(blocks) + 1) as bar:
            costs = measure_blocks(blocks, c.definition, scenario(c), path, lambda _: bar.advance())
            layers = [str(of_layer[PARENT].block) for of_layer in c.variants]
            (whole,) = (Latency(*times) for times in seconds([c.parent.model], scenario(c)))
            bar.advance()
        sums = total([*(costs[name] for name in layers), costs[ENDS]])
        costs = scaled_to(costs, sums, whole)
        said += _agreement(c, *(_seconds(c, each.prefill, each.decode)[LATENCY] for each in (whole, sums)), path)
    return {name: _seconds(c, each.prefill, each.decode) for name, each in costs.items()}, said


def _agreement(c: Context, whole: float, layers: float, path: Path) -> str:
    """Return what the parent takes beside the sum of its layers, in seconds of a batch.

    Errors:
        UserError: they are far apart, and a limit needs times.
    """
    said = f"the parent takes {whole:.3g} s, {whole / layers:.2f} times what its layers took by themselves"
    if 1 / FAR_APART < whole / layers < FAR_APART:
        return f"; {said}"
    said += ": other work hid what layers cost"
    limits = [key for key in OF_TIME if getattr(c.part.costs, key) is not None]
    if limits:
        raise UserError(
            f"{c.origin}: puzzle.costs.{limits[0]} needs times, and {said}",
            hint=f"remove {path} and run it again when the machine has no other work",
        )
    return f"; {said}; remove {path} to measure again"


def _seconds(c: Context, prefill: float, decode: float) -> dict[str, float]:
    return {LATENCY: prefill + c.part.costs.output * decode, "prefill": prefill, "decode": decode}


def measured_latency(c: Context, models: list[GenerationModel]) -> list[float]:
    """Return seconds of a batch in the scenario, of each model."""
    return [_seconds(c, *times)[LATENCY] for times in seconds(models, scenario(c))]


def run(c: Context, folder: Path) -> str:
    """Count, and measure where the recipe asks for times."""
    blocks = {str(v.block): v.block for of_layer in c.variants for v in of_layer.values() if v.block is not None}
    times, said = _timed(c, blocks, folder / TABLE)
    own = {name: _costs(c, block, times.get(name, {})) for name, block in blocks.items()}
    nothing = dict.fromkeys(next(iter(own.values())), 0)
    layers = [
        {name: nothing if v.block is None else own[str(v.block)] for name, v in of_layer.items()}
        for of_layer in c.variants
    ]
    write_json(folder / COSTS, {"layers": layers, "ends": {**_outside(c), **times.get(ENDS, {})}})
    return f"{len(blocks)} different layers{said}"


def _costs(c: Context, block: Block, times: dict[str, float]) -> dict[str, float]:
    return {PARAMETERS: block.parameters, MEMORY: layer_memory(block, serving(c)).total, **times}
