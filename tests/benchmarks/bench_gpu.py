"""The 8B's layers on one H100: speed of our model and of NeMo's own, where a step's time goes, checkpoint and resume.

    python tests/benchmarks/bench_gpu.py --out OUT                      # one GPU
    python tests/benchmarks/bench_gpu.py --out OUT --only parallel      # two GPUs
    python tests/benchmarks/bench_gpu.py --out OUT --small              # a dry run of the same code, on the CPU too

The model is `nemotron_h_8b` with its pattern cut to 13 layers (6 Mamba-2, 6 FFN, 1 attention: its ratio) so that it
fits one GPU with its optimizer. All sides take the same steps on the same random tokens (`gpu_sides.py` says what a
step is); they are built and timed in turn, in one order and then in the reverse. Each result is printed as a line of
JSON and kept in OUT/results.jsonl; a section that fails prints its error, and the others go on.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from results import Report

CACHE = Path(tempfile.gettempdir()) / "nemotron_h_triton"
os.environ.setdefault("TRITON_CACHE_DIR", str(CACHE))
os.environ.setdefault("TRITON_CACHE_AUTOTUNING", "1")
# NVLink multicast stays off: hosts that share their GPUs forbid it
os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
os.environ.setdefault("NVSHMEM_DISABLE_NVLS", "1")

PRECISIONS = ("bf16", "fp8_current_scaling")
SECTIONS = ("gemm", "speed", "profile", "checkpoint", "recompute")
#: tokens per chunk of the scan, tried by the section `scan`
CHUNKS = (64, 128, 256)
#: 6 : 6 : 1 of the 8B's 24 : 24 : 4 as nearly as one attention layer allows, in the order that the 8B begins with
PATTERN = "M-M-M-M*-M-M-"
WIDTHS = (
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "mamba_num_heads",
    "mamba_head_dim",
    "mamba_num_groups",
    "mamba_state_dim",
)


#: what the command line changes of the shape
CHOSEN: dict[str, Any] = {}


def shape_of(small: bool):
    """The 8B's widths at 13 layers; a dry run has a hundredth of them."""
    from gpu_sides import Shape

    from nemotron_h.recipe.compose import compose

    model = compose("nemotron_h_8b/pretrain").model
    widths = {name: getattr(model, name) for name in WIDTHS} | {"kv_channels": model.head_dim}
    if small:
        little = (64, 96, 4, 2, 8, 16, 2, 16, 16)
        widths = dict(zip(widths, little, strict=True))
    return Shape(
        pattern=PATTERN,
        widths=widths,
        vocab_size=512 if small else model.vocab_size,
        seq_length=128 if small else 8192,
        micro_batches=2 if small else 4,
    ).changed(**CHOSEN)


def peaks() -> dict[str, float]:
    """Operations and bytes per second that the GPU's data sheet states; the H100's for a dry run."""
    import torch

    from nemotron_h.planning.gpus import gpu
    from nemotron_h.training.callbacks.progress import gpu_of

    sheet = gpu_of(torch.cuda.get_device_name()) if torch.cuda.is_available() else gpu("h100")
    if sheet is None:
        raise SystemExit(f"no data sheet of {torch.cuda.get_device_name()} in configs/gpus.yaml: no MFU can be given")
    return {"bf16": sheet.peak("bf16"), "fp8": sheet.peak("fp8"), "bandwidth": sheet.bandwidth_gb_s * 1e9}


def step_flops(shape, definition) -> float:
    """Exact operations of a step (`nemotron_h.planning.flops`)."""
    from nemotron_h.planning.flops import flops_per_token

    return flops_per_token(definition, shape.seq_length, training=True).total * shape.tokens


def summary(shape, definition, name: str, seconds: list[float], peak_gib: float) -> dict[str, Any]:
    """Median step as tokens/s, TFLOP/s and MFU."""
    second, flops, peak = median(seconds), step_flops(shape, definition), peaks()
    gemm = "fp8" if "fp8" in name else "bf16"
    return {
        "name": name,
        "step_s": round(second, 4),
        "steps_s": [round(s, 4) for s in seconds],
        "tokens_per_s": round(shape.tokens / second),
        "tflops": round(flops / second / 1e12, 1),
        "mfu_of_gemm_dtype": round(flops / second / peak[gemm], 4),
        "mfu_of_bf16": round(flops / second / peak["bf16"], 4),
        "peak_gib": round(peak_gib, 2),
    }


