"""How many numbers of a phonebook do small models look up, within and beyond the length that they were trained at?

`python demos/phonebook.py` trains a hybrid and Mamba-2 alone, of as many parameters, with three seeds on phonebooks of
up to 16 lines and on needles in noise, asks them for lines of books of up to 64, and writes `docs/img/phonebook.svg`
and the table of `docs/results/phonebook.md`. Each run is a process with one thread, two at a time (`--at-once`); what
is finished is kept in `--out`. A run of the hybrid takes about ten minutes on a core.

Axes: b rows, n lines of a book, q questions, s positions, v vocabulary.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemotron_h.core import plot
from nemotron_h.core.errors import UserError
from nemotron_h.core.files import write_between
from nemotron_h.platform.ranks import report_mistakes

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from nemotron_h.model.module import NemotronHConfig

ROOT = Path(__file__).resolve().parents[1]
PAGE, PICTURE = ROOT / "docs/results/phonebook.md", ROOT / "docs/img/phonebook.svg"
OPENING, CLOSING = "<!-- table: written by demos/phonebook.py -->\n", "<!-- end of table -->\n"

#: name -> pattern, width of the FFN; 0.21 M parameters outside of embedding and output, to 1 %
MODELS = {"hybrid": ("M-M*-", 352), "mamba2": ("MMMM", 0)}
WORDS = {"hybrid": "hybrid", "mamba2": "Mamba-2 alone"}
HIDDEN, HEADS, STATE = 64, 2, 16
PHONEBOOK, NEEDLE = TASKS = ("phonebook", "needle")
#: each name and each number is a token; then those before the book, before the questions, and of noise
NAMES, NUMBERS, OTHERS = 64, 32, 8
BEGIN, END, NOISE = 0, 1, (2, 3)
#: lines of the largest books in training, one size after the other; of books in tests
TRAINED, TESTED = (4, 6, 9, 12, 16), (4, 8, 16, 24, 32, 48, 64)
#: of lines in training: where all are asked for, a model need not look up but leaves out the numbers of before
ASKED = 0.5
QUESTIONS, NEEDLES = 32, 2  # of a row, at most
#: of a step; of a run
TOKENS, STEPS = 4096, 1200
#: answers of the largest books that are right when they grow; steps, of all, after which they grow anyway
RIGHT, PATIENCE = 0.75, 0.06
NEEDLE_SHARE, WARMUP = 0.2, 0.05  # of steps
TEST_ROWS, TEST_BATCH = 128, 32
#: of AdamW, which embedding, output and vectors have; of Muon, which the layers' matrices have
RATE, MUON_RATE, SEEDS = 4e-3, 8e-3, (1, 2, 3)


def rows(task: str, count: int, lines: int, rng: torch.Generator, asked: float = 1) -> tuple[Tensor, Tensor]:
    """Return rows of a task, int64 [b, s], and which tokens are answers, bool [b, s].

    A row is a book of lines `name number`, an end mark, and some of its lines again in another order: there each
    number is an answer. In a row of needles all lines of the book but `NEEDLES` are noise.

    Args:
        count: rows.
        lines: of the book.
        asked: share of the lines that are asked for, each once, up to `QUESTIONS`.
        rng: on the device of the rows.
    """
    import torch

    def order(several: int) -> Tensor:  # [b, several], each a permutation
        return torch.rand(count, several, generator=rng, device=rng.device).argsort(1)

    entries = lines if task == PHONEBOOK else min(NEEDLES, lines)
    names = OTHERS + order(NAMES)[:, :entries]
    numbers = OTHERS + NAMES + torch.randint(NUMBERS, (count, entries), generator=rng, device=rng.device)
    written = torch.stack([names, numbers], 2)  # [b, n, 2]
    book = torch.tensor(NOISE, device=rng.device).expand(count, lines, 2).clone()
    book.scatter_(1, order(lines)[:, :entries, None].expand(-1, -1, 2), written)
    chosen = order(entries)[:, : min(QUESTIONS, math.ceil(asked * entries))]
    questions = written.gather(1, chosen[:, :, None].expand(-1, -1, 2))  # [b, q, 2]
    answers = torch.zeros_like(questions, dtype=torch.bool)
    answers[:, :, 1] = True
    begin, end = (torch.full((count, 1), token, device=rng.device) for token in (BEGIN, END))
    tokens = torch.cat([begin, book.flatten(1), end, questions.flatten(1)], 1)
    before = torch.zeros(count, tokens.shape[1] - answers[0].numel(), dtype=torch.bool, device=rng.device)
    return tokens, torch.cat([before, answers.flatten(1)], 1)


def configuration(name: str) -> NemotronHConfig:
    """Return a model's numbers, float32, with plain attention: Transformer Engine's has no float32 kernel."""
    import torch
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

    from nemotron_h.model import layers
    from nemotron_h.model.core_attention import ScaledDotProductAttention
    from nemotron_h.model.module import NemotronHConfig

    def plain() -> layers.ModuleSpec:
        parts = layers.Parts(ColumnParallelLinear, RowParallelLinear, ScaledDotProductAttention, norm=layers.RMSNorm)
        return layers.ModuleSpec(module=layers.NemotronHStack, submodules=parts)

    pattern, ffn = MODELS[name]
    values: dict[str, Any] = {"num_attention_heads": HEADS, "num_query_groups": HEADS, "kv_channels": HIDDEN // HEADS}
    if name == "mamba2":
        values = {"num_attention_heads": 0, "num_query_groups": 0, "kv_channels": 0, "family": "mamba2"}
    if torch.cuda.is_available():
        values |= {"mamba_stack_spec": plain}
    return NemotronHConfig(
        **values,
        mamba_num_heads=8,
        mamba_head_dim=32,
        mamba_num_groups=1,
        mamba_state_dim=STATE,
        definition_name=name,
        hybrid_override_pattern=pattern,
        hidden_size=HIDDEN,
        ffn_hidden_size=ffn,
        vocab_size=OTHERS + NAMES + NUMBERS,
        seq_length=1024,
        init_method_std=0.1,  # about 1 / sqrt(HIDDEN): attention is not flat at first
        params_dtype=torch.float32,
        pipeline_dtype=torch.float32,
        bf16=False,
        fuse_weight_gradients=False,  # there is no gradient buffer without Megatron's DDP
        gradient_accumulation_fusion=False,
    )


def model(name: str, seed: int) -> torch.nn.Module:
    """Return a model with initial weights, on the GPU where there is one."""
    import torch
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    from nemotron_h.platform import cpu

    cpu.install()
    gpu = torch.cuda.is_available()
    if not torch.distributed.is_initialized():
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group("nccl" if gpu else "gloo", store=store, rank=0, world_size=1)
        parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(seed)
    torch.manual_seed(seed)
    config = configuration(name)
    config.init_seed = seed
    return config.configure_model(None).float().to("cuda" if gpu else "cpu").train()


def accuracies(net: torch.nn.Module, seed: int) -> dict[str, dict[int, float]]:
    """Return the share of numbers that are the likeliest token, by task and lines of the book."""
    import torch

    shares: dict[str, dict[int, float]] = {task: {} for task in TASKS}
    device = next(net.parameters()).device
    net.eval()
    with torch.no_grad():
        for task, lines in ((task, lines) for task in TASKS for lines in TESTED):
            rng, right = torch.Generator(device).manual_seed(1_000_000 + seed), []
            for _ in range(TEST_ROWS // TEST_BATCH):
                tokens, answers = rows(task, TEST_BATCH, lines, rng)
                likeliest = net(input_ids=tokens[:, :-1])[..., : OTHERS + NAMES + NUMBERS].argmax(-1)  # [b, s - 1]
                right.append((likeliest == tokens[:, 1:])[answers[:, 1:]].float().mean().item())
            shares[task][lines] = sum(right) / len(right)
    net.train()
    return shares


def train(name: str, seed: int, file: Path, steps: int) -> None:
    """Train a model, the loss on answers alone, and write what it finds after a quarter, a half and all steps.

    The largest books grow from the first to the last of `TRAINED`, each when it is known (`RIGHT`, `PATIENCE`): the
    gradient of a lookup among many lines is small until one among few is learnt. Half the steps have the largest, the
    others any size up to that.
    """
    from nemotron_h.platform import quiet

    quiet.hush()
    import torch

    net, chosen = model(name, seed), random.Random(seed)
    rng = torch.Generator(next(net.parameters()).device).manual_seed(seed)
    several = optimizers(net)
    since, seen, history = time.monotonic(), 0, []
    size, right, grown = 0, 0.0, [0]
    for step in range(steps):
        lines = TRAINED[size] if chosen.random() < 0.5 else chosen.randint(2, TRAINED[size])
        task = NEEDLE if chosen.random() < NEEDLE_SHARE else PHONEBOOK
        questions = math.ceil(ASKED * (lines if task == PHONEBOOK else NEEDLES))
        tokens, answers = rows(task, TOKENS // (2 + 2 * lines + 2 * questions), lines, rng, ASKED)
        asked, labels = answers[:, 1:], tokens[:, 1:]  # [b, s - 1]
        logits = net(input_ids=tokens[:, :-1])[asked]  # [answers, v]
        loss = torch.nn.functional.cross_entropy(logits, labels[asked])
        net.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        for optimizer in several:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * scale(step, steps)
            optimizer.step()
        seen += tokens.numel()
        if task == PHONEBOOK and lines == TRAINED[size]:
            right += 0.1 * ((logits.argmax(-1) == labels[asked]).float().mean().item() - right)
        if size + 1 < len(TRAINED) and (right > RIGHT or step - grown[-1] >= PATIENCE * steps):
            size, right = size + 1, 0.0
            grown.append(step)
        if step + 1 in (steps // 4, steps // 2, steps):
            history.append({"step": step + 1, "loss": loss.item(), "found": accuracies(net, seed)})
            print(f"step {step + 1}, {time.monotonic() - since:.0f} s: {history[-1]}", flush=True)
    told = {"model": name, "seed": seed, "tokens": seen, "seconds": time.monotonic() - since, "grown": grown}
    file.write_text(json.dumps({**told, "history": history}) + "\n")


def optimizers(net: torch.nn.Module) -> list[torch.optim.Optimizer]:
    """Return Muon of the layers' matrices, and AdamW of all else. A lookup compares names, of which each pair has a
    small share of the gradient: Muon's updates have all directions at one size.
    """
    import torch

    hidden, others, vectors = [], [], []
    for name, weight in net.named_parameters():
        matrix = hidden if name.startswith("decoder.") and weight.dim() == 2 else others
        (matrix if weight.dim() > 1 else vectors).append(weight)
    groups = [{"params": others, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    several = [
        torch.optim.Muon(hidden, lr=MUON_RATE, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.95)),
    ]
    for optimizer in several:
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
    return several


def scale(step: int, steps: int) -> float:
    """Return the factor of a step's learning rate: a line up, then a cosine down to a tenth."""
    warm = round(WARMUP * steps)
    if step < warm:
        return (step + 1) / warm
    return 0.55 + 0.45 * math.cos(math.pi * (step - warm) / (steps - warm))


