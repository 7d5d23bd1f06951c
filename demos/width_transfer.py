"""Does Falcon-H1's rule of multipliers carry a learning rate over to another width? `python demos/width_transfer.py`.

Trains twins of `falcon_h1_tiny`, with the rule and without multipliers, at three widths and five learning rates, each a
run of the recipe; about half an hour on one core. Writes `docs/img/width_transfer.svg` and the table of
`docs/results/width.md`. What an earlier call has finished is not run again; a run that was stopped continues.
"""

from __future__ import annotations

import math
import os
import shutil
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
from rich.console import Console

from nemotron_h.core import plot
from nemotron_h.core.errors import UserError
from nemotron_h.core.files import read_json_object, write_json
from nemotron_h.core.progress import StageProgress
from nemotron_h.platform.ranks import report_mistakes
from nemotron_h.recipe.checks import definition_of
from nemotron_h.recipe.compose import compose

ROOT = Path(__file__).resolve().parents[1]
PAGE, PICTURE = ROOT / "docs/results/width.md", ROOT / "docs/img/width_transfer.svg"
BEGIN, END = "<!-- table: written by demos/width_transfer.py -->\n", "<!-- end of table -->\n"
BLEND, FOLDER = ROOT / "demos/width_transfer.yaml", Path("runs/width_transfer")
RECIPE = "falcon_h1_tiny"

WIDTHS = (64, 128, 256)
RATES = tuple(2.0**-power for power in range(10, 5, -1))  # 9.8e-4 to 1.6e-2
#: the rule's initial weights have the same deviation at all widths, or (scaled) the root of the width as their measure
VARIANTS = {"none": "no multipliers", "falcon_h1": "the rule", "falcon_h1_scaled": "the rule, scaled weights"}
BASE_WIDTH = 1280  # of the rule
STEPS, TOKENS = 200, 1024  # per step, 8 sequences of 128


def settings(variant: str, width: int, rate: float) -> list[str]:
    """Return what a run changes in the recipe; heads of one size, so that their number grows with the width."""
    widths = {
        "pattern": "PSPS",
        "vocab_size": 1024,
        "hidden_size": width,
        "ffn_hidden_size": 3 * width,
        "num_attention_heads": width // 16,
        "head_dim": 16,
        "mamba_num_heads": width // 16,
    }
    model = replace(definition_of(compose(f"{RECIPE}/pretrain"), RECIPE), **widths).counted()
    values = {
        **{f"model.{key}": value for key, value in widths.items()},
        **{f"model.expect.{key}": value for key, value in asdict(model.expect).items()},
        "model.multipliers.rule": variant.removesuffix("_scaled"),
        "model.init_std": 0.02 * (math.sqrt(width / BASE_WIDTH) if variant.endswith("_scaled") else 1),
        "precision": "fp32",
        "tokens": STEPS * TOKENS,
        "data.blend": BLEND,
        "data.seq_length": 128,
        "data.global_batch_size": 8,
        "data.micro_batch_size": 8,
        "optim.peak_lr": rate,
        "optim.final_lr": rate / 100,
        "optim.warmup_tokens": STEPS * TOKENS // 10,
        "optim.decay_tokens": STEPS * TOKENS // 2,
        "log.validate_every_steps": STEPS,
        "log.validation_batches": 16,
        "log.trackers": "[]",
        "checkpoint.every_steps": STEPS // 2,
    }
    return [f"{key}={value}" for key, value in values.items()]


def validation_loss(name: str, changes: list[str]) -> float:
    """Train a run in a fork of this process, which has imported NeMo, and return its last validation loss.

    Errors:
        UserError: it failed; names its log.
    """
    folder = FOLDER / name
    log = FOLDER / f"{name}.log"
    process = os.fork()
    if not process:
        with log.open("ab") as opened:
            os.dup2(opened.fileno(), 1)
            os.dup2(opened.fileno(), 2)
        arguments = ["--factory", RECIPE, "--yes", *changes, f"log.explicit_log_dir={folder}"]
        sys.argv = ["nemo", "llm", "pretrain", *arguments]
        from nemotron_h.launch.command import main

        main()
        os._exit(0)
    if os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]):
        raise UserError(f"run {name} failed", hint=f"see the end of {log}; the same command continues")
    loss = read_json_object(folder / "run.json")["metrics"]["val_loss"]
    shutil.rmtree(folder / "checkpoints")
    return float(loss)