def gemm(report: Report, args: argparse.Namespace) -> None:
    """What the largest products of the model reach alone, in BF16 with torch: the practical ceiling."""
    import torch

    shape = shape_of(args.small)
    hidden, ffn = shape.widths["hidden_size"], shape.widths["ffn_hidden_size"]
    inner = shape.widths["mamba_num_heads"] * shape.widths["mamba_head_dim"]
    groups = 2 * shape.widths["mamba_num_groups"] * shape.widths["mamba_state_dim"]
    outputs = {
        "in_proj": (hidden, 2 * inner + groups + shape.widths["mamba_num_heads"]),
        "out_proj": (inner, hidden),
        "fc1": (hidden, ffn),
        "fc2": (ffn, hidden),
        "head": (hidden, shape.vocab_size),
    }
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for name, (inputs, width) in outputs.items():
        a = torch.randn(shape.seq_length, inputs, device=device, dtype=torch.bfloat16)
        b = torch.randn(inputs, width, device=device, dtype=torch.bfloat16)
        times = []
        for _ in range(8):
            sync_device()
            began = time.perf_counter()
            a @ b
            sync_device()
            times.append(time.perf_counter() - began)
        flops = 2 * shape.seq_length * inputs * width
        report.add("gemm", name=name, tflops=round(flops / median(times[3:]) / 1e12, 1))


