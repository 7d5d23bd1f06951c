"""Data: preparation against `datasets` + `tokenizers`, and the sampler against megatron-core's blended dataset.

Preparation: both sides turn the same JSONL file into the same flat file of token ids (checked: equal bytes) with the
same tokenizer.json, in turn, so a machine whose speed drifts slows both; ratios are of medians. Tokenising in threads
is off: N workers are N cores. Sampler: both serve the same `.bin/.idx` files, each in a process of its own, all of
them started in turn. Writes everything measured to `.bench/data.json`.
"""

from __future__ import annotations

import argparse
import functools
import io
import json
import os
import resource
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections import OrderedDict
from pathlib import Path
from statistics import median
from types import SimpleNamespace

os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import yaml
from rich.console import Console
from rich.table import Table

from nemotron_h.data.blend import load_blend
from nemotron_h.data.feed.sampler import BlendSampler, Segment
from nemotron_h.data.indexed import write_index
from nemotron_h.data.phases import Horizon, phase_spans
from nemotron_h.data.tokenizer import train_bpe

WORK = Path(__file__).resolve().parents[2] / ".bench"
EOD, SEQ, VOCABULARY = 0, 512, 8192
DOCUMENT = 4000  # ours: characters, about a web page
console = Console()


# preparation


def write_corpus(path: Path, size: int) -> int:
    """Documents out of the Python sources of this installation: real text that needs no download.

    Returns:
        bytes of text.
    """
    folders = [Path(sysconfig.get_path("stdlib")), Path(sysconfig.get_path("purelib"))]
    done = 0
    with open(path, "w", encoding="utf-8") as out:
        for source in (file for folder in folders for file in sorted(folder.rglob("*.py"))):
            try:
                text = source.read_text(encoding="utf-8")
            except (UnicodeDecodeError, OSError):
                continue
            for start in range(0, len(text), DOCUMENT):
                if part := text[start : start + DOCUMENT].strip():
                    out.write(json.dumps({"text": part}) + "\n")
                    done += len(part.encode())
            if done >= size:
                return done
    return done


@functools.lru_cache(maxsize=1)
def library_tokenizer(path: str):
    """The tokenizers library's own reading of tokenizer.json, one for each process."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(path)
    tokenizer.encode_special_tokens = True
    return tokenizer


def encode(batch: dict, path: str) -> dict:
    """What `datasets` maps: text to ids, closed with EOD."""
    encoded = library_tokenizer(path).encode_batch_fast(batch["text"], add_special_tokens=False)
    return {"ids": [[*e.ids, EOD] for e in encoded]}


def prepare_theirs(jsonl: Path, tokenizer: Path, folder: Path, workers: int) -> Path:
    """JSONL to a flat file with `datasets` and `tokenizers`."""
    import datasets

    datasets.disable_progress_bars()
    data = datasets.load_dataset("json", data_files=str(jsonl), split="train", cache_dir=str(folder / "cache"))
    features = datasets.Features({"ids": datasets.Sequence(datasets.Value("uint16"))})
    data = data.map(
        encode, batched=True, batch_size=256, remove_columns=data.column_names, features=features,
        num_proc=workers if workers > 1 else None, fn_kwargs={"path": str(tokenizer / "tokenizer.json")},
    )  # fmt: skip
    out, lengths = folder / "train.bin", []
    with open(out, "wb") as file:
        for chunk in data.data.column("ids").chunks:
            file.write(chunk.flatten().to_numpy().tobytes())
            lengths.append(np.diff(chunk.offsets.to_numpy()))
        file.flush()
        os.fsync(file.fileno())
    write_index(folder / "train.idx", np.concatenate(lengths).astype(np.int32), np.dtype(np.uint16))
    return out


def prepare_ours(jsonl: Path, tokenizer: Path, folder: Path, workers: int) -> Path:
    """The same with `nemotron-h data prepare`'s code, hashing and manifest included."""
    from nemotron_h.data.prepare.pipeline import prepare

    blend = {
        "name": "bench",
        "tokenizer": {"kind": "bpe", "path": str(tokenizer)},
        "sources": {"code": {"category": "code", "format": "jsonl", "path": str(jsonl), "validation": 0.0}},
        "phases": [{"name": "all", "weights": {"code": 100}}],
    }
    (folder / "bench.yaml").write_text(yaml.safe_dump(blend))
    prepare(load_blend(folder / "bench.yaml"), folder, workers=workers, console=Console(file=io.StringIO()))
    return folder / "bench" / "code" / "train.bin"


