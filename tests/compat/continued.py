"""What follows from the written runs: their texts and exports, their steps after a resume, the tensors at the end.

Used by `write.py` on the tree that wrote the runs, and by `test_written_before.py` on every tree after it.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from forks import FORKS

WORKER = Path(__file__).parents[1] / "training" / "worker.py"
COMMANDS = Path(__file__).with_name("commands.py")

#: name of a run -> the step of its written checkpoint, and its last one
STEPS = {"small": (4, 8), "small_lora": (2, 4)}
BASE, ADAPTER = (f"runs/{run}/checkpoints/step-{stop:06d}" for run, (stop, _) in STEPS.items())

PROMPTS = ("abc de", "hgf fed cab")
GREEDY = ("--temperature", "0", "--max-tokens", "24", "--json", "--device", "cpu")


def processor() -> dict[str, str]:
    """Return what the last bit of a sum depends on here: torch, its instruction set, and the CPU's own.

    The libraries below torch choose their kernels by themselves, so torch's word for the instruction set is not enough.
    """
    info = Path("/proc/cpuinfo")
    fields = dict(line.split(":", 1) for line in info.read_text().splitlines() if ":" in line) if info.is_file() else {}
    fields = {key.strip(): value.strip() for key, value in fields.items()}
    wide = [flag for flag in fields.get("flags", "").split() if flag.startswith(("avx", "amx", "fma"))]
    return {
        "torch": torch.__version__,
        "device": "cuda" if torch.cuda.is_available() else torch.backends.cpu.get_cpu_capability(),
        "vendor": fields.get("vendor_id", ""),
        "flags": " ".join(sorted(wide)),
    }


def run_program(folder: Path, program: str, *arguments: str, code: int = 0, ranks: int = 1) -> str:
    """Run a script or module in a folder as a process of its own, check its exit code; return what it printed."""
    ended = FORKS.run(program, *arguments, folder=folder, name="run", ranks=ranks)
    out, err = ((folder / f"run.{end}").read_text() for end in ("out", "err"))
    assert ended == code, f"{program} {' '.join(arguments)}: {ended}\n{out[-2000:]}{err[-4000:]}"
    return out


def orders(folder: Path, *listed: Sequence[str]) -> list[Any]:
    """Run the orders of `commands.py` in a folder; return the answer to each."""
    said = run_program(folder, str(COMMANDS), *map(json.dumps, listed))
    answers = [json.loads(line) for line in said.splitlines() if line.startswith(('"', "{"))]
    assert len(answers) == len(listed), said
    return answers


def steps_of(folder: Path, runs: str) -> dict[str, dict[str, Any]]:
    """Take what the worker noted of each step of the last run below a folder."""
    file = folder / runs / "steps.jsonl"
    records = [json.loads(line) for line in file.read_text().splitlines()]
    file.unlink()
    return {str(record.pop("step")): record for record in records}


def resumed(folder: Path, run: str) -> dict[str, dict[str, Any]]:
    """Go on with a run from the recipe in its folder; return what its steps did."""
    said = run_program(folder, str(WORKER), f"runs/{run}/recipe.yaml")
    assert f"resumed at step {STEPS[run][0]}" in said
    return steps_of(folder, "runs")


def generate(checkpoint: str, *options: str) -> tuple[str, ...]:
    """Return the order for the most probable continuations of the prompts."""
    return ("generate", checkpoint, *PROMPTS, *GREEDY, *options)


def continuations(printed: str) -> list[dict[str, Any]]:
    """Return what that order printed."""
    return [json.loads(line) for line in printed.splitlines()]


def safetensors_hashes(file: Path) -> dict[str, str]:
    """Return the hash of each tensor of a safetensors file: of its dtype, shape and bytes."""
    data = file.read_bytes()
    (length,) = struct.unpack_from("<Q", data)
    entries = json.loads(data[8 : 8 + length])
    entries.pop("__metadata__", None)
    found = {}
    for name, entry in sorted(entries.items()):
        begin, end = (8 + length + offset for offset in entry["data_offsets"])
        head = f"{entry['dtype']} {entry['shape']} "
        found[name] = hashlib.sha256(head.encode() + data[begin:end]).hexdigest()
    return found


def folder_hashes(folder: Path) -> dict[str, Any]:
    """Return the hash of each file of an export; of weights, that of each tensor."""
    return {
        file.name: safetensors_hashes(file)
        if file.suffix == ".safetensors"
        else hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.iterdir())
        if file.is_file()
    }


#: GGUF's numbers of kinds of values, and the struct format of each
_GGUF_VALUES = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
#: GGUF's numbers of dtypes, and the bytes of a number
_GGUF_BYTES = {0: 4, 1: 2, 30: 2}


class _Gguf:
    """Read a GGUF file by the format's description alone."""

    def __init__(self, data: bytes) -> None:
        self.data, self.place = data, 0

    def number(self, form: str) -> Any:
        """Return the next number."""
        self.place += struct.calcsize(form)
        return struct.unpack_from(form, self.data, self.place - struct.calcsize(form))[0]

    def text(self) -> str:
        """Return the next text."""
        length = self.number("<Q")
        self.place += length
        return self.data[self.place - length : self.place].decode()

    def value(self, kind: int) -> Any:
        """Return the next value of a kind."""
        if kind == 8:
            return self.text()
        if kind == 9:
            inner, count = self.number("<I"), self.number("<Q")
            return [self.value(inner) for _ in range(count)]
        return self.number(_GGUF_VALUES[kind])

    def tensors(self) -> Iterator[tuple[str, str]]:
        """Yield the name of each tensor, and the hash of its dtype, axes and bytes."""
        assert self.data[:4] == b"GGUF"
        self.place = 8
        tensors, values = self.number("<Q"), self.number("<Q")
        for _ in range(values):
            self.text()
            self.value(self.number("<I"))
        entries = [
            (self.text(), [self.number("<Q") for _ in range(self.number("<I"))], self.number("<I"), self.number("<Q"))
            for _ in range(tensors)
        ]
        start = -(-self.place // 32) * 32
        for name, axes, kind, offset in entries:
            begin = start + offset
            data = self.data[begin : begin + math.prod(axes) * _GGUF_BYTES[kind]]
            yield name, hashlib.sha256(f"{kind} {axes} ".encode() + data).hexdigest()


def outcome(folder: Path) -> dict[str, Any]:
    """Do everything with a copy of `written/`, which it changes.

    Returns:
        `data`: what any machine gives bit for bit; `computed`: what depends on how its processor adds.
    """
    words, talk = ("--tokenizer", "data/words/tokenizer"), ("--tokenizer", "data/talk/tokenizer")
    base, _, merged, *_, stored = orders(
        folder,
        generate(BASE, *words),
        # the adapter's record names its base by the folder where it was written
        ("merge-adapter", ADAPTER, "merged", "--base", BASE),
        generate("merged", *talk),
        ("export", "peft", ADAPTER, "peft", "--base", BASE),
        ("export", "hf", BASE, "hf", *words),
        ("export", "gguf", BASE, "small.gguf", *words),
        ("hash", f"{BASE}/weights", f"{ADAPTER}/weights", "merged/weights"),
    )
    steps = {run: resumed(folder, run) for run in STEPS}
    ends = [f"runs/{run}/checkpoints/step-{last:06d}/weights" for run, (_, last) in STEPS.items()]
    again, finished = orders(folder, generate("runs/small_lora"), ("hash", *ends))
    return {
        "data": {
            "generated": continuations(base),
            "generated by the merged adapter": continuations(merged),
            "hf": folder_hashes(folder / "hf"),
            "gguf": dict(_Gguf((folder / "small.gguf").read_bytes()).tensors()),
            "tensors": {name: stored[f"{name}/weights"] for name in (BASE, ADAPTER)},
        },
        "computed": {
            "steps": steps,
            "tensors": {
                "merged": stored["merged/weights"],
                **{end.removesuffix("/weights"): finished[end] for end in ends},
            },
            "peft": safetensors_hashes(folder / "peft" / "adapter_model.safetensors"),
            "generated by the resumed adapter": continuations(again),
        },
    }