def scan(report: Report, args: argparse.Namespace) -> None:
    """The mixer's fused kernel alone, forward and backward, by the length of the scan's chunks."""
    import torch

    from nemotron_h.ops.select import KERNEL_CHUNK, select_ops

    fused = select_ops().fused_mixer
    if fused is None:
        report.add("scan", left_out="there are no kernels here")
        return
    shape = shape_of(args.small)
    w, rng = shape.widths, torch.Generator("cuda").manual_seed(0)
    heads, groups = w["mamba_num_heads"], w["mamba_num_groups"]
    inner, states = heads * w["mamba_head_dim"], 2 * groups * w["mamba_state_dim"]

    def normal(*size: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.randn(*size, device="cuda", generator=rng, dtype=dtype).requires_grad_()

    inputs = [
        normal(1, shape.seq_length, 2 * inner + states + heads),
        normal(inner + states, 4),
        normal(inner + states),
        normal(heads, dtype=torch.float32),
        (-1 - torch.rand(heads, device="cuda", generator=rng)).requires_grad_(),
        normal(heads, dtype=torch.float32),
        normal(inner),
    ]
    upstream = torch.randn(1, shape.seq_length, inner, device="cuda", generator=rng, dtype=torch.bfloat16)
    results: dict[int, list[torch.Tensor]] = {}
    for chunk in CHUNKS:
        times: dict[str, list[float]] = {"forward": [], "backward": []}
        for _ in range(10):
            sync_device()
            began = time.perf_counter()
            out = fused(*inputs, head_dim=w["mamba_head_dim"], groups=groups, chunk_size=chunk)
            sync_device()
            times["forward"].append(time.perf_counter() - began)
            began = time.perf_counter()
            gradients = torch.autograd.grad(out, inputs, upstream)
            sync_device()
            times["backward"].append(time.perf_counter() - began)
        results[chunk] = [out.detach(), *gradients]
        report.add("scan", chunk=chunk, **{f"{name}_ms": round(median(t[3:]) * 1e3, 3) for name, t in times.items()})
    for chunk, found in results.items():
        gaps = [float((a - b).norm() / b.norm()) for a, b in zip(found, results[KERNEL_CHUNK], strict=True)]
        report.add("scan", chunk=chunk, relative_difference=[f"{gap:.1e}" for gap in gaps])


def replaced(report: Report, args: argparse.Namespace) -> None:
    """Our launch of the gated norm's backward and our embedding gradient, each against the library's own."""
    from gpu_replaced import embedding_gradient, gated_norm_backward

    from nemotron_h.ops.select import select_ops

    shape = shape_of(args.small)
    if select_ops().fused_mixer is None:
        report.add("replaced", left_out="gated norm: there are no kernels here")
    else:
        for found in gated_norm_backward(shape):
            report.add("replaced", **found)
    for found in embedding_gradient(shape):
        report.add("replaced", **found)


def sync_device() -> None:
    """Wait for the device."""
    from gpu_sides import sync

    sync()


def sides_of(args: argparse.Namespace) -> dict[str, tuple[Callable, str, dict[str, Any]]]:
    """Name -> maker, precision, further fields."""
    import gpu_sides
    import torch

    found: dict[str, tuple[Callable, str, dict[str, Any]]] = {}
    for precision in args.precisions:
        memory = {"moments": args.moments, "gradients": args.gradients}
        found[f"ours {precision}"] = (gpu_sides.ours, precision, memory | dict(args.set))
        if torch.cuda.is_available():  # NeMo's layers run on GPUs alone
            found[f"stock {precision}"] = (gpu_sides.stock, precision, {})
    return {name: side for name, side in found.items() if not args.sides or name.split()[0] in args.sides}


def speed(report: Report, args: argparse.Namespace) -> None:
    """Steps of every side in turn, then again in the reverse order."""
    from gpu_sides import Result, Side

    shape, sides = shape_of(args.small), sides_of(args)
    results = {name: Result(name) for name in sides}
    definition = None
    for turn in range(args.rounds):
        order = list(sides) if turn % 2 == 0 else list(reversed(sides))
        for name in order:
            if turn and report.elapsed() > args.budget:
                report.add("speed", name=name, left_out=f"round {turn + 1}: {args.budget} s are over")
                continue
            maker, precision, changes = sides[name]
            with guarded(report, f"speed: {name}") as keep:
                side = keep(Side(maker, shape, precision, **changes))
                definition = definition or side.definition()
                for _ in range(args.warmup + args.steps):
                    side.step()
                result = results[name]
                result.seconds += side.seconds[args.warmup :]
                result.losses = side.losses
                result.peak_gib = max(result.peak_gib, side.peak_gib())
                result.parameters = side.parameters
                result.first_step_seconds = result.first_step_seconds or side.seconds[0]
                report.add(
                    "round",
                    turn=turn + 1,
                    shape=name_of(shape),
                    parameters=side.parameters,
                    build_s=round(side.build_seconds, 1),
                    first_step_s=round(side.seconds[0], 1),
                    losses=[round(x, 4) for x in side.losses],
                    grad_norm=round(side.grad_norm, 4),
                    **summary(shape, definition, name, side.seconds[args.warmup :], side.peak_gib()),
                )
    done = {name: r for name, r in results.items() if r.seconds}
    for name, result in done.items():
        report.add(
            "speed", parameters=result.parameters, **summary(shape, definition, name, result.seconds, result.peak_gib)
        )
    ratios(report, shape)
    print(table(done, shape, definition), flush=True)


def name_of(shape) -> str:
    """What two rounds have in common that can be compared."""
    return f"{shape.pattern} {shape.micro_batches} x {shape.seq_length}"


def ratios(report: Report, shape) -> None:
    """Of the medians of all rounds of this shape in OUT, an earlier process's too."""
    seconds: dict[str, list[float]] = defaultdict(list)
    for line in (report.out / "results.jsonl").read_text().splitlines():
        found = json.loads(line)
        if found["section"] == "round" and found.get("shape") == name_of(shape):
            seconds[found["name"]] += found["steps_s"]
    for a, b in (
        ("ours bf16", "stock bf16"),
        ("ours fp8_current_scaling", "stock fp8_current_scaling"),
        ("ours fp8_current_scaling", "ours bf16"),
        ("stock fp8_current_scaling", "stock bf16"),
    ):
        if a in seconds and b in seconds:
            report.add("ratio", faster=a, than=b, by=round(median(seconds[b]) / median(seconds[a]), 3))


def table(done: dict, shape, definition) -> str:
    """The speed section for the documentation."""
    lines = [
        f"{shape.micro_batches} x {shape.seq_length} tokens per step, pattern {shape.pattern}",
        "| | tokens/s | TFLOP/s | MFU (GEMM dtype) | MFU (BF16) | peak GiB | steps |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, result in done.items():
        s = summary(shape, definition, name, result.seconds, result.peak_gib)
        lines.append(
            f"| {name} | {s['tokens_per_s']:,} | {s['tflops']:.0f} | {s['mfu_of_gemm_dtype']:.1%} | "
            f"{s['mfu_of_bf16']:.1%} | {s['peak_gib']:.1f} | {len(result.seconds)} |"
        )
    return "\n".join(lines)


def profile(report: Report, args: argparse.Namespace) -> None:
    """Two steps of each side under the profiler: kernels by part, against the least time each part can take."""
    import torch
    from gpu_kernels import OTHER, floors, part_of
    from gpu_sides import Side
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    shape, on_gpu = shape_of(args.small), torch.cuda.is_available()
    for name, (maker, precision, changes) in sides_of(args).items():
        if report.elapsed() > args.budget:
            report.add("profile", name=name, left_out=f"{args.budget} s are over")
            continue
        with guarded(report, f"profile: {name}") as keep:
            side = keep(Side(maker, shape, precision, **changes))
            for _ in range(2):
                side.step()
            activities = [ProfilerActivity.CUDA] if on_gpu else [ProfilerActivity.CPU]
            with profiler(activities=activities) as profiled:
                for _ in range(2):
                    side.step()
            parts: dict[str, float] = defaultdict(float)
            kernels: dict[str, list[tuple[str, float, int]]] = defaultdict(list)
            for event in profiled.key_averages():
                if on_gpu and event.device_type != DeviceType.CUDA:
                    continue
                seconds = (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 2e6
                part = part_of(event.key)
                parts[part] += seconds
                kernels[part].append((event.key[:120], round(seconds * 1e3, 3), event.count // 2))
            wall, busy = median(side.seconds[-2:]), sum(parts.values())
            floor = floors(side.definition(), shape.seq_length, shape.micro_batches, "fp8" in precision, peaks())
            rows = []
            for part, seconds in sorted(parts.items(), key=lambda item: -item[1]):
                least = floor.get(part)
                rows.append([part, seconds * 1e3, seconds / busy, least and least * 1e3, least and least / seconds])
            top = {part: sorted(found, key=lambda k: -k[1])[:6] for part, found in kernels.items()}
            report.add(
                "profile",
                name=name,
                wall_ms=round(wall * 1e3, 1),
                busy_ms=round(busy * 1e3, 1),
                parts_ms={row[0]: round(row[1], 2) for row in rows},
                floors_ms={part: round(value * 1e3, 2) for part, value in floor.items()},
            )
            (report.out / f"kernels_{name.replace(' ', '_')}.json").write_text(json.dumps(top, indent=1))
            print(f"{name}: {wall * 1e3:.0f} ms a step, kernels {busy * 1e3:.0f} ms")
            print("| part | ms | share | least ms | of roofline |\n|---|---|---|---|---|")
            for part, ms, share, least, roof in rows:
                bound = f"{least:,.1f} | {roof:.0%}" if least else " | "
                print(f"| {part} | {ms:,.1f} | {share:.1%} | {bound} |")
            for key, ms, count in top.get(OTHER, []):
                print(f"  unclassified: {ms} ms x{count} {key}")
            sys.stdout.flush()


def recompute(report: Report, args: argparse.Namespace) -> None:
    """Each setting of selective recompute: same loss and gradient norm, less memory, at what price."""
    from gpu_sides import Side, ours

    shape = shape_of(args.small).changed(micro_batches=1)
    settings: dict[str, dict[str, str]] = {
        "none": {},
        "mamba": {"recompute_mamba": "layer"},
        "ffn activation": {"recompute_ffn": "activation"},
        "ffn": {"recompute_ffn": "layer"},
        "attention": {"recompute_attention": "layer"},
        "all": {f"recompute_{part}": "layer" for part in ("mamba", "ffn", "attention")},
    }
    for precision, names in (("bf16", list(settings)), ("fp8_current_scaling", ["none", "ffn activation", "all"])):
        for name in names:
            if report.elapsed() > args.budget:
                report.add("recompute", name=name, left_out=f"{args.budget} s are over")
                continue
            with guarded(report, f"recompute: {name}") as keep:
                side = keep(Side(ours, shape, precision, **settings[name]))
                for _ in range(4):
                    side.step()
                report.add(
                    "recompute",
                    name=name,
                    precision=precision,
                    losses=side.losses,
                    grad_norm=side.grad_norm,
                    step_s=round(median(side.seconds[2:]), 4),
                    peak_gib=round(side.peak_gib(), 2),
                )


def checkpoint(report: Report, args: argparse.Namespace) -> None:
    """Three steps, a checkpoint, three more; then the last three again from the checkpoint, across precisions too.

    The 8B's widths at 5 layers and a small vocabulary, so that the checkpoint is written in seconds.
    """
    from gpu_sides import Side, ours

    shape = shape_of(args.small).changed(pattern="M-M*-", micro_batches=1)
    shape = shape.changed(vocab_size=min(shape.vocab_size, 16384))
    folder = Path(tempfile.mkdtemp())
    resumes = {"bf16": ["bf16"], "fp8_current_scaling": ["fp8_current_scaling", "bf16"]}
    try:
        for saved, precisions in resumes.items():
            straight = Side(ours, shape, saved)
            for _ in range(3):
                straight.step()
            began = time.perf_counter()
            straight.save(folder / saved)
            save_s = time.perf_counter() - began
            size = sum(f.stat().st_size for f in (folder / saved).rglob("*") if f.is_file())
            for _ in range(3):
                straight.step()
            expected = straight.losses[3:]
            straight.close()
            for resumed in precisions:
                again = Side(ours, shape, resumed, init_seed=7)
                began = time.perf_counter()
                again.load(folder / saved)
                load_s = time.perf_counter() - began
                for _ in range(3):  # the batches of the first three steps
                    next(again.data)
                for _ in range(3):
                    again.step()
                report.add(
                    "checkpoint",
                    saved=saved,
                    resumed=resumed,
                    straight=expected,
                    after_resume=again.losses,
                    largest_difference=max(abs(a - b) for a, b in zip(expected, again.losses, strict=True)),
                    equal=expected == again.losses,
                    save_s=round(save_s, 1),
                    load_s=round(load_s, 1),
                    gib=round(size / 2**30, 2),
                )
                again.close()
                free()
            shutil.rmtree(folder / saved)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


LAYOUTS = {
    1: {"one": {}},
    2: {
        "tp2": {"tensor": 2},
        "tp2sp": {"tensor": 2, "sequence": True},
        "tp2sp recompute": {"tensor": 2, "sequence": True},
        "dp2": {},
        "dp2 overlap": {"overlap": True},
    },
}


def parallel_worker(report: Report, args: argparse.Namespace) -> None:
    """This rank's part of every layout of so many ranks; rank 0 reports."""
    import torch
    from gpu_sides import ONE, Layout, Side, ours, start

    start(ONE)
    ranks = torch.distributed.get_world_size()
    shape = shape_of(args.small).changed(pattern="M-M*-")
    shape = shape.changed(vocab_size=min(shape.vocab_size, 32768), seq_length=min(shape.seq_length, 4096))
    for name, values in LAYOUTS[ranks].items():
        for precision in ("bf16", "fp8_current_scaling"):
            layout = Layout(**values)
            data_ranks = ranks // layout.tensor
            again = {f"recompute_{part}": "layer" for part in ("mamba", "ffn", "attention")}
            changes = again if name.endswith("recompute") else {}
            side = Side(ours, shape.changed(micro_batches=4 // data_ranks), precision, layout, **changes)
            for _ in range(6):
                side.step()
            if torch.distributed.get_rank() == 0:
                report.add(
                    "parallel",
                    layout=name,
                    precision=precision,
                    losses=side.losses,
                    grad_norm=side.grad_norm,
                    step_s=round(median(side.seconds[2:]), 4),
                    peak_gib=round(side.peak_gib(), 2),
                )
            side.close()
            free()
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def parallel(report: Report, args: argparse.Namespace) -> None:
    """One rank, then two: losses of every layout against one rank's."""
    environment = {**os.environ, "OMP_NUM_THREADS": "4"}
    small = ["--small"] if args.small else []
    for ranks in (1, 2):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        command += [__file__, "--out", str(args.out), "--only", "parallel-worker", *small]
        done = subprocess.run(command, env=environment, timeout=420)
        if done.returncode:
            report.add("parallel", ranks=ranks, failed=done.returncode)
    found = [json.loads(line) for line in (report.out / "results.jsonl").read_text().splitlines()]
    runs = {(r["layout"], r["precision"]): r for r in found if r["section"] == "parallel" and "losses" in r}
    print("| layout | precision | largest relative difference of a loss from one GPU | gradient norm | step s |")
    print("|---|---|---|---|---|")
    for (layout, precision), run in runs.items():
        one = runs.get(("one", precision))
        if one is None:
            continue
        gap = max(abs(a - b) / abs(b) for a, b in zip(run["losses"], one["losses"], strict=True))
        print(f"| {layout} | {precision} | {gap:.1e} | {run['grad_norm']:.4f} | {run['step_s']} |", flush=True)
        report.add("parallel equality", layout=layout, precision=precision, largest_relative_difference=gap)


def free() -> None:
    """Collect what a failed side left."""
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextmanager
def guarded(report: Report, where: str) -> Iterator[Callable]:
    """Report an error and go on. Gives a function that takes a side and returns it; it is closed at the end."""
    try:
        with ExitStack() as stack:

            def keep(side):
                stack.callback(side.close)
                return side

            yield keep
    except Exception:
        failed(report, where)
    free()


def failed(report: Report, where: str) -> None:
    """Print the error that is being handled, and go on."""
    text = traceback.format_exc()
    print(text, flush=True)
    report.add("failed", where=where, error=text.strip().splitlines()[-1][:500])


def unpack_cache(file: Path | None) -> None:
    """Compiled kernels of an earlier run."""
    if file is not None and file.is_file():
        with tarfile.open(file) as archive:
            archive.extractall(Path(os.environ["TRITON_CACHE_DIR"]), filter="data")
        print(f"compiled kernels from {file}")


def pack_cache(out: Path) -> None:
    """Compiled kernels for the next run, as one file."""
    folder = Path(os.environ["TRITON_CACHE_DIR"])
    if folder.is_dir() and any(folder.iterdir()):
        with tarfile.open(out / "triton.tar.xz", "w:xz", preset=1) as archive:  # the default takes a minute
            archive.add(folder, arcname=".")


def setting(text: str) -> tuple[str, Any]:
    """FIELD=VALUE; the value is JSON, or text."""
    name, _, value = text.partition("=")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for results, kernel tables, compiled kernels")
    parser.add_argument(
        "--only",
        nargs="+",
        choices=(*SECTIONS, "scan", "replaced", "parallel", "parallel-worker"),
        default=SECTIONS,
        help="sections, in this order (default: all of one GPU's)",
    )
    parser.add_argument("--small", action="store_true", help="a dry run: tiny widths, numbers mean nothing")
    parser.add_argument("--sides", nargs="+", choices=("ours", "stock"), help="leave the other side out")
    parser.add_argument(
        "--precisions",
        nargs="+",
        choices=PRECISIONS,
        default=PRECISIONS,
        help="one alone where the GPU has no room for what the other leaves; ratios are of all that OUT has",
    )
    parser.add_argument("--pattern", help=f"other layers than {PATTERN}, where the GPU has room for them")
    parser.add_argument("--vocab-size", type=int, help="of the output matrix, always BF16")
    parser.add_argument(
        "--set",
        nargs="+",
        type=setting,
        default=(),
        metavar="FIELD=VALUE",
        help="fields of our configuration, such as recompute_ffn=activation",
    )
    for key, what in (("moments", "Adam's moments"), ("gradients", "gradient sums")):
        parser.add_argument(f"--{key}", choices=("fp32", "bf16"), default="fp32", help=f"of {what}, our sides alone")
    parser.add_argument("--micro-batches", type=int, help="sequences per step (default 4)")
    parser.add_argument("--rounds", type=int, default=2, help="times that each side is built and timed (default 2)")
    parser.add_argument("--warmup", type=int, default=3, help="untimed steps of a round (default 3)")
    parser.add_argument("--steps", type=int, default=6, help="timed steps of a round (default 6)")
    parser.add_argument("--budget", type=float, default=400, help="start nothing optional after so many seconds")
    parser.add_argument("--triton-cache", type=Path, help="a triton.tar.xz that an earlier run wrote")
    return parser.parse_args()


def main() -> None:
    """Run the sections; each is guarded."""
    args = arguments()
    for key in ("pattern", "vocab_size", "micro_batches"):
        if getattr(args, key) is not None:
            CHOSEN[key] = getattr(args, key)
    report = Report(args.out)
    if "parallel-worker" not in args.only:
        unpack_cache(args.triton_cache)
    if "parallel" not in args.only:
        import torch
        from gpu_sides import ON_GPU, start

        if "parallel-worker" not in args.only:
            start()
            report.add(
                "machine",
                gpu=torch.cuda.get_device_name() if ON_GPU else "none",
                torch=torch.__version__,
                peaks=peaks(),
                imports_s=round(report.elapsed(), 1),
            )
    sections = {
        "gemm": gemm,
        "scan": scan,
        "replaced": replaced,
        "speed": speed,
        "profile": profile,
        "recompute": recompute,
        "checkpoint": checkpoint,
        "parallel": parallel,
        "parallel-worker": parallel_worker,
    }
    for name in args.only:
        try:
            sections[name](report, args)
        except Exception:
            failed(report, name)
            if name == "parallel-worker":
                raise
    if not {"parallel", "parallel-worker"} & set(args.only):
        pack_cache(args.out)


if __name__ == "__main__":
    main()
