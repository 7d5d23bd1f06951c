"""Generation of nemotron_h_tiny on the CPU: tokens/s of prefill, of steps and in sum, against transformers' `generate`.

Both sides have the same random weights (checked: the same tokens, chosen greedily) and the same number of threads, one
process each, and take their turns one after the other, each after a short untimed one; ratios are of medians. CPU
seconds are given beside, as other jobs on the machine disturb them less. Writes everything measured to
`.bench/generation.json`. Takes about 2 minutes.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from nemotron_h.core.errors import UserError
from nemotron_h.platform import environments
from nemotron_h.recipe.checks import definition_of
from nemotron_h.recipe.compose import compose

HERE = Path(__file__).resolve().parent
WORK = HERE.parents[1] / ".bench"
#: transformers with this model and NeMo cannot share an environment
HF_REQUIREMENTS = HERE / "requirements_hf.txt"
RECIPE = "nemotron_h_tiny/pretrain"
#: ours: what this project aims at, of all tokens' time together
TARGET = 3.0
#: ours: steps of the untimed continuation before a timed one
WARM_TOKENS = 32

console = Console()


class BenchError(RuntimeError):
    """A measurement that could not be made; its text says why."""


class Side:
    """One implementation as a process that continues prompts when told."""

    def __init__(self, name: str, command: list[str], threads: int) -> None:
        self.name, self.errors = name, WORK / f"generation_{name}.log"
        offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
        environment = {**os.environ, **offline, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        with self.errors.open("w") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=environment
            )
        self._answer()

    def _answer(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            raise BenchError(f"{self.name} ended: {self.errors.read_text()[-1500:]}")
        return json.loads(line)

    def run(self, **order: int) -> dict:
        """One batch of prompts and their continuations."""
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """End the process."""
        self.process.stdin.close()
        self.process.wait(timeout=60)


def summary(runs: list[dict], batch: int, args: argparse.Namespace) -> dict[str, float]:
    """Tokens/s from medians."""

    def middle(kind: str, *phases: str) -> float:
        return median(sum(run[f"{phase}_{kind}"] for phase in phases) for run in runs)

    return {
        "prefill": batch * args.prompt / middle("seconds", "prefill"),
        "decode": batch * (args.output - 1) / middle("seconds", "decode"),
        "sum": batch * args.output / middle("seconds", "prefill", "decode"),
        "prefill_cpu": middle("cpu_seconds", "prefill"),
        "decode_cpu": middle("cpu_seconds", "decode"),
        "sum_cpu": middle("cpu_seconds", "prefill", "decode"),
        "peak_mib": runs[-1]["peak_mib"],
    }


def arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a smoke test: one turn, no verdict worth reading")
    parser.add_argument("--turns", type=int, default=5, help="timed turns of each side (default 5)")
    parser.add_argument("--threads", type=int, default=2, help="threads of every process (default 2)")
    parser.add_argument("--prompt", type=int, default=2048, help="tokens of a prompt (default 2048)")
    parser.add_argument("--output", type=int, default=128, help="tokens of a continuation (default 128)")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8], help="prompts at a time (default 1 8)")
    parser.add_argument("--strict", action="store_true", help="exit with 1 when the target is missed")
    args = parser.parse_args()
    if args.quick:
        args.turns = 1
    if args.output < 2 or args.turns < 1:
        parser.error("--output has to be 2 or more, --turns 1 or more")
    return args


def in_progress(turns: list[tuple[int, int, Side]]) -> Iterator[tuple[int, int, Side]]:
    """The turns, with a bar that says what runs and about how long the rest takes."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("left"), TimeRemainingColumn(), console=console) as progress:
        task = progress.add_task("", total=sum(batch for batch, _, _ in turns))  # prompts: a turn's time goes with them
        for batch, turn, side in turns:
            what = f"turn {turn}" if turn else "warm-up"
            progress.update(task, description=f"{side.name}, batch {batch}, {what}")
            yield batch, turn, side
            progress.advance(task, batch)


