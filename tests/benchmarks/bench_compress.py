"""A compression against its controls: what does the child owe to the parent, and what to its importance?

    python tests/benchmarks/bench_compress.py PARENT --jobs 8 --out runs/bench_compress

PARENT is a run or checkpoint of `nemotron_h_tiny` (nemo llm pretrain --factory nemotron_h_tiny --yes; the longer it was
trained, the more pruning hurts), and the data of blend `sample_small` is prepared (`$NEMOTRON_H_DATA`, or ./data; the
folders sample_small/*/ and manifest.json are all that is read). No network is needed. To carry PARENT elsewhere without
its optimizer: nemotron-h export hf PARENT a --dtype bf16; nemotron-h import hf a parent (23 MB).

Time of the tiny recipe: ten runs of 819,200 tokens, at 2,000 tokens/s on one thread of an old core 7 minutes each, and
before them about 6 minutes for the choice of the winner.

Jobs, each a run of its own with `--threads` threads, `--jobs` at a time, for each of `--seeds` seeds of the data's
order (and of the initial weights, where there are any):

    child     the winner of the pipeline, distilled from the parent
    random    a child of the same counts and widths, its layers and channels drawn by the seed, distilled as the child
    scratch   the child's architecture from new weights, pretrained on the same tokens

The pipeline chooses the winner first. Killed or run again, everything goes
on where it was: with `--until SECONDS` it ends itself in time for a machine that ends commands, with exit code 75.
Writes results.json and prints a table: loss per seed, mean and spread, and the share of the gap that pruning opened
which was recovered: (loss_pruned - loss) / (loss_pruned - loss_parent). All losses are of held-out text that no choice
has seen.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from nemotron_h.launch import runs as launch
from nemotron_h.launch.several import train_several
from nemotron_h.recipe.compose import compose

TARGET = 0.88  # ours: what the distillation should recover


def main() -> int:
    """Run the pipeline and what is missing of the controls; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parent", type=Path)
    parser.add_argument("--recipe", default="nemotron_h_tiny/minipuzzle")
    parser.add_argument("--out", type=Path, default=Path("runs/bench_compress"))
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--threads", type=int, default=1, help="of each run")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--until", type=float, default=float("inf"), help="seconds; runs then write a checkpoint")
    parser.add_argument("overrides", nargs="*", help="values of the recipe: tokens=1M")
    options = parser.parse_intermixed_args()
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    end = time.monotonic() + options.until
    overrides = [f"minipuzzle.parent={options.parent.resolve()}", f"log.dir={options.out.resolve()}"]
    recipe = compose(options.recipe, [*overrides, *options.overrides])
    import torch

    torch.set_num_threads(options.threads * options.jobs)
    from nemotron_h.compression.minipuzzle import MiniPuzzle
    from nemotron_h.launch.runs import steps_of

    console = Console(highlight=False, soft_wrap=True)
    made = MiniPuzzle(recipe, console)
    for stage in ("importance", "candidates", "score", "short-distil", "select"):
        if time.monotonic() > end:
            return launch.LEFT_EARLY
        made.pipeline.run(stage)
    runs = jobs(made, options.seeds)
    if not train_several([(run, steps_of(run)) for run in runs.values()], options.jobs, console, end):
        console.print("left early; run the same command again to continue")
        return launch.LEFT_EARLY
    report(made, runs, options.out / "results.json", console)
    return 0


def jobs(made, seeds: int) -> dict[tuple[str, int], launch.Run]:
    """The runs, by kind and seed; pruned checkpoints are written."""
    from nemotron_h.compression import distillations
    from nemotron_h.compression.candidates import candidate_of
    from nemotron_h.compression.child import child_definition
    from nemotron_h.compression.pipeline.select import WINNER
    from nemotron_h.compression.selection import child_of
    from nemotron_h.compression.slicing import write_child

    winner = made.read("select", WINNER)
    candidate = candidate_of(winner["candidate"])
    scores, folder, found = made.importance.scores(), made.folder / "controls", {}
    folder.mkdir(parents=True, exist_ok=True)
    for seed in range(seeds):
        drawn = child_of(made.definition, scores.shuffle(seed), candidate)
        start = folder / f"pruned-random-{seed}"
        if not (start / "integrity.json").exists():
            write_child(made.parent.checkpoint, drawn, start, f"random-{seed}")
        given = dataclasses.replace(made.recipe, data=dataclasses.replace(made.recipe.data, seed=1000 + seed))
        given.init_seed = 1000 + seed
        students = {
            "child": (made.definition_of(candidate), Path(winner["pruned"]["checkpoint"])),
            "random": (child_definition(made.definition, drawn, f"random-{seed}"), start),
        }
        for kind, (definition, checkpoint) in students.items():
            name = f"{kind}-{seed}"
            found[kind, seed] = distillations.run_of(
                given, name, definition, checkpoint, made.parent.checkpoint, given.tokens, folder
            )
        scratch = distillations.run_of(
            given, f"scratch-{seed}", made.definition_of(candidate), start, made.parent.checkpoint, given.tokens, folder
        )
        scratch.recipe.stage, scratch.recipe.init.checkpoint, scratch.recipe.distill = "pretrain", None, None
        scratch.recipe.sources = {}  # they speak of a distillation
        # as the tiny model is pretrained: a higher peak than a distillation's
        scratch.recipe.optim.peak_lr, scratch.recipe.optim.final_lr = 3e-3, 3e-5
        found["scratch", seed] = scratch
    return found


def report(made, runs: dict, out: Path, console: Console) -> None:
    """Measure every run on the held-out text that no choice has seen, and print."""
    from nemotron_h.compression.pipeline.select import WINNER
    from nemotron_h.compression.pipeline.text import HALVES, REPORTED

    winner, parent = made.read("select", WINNER), made.parent.own_score(REPORTED).loss
    pruned = winner["pruned"]["loss"]
    losses: dict[str, dict[int, float]] = {}
    for (kind, seed), run in runs.items():
        losses.setdefault(kind, {})[seed] = made.measure(run.folder)["loss"]
    random = {
        seed: made.measure(made.folder / "controls" / f"pruned-random-{seed}")["loss"] for seed in losses["random"]
    }
    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("model", "loss", "spread", "of the gap recovered"):
        table.add_column(heading, justify="left" if heading == "model" else "right")
    table.add_row("parent", f"{parent:.4f}", "", "")
    table.add_row("pruned", f"{pruned:.4f}", "", "")
    row = statistics.mean(random.values())
    table.add_row("pruned at random", f"{row:.4f}", f"{max(random.values()) - min(random.values()):.4f}", "")
    found = {
        "text": HALVES[REPORTED],
        "parent": parent,
        "pruned": pruned,
        "pruned at random": random,
        "losses": losses,
        "recovered": {},
    }
    for kind, values in losses.items():
        share = {seed: (pruned - loss) / (pruned - parent) for seed, loss in values.items()}
        found["recovered"][kind] = share
        mean, spread = statistics.mean(values.values()), max(values.values()) - min(values.values())
        table.add_row(kind, f"{mean:.4f}", f"{spread:.4f}", f"{statistics.mean(share.values()):.1%}")
    found["parameters"] = {"parent": made.definition.parameters, "winner": winner["name"]}
    out.write_text(json.dumps(found, indent=1))
    console.print(table)
    least = min(found["recovered"]["child"].values())
    console.print(f"least recovery of a child {least:.1%}, target {TARGET:.0%}; written: {out}")


if __name__ == "__main__":
    sys.exit(main())