def bench_preparation(work: Path, size: int, rounds: int) -> dict:
    jsonl, tokenizer = work / "text.jsonl", work / "tokenizer"
    tokenizer.mkdir()
    text_bytes = write_corpus(jsonl, size)
    with open(jsonl, encoding="utf-8") as file:
        train_bpe([json.loads(line)["text"] for line, _ in zip(file, range(1000), strict=False)], 8192, tokenizer)
    import datasets  # noqa: F401  imports are not part of the work

    import nemotron_h.data.prepare.pipeline  # noqa: F401

    sides = {"ours": prepare_ours, "datasets + tokenizers": prepare_theirs}
    seconds: dict[str, list[float]] = {f"{name}, {n}": [] for n in (1, 2) for name in sides}
    expected = tokens = None
    for turn in range(rounds):
        for workers in (1, 2):
            for name, side in sides.items():
                console.print(f"preparation, round {turn + 1} of {rounds}: {name}, {workers} workers")
                folder = Path(tempfile.mkdtemp(dir=work))
                start = time.perf_counter()
                out = side(jsonl, tokenizer, folder, workers)
                seconds[f"{name}, {workers}"].append(time.perf_counter() - start)
                content = out.read_bytes()
                expected, tokens = expected or content, len(content) // 2
                if content != expected:
                    raise SystemExit(f"{name} with {workers} workers wrote other tokens")
                shutil.rmtree(folder)
    medians = {key: median(times) for key, times in seconds.items()}
    table = Table(title=f"Preparation: {text_bytes / 1e6:.0f} MB of text, {tokens:,} tokens, {rounds} rounds, medians")
    for header in ("workers", "ours, tokens/s", "per core", "datasets + tokenizers, tokens/s", "per core", "ratio"):
        table.add_column(header, justify="right")
    for n in (1, 2):
        ours, theirs = (tokens / medians[f"{name}, {n}"] for name in sides)
        table.add_row(
            str(n), f"{ours:,.0f}", f"{ours / n:,.0f}", f"{theirs:,.0f}", f"{theirs / n:,.0f}", f"{ours / theirs:.2f}"
        )
    console.print(table)
    for name in sides:
        console.print(f"{name}: {medians[f'{name}, 1'] / medians[f'{name}, 2']:.2f} times as fast with two workers")
    return {"text_bytes": text_bytes, "tokens": tokens, "seconds": seconds}


# sampler