def measure(console: Console) -> dict[str, float]:
    """Return the loss of each run by name, training those that are not there."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    file = FOLDER / "losses.json"
    losses: dict[str, float] = read_json_object(file) if file.is_file() else {}
    wanted = [(variant, width, rate) for variant in VARIANTS for rate in RATES for width in WIDTHS]
    left = [run for run in wanted if name_of(*run) not in losses]
    if left:
        if not (Path("data") / "width_transfer" / "manifest.json").is_file():
            raise UserError(
                "data/width_transfer is not there", hint=f"nemotron-h data prepare --blend {BLEND.relative_to(ROOT)}"
            )
        import nemotron_h.report.page
        import nemotron_h.training.stages.pretrain  # noqa: F401
    with StageProgress(console, "runs", len(left)) as bar:
        for run in left:
            name = name_of(*run)
            losses[name] = validation_loss(name, settings(*run))
            write_json(file, losses)
            bar.say(f"{name}: validation loss {losses[name]:.4f}")
            bar.advance()
    return losses


def name_of(variant: str, width: int, rate: float) -> str:
    """Return a run's name."""
    return f"{variant}-{width}-{rate:.3g}"


def optimum(losses: list[float]) -> float:
    """Return the learning rate where a parabola through the lowest loss and its neighbours, over the logarithm, is
    lowest; NaN where the lowest is at an end.
    """
    best = int(np.argmin(losses))
    if not 0 < best < len(losses) - 1:
        return float("nan")
    a, b, _ = np.polyfit(np.log2(RATES[best - 1 : best + 2]), losses[best - 1 : best + 2], 2)
    return float(2 ** (-b / (2 * a)))


def table(losses: dict[str, float]) -> str:
    """Return the losses as a table, and where they are lowest."""
    lines = [f"| | width | {' | '.join(f'{rate:.2g}' for rate in RATES)} | optimum |", "|" + "---|" * (len(RATES) + 3)]
    for variant, words in VARIANTS.items():
        for width in WIDTHS:
            row = [losses[name_of(variant, width, rate)] for rate in RATES]
            cells = [f"**{loss:.3f}**" if loss == min(row) else f"{loss:.3f}" for loss in row]
            lines.append(f"| {words} | {width} | {' | '.join(cells)} | {optimum(row):.1e} |")
    return "\n".join(lines) + "\n"


@plot.styled
def draw(losses: dict[str, float]) -> None:
    """Plot the losses over the learning rate, a panel for each variant and a curve for each width."""
    figure, panels = plot.canvas(720, 340, columns=len(VARIANTS), sharey=True, sharex=True)
    for axes, (variant, words) in zip(panels, VARIANTS.items(), strict=True):
        for width, colour in zip(WIDTHS, plot.SERIES, strict=False):
            row = [losses[name_of(variant, width, rate)] for rate in RATES]
            axes.plot(RATES, row, color=colour, marker="o", markersize=4, label=f"width {width}")
            axes.plot(RATES[int(np.argmin(row))], min(row), color=colour, marker="o", markersize=10, fillstyle="none")
        axes.set_xscale("log", base=2)
        axes.set_xticks(RATES[::2], [f"{rate:.1e}" for rate in RATES[::2]])
        axes.set(title=words, xlabel="learning rate")
    panels[0].set_ylabel("validation loss")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(WIDTHS))
    plot.save(
        figure, PICTURE, "Validation loss over the learning rate, with Falcon-H1's rule of multipliers and without"
    )


def main() -> None:
    """Train what is missing, then write figure and table."""
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    console = Console()
    losses = measure(console)
    draw(losses)
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n{table(losses)}\n{END}{rest.partition(END)[2]}", encoding="utf-8")
    console.print(f"{PICTURE}\n{PAGE}")


if __name__ == "__main__":
    report_mistakes()
    main()
