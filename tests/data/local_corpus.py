"""A small local blend: JSONL, JSON, text and Python files that the data tests prepare."""

from __future__ import annotations

import json
import random
from pathlib import Path

import yaml

SYLLABLES = ["sta", "te", "mo", "del", "to", "ken", "lay", "er", "norm", "con", "vo", "lu", "tion", "gra", "di", "ent"]
WORDS = [a + b for a in SYLLABLES for b in SYLLABLES]


def sentences(seed: int, count: int) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(3, 60))) + f" {seed}.{n}" for n in range(count)]


def write_jsonl(path: Path, texts: list[str]) -> None:
    path.write_text(
        "".join(json.dumps({"text": text, "id": n}) + "\n" for n, text in enumerate(texts)), encoding="utf-8"
    )


class Corpus:
    """A folder with sources and a blend; `blend()` writes the YAML and loads it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.root = folder / "prepared"
        write_jsonl(folder / "web.jsonl", sentences(1, 6000))
        write_jsonl(folder / "more.jsonl", sentences(2, 300))
        (folder / "wiki.txt").write_text("\n".join(sentences(3, 400)), encoding="utf-8")
        (folder / "code").mkdir()
        for n in range(20):
            (folder / "code" / f"m{n}.py").write_text(f"def f{n}(x):\n    return x + {n}\n", encoding="utf-8")
        self.content = {
            "name": "local",
            "tokenizer": {"kind": "bpe", "vocab_size": 400, "train_on": ["wiki"], "train_bytes": "1M"},
            "sources": {
                "web": {"category": "web", "format": "jsonl", "path": "web.jsonl", "validation": 0.05},
                "more": {"category": "web", "format": "jsonl", "path": "more.jsonl", "validation": 0.05},
                "wiki": {"category": "wiki", "format": "text", "split_on": "\n", "path": "wiki.txt"},
                "code": {"category": "code", "format": "python", "path": "code", "validation": 0.2},
            },
            "phases": [
                {"name": "one", "weights": {"web": 70, "wiki": 10, "code": 20}, "until": {"fraction": 0.6}},
                {"name": "two", "weights": {"web": 50, "wiki": 30, "code": 20}},
            ],
        }

    @property
    def prepared(self) -> Path:
        return self.root / "local"

    def write(self) -> Path:
        path = self.folder / "local.yaml"
        path.write_text(yaml.safe_dump(self.content, sort_keys=False), encoding="utf-8")
        return path

    def blend(self):
        from nemotron_h.data.blend import load_blend

        return load_blend(self.write())

    def prepare(self, **options):
        from rich.console import Console

        from nemotron_h.data.prepare.pipeline import prepare

        with open(self.folder / "log.txt", "w", encoding="utf-8") as log:
            options = {"root": self.root, "workers": 1, "console": Console(file=log, width=200), **options}
            return prepare(self.blend(), **options)

    @property
    def log(self) -> str:
        return (self.folder / "log.txt").read_text(encoding="utf-8")


def snapshot(folder: Path) -> dict[str, bytes]:
    """File -> content of a prepared blend, without the lock and the caches at its top."""
    files = [p for p in sorted(folder.rglob("*")) if p.is_file()]
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in files if p.parent != folder or p.name == "manifest.json"
    }