def write_sources(folder: Path, count: int, tokens: int) -> dict[str, str]:
    """Random `.bin/.idx` pairs; name -> prefix."""
    rng = np.random.default_rng(0)
    prefixes = {}
    for number in range(count):
        prefix = folder / f"source{number}"
        lengths = rng.integers(100, 1000, tokens // 550).astype(np.int32)
        content = rng.integers(1, VOCABULARY, int(lengths.sum())).astype(np.uint16)
        content[np.cumsum(lengths) - 1] = EOD
        content.tofile(f"{prefix}.bin")
        write_index(f"{prefix}.idx", lengths, content.dtype)
        prefixes[f"source{number}"] = str(prefix)
    return prefixes


def shares_of(names: list[str]) -> dict[str, float]:
    """Unequal shares, that sum to 1."""
    total = len(names) * (len(names) + 1) / 2
    return {name: (n + 1) / total for n, name in enumerate(names)}


def megabytes() -> float:
    """Resident memory of this process."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 1e6


def megatron_dataset(prefixes: dict[str, str], samples: int, cache: str):
    """megatron-core's blended GPT dataset over the prefixes."""
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    shares = shares_of(list(prefixes))
    tokenizer = SimpleNamespace(eod=EOD, pad=-1, unique_identifiers=OrderedDict(name="bench"))
    config = GPTDatasetConfig(
        random_seed=1, sequence_length=SEQ, blend=(list(prefixes.values()), [shares[name] for name in prefixes]),
        split="100,0,0", path_to_cache=cache, tokenizer=tokenizer, reset_position_ids=False,
        reset_attention_mask=False, eod_mask_loss=False, create_attention_mask=False,
    )  # fmt: skip
    return BlendedMegatronDatasetBuilder(GPTDataset, (samples, 0, 0), lambda: True, config).build()[0]


def our_dataset(prefixes: dict[str, str], samples: int):
    """The windows that the data module reads over the same files."""
    from nemotron_h.data.feed.datamodule import WindowDataset
    from nemotron_h.data.indexed import TokenStream

    streams = {name: TokenStream(prefix, VOCABULARY) for name, prefix in prefixes.items()}
    tokens = {name: stream.tokens for name, stream in streams.items()}
    sampler = BlendSampler([Segment("all", 0, samples, shares_of(list(prefixes)))], tokens, SEQ, seed=1)
    return WindowDataset(sampler, streams, SEQ, samples, True)


def serve(side: str, prefixes: dict[str, str], samples: int, reads: int, cache: str) -> dict:
    """Start up and read consecutive samples from the middle of the run; what a rank does. Runs in its own process."""
    if side == "ours":
        import nemotron_h.data.feed.datamodule  # noqa: F401
    else:
        import megatron.core.datasets.blended_megatron_dataset_builder
        import megatron.core.datasets.gpt_dataset  # noqa: F401
        import torch

        store = torch.distributed.HashStore()
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)  # it asks for its rank
    before, start = megabytes(), time.perf_counter()
    data = our_dataset(prefixes, samples) if side == "ours" else megatron_dataset(prefixes, samples, cache)
    item = data[samples // 2]
    ready, grown = time.perf_counter() - start, megabytes() - before
    if tuple(item["tokens"].shape) != (SEQ,):
        raise SystemExit(f"{side}: samples of shape {tuple(item['tokens'].shape)}")
    times = []
    first = samples // 2 + 1
    for chunk in range(first, first + reads, 1000):
        start = time.perf_counter()
        for number in range(chunk, chunk + 1000):
            _ = data[number]
        times.append((time.perf_counter() - start) / 1000 * 1e6)
    index = sum(f.stat().st_size for f in Path(cache).rglob("*") if f.is_file()) if side != "ours" else 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6 - before
    return {"start": ready, "memory": grown, "peak": peak, "index": index / 1e6, "sample": median(times)}


def large_plan(sources: int, tokens: int, reads: int) -> dict:
    """Our sampler alone over the paper's phases: many sources and a long horizon. Runs in its own process."""
    names = [f"source{n}" for n in range(sources)]
    shares, blend = shares_of(names), load_blend("nemotron_h")
    sizes = {name: int(tokens / 2 * shares[name]) for name in names}
    before, start = megabytes(), time.perf_counter()
    spans = phase_spans(blend.phases, Horizon(tokens, 8192 * 768))
    segments = []
    for n, span in enumerate(spans):
        turned = dict(zip(names[n:] + names[:n], shares.values(), strict=True))  # each phase with other shares
        segments.append(Segment(span.name, span.first_step * 768, span.end_step * 768, turned))
    sampler = BlendSampler(segments, sizes, 8192, seed=1)
    middle = segments[2].first - reads // 2
    _ = sampler[middle]
    ready, grown = time.perf_counter() - start, megabytes() - before
    start = time.perf_counter()
    for number in range(middle, middle + reads):
        _ = sampler[number]
    each = (time.perf_counter() - start) / reads * 1e6
    return {"start": ready, "memory": grown, "process": megabytes(), "sample": each, "samples": segments[-1].end}


def in_process(**job: object) -> dict:
    """Run `serve` or `large_plan` in a process of its own."""
    line = [sys.executable, __file__, "--job", json.dumps(job)]
    done = subprocess.run(line, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise SystemExit(f"{job}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def bench_sampler(work: Path, samples: int, reads: int, rounds: int) -> dict:
    prefixes = write_sources(work, 10, 4_000_000)
    results: dict[str, list[dict]] = {"ours": [], "megatron-core, first start": [], "megatron-core, cached": []}
    for turn in range(rounds):
        cache = str(work / f"cache{turn}")
        for name, collected in results.items():
            console.print(f"sampler, round {turn + 1} of {rounds}: {name}")
            side = "ours" if name == "ours" else "megatron"
            job = {"side": side, "prefixes": prefixes, "samples": samples, "reads": reads, "cache": cache}
            collected.append(in_process(**job))
        shutil.rmtree(cache)
    results["ours, 1,000 sources, 20T tokens"] = [
        in_process(sources=1000, tokens=20 * 10**12, reads=reads) for _ in range(rounds)
    ]
    table = Table(title=f"Sampler: 10 sources, {samples:,} samples of {SEQ} tokens, medians of {rounds}")
    for header in ("", "start-up", "memory of it", "peak of it", "index on disk", "per sample"):
        table.add_column(header, justify="right" if header else "left")
    for name, runs in results.items():
        m = {key: median(run[key] for run in runs) for key in runs[0]}
        peak = f"{m['peak']:.0f} MB" if "peak" in m else f"{m['process']:.0f} MB the process"
        disk = f"{m['index']:.0f} MB" if "index" in m else "0 MB"
        table.add_row(name, f"{m['start']:.3f} s", f"{m['memory']:.1f} MB", peak, disk, f"{m['sample']:.1f} µs")
    console.print(table)
    console.print(
        "Per sample: the item with its tokens, from a warm page cache. The last row: the sampler alone, no tokens read."
    )
    return results


def main() -> None:
    """Measure, print, and write `.bench/data.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small text, one round: does it work")
    parser.add_argument("--only", choices=("preparation", "sampler"), help="one of the two")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        job = json.loads(args.job)
        print(json.dumps(serve(**job) if "side" in job else large_plan(**job)))
        return
    WORK.mkdir(exist_ok=True)
    load = os.getloadavg()
    console.print(f"{os.cpu_count()} cores, load {load[0]:.1f} before the start (0 is an idle machine)")
    measured: dict = {"load": load, "quick": args.quick}
    rounds = 1 if args.quick else 3
    for name in ("preparation", "sampler"):
        if args.only in (None, name):
            with tempfile.TemporaryDirectory(dir=WORK, prefix="data-") as folder:
                if name == "preparation":
                    measured[name] = bench_preparation(Path(folder), 4_000_000 if args.quick else 64_000_000, rounds)
                else:
                    size, reads = (100_000, 2_000) if args.quick else (1_000_000, 20_000)
                    measured[name] = bench_sampler(Path(folder), size, reads, rounds)
    measured["load_after"] = os.getloadavg()
    console.print(f"load {measured['load_after'][0]:.1f} at the end (what ran here included)")
    (WORK / "data.json").write_text(json.dumps(measured, indent=1) + "\n")


if __name__ == "__main__":
    main()