def measure(args: argparse.Namespace) -> dict[int, dict[str, list[dict]]]:
    """Runs by batch and side; the first turn of each warms up.

    Errors:
        BenchError: a process ended, or the sides chose different tokens: they are different models.
    """
    definition = json.dumps(dataclasses.asdict(definition_of(compose(RECIPE), RECIPE)))
    weights = WORK / "generation.safetensors"
    weights.unlink(missing_ok=True)
    files = ["--weights", str(weights)]
    sides: list[Side] = []
    tokens: list[list[int]] = []
    found: dict[int, dict[str, list[dict]]] = {batch: {"ours": [], "hf": []} for batch in args.batches}
    try:
        hf_python = environments.make(WORK / "hf", HF_REQUIREMENTS, console.print)
        ours = [sys.executable, str(HERE / "generation_step.py"), "--recipe", RECIPE, *files]
        sides.append(Side("ours", ours, args.threads))
        theirs = [str(hf_python), str(HERE / "generation_step_hf.py"), "--definition", definition, *files]
        sides.append(Side("hf", theirs, args.threads))
        turns = [(batch, turn, side) for batch in args.batches for turn in range(args.turns + 1) for side in sides]
        for batch, turn, side in in_progress(turns):
            # the other side's turn has left it idle, with cold caches: not what is compared
            side.run(batch=1, prompt=args.prompt, output=min(args.output, WARM_TOKENS))
            run = side.run(batch=batch, prompt=args.prompt, output=args.output)
            if turn == 0 and side.name == "hf" and run["tokens"] != tokens:
                raise BenchError(f"the two sides chose different tokens at batch {batch}: they are different models")
            tokens = run.pop("tokens")
            if turn:
                found[batch][side.name].append(run)
    finally:
        for side in sides:
            side.close()
        weights.unlink(missing_ok=True)
    return found


def main() -> int:
    """Measure, print, write; the exit code is 1 for a failure, or a missed target with `--strict`."""
    args = arguments()
    WORK.mkdir(exist_ok=True)
    started = time.time()
    try:
        runs = measure(args)
    except (BenchError, UserError) as error:
        console.print(f"[red]{error}", markup=True)
        return 1
    results, met = {}, True
    table = Table(title=f"Generation, float32, {args.prompt:,} tokens in, {args.output:,} out, {args.threads} threads")
    cpu = ("CPU s prefill", "decode", "in sum")
    for column in ("batch", "", "prefill tokens/s", "decode tokens/s", "in sum", *cpu, "peak MiB"):
        table.add_column(column, justify="right")
    for batch, sides in runs.items():
        numbers = {name: summary(found, batch, args) for name, found in sides.items()}
        ratios = {key: numbers["ours"][key] / numbers["hf"][key] for key in ("prefill", "decode", "sum")}
        for key in ("prefill_cpu", "decode_cpu", "sum_cpu"):
            ratios[key] = numbers["hf"][key] / numbers["ours"][key]
        results[batch] = {**numbers, "ratios": ratios}
        met = met and ratios["sum"] >= TARGET
        for name, n in numbers.items():
            cells = (f"{n['prefill']:,.0f}", f"{n['decode']:,.1f}", f"{n['sum']:,.1f}")
            spent = (f"{n[key]:.2f}" for key in ("prefill_cpu", "decode_cpu", "sum_cpu"))
            table.add_row(str(batch), name, *cells, *spent, f"{n['peak_mib']:,.0f}")
        table.add_row(str(batch), "ratio", *(f"{ratio:.2f}x" for ratio in ratios.values()), "")
    console.print(table)
    style = "green" if met else "red"
    console.print(f"Target of {TARGET:g}x in sum at every batch: {'met' if met else 'MISSED'}.", style=style)
    record = {
        "results": results,
        "runs": runs,
        "threads": args.threads,
        "load_average": os.getloadavg(),
        "packages": environments.packages(HF_REQUIREMENTS),
        "seconds": time.time() - started,
    }
    (WORK / "generation.json").write_text(json.dumps(record, indent=1))
    console.print(f"Written to {WORK / 'generation.json'} ({record['seconds']:.0f} s).")
    return int(args.strict and not met)


if __name__ == "__main__":
    sys.exit(main())
