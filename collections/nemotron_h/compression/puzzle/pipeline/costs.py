"""Stage `costs`: parameters, memory and times of every variant in the scenario of the recipe (2411.19146, 4.1).

    nemotron-h puzzle RECIPE --stage costs

Depends on the widths of the parent and its variants alone, and with times on this machine. Writes costs.json; the times
are in times.yaml, which a command measures further where it was interrupted.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from nemotron_h.compression.puzzle.context import Context
from nemotron_h.compression.stages import Stage
from nemotron_h.core.units import BYTES
from nemotron_h.planning.inference import Serving

COSTS, TABLE = "costs.json", "times.yaml"
#: resources of a layer
PARAMETERS, MEMORY, LATENCY = "parameters", "memory", "latency"


def stage(c: Context) -> Stage:
    """Return the stage."""
    return Stage("costs", "what every variant costs", (), (COSTS,), partial(inputs, c), partial(run, c))


def inputs(c: Context) -> dict[str, Any]:
    """Return what the result depends on; limits are the search's."""
    scenario = ("batch", "prompt", "output", "weights", "kv_cache", "states", "times")
    keys = {f"puzzle.costs.{key}": getattr(c.part.costs, key) for key in scenario}
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
