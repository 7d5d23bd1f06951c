"""Training step of nemotron_h_tiny: tokens/s and peak memory, ours against Hugging Face transformers.

Both sides train the same model (checked: equal losses with the same weights) on the same tokens with the same number
of threads, one process each. The processes take steps in turn, so a machine whose speed drifts slows both; ratios are
of medians. Writes everything measured to `.bench/train.json`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import subprocess
import sys
import time
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
PRECISIONS = ("fp32", "bf16")
LENGTHS = (512, 2048)
#: ours: the same tokens in a step at every length, the tiny recipe's 16 x 512
TOKENS = 8192
#: ours: what this project promises at length 2048
TARGET_LENGTH, TARGET_FP32, TARGET_BEST = 2048, 1.3, 1.5

console = Console()


class BenchError(RuntimeError):
    """A measurement that could not be made; its text says why."""


class Side:
    """One implementation in one precision, as a process that takes a step when told."""

    def __init__(self, name: str, command: list[str], threads: int) -> None:
        self.name = name
        self.errors = WORK / f"{name.replace(' ', '_')}.log"
        with self.errors.open("w") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=environment(threads)
            )
        self.steps: list[dict[str, float]] = []
        self.facts: dict[str, float] = {}

    def answer(self) -> dict[str, float]:
        """The process's next answer."""
        line = self.process.stdout.readline()
        if not line:
            raise BenchError(f"{self.name} ended: {self.errors.read_text()[-1500:]}")
        return json.loads(line)

    def step(self) -> dict[str, float]:
        """One training step."""
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        return self.answer()

    def close(self) -> None:
        """End the process."""
        self.process.stdin.close()
        self.process.wait(timeout=60)


def environment(threads: int) -> dict[str, str]:
    """What both sides run under: the same number of threads, no network."""
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    return {**os.environ, **offline, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}


def once(command: list[str], threads: int) -> dict:
    """The one JSON object that a command prints."""
    done = subprocess.run(command, capture_output=True, text=True, env=environment(threads))
    if done.returncode:
        raise BenchError(f"{' '.join(command[:2])} failed: {done.stderr[-1500:]}")
    return json.loads(done.stdout)


