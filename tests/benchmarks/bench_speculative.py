"""Generation with a draft against plain generation, in turns of one run: tokens/s of both, ratio, acceptance.

    python tests/benchmarks/bench_speculative.py                                    # random weights, CPU, 2 minutes
    python tests/benchmarks/bench_speculative.py --target nemotron_h_8b --draft layers:6 --right 0.6 0.8 0.9   # a GPU
    python tests/benchmarks/bench_speculative.py --target runs/large --draft runs/small --prompts prompts.txt

With --profile on a GPU also what a pass takes: of its CUDA graphs, of the whole, and of the first ones, which record
them.

TARGET and DRAFT are names of definitions, whose weights are random then, or runs and checkpoints; a draft also
`layers:N` or, of a run, `lookup`. Random models agree by chance alone: there the draft model runs for its time, and
what it drafts is replaced by the target's own next token, a wrong one in a share of the places (`--right` has the
shares that are right). Both sides write greedily and have to write the same tokens. Times are medians of turns, of all
tokens but the first; on the CPU those of one thread, which other jobs on the machine disturb less than the clock's.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median

from repository import import_repository

import_repository()

import torch  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from nemotron_h.cli.generate import read_prompts  # noqa: E402
from nemotron_h.core.progress import StageProgress  # noqa: E402
from nemotron_h.inference.drafts import DRAFT_TOKENS, Acceptance, Draft, ModelDrafter, Proposal  # noqa: E402
from nemotron_h.inference.generate import Generation  # noqa: E402
from nemotron_h.inference.layer_costs import random_model  # noqa: E402
from nemotron_h.inference.model import GenerationModel  # noqa: E402
from nemotron_h.inference.opening import LAYERS, open_checkpoint  # noqa: E402
from nemotron_h.inference.sampling import Sampling  # noqa: E402
from nemotron_h.recipe.checks import definition_of  # noqa: E402
from nemotron_h.recipe.compose import compose  # noqa: E402

GREEDY = Sampling(temperature=0)
#: tokens that a profile leaves unwritten, so that its last pass is a whole one
DRAFT_ROOM = 20
REPLAYS = 50


class ScriptedDrafter(ModelDrafter):
    """Drafts the tokens that are known to follow, some of them wrong, after the model's passes."""

    def __init__(self, draft: ScriptedDraft, rows: int) -> None:
        super().__init__(draft.model, draft.tokens, rows)
        self.script, self.right, self.rng = draft.script, draft.right, random.Random(0)

    def propose(self, texts: Sequence[Sequence[int]], uniform: torch.Tensor) -> Proposal:
        """Replace what the model drafts."""
        proposal, size = super().propose(texts, uniform), len(self.model.output)
        drafted: list[list[int]] = []
        for text in texts:
            whole = next((script for script in self.script if script[: len(text)] == list(text)), text)
            tokens = [*whole[len(text) :], *[0] * self.tokens][: self.tokens]
            drafted.append([(token + (self.rng.random() >= self.right)) % size for token in tokens])
        return replace(proposal, tokens=torch.tensor(drafted, device=proposal.tokens.device))


@dataclass(frozen=True)
class ScriptedDraft(Draft):
    """A draft of which this share of tokens is right; `script` is each prompt with its continuation."""

    right: float = 1.0
    script: list[list[int]] = field(default_factory=list)

    def start(self, rows: int) -> ScriptedDrafter:
        """Return the drafter."""
        return ScriptedDrafter(self, rows)


@dataclass
class Turn:
    """One batch of continuations, with the seconds of all tokens but each row's first."""

    texts: list[list[int]]
    seconds: float
    acceptance: Acceptance

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return sum(len(text) - 1 for text in self.texts) / self.seconds


def write(model: GenerationModel, prompts: list[list[int]], count: int, draft: Draft | None) -> Turn:
    """One batch."""
    generation = Generation(model, prompts, max_tokens=count, sampling=GREEDY, draft=draft)
    texts: list[list[int]] = [[] for _ in prompts]
    began, now = None, time.process_time if model.device.type == "cpu" else time.perf_counter
    for items in generation:
        began = began or now()
        for text, tokens in zip(texts, items, strict=True):
            text += tokens
    return Turn(texts, now() - began, generation.acceptance)


