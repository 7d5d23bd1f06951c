"""Run the command of `minipuzzle.evaluate` on a checkpoint and read the scores that it prints. Imports no torch."""

from __future__ import annotations

import json
import shlex
import subprocess
from pathlib import Path

from nemotron_h.core.errors import UserError


def task_scores(evaluate: str, checkpoint: Path, origin: str) -> dict[str, float]:
    """Return task scores of a checkpoint, and their `mean`.

    Args:
        evaluate: the command, with `{checkpoint}` for the folder.
        checkpoint: its folder.
        origin: the recipe to name in an error.
    Errors:
        UserError: the command fails, or its last line is no JSON object of numbers.
    """
    command = [word.replace("{checkpoint}", str(checkpoint)) for word in shlex.split(evaluate)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    try:
        if done.returncode:
            raise ValueError(f"exit code {done.returncode}")
        scores = json.loads(lines[-1]) if lines else None
        if not isinstance(scores, dict) or not scores:
            raise ValueError("no scores")
        tasks = {str(name): float(value) for name, value in scores.items()}
    except (ValueError, TypeError) as error:
        said = (done.stderr.strip().splitlines() or lines or ["it printed nothing"])[-1]
        raise UserError(
            f"{origin}: minipuzzle.evaluate: {shlex.join(command)}: {error}: {said}",
            hint="it has to print a JSON object of task scores in its last line",
        ) from error
    return {**tasks, "mean": sum(tasks.values()) / len(tasks)}
