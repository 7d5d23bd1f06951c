"""How fast the hybrids of a Transformer write, in the largest batch that their states leave room for.

    python tests/benchmarks/bench_hybrids.py --model llama_tiny --prompt 64 --output 128       # a CPU
    python tests/benchmarks/bench_hybrids.py --model nemotron_t_8b --csv speeds.csv            # a GPU: 8B, 2 minutes

`--attention` has the shares of the Transformer's attention layers that stay, spread evenly; the others are Mamba-2
layers as `nemotron-h transplant` makes them, with a group for each query head, or `--groups`. Weights are random, as
speed is that of any. A batch is as `nemotron-h coverage` takes it, half of the memory that is free. Seconds a sample
are those of prompt and answer over the batch; a step is timed in the middle of the answer.
"""

from __future__ import annotations

import argparse
import csv
from dataclasses import asdict, dataclass
from pathlib import Path

from repository import import_repository

import_repository()

import torch  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from nemotron_h.architecture.blocks.transplant import attention_layers  # noqa: E402
from nemotron_h.architecture.definition import ModelDefinition  # noqa: E402
from nemotron_h.architecture.hybrid import counts, evenly  # noqa: E402
from nemotron_h.compression.hybridise.rounds import hybrid_of  # noqa: E402
from nemotron_h.core.units import GIB  # noqa: E402
from nemotron_h.inference.layer_costs import placement, random_model, seconds  # noqa: E402
from nemotron_h.inference.pool import rows_that_fit  # noqa: E402
from nemotron_h.planning.inference import Serving, inference_memory  # noqa: E402
from nemotron_h.recipe.checks import definition_of  # noqa: E402
from nemotron_h.recipe.compose import compose  # noqa: E402
from nemotron_h.schema.layer_costs import Scenario  # noqa: E402


@dataclass
class Row:
    """Speed of a model."""

    attention: float
    parameters: int
    state_mib: float
    batch: int
    prefill: float
    step: float
    seconds_a_sample: float
    tokens_per_second: float


def hybrid(parent: ModelDefinition, share: float, groups: int | None) -> ModelDefinition:
    """The parent with this share of its attention layers."""
    if share == 1:
        return parent
    layers, (stay,) = attention_layers(parent.blocks), counts(parent, [share], "--attention")
    kept = evenly(layers, stay)
    return hybrid_of(parent, [layer for layer in layers if layer not in kept], groups, f"{parent.name}-{share:g}")


def measure(definition: ModelDefinition, share: float, args: argparse.Namespace) -> Row:
    """One model, in its largest batch."""
    device, dtype = placement()
    model = random_model(definition, dtype, device)
    length = args.prompt + args.output
    batch = min(rows_that_fit(model, length), args.batch or 10**9)
    ((prefill, step),) = seconds([model], Scenario(batch, args.prompt, args.output), args.turns)
    whole = prefill + args.output * step
    state = inference_memory(definition, Serving(length)).cache / (GIB / 1024)
    return Row(share, definition.parameters, state, batch, prefill, step, whole / batch, batch * args.output / whole)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama_tiny", help="a Transformer's recipe")
    parser.add_argument("--attention", type=float, nargs="+", default=[1, 0.5, 0.25, 0], help="1 is the Transformer")
    parser.add_argument("--groups", type=int, help="of each mixer")
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--output", type=int, default=1024)
    parser.add_argument("--batch", type=int, help="most rows")
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    parent, rows = definition_of(compose(args.model), args.model), []
    table = Table(title=f"{args.model}, {args.prompt} tokens in, {args.output} out")
    for column in ("attention", "parameters", "states, MiB", "batch", "prefill s", "step ms", "tokens/s", "ratio"):
        table.add_column(column, justify="right")
    for share in args.attention:
        row = measure(hybrid(parent, share, args.groups), share, args)
        rows.append(row)
        table.add_row(
            f"{share:.0%}",
            f"{row.parameters / 1e9:.2f} B",
            f"{row.state_mib:,.1f}",
            str(row.batch),
            f"{row.prefill:.2f}",
            f"{row.step * 1e3:.1f}",
            f"{row.tokens_per_second:,.0f}",
            f"{row.tokens_per_second / rows[0].tokens_per_second:.2f}x",
        )
        print(asdict(row), flush=True)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    Console(width=120).print(table)
    if args.csv:
        with args.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(asdict(rows[0])))
            writer.writeheader()
            writer.writerows(map(asdict, rows))


if __name__ == "__main__":
    main()
