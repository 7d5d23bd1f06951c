"""Generation with the whole 8B on one GPU, its matrices in FP8 too, against its Transformer twin: largest batches.

    python tests/benchmarks/bench_generation_gpu.py --out OUT           # 65,536 tokens in, 1,024 out; 5 minutes
    python tests/benchmarks/bench_generation_gpu.py --out OUT --small   # a dry run of the same code, on the CPU too

Both sides are the definitions that the paper compares, uncut: `nemotron_h_8b` (52 layers: 24 Mamba-2, 24 FFN, 4
attention; 8.10 B parameters) and `nemotron_t_8b` (64 layers: 32 attention, 32 FFN; 8.05 B), of one width and attention
shape, with random weights in BF16 (speed does not depend on their values), through the same `GenerationModel`: flash
attention over shared keys in prefill, our split-KV kernel and a CUDA graph in the steps; Mamba-2 by the kernels of
mamba-ssm.

The batch of each side is the largest that the exact memory model (`nemotron_h.planning.inference`) fits beside weights
and the measured workspace of a prefill pass; it is then allocated and run. Prefill reads one sequence after the other
(a pass is 8,192 tokens of one), so its time is the batch times that of one sequence: it is timed on the first
`--prefill-rows` sequences, whose states are then copied to the rest of the batch. Every step of the 1,024 is run and
timed at the whole batch. Tokens are chosen greedily and read by the host after every step, as streaming does.

Results are printed as lines of JSON, kept in OUT/results.jsonl, and end in a table. A part that fails prints its error,
and the others go on.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

from bench_gpu import failed, free, pack_cache, unpack_cache
from repository import import_repository
from results import Report

import_repository()

import torch  # noqa: E402
from random_model import random_model  # noqa: E402

from nemotron_h.architecture.definition import Expect, ModelDefinition  # noqa: E402
from nemotron_h.inference.graph import Stepper  # noqa: E402
from nemotron_h.inference.model import GenerationModel  # noqa: E402
from nemotron_h.inference.prefill import pass_tokens, prefill  # noqa: E402
from nemotron_h.inference.sampling import Sampling, choose  # noqa: E402
from nemotron_h.inference.states import States  # noqa: E402
from nemotron_h.planning.flops import flops_per_token  # noqa: E402
from nemotron_h.planning.inference import Serving, inference_memory  # noqa: E402
from nemotron_h.recipe.compose import compose  # noqa: E402

SIDES = {"hybrid": "nemotron_h_8b", "hybrid in FP8": "nemotron_h_8b", "transformer": "nemotron_t_8b"}
GREEDY = Sampling(temperature=0)
GIB = 2**30
#: ours: left free beside the plan, for the CUDA graph's pool, cuBLAS and fragmentation
SPARE = 0.75 * GIB
#: steps between two readings of the clock
STRETCH = 64
ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"


def definition_of(name: str, small: bool) -> ModelDefinition:
    """The whole model; a dry run has little widths and a sixth of the layers."""
    values = dataclasses.asdict(compose(name).model)
    pattern = values["pattern"]
    if small:
        little = {"hidden_size": 64, "ffn_hidden_size": 96, "num_attention_heads": 4, "num_query_groups": 2}
        little |= {"head_dim": 16, "vocab_size": 512}
        if "M" in pattern:
            little |= {"mamba_num_heads": 8, "mamba_head_dim": 16, "mamba_num_groups": 2, "mamba_state_dim": 16}
        pattern = pattern[:10]
        values |= little
    counts = Expect(pattern.count("M"), pattern.count("*"), pattern.count("-"), 0)
    return ModelDefinition(**{**values, "pattern": pattern, "expect": counts})


def sync() -> None:
    """Wait for the device."""
    if ON_GPU:
        torch.cuda.synchronize()


def timed(work: Callable[[], Any]) -> float:
    """Seconds of a piece of work."""
    sync()
    began = time.perf_counter()
    work()
    sync()
    return time.perf_counter() - began


def allocated() -> int:
    """Bytes of tensors on the GPU."""
    return torch.cuda.memory_allocated() if ON_GPU else 0


def prompt_of(definition: ModelDefinition, length: int, seed: int) -> list[int]:
    """Random tokens."""
    return torch.randint(definition.vocab_size, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


class Side:
    """One model, from its weights to its last token."""

    def __init__(self, name: str, report: Report, args: argparse.Namespace, free_bytes: int) -> None:
        self.name, self.report, self.args, self.free_bytes = name, report, args, free_bytes
        self.definition = definition_of(SIDES[name], args.small)
        self.capacity = args.prompt + args.output
        self.float8 = name.endswith("FP8")
        self.dtype = torch.bfloat16 if ON_GPU or self.float8 else torch.float32
        self.result: dict[str, Any] = {"name": name, "model": SIDES[name], "parameters": self.definition.parameters}

    def add(self, section: str, **values: Any) -> None:
        """Report one result of this side."""
        self.report.add(section, name=self.name, **values)

    def run(self) -> dict[str, Any]:
        """All parts; what was measured before a failure is kept."""
        for part in (self.build, self.check, self.plan, self.prefill, self.decode, self.alone):
            try:
                part()
            except Exception:
                failed(self.report, f"{self.name}: {part.__name__}")
                if part is not self.check and part is not self.alone:
                    break
            if self.report.elapsed() > self.args.budget and part is self.decode:
                break
        self.add("side", **{k: v for k, v in self.result.items() if k != "name"})
        return self.result

    def build(self) -> None:
        """Random weights on the device."""
        before = allocated()
        seconds = timed(lambda: setattr(self, "model", random_model(self.definition, self.dtype, DEVICE)))
        if self.float8:
            self.model = self.model.in_float8()
            free()
        model: GenerationModel = self.model
        self.weights = allocated() - before
        planned = inference_memory(self.definition, Serving(0, 1)).weights
        self.add(
            "build",
            ops=model.ops.origin,
            graphs=model.ops.graphs,
            seconds=round(seconds, 1),
            weights_gib=round(self.weights / GIB, 2),
            planned_weights_gib=round(planned / GIB, 2),
            parameters=self.definition.parameters,
            pattern=self.definition.pattern,
        )

    def check(self) -> None:
        """Scores of steps (the first plain, then through the CUDA graph) against reading all tokens at once."""
        length, read, batch = 330, 300, 2
        tokens = torch.tensor([prompt_of(self.definition, length, seed) for seed in range(batch)])
        states = self.model.new_states(batch, length)
        expected = self.model.logits(self.model.extend(tokens, states)[:, read - 1 :]).float()
        states = self.model.new_states(batch, length)
        self.model.extend(tokens[:, :200], states)
        actual = [self.model.logits(self.model.extend(tokens[:, 200:read], states)[:, -1])]
        stepper = Stepper(self.model, states)
        actual += [stepper.step(tokens[:, position].to(DEVICE)).clone() for position in range(read, length)]
        found = torch.stack(actual, dim=1).float()
        norms = (found - expected).norm(dim=-1) / expected.norm(dim=-1)
        same = (found.argmax(-1) == expected.argmax(-1)).float().mean()
        self.result["check"] = round(float(norms.max()), 5)
        self.add(
            "check",
            relative_difference_first=round(float(norms[:, 0].max()), 5),
            relative_difference_largest=round(float(norms.max()), 5),
            same_token=round(float(same), 4),
        )

    def plan(self) -> None:
        """The largest batch by the memory model, with the measured workspace of a pass; then its states."""
        limit = pass_tokens(self.model)
        two_passes = min(2 * limit, self.args.prompt)
        prompt = [prompt_of(self.definition, two_passes, 0)]
        first = timed(lambda: prefill(self.model, prompt, self.model.new_states(1, self.capacity)))
        states = self.model.new_states(1, self.capacity)
        base = allocated()
        if ON_GPU:
            torch.cuda.reset_peak_memory_stats()
        prefill(self.model, prompt, states)
        workspace = torch.cuda.max_memory_allocated() - base if ON_GPU else 0
        del states
        free()
        memory = inference_memory(self.definition, Serving(self.capacity, 1))
        room = self.free_bytes - self.weights - workspace - SPARE
        batch = self.args.batch or (max(1, int(room // memory.cache)) if ON_GPU else 3)
        planned = batch
        while True:
            try:
                self.states: States = self.model.new_states(batch, self.capacity)
                break
            except torch.OutOfMemoryError:
                if batch == 1:
                    raise
                batch -= 1
                free()
        self.batch = batch
        self.result |= {"batch": batch, "cache_mib_per_sequence": round(memory.cache / 2**20, 1)}
        self.add(
            "plan",
            batch=batch,
            planned_batch=planned,
            free_gib=round(self.free_bytes / GIB, 2),
            workspace_gib=round(workspace / GIB, 2),
            cache_gib_per_sequence=round(memory.cache / GIB, 4),
            states_gib=round(self.states.bytes() / GIB, 2),
            planned_states_gib=round(batch * memory.cache / GIB, 2),
            first_passes_s=round(first, 1),
        )

    def prefill(self) -> None:
        """Whole prompts of the first sequences, one after the other; their states for the others too."""
        rows = min(self.args.prefill_rows or self.batch, self.batch)
        last, seconds = [], []
        for row in range(rows):
            prompt = [prompt_of(self.definition, self.args.prompt, row)]
            seconds.append(
                timed(lambda p=prompt, r=row: last.append(prefill(self.model, p, self.states.rows(r, r + 1))))
            )
        for layer in self.states.layers:
            for tensor in vars(layer).values() if layer is not None else ():
                for row in range(rows, self.batch):
                    tensor[row].copy_(tensor[row % rows])
        self.states.lengths[:] = self.args.prompt
        self.states.positions.fill_(self.args.prompt)
        self.hidden = torch.cat([last[row % rows] for row in range(self.batch)])
        each = median(seconds)
        flops = flops_per_token(self.definition, self.args.prompt, training=False)
        # the output matrix scores one token of a prompt
        work = (flops.total - flops.head) * self.args.prompt
        self.result |= {"prefill_s": each * self.batch, "prefill_tokens_per_s": round(self.args.prompt / each)}
        self.add(
            "prefill",
            seconds_per_sequence=[round(s, 3) for s in seconds],
            rows_timed=rows,
            tokens_per_s=round(self.args.prompt / each),
            tflops=round(work / each / 1e12, 1),
            whole_batch_s=round(each * self.batch, 2),
        )

    def _steps(self, stepper: Stepper, chosen: torch.Tensor, count: int) -> list[float]:
        """Seconds of stretches of steps."""
        generators = GREEDY.generators(len(chosen))
        times, began, done = [], time.perf_counter(), 0
        for number in range(count):
            chosen = choose(stepper.step(chosen), GREEDY, generators)
            chosen.tolist()  # the host reads every token, which waits for the step
            if (number + 1) % STRETCH == 0 or number + 1 == count:
                now = time.perf_counter()
                times.append((now - began) / (number + 1 - done))
                began, done = now, number + 1
        return times

    def _rewind(self, states: States) -> None:
        """To the end of the prompts."""
        states.lengths[:] = self.args.prompt
        states.positions.fill_(self.args.prompt)

    def decode(self) -> None:
        """Some steps kernel by kernel, then all of them through the CUDA graph."""
        first = choose(self.model.logits(self.hidden), GREEDY, GREEDY.generators(self.batch))
        plain = self._steps(Stepper(self.model, self.states, graph=False), first, min(12, self.args.output))
        self._rewind(self.states)
        if ON_GPU:
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        stepper = Stepper(self.model, self.states)
        times = self._steps(stepper, first, self.args.output - 1)
        seconds = time.perf_counter() - began
        produced = self.batch * self.args.output
        memory = inference_memory(self.definition, Serving(self.args.prompt + self.args.output // 2, self.batch))
        # weights but for the embedding (a row per token), keys and values once; states are read and written
        moved = self.weights - 2 * self.definition.vocab_size * self.definition.hidden_size
        moved += memory.kv_cache + 2 * (memory.ssm_states + memory.conv_states)
        step = median(times)
        self.result |= {
            "decode_s": seconds,
            "step_ms": round(step * 1e3, 2),
            "decode_tokens_per_s": round(produced / seconds, 1),
            "output_tokens_per_s": round(produced / (seconds + self.result["prefill_s"]), 1),
        }
        self.add(
            "decode",
            seconds=round(seconds, 2),
            step_ms=round(step * 1e3, 2),
            step_ms_by_stretch=[round(t * 1e3, 2) for t in times],
            step_ms_without_graph=round(plain[-1] * 1e3, 2),
            graph=stepper.recorded.graph is not None,
            gb_per_step=round(moved / 1e9, 2),
            tb_per_s=round(moved / step / 1e12, 3),
            decode_tokens_per_s=self.result["decode_tokens_per_s"],
            output_tokens_per_s=self.result["output_tokens_per_s"],
            peak_gib=round(torch.cuda.max_memory_allocated() / GIB, 2) if ON_GPU else 0,
        )

    def alone(self) -> None:
        """Steps of one sequence, with and without the graph: the latency of a token."""
        states = self.states.rows(0, 1)
        first = torch.zeros(1, dtype=torch.int64, device=DEVICE)
        found = {}
        for label, graph in (("graph", None), ("kernel by kernel", False)):
            self._rewind(states)
            stepper = Stepper(self.model, states, graph)
            count = min(2 * STRETCH, self.args.output)
            found[label] = round(self._steps(stepper, first, count)[-1] * 1e3, 2)
        self.result["step_ms_alone"] = found["graph"]
        self.add("alone", step_ms=found)


def table(results: list[dict[str, Any]], args: argparse.Namespace) -> str:
    """For the documentation."""
    columns = {
        "batch": "batch",
        "cache_mib_per_sequence": "cache MiB per sequence",
        "prefill_tokens_per_s": "prefill tokens/s",
        "step_ms": "step ms",
        "decode_tokens_per_s": "decode tokens/s",
        "output_tokens_per_s": "output tokens/s, prefill included",
        "step_ms_alone": "step ms, batch 1",
    }
    lines = [f"{args.prompt:,} tokens in, {args.output:,} out", "| | " + " | ".join(columns.values()) + " |"]
    lines.append("|---" * (len(columns) + 1) + "|")
    for r in results:
        cells = [f"{r[key]:,}" if key in r else "" for key in columns]
        lines.append(f"| {r['model']}{' in FP8' * r['name'].endswith('FP8')} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for results and compiled kernels")
    parser.add_argument("--small", action="store_true", help="a dry run: tiny widths, numbers mean nothing")
    parser.add_argument("--sides", nargs="+", choices=tuple(SIDES), default=list(SIDES), help="default: both")
    parser.add_argument("--prompt", type=int, help="tokens of each prompt (default 65,536)")
    parser.add_argument("--output", type=int, help="tokens of each continuation (default 1,024)")
    parser.add_argument("--batch", type=int, help="this batch, not the largest")
    parser.add_argument("--prefill-rows", type=int, default=4, help="prompts that are timed (default 4; 0: all)")
    parser.add_argument("--budget", type=float, default=280, help="start nothing optional after so many seconds")
    parser.add_argument("--triton-cache", type=Path, help="a triton.tar.xz that an earlier run wrote")
    args = parser.parse_args()
    args.prompt = args.prompt or (300 if args.small else 65536)
    args.output = args.output or (70 if args.small else 1024)
    return args


def main() -> None:
    """Run both sides; each part is guarded."""
    args = arguments()
    report = Report(args.out)
    unpack_cache(args.triton_cache)
    free_bytes = torch.cuda.mem_get_info()[0] if ON_GPU else 0
    report.add(
        "machine",
        gpu=torch.cuda.get_device_name() if ON_GPU else "none",
        torch=torch.__version__,
        free_gib=round(free_bytes / GIB, 2),
    )
    results = []
    for name in args.sides:
        side = Side(name, report, args, free_bytes)
        results.append(side.run())
        del side
        free()
    pack_cache(args.out)
    both = {r["name"]: r for r in results}
    keys = ("output_tokens_per_s", "decode_tokens_per_s", "prefill_tokens_per_s", "batch")
    for one, other in (("hybrid", "transformer"), ("hybrid in FP8", "hybrid")):
        a, b = both.get(one, {}), both.get(other, {})
        if "step_ms_alone" in a and "step_ms_alone" in b:
            ratios = {key: round(a[key] / b[key], 3) for key in keys}
            alone = round(b["step_ms_alone"] / a["step_ms_alone"], 3)
            report.add("ratio", of=one, to=other, **ratios, decode_alone=alone)
    print(table(results, args), flush=True)


if __name__ == "__main__":
    main()