def run(folder: Path, at_once: int, steps: int) -> list[dict[str, Any]]:
    """Train what is not there, some at a time, each in a process of its own, and return what all found.

    Errors:
        UserError: a run failed; names its log.
    """
    runs = [(name, seed, folder / f"{name}-{seed}.json") for name in MODELS for seed in SEEDS]

    def start(each: tuple[str, int, Path]) -> None:
        name, seed, file = each
        if not file.is_file():
            command = [sys.executable, __file__, "--out", str(folder), "--steps", str(steps), "--one", name, str(seed)]
            with file.with_suffix(".log").open("w") as log:
                subprocess.run(command, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False)
        print(f"{file.stem} is through", flush=True)

    with ThreadPoolExecutor(at_once) as pool:
        list(pool.map(start, runs))
    if failed := [file for _, _, file in runs if not file.is_file()]:
        raise UserError(f"{failed[0].stem} failed", hint=f"read {failed[0].with_suffix('.log')}")
    return [json.loads(file.read_text()) for _, _, file in runs]


def percent(result: dict[str, Any], task: str) -> list[float]:
    """Return the percent of right numbers by `TESTED` lines, after all steps."""
    found = result["history"][-1]["found"][task]
    return [100 * found[str(lines)] for lines in TESTED]


def table(results: Sequence[dict[str, Any]]) -> str:
    """Return percent of right numbers of each run: means would hide that a lookup is learnt or not."""
    head = ["percent of", "model", "seed", "steps", *(f"{lines} lines" for lines in TESTED)]
    rows = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for task in TASKS:
        for each in results:
            numbers = [f"{value:.0f}" for value in percent(each, task)]
            run = [task, WORDS[each["model"]], str(each["seed"]), f"{each['history'][-1]['step']:,}"]
            rows.append(f"| {' | '.join([*run, *numbers])} |")
    return "\n".join(rows) + "\n"