def sides_of(length: int, args: argparse.Namespace, definition: str, hf_python: Path) -> list[Side]:
    """Start every implementation and precision at one sequence length."""
    shape = ["--length", str(length), "--batch", str(TOKENS // length)]
    ours = [sys.executable, str(HERE / "train_step.py"), "--recipe", RECIPE, *shape]
    theirs = [str(hf_python), str(HERE / "train_step_hf.py"), "--definition", definition, *shape]
    theirs += ["--chunk", str(args.hf_chunk)]
    sides = []
    for precision in PRECISIONS:
        sides.append(Side(f"ours {precision}", [*ours, "--precision", precision], args.threads))
        sides.append(Side(f"hf {precision}", [*theirs, "--precision", precision], args.threads))
    if args.bf16_weights:
        sides.append(Side("hf bf16-weights", [*theirs, "--precision", "bf16-weights"], args.threads))
    return sides


def measure(length: int, args: argparse.Namespace, definition: str, hf_python: Path, progress: Progress) -> dict:
    """Steps of all sides in turn at one length; medians by side."""
    sides = sides_of(length, args, definition, hf_python)
    task = progress.add_task(f"length {length:4}: starting", total=(args.warmup + args.turns) * len(sides))
    try:
        for side in sides:
            side.facts = side.answer()
        for turn in range(args.warmup + args.turns):
            for side in sides:
                progress.update(task, description=f"length {length:4}: {side.name}")
                step = side.step()
                if turn >= args.warmup:
                    side.steps.append(step)
                progress.advance(task)
    finally:
        for side in sides:
            side.close()
    parameters = {side.facts["parameters"] for side in sides}
    if len(parameters) != 1:
        raise BenchError(f"the two models have different numbers of parameters: {sorted(parameters)}")
    return {
        side.name: {
            "tokens_per_second": TOKENS / median(s["seconds"] for s in side.steps),
            "seconds": [s["seconds"] for s in side.steps],
            "cpu_seconds": [s["cpu_seconds"] for s in side.steps],
            "peak_mib": side.steps[-1]["peak_mib"],
            "added_mib": side.steps[-1]["added_mib"],
            "parameters": side.facts["parameters"],
        }
        for side in sides
    }


def same_loss(definition: str, hf_python: Path, threads: int) -> dict[str, float]:
    """Losses of both sides with the same scale-1 weights and tokens, float32, over several chunks.

    Errors:
        BenchError: the means differ by more than 1e-4 or a token's losses by more than 1e-3: two different models.
    """
    weights = WORK / "check.safetensors"
    shape = ["--batch", "2", "--length", "300", "--weights", str(weights)]
    ours = once([sys.executable, str(HERE / "train_step.py"), "--recipe", RECIPE, *shape], threads)["loss"]
    theirs = once([str(hf_python), str(HERE / "train_step_hf.py"), "--definition", definition, *shape], threads)
    weights.unlink()
    if not abs(ours - theirs["loss"]) < 1e-4 or not theirs["largest_difference"] < 1e-3:
        raise BenchError(f"the two sides are different models: loss {ours:.6f} (ours), {theirs} (transformers)")
    return {"ours": ours, "hf": theirs["loss"], "largest_difference_of_a_token": theirs["largest_difference"]}


def limit_share(side: dict, gemm: dict, precision: str) -> float:
    """Share of a step that the products of the linear layers alone would take at this machine's measured speed."""
    return gemm[precision]["seconds"] / median(side["seconds"])


def table_of(length: int, results: dict, gemm: dict) -> Table:
    """One length as a table."""
    table = Table(title=f"Training step at {TOKENS // length} x {length} tokens")
    for column in ("", "tokens/s", "vs HF", "peak MiB", "without start", "vs HF", "of GEMM limit"):
        table.add_column(column, justify="right" if column else "left")
    for name, side in results.items():
        implementation, precision = name.split()
        against = results[f"hf {precision}"]
        ours = implementation == "ours"
        table.add_row(
            name,
            f"{side['tokens_per_second']:,.0f}",
            f"{side['tokens_per_second'] / against['tokens_per_second']:.2f}x" if ours else "",
            f"{side['peak_mib']:,.0f}",
            f"{side['added_mib']:,.0f}",
            f"{side['added_mib'] / against['added_mib']:.2f}x" if ours else "",
            f"{limit_share(side, gemm, precision.split('-')[0]):.0%}",
        )
    return table


def verdict_of(results: dict) -> tuple[bool, str]:
    """Whether the targets are met at their length, and the sentence that says so."""
    speed = {name: side["tokens_per_second"] for name, side in results.items()}
    memory = results["ours fp32"]["added_mib"] / results["hf fp32"]["added_mib"]
    fp32 = speed["ours fp32"] / speed["hf fp32"]
    best = max(speed[f"ours {p}"] for p in PRECISIONS) / max(speed[f"hf {p}"] for p in PRECISIONS)
    met = fp32 >= TARGET_FP32 and memory <= 1 and best >= TARGET_BEST
    sentence = (
        f"at {TARGET_LENGTH} tokens, float32 {fp32:.2f}x transformers' tokens/s (target {TARGET_FP32}) with "
        f"{memory:.2f}x the memory (target 1.00), best precision {best:.2f}x (target {TARGET_BEST})"
    )
    return met, sentence


def arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a smoke test: one turn, no verdict worth reading")
    parser.add_argument("--turns", type=int, default=5, help="timed steps of each side (default 5)")
    parser.add_argument("--warmup", type=int, default=1, help="untimed steps of each side (default 1)")
    parser.add_argument("--threads", type=int, default=2, help="threads of every process (default 2)")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="sequence lengths (default 512 2048)")
    parser.add_argument("--hf-chunk", type=int, default=128, help="transformers' chunk of the scan (its default: 128)")
    parser.add_argument("--bf16-weights", action="store_true", help="also time transformers with pure bf16 weights")
    parser.add_argument("--strict", action="store_true", help="exit with 1 when a target is missed")
    args = parser.parse_args()
    if args.quick:
        args.turns, args.warmup = 1, 1
    for length in args.lengths:
        if length < 1 or TOKENS % length:
            parser.error(f"--lengths {length} does not divide the {TOKENS} tokens of a step")
    return args


def main() -> int:
    """Measure, print, write; the exit code is 1 for a failure, or a missed target with `--strict`."""
    args = arguments()
    WORK.mkdir(exist_ok=True)
    started = time.time()
    definition = json.dumps(dataclasses.asdict(definition_of(compose(RECIPE), RECIPE)))
    results: dict[int, dict] = {}
    try:
        hf_python = environments.make(WORK / "hf", HF_REQUIREMENTS, console.print)
        losses = same_loss(definition, hf_python, args.threads)
        console.print(
            f"Same weights, same tokens: loss {losses['ours']:.6f} (ours), {losses['hf']:.6f} (transformers); "
            f"largest difference of a token {losses['largest_difference_of_a_token']:.1e}"
        )
        columns = (TextColumn("{task.description:28}"), BarColumn(), MofNCompleteColumn())
        with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as progress:
            gemm_command = [sys.executable, str(HERE / "gemm.py"), "--definition", definition, "--tokens", str(TOKENS)]
            limits = [once(gemm_command, args.threads)]
            for length in args.lengths:
                results[length] = measure(length, args, definition, hf_python, progress)
                limits.append(once(gemm_command, args.threads))
            # a limit is the best that was seen, whatever else ran on the machine meanwhile
            gemm = {p: min((limit[p] for limit in limits), key=lambda g: g["seconds"]) for p in PRECISIONS}
    except (BenchError, UserError) as error:
        console.print(f"[red]{error}", markup=True)
        return 1
    for length, sides in results.items():
        console.print(table_of(length, sides, gemm))
    for precision in PRECISIONS:
        speed = gemm[precision]["flops"] / gemm[precision]["seconds"] / 1e9
        console.print(
            f"GEMM limit, {precision}: the linear layers' {gemm[precision]['flops'] / 1e9:,.0f} GFLOP of a step run at "
            f"{speed:,.0f} GFLOP/s here ({gemm[precision]['seconds']:.2f} s)."
        )
    met, sentence = verdict_of(results[TARGET_LENGTH]) if TARGET_LENGTH in results else (True, "")
    if sentence:
        console.print(f"{'Targets met' if met else 'Targets MISSED'}: {sentence}.", style="green" if met else "red")
    record = {
        "losses": losses,
        "gemm": gemm,
        "results": results,
        "targets_met": met,
        "threads": args.threads,
        "load_average": os.getloadavg(),
        "hf_chunk": args.hf_chunk,
        "packages": environments.packages(HF_REQUIREMENTS),
        "processor": platform.processor() or platform.machine(),
        "seconds": time.time() - started,
    }
    (WORK / "train.json").write_text(json.dumps(record, indent=1))
    console.print(f"Written to {WORK / 'train.json'} ({record['seconds']:.0f} s).")
    return int(args.strict and not met)


if __name__ == "__main__":
    sys.exit(main())
