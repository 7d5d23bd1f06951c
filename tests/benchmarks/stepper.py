"""A training step that another process orders one at a time, so that two processes can be timed in turn.

Orders come on stdin, one a line (`step`, `quit`); answers go to stdout, one JSON object a line. The standard library
alone, as two virtual environments import it.
"""

from __future__ import annotations

import json
import os
import random
import resource
import sys
import time
from collections.abc import Callable

MIB = 1 << 20


def resident_mib() -> float:
    """Memory of this process now, MiB."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / MIB


def peak_mib() -> float:
    """Largest memory of this process so far, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


class Answers:
    """The process's stdout, kept for answers; what libraries print goes to stderr from here on."""

    def __init__(self) -> None:
        self.file = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def send(self, **values: object) -> None:
        """One answer."""
        print(json.dumps(values), file=self.file, flush=True)


def serve(answers: Answers, step: Callable[[], float], parameters: int, before_model_mib: float) -> None:
    """Take one step per order and report its seconds, CPU seconds, loss and the memory so far.

    Args:
        step: a whole training step; returns the loss.
        parameters: of the model, reported once.
        before_model_mib: memory before the model was built; peaks are reported with and without it.
    """
    answers.send(parameters=parameters, before_model_mib=before_model_mib)
    for order in sys.stdin:
        if order.strip() != "step":
            return
        cpu, wall = time.process_time(), time.perf_counter()
        loss = step()
        answers.send(
            seconds=time.perf_counter() - wall,
            cpu_seconds=time.process_time() - cpu,
            loss=loss,
            peak_mib=peak_mib(),
            added_mib=peak_mib() - before_model_mib,
        )


def serve_generation(answers: Answers, run: Callable[..., list[list[int]]], vocab_size: int) -> None:
    """Continue random prompts, one order (`{"batch": ..., "prompt": ..., "output": ...}`) after the other.

    Reports seconds and CPU seconds up to the first token (prefill) and from there to the last (decode).

    Args:
        run: prompts, number of tokens, and a function to call after each token of the batch -> tokens by row.
    """
    answers.send(ready=True)
    for order in sys.stdin:
        asked = json.loads(order)
        rng = random.Random(0)
        prompts = [[rng.randrange(vocab_size) for _ in range(asked["prompt"])] for _ in range(asked["batch"])]
        marks: list[tuple[float, float]] = []

        def mark(marks: list[tuple[float, float]] = marks) -> None:
            marks.append((time.perf_counter(), time.process_time()))

        mark()
        tokens = run(prompts, asked["output"], mark)
        (began, began_cpu), (first, first_cpu), (last, last_cpu) = marks[0], marks[1], marks[-1]
        answers.send(
            prefill_seconds=first - began,
            decode_seconds=last - first,
            prefill_cpu_seconds=first_cpu - began_cpu,
            decode_cpu_seconds=last_cpu - first_cpu,
            tokens=tokens,
            peak_mib=peak_mib(),
        )