def profile(model: GenerationModel, prompt: list[int], count: int, draft: Draft | None) -> str:
    """Passes of one continuation, and its graphs by themselves, in milliseconds."""
    sync, began = torch.cuda.synchronize, time.perf_counter()
    generation = Generation(model, [prompt], max_tokens=count, sampling=GREEDY, draft=draft)
    writer, passes, written = generation.writer([0]), [], 0
    while written < count - DRAFT_ROOM:
        written += len(writer.write([False])[0])
        sync()
        passes.append(time.perf_counter() - began)
        began = time.perf_counter()
    recorded = {"step": writer.stepper.recorded}
    if draft is not None:
        recorded = {"pass": writer.judged, "advance": writer.accepted}
        recorded |= {"draft": writer.drafter.drafted, "its advance": writer.drafter.accepted}
    parts = []
    for name, each in recorded.items():
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(REPLAYS):
            each.graph.replay()
        end.record()
        sync()
        parts.append(f"{name} {begin.elapsed_time(end) / REPLAYS:.3f}")
    name = "plain" if draft is None else f"{draft.name}, {draft.tokens} tokens"
    first = ", ".join(f"{1e3 * seconds:.1f}" for seconds in passes[1:3])
    whole = f"{1e3 * median(passes[6:]):.2f} a pass of {written / len(passes):.2f} tokens"
    return f"{name}: {whole}, the second and third {first}; graphs: {', '.join(parts)}"


def random_pair(args: argparse.Namespace) -> tuple[GenerationModel, GenerationModel, list[list[int]]]:
    """Target, draft and prompts."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    target = random_model(definition_of(compose(args.target), args.target), dtype, device)
    if args.draft.startswith(LAYERS):
        draft = target.first_layers(int(args.draft.removeprefix(LAYERS)))
    else:
        draft = random_model(definition_of(compose(args.draft), args.draft), dtype, device, seed=1)
    rng = torch.Generator().manual_seed(0)
    return target, draft, torch.randint(len(target.output), (max(args.batches), args.prompt), generator=rng).tolist()


def arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="nemotron_h_tiny")
    parser.add_argument("--draft", default="layers:2")
    parser.add_argument("--prompts", metavar="FILE", help="of a run: a prompt a line")
    parser.add_argument("--right", type=float, nargs="+", default=[0.5, 0.8, 1.0], help="of random weights")
    parser.add_argument("--draft-tokens", type=int, nargs="+", default=[DRAFT_TOKENS])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8], help="prompts at a time")
    parser.add_argument("--prompt", type=int, default=256, help="tokens of a random prompt")
    parser.add_argument("--output", type=int, default=96, help="tokens of a continuation")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--profile", action="store_true", help="print the milliseconds of a pass and its graphs")
    return parser.parse_args()


def main() -> None:
    """Measure and print."""
    args = arguments()
    torch.set_num_threads(1)
    sides: list[Draft] = []
    if Path(args.target).exists():
        if args.prompts is None:
            raise SystemExit("a run needs --prompts FILE")
        opened = open_checkpoint(Path(args.target), None, None, None, args.draft)
        target, prompts = opened.model, opened.tokenizer.encode_batch(read_prompts(args.prompts))
        sides = [replace(opened.draft, tokens=count) for count in args.draft_tokens]
    else:
        target, drafting, prompts = random_pair(args)
        sides = [
            ScriptedDraft(drafting, count, f"{args.draft}, {right:.0%} right", right)
            for count in args.draft_tokens
            for right in args.right
        ]
    table = Table(title=f"{args.target} on {target.device}, {target.dtype}, {args.output} tokens out")
    for column in ("batch", "draft", "tokens", "plain tokens/s", "drafted", "ratio", "accepted per pass", "of drafted"):
        table.add_column(column, justify="right")
    with StageProgress(Console(), "turns", len(args.batches) * len(sides) * (args.turns + 1)) as bar:
        for batch in args.batches:
            rows = [prompts[i % len(prompts)] for i in range(batch)]
            for side in sides:
                turns: list[tuple[Turn, Turn]] = []
                for number in range(args.turns + 1):
                    plain = write(target, rows, args.output, None)
                    script = [[*row, *text] for row, text in zip(rows, plain.texts, strict=True)]
                    scripted = replace(side, script=script) if isinstance(side, ScriptedDraft) else side
                    drafted = write(target, rows, args.output, scripted)
                    if plain.texts != drafted.texts:
                        print(f"other tokens with {side.name}: two scores were closer than rounding", flush=True)
                    turns += [(plain, drafted)] if number else []
                    bar.advance(1, f"{side.name}, batch {batch}")
                rates = [median(turn[i].rate for turn in turns) for i in range(2)]
                cells = (f"{rates[0]:,.0f}", f"{rates[1]:,.0f}", f"{rates[1] / rates[0]:.2f}x")
                a = turns[-1][1].acceptance
                share = (f"{a.accepted / a.passes:.2f}", f"{a.accepted / max(a.drafted, 1):.0%}")
                table.add_row(str(batch), side.name, str(side.tokens), *cells, *share)
    Console(width=120).print(table)
    if args.profile and target.device.type == "cuda":
        for side in (None, *sides):
            print(profile(target, prompts[0], args.output, side), flush=True)


if __name__ == "__main__":
    main()