@plot.styled
def draw(results: Sequence[dict[str, Any]], file: Path) -> None:
    """Plot percent of right numbers over lines, a panel for each task and a curve for each run."""
    figure, panels = plot.canvas(720, 340, columns=len(TASKS), sharey=True)
    for axes, task in zip(panels, TASKS, strict=True):
        for name, colour in zip(MODELS, plot.SERIES, strict=False):
            several = [each for each in results if each["model"] == name]
            for number, each in enumerate(several):
                label = None if number else WORDS[name]
                axes.plot(TESTED, percent(each, task), color=colour, marker="o", markersize=4, label=label)
        axes.axvline(TRAINED[-1], color=plot.MUTED, linewidth=1, linestyle=":")
        axes.set_xscale("log", base=2)
        axes.set_xticks(TESTED, [str(lines) for lines in TESTED])
        axes.set(title=task, xlabel="lines (dotted: longest in training)", ylim=(-3, 103))
    panels[0].set_ylabel("right numbers, percent")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(MODELS))
    plot.save(figure, file, "Right numbers over lines of a phonebook, and of noise with needles, of two small models")


def main() -> None:
    """Train what is not there, and write figure and table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/phonebook"), help="folder of the runs")
    parser.add_argument("--at-once", type=int, default=2, help="processes")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"of a run (default {STEPS:,})")
    parser.add_argument("--one", nargs=2, metavar=("MODEL", "SEED"), help="train this run, in this process")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.one:
        name, seed = args.one
        train(name, int(seed), args.out / f"{name}-{seed}.json", args.steps)
        return
    results = run(args.out, args.at_once, args.steps)
    draw(results, PICTURE)
    write_between(PAGE, OPENING, CLOSING, table(results))
    print(f"{PICTURE}\n{PAGE}")


if __name__ == "__main__":
    report_mistakes()
    main()
