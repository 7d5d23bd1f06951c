"""Do something for every layer of a parent, several layers at a time: a process on each device of the recipe."""

from __future__ import annotations

import functools
import multiprocessing
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import as_completed
from typing import Any

import torch
from rich.console import Console

from nemotron_h.compression.pipeline.compression import Compression
from nemotron_h.core.worker_pool import worker_pool
from nemotron_h.launch.place import Place
from nemotron_h.platform import quiet
from nemotron_h.schema.recipe import RecipeConfig

#: work on a layer; what it returns goes through a pipe
Work = Callable[[Any, int], Any]

_context: Compression | None = None


def over_layers(c: Compression, work: Work, layers: Sequence[int]) -> Iterator[tuple[int, Any]]:
    """Yield (layer, what `work` returns), as each is done.

    Args:
        c: of each process another of its class.
        work: a function of a module, with arguments that can be pickled.
        layers: those that cost most first.
    """
    workers = min(c.recipe.parallel.devices, len(layers))
    if workers <= 1:
        for layer in layers:
            yield layer, work(c, layer)
        return
    c.parent.release()  # each process has one of its own
    threads = max(1, torch.get_num_threads() // workers)
    taken = "variants and layers that are done are kept"
    arguments = (type(c), c.recipe, c.origin, c.place, threads)
    with worker_pool(workers, _begin, arguments, taken, "parallel.devices") as pool:
        jobs = {pool.submit(_run, work, layer): layer for layer in layers}
        for job in as_completed(jobs):
            yield jobs[job], job.result()


def _begin(make: type[Compression], recipe: RecipeConfig, origin: str, place: Place, threads: int) -> None:
    global _context
    if not quiet.verbose():
        warnings.filterwarnings("ignore")
    torch.set_num_threads(threads)
    if torch.cuda.is_available():
        number = int(multiprocessing.current_process().name.rpartition("-")[2])  # those of a pool follow each other
        torch.cuda.set_device(number % torch.cuda.device_count())
    _context = make(recipe, Console(quiet=True), origin=origin, place=place)


def _run(work: Work, layer: int) -> Any:
    return work(_context, layer)


def bound(work: Callable[..., Any], *arguments: Any) -> Work:
    """Return work with further arguments, which can be pickled."""
    return functools.partial(_with, work, arguments)


def _with(work: Callable[..., Any], arguments: tuple[Any, ...], c: Compression, layer: int) -> Any:
    return work(c, layer, *arguments)
