"""A distillation step with the loss in chunks against the plain one: full logits of both models, softmax, KL.

Both sides run the same student and teacher on the same tokens, forward and backward without an optimizer, one process
each; the processes take steps in turn, and ratios are of medians. The losses must agree. On the CPU a small model in
float32 with the family's vocabulary of 131,072; with `--device cuda` three layers of the 8B's widths in BF16 at 8,192
tokens. Writes everything measured to `.bench/distill.json`; exit code 1 where the target is missed.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
VOCABULARY = 131_072
#: ours: what this project promises
MOST_MEMORY, MOST_TIME = 0.6, 1.0
SIDES = ("ours", "plain")
SHAPES: dict[str, dict[str, Any]] = {
    "cpu": {"tokens": 512, "hidden_size": 128, "ffn_hidden_size": 512, "num_attention_heads": 4, "num_query_groups": 2}
    | {"mamba_num_heads": 8, "mamba_head_dim": 32, "mamba_num_groups": 2, "mamba_state_dim": 32},
    # paper table 1, the 8B
    "cuda": {"tokens": 8192, "hidden_size": 4096, "ffn_hidden_size": 21504, "num_attention_heads": 32}
    | {"num_query_groups": 8, "mamba_num_heads": 128, "mamba_head_dim": 64, "mamba_num_groups": 8}
    | {"mamba_state_dim": 128},
}


def build(side: str, device: str) -> tuple[Any, Any, int]:
    """A step that returns the loss, what memory it peaks at (None: the process's), and the student's parameters."""
    import torch
    import torch.nn.functional as F
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    from nemotron_h.model.module import NemotronHConfig
    from nemotron_h.ops.distillation_loss import HiddenTeacher, Objective, distillation_loss

    torch.distributed.init_process_group(
        "gloo" if device == "cpu" else "nccl", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)
    shape = dict(SHAPES[device])
    tokens = shape.pop("tokens")
    dtype = torch.float32 if device == "cpu" else torch.bfloat16

    def model(pattern: str, seed: int) -> Any:
        config = NemotronHConfig(
            definition_name="bench",
            hybrid_override_pattern=pattern,
            kv_channels=shape["hidden_size"] // shape["num_attention_heads"],
            vocab_size=VOCABULARY,
            seq_length=tokens,
            init_seed=seed,
            params_dtype=dtype,
            bf16=dtype == torch.bfloat16,
            fuse_weight_gradients=False,  # no gradient buffers here
            gradient_accumulation_fusion=False,
            **shape,
        )
        built = config.configure_model(None)
        return built.to(device=device, dtype=dtype)

    student, teacher = model("M*-", 1), model("M-*-", 2)
    teacher.eval().requires_grad_(False)
    rng = torch.Generator().manual_seed(0)
    text = torch.randint(VOCABULARY, (1, tokens + 1), generator=rng).to(device)
    weights = torch.ones(tokens, device=device)

    def step() -> float:
        for parameter in student.parameters():
            parameter.grad = None
        with torch.no_grad():
            beside = teacher.hidden_states(text[:, :-1], None, None).flatten(0, 1)
        hidden = student.hidden_states(text[:, :-1], None, None).flatten(0, 1)
        own, theirs = student.output_layer, teacher.output_layer
        if side == "ours":
            found = distillation_loss(
                hidden, own.weight, HiddenTeacher(beside, theirs.weight), text[0, 1:], weights, Objective()
            )
            loss = found.total / tokens
        else:
            with torch.no_grad():
                aim = F.softmax(theirs(beside.unsqueeze(1))[0].squeeze(1).float(), dim=-1)
            logits = own(hidden.unsqueeze(1))[0].squeeze(1).float()
            loss = F.kl_div(F.log_softmax(logits, dim=-1), aim, reduction="none").sum() / tokens
        loss.backward()
        return float(loss)

    return (
        step,
        torch.cuda.max_memory_allocated if device == "cuda" else None,
        sum(p.numel() for p in student.parameters()),
    )


def work(side: str, device: str) -> None:
    """One side, as a process that takes a step when told."""
    from stepper import MIB, Answers, resident_mib, serve

    answers = Answers()
    from nemotron_h.platform import cpu, quiet

    quiet.hush()
    cpu.install()
    before = resident_mib()
    step, peak, parameters = build(side, device)
    if peak is None:
        serve(answers, step, parameters, before)
        return
    import time

    answers.send(parameters=parameters, before_model_mib=0)
    for order in sys.stdin:
        if order.strip() != "step":
            return
        started = time.perf_counter()
        loss = step()
        answers.send(seconds=time.perf_counter() - started, loss=loss, added_mib=peak() / MIB)


def main() -> int:
    """Measure and compare."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=list(SHAPES), default="cpu")
    parser.add_argument("--threads", type=int, default=2, help="of each side, on the CPU (default: %(default)s)")
    parser.add_argument("--turns", type=int, default=5, help="timed steps (default: %(default)s)")
    parser.add_argument("--warmup", type=int, default=2, help="steps before them (default: %(default)s)")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        work(args.side, args.device)
        return 0
    from bench_train import WORK, Side, console

    WORK.mkdir(exist_ok=True)
    # one process at a time holds a GPU's memory; on the CPU both are there and take steps in turn
    command = [sys.executable, __file__, "--device", args.device, "--side"]
    groups = [SIDES] if args.device == "cpu" else [(name,) for name in SIDES]
    steps: dict[str, list[dict]] = {name: [] for name in SIDES}
    for group in groups:
        sides = [Side(f"distill {name}", [*command, name], args.threads) for name in group]
        for side in sides:
            side.answer()
        for turn in range(args.warmup + args.turns):
            for name, side in zip(group, sides, strict=True):
                found = side.step()
                steps[name].append(found)
                console.print(f"{name:5} step {turn + 1}: {found['seconds']:.2f} s, {found['added_mib']:,.0f} MiB")
        for side in sides:
            side.close()
    seconds = {name: median(s["seconds"] for s in found[args.warmup :]) for name, found in steps.items()}
    memory = {name: found[-1]["added_mib"] for name, found in steps.items()}
    apart = abs(steps["ours"][0]["loss"] - steps["plain"][0]["loss"]) / steps["plain"][0]["loss"]
    time_ratio, memory_ratio = seconds["ours"] / seconds["plain"], memory["ours"] / memory["plain"]
    result = {"device": args.device, "seconds": seconds, "mib": memory, "steps": steps}
    (WORK / "distill.json").write_text(json.dumps(result, indent=1))
    console.print(f"step: {seconds['ours']:.2f} s in chunks, {seconds['plain']:.2f} s plain: {time_ratio:.2f}x")
    console.print(f"memory: {memory['ours']:,.0f} MiB in chunks, {memory['plain']:,.0f} MiB plain: {memory_ratio:.2f}x")
    console.print(f"losses differ by {apart:.1e} of themselves")
    good = time_ratio <= MOST_TIME and memory_ratio <= MOST_MEMORY and apart < (1e-4 if args.device == "cpu" else 1e-2)
    console.print(
        f"target (at most {MOST_TIME:.2f}x and {MOST_MEMORY:.2f}x, equal losses): {'met' if good else 'MISSED'}"
    )
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
