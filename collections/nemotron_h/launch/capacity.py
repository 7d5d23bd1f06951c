"""Count the runs that this machine takes at a time, by ranks and memory, and share it among them."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from nemotron_h.architecture.rank import Layout
from nemotron_h.core.units import GIB
from nemotron_h.launch.place import Place
from nemotron_h.launch.several import threads
from nemotron_h.planning.layouts import layout_of
from nemotron_h.planning.memory import largest_stage
from nemotron_h.platform.memory import available
from nemotron_h.recipe.checks import definition_of
from nemotron_h.schema.recipe import RecipeConfig

#: ours: of a process that has imported NeMo and trains nothing yet; of a GPU, its context, kernels and NCCL's buffers
PROCESS_BYTES = 1.5 * GIB


class Capacity(NamedTuple):
    """Runs at a time, what limits them, and the environment of the run in a slot."""

    runs: int
    why: str
    env: Callable[[int], Mapping[str, str]]


def capacity(recipes: Sequence[RecipeConfig], most: int | None, place: Place) -> Capacity:
    """Return how many of the runs start at a time.

    Args:
        recipes: of the runs, at least one.
        most: at a time; None is no limit, but a GPU has one run then. More share the GPUs, as memory allows.
        place: jobs all wait in the queue of their cluster.
    """
    count = len(recipes)
    if place.submits:
        return Capacity(min(count, most or count), "jobs of the cluster", lambda slot: {})
    devices = max(recipe.parallel.devices for recipe in recipes)
    gpus = gpu_count()
    there = gpus or len(os.sched_getaffinity(0))
    apart = max(1, there // devices)
    limits = {"points": count, f"{there} {'GPUs' if gpus else 'cores'}": apart}
    if not gpus:
        need = max(memory(recipe) for recipe in recipes)
        limits[f"{available() / GIB:.1f} GiB free, {need / GIB:.1f} a run"] = max(1, int(available() // need))
    elif most is not None and most > apart:
        need, free = max(map(gpu_memory, recipes)), available("cuda")
        words = f"{there} GPUs, {free / GIB:.1f} GiB free on each, {need / GIB:.1f} a run"
        limits = {"points": count, words: apart * max(1, int(free // need))}
    if most is not None:
        limits["at_once"] = most
    why = min(limits, key=limits.__getitem__)
    runs = limits[why]
    if gpus:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(gpus)))
        names = visible.split(",")
        own = [",".join(names[slot * devices : (slot + 1) * devices]) for slot in range(apart)]
        return Capacity(runs, why, lambda slot: {"CUDA_VISIBLE_DEVICES": own[slot % apart]} if runs > 1 else {})
    return Capacity(runs, why, lambda slot: threads(runs * devices))


def memory(recipe: RecipeConfig) -> int:
    """Return the bytes that a run takes of this machine, all its ranks together, where they are on the CPU."""
    return recipe.parallel.devices * _of_rank(recipe, replace(layout_of(recipe), backend="cpu"))


def gpu_memory(recipe: RecipeConfig) -> int:
    """Return the bytes that a rank of a run takes of its GPU."""
    return _of_rank(recipe, layout_of(recipe))


def _of_rank(recipe: RecipeConfig, layout: Layout) -> int:
    return int(largest_stage(definition_of(recipe, recipe.name), layout).peak + PROCESS_BYTES)


def gpu_count() -> int:
    """Return the GPUs that are visible."""
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0
