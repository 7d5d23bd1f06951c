"""Seeded bad inputs for every door where a user's file or setting comes in; each has to end in one clear error.

A door is a generator function in `DOORS`: from a random number generator and an empty folder it yields `Bad` without
end. Whatever it yields is wrong for sure, so an input that is accepted is a fault. To add a door, write such a function
and its line in `DOORS`.
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from nemotron_h.checkpoint import folders
from nemotron_h.checkpoint.definition import read_model
from nemotron_h.core.strict import Range, ranges
from nemotron_h.data.blend import Blend, load_blend
from nemotron_h.data.manifest import check_manifest
from nemotron_h.data.tokenizer import load_tokenizer
from nemotron_h.data.tokenizer_base import META_FILE
from nemotron_h.launch import load as clusters
from nemotron_h.recipe.compose import compose, configs_dir
from nemotron_h.schema.recipe import RecipeConfig


@dataclass(frozen=True)
class Bad:
    """A bad input.

    Attributes:
        what: is wrong.
        names: the error names one of these: the key, or the file.
        read: reads the input in this process.
        command: reads it as a command, where there is one that does no more.
    """

    what: str
    names: tuple[str, ...]
    read: Callable[[], Any]
    command: tuple[str, ...] = ()


def bad_numbers(allowed: Range) -> list[Any]:
    """Return values that no number of a range may have, as YAML writes them."""
    values = [float("nan"), float("inf"), -float("inf"), 10**40, -(10**40), "abc", "1,5", "0x", True, {"a": 1}]
    for limit, beyond in ((allowed.least, -1), (allowed.above, 0), (allowed.most, 1), (allowed.below, 0)):
        if limit is not None:
            values.append(limit + beyond * max(1, abs(limit)))
    return values


BAD_NAMES = ("../../x", "", "a b", "a/b", "/etc/x", "a\nb", ".hidden", "x" * 300, "-rf", "a:b", "ü", "\x00", "$HOME")
BAD_TEXTS = ([1, 2], {"a": {"b": 1}})


def broken(rng: random.Random, text: str, key: str) -> tuple[str, bytes]:
    """Return what is wrong with a YAML mapping, and its bytes.

    Args:
        text: of a mapping without flow style at its end.
        key: at its top.
    """
    place, size = rng.randrange(len(text)), rng.choice((40, 500, 5000, 100_000))
    head, tail = text[:place].encode(), text[place:].encode()
    laughs = "".join(f"z{n}: &z{n} [{', '.join([f'*z{n - 1}'] * 10)}]\n" for n in range(1, rng.randint(8, 30)))
    endings = {
        "a key twice": f"{key}: again\n",
        "a key of a mapping twice": "z: {a: 1, b: 2, a: 3}\n",
        "an open list": "z: [1, 2\n",
        "an open text": "z: 'abc\n",
        "brackets that do not match": "z: {a: 1]\n",
        "a bracket alone": "}\n",
        "a tab": "z:\n\t- a\n",
        "two documents": "---\nz: 1\n",
        "a Python object": f"z: !!python/object/apply:{rng.choice(('os.system', 'builtins.eval'))} ['true']\n",
        "a tag": f"z: {rng.choice(('!mine', '!!binary', '!!set', '!!timestamp'))} x\n",
        "a number that is none": "z: !!int abc\n",
        "more digits than Python reads": f"z: {'9' * size}9999\n" if size > 4300 else "z: !!float x\n",
        "an alias of nothing": "z: *nothing\n",
        "a list as a key": "? [a, b]\n: 1\n",
        "deep lists": f"z: {'[' * size}\n",
        "deep mappings": f"z: {'{a: ' * size}\n",
        "deep blocks": "".join(f"{' ' * n}z:\n" for n in range(40)),
        "aliases that multiply": f"z0: &z0 [lol, lol]\n{laughs}",
        "a chain of aliases": "z0: &z0 [x]\n" + "".join(f"z{n}: &z{n} [*z{n - 1}]\n" for n in range(1, 100)),
        "an anchor in itself": rng.choice(("z: &z [*z]\n", "z: &z {a: *z}\n", "z: &z {a: {<<: *z}}\n")),
        "a long list": f"z: [{'1, ' * 400_000}1]\n",
        "a long comment": f"# {'x' * 2**20}\n",
    }
    whole = {
        "not UTF-8": head + bytes([rng.choice((0xFF, 0xC0, 0xF5))]) + tail,
        "UTF-16": text.encode("utf-16"),
        "UTF-32": text.encode("utf-32"),
        "a control character": head + bytes([rng.choice((0, 1, 7, 8, 0x1B))]) + tail,
        "a list": b"- a\n- b\n",
        "a text": b"just words\n",
        "a number": b"5\n",
        "noise": b"\x9e" + rng.randbytes(200),
    }
    what = rng.choice([*endings, *whole])
    return what, whole.get(what) or f"{text}\n{endings[what]}".encode()


def _mistyped(rng: random.Random, word: str) -> str:
    place = rng.randrange(len(word))
    return word[:place] + rng.choice("qxz") + word[place:]


#: part of a recipe that only some stages have -> a recipe with it
_WITH = {part: f"nemotron_h_tiny/{part}" for part in ("preference", "distill", "minipuzzle")}


def _recipe_change(rng: random.Random) -> tuple[str, str, str, Any]:
    """Return a recipe to start from, what is wrong, and a key with a value that is wrong in it."""
    allowed = ranges(RecipeConfig)
    kind = rng.choice(("number", "number", "name", "text", "time", "folder", "unknown"))
    if kind == "number":
        key = rng.choice(sorted(allowed))
        value = rng.choice(bad_numbers(allowed[key]))
    elif kind == "name":
        key, value = rng.choice(("name", "model.name")), rng.choice(BAD_NAMES)
    elif kind == "text":
        key = rng.choice(("stage", "precision", "tokens", "optim.warmup_tokens", "data.blend", "model.pattern", "log"))
        value = rng.choice((*BAD_TEXTS, "\u2603", "1e999", "-5", None))
    elif kind == "time":
        key = "checkpoint.leave_after"
        value = rng.choice(("abc", "00:00:00", "-1:00:00", "25", "1:2:3", "9:99:99", [1], "1" * 5000))
    elif kind == "folder":
        key = rng.choice(("log.dir", "data.root"))
        value = rng.choice(("", "a\nb", "x" * 5000, __file__, f"{__file__}/x"))
    else:
        key = _mistyped(rng, rng.choice(sorted(allowed)).split(".")[-1])
        value = 1
    base = _WITH.get(key.split(".")[0], "nemotron_h_tiny/pretrain")
    return base, f"{key}: {str(value)[:40]!r}", key, value


def recipes(rng: random.Random, folder: Path) -> Iterator[Bad]:
    """Yield recipe files, by `compose`."""
    for number in range(10**6):
        base, what, key, value = _recipe_change(rng)
        lines = f"# @package _global_\ndefaults:\n  - /{base}\n  - _self_\n"
        content: Any = value
        for part in reversed(key.split(".")):
            content = {part: content}
        text = lines + ("" if "name" in content else "name: mine\n") + yaml.safe_dump(content, allow_unicode=True)
        path, names = folder / f"recipe{number}.yaml", (key, f"recipe{number}.yaml")
        data = text.encode()
        choice = rng.random()
        if choice < 0.5:
            what, data = broken(rng, f"{lines}name: mine\n", "name")
        elif choice < 0.65:
            what, text = _bad_defaults(rng, path.stem)
            data = text.encode()
        path.write_bytes(data)
        yield Bad(f"recipe: {what}", names, lambda path=path: compose(str(path)), ("recipe", "check", str(path)))


def _bad_defaults(rng: random.Random, own: str) -> tuple[str, str]:
    chain = "".join(f"  k{n}: ${{sources.k{n - 1}}}${{sources.k{n - 1}}}\n" for n in range(1, 60))
    return rng.choice(
        (
            ("defaults that are a number", "defaults: 5\nname: mine\n"),
            ("defaults that are a text", "defaults: nemotron_h_tiny/pretrain\nname: mine\n"),
            ("defaults with a number", "defaults: [/nemotron_h_tiny/pretrain, 5, _self_]\nname: mine\n"),
            ("defaults with a list", "defaults: [[/nemotron_h_tiny/pretrain], _self_]\nname: mine\n"),
            ("defaults without such a file", f"defaults: [/{_mistyped(rng, 'base/pretrain')}]\nname: mine\n"),
            ("defaults without such a model", "defaults: [/base/pretrain, /model: nope, _self_]\nname: mine\n"),
            ("defaults that name their own file", f"defaults: [{own}, _self_]\nname: mine\n"),
            ("Hydra's own keys", "defaults: [/nemotron_h_tiny/pretrain]\nhydra: {searchpath: [file:///tmp]}\n"),
            ("a key that is missing", "defaults: [/model: nemotron_h_tiny, _self_]\nname: mine\n"),
            ("interpolations that multiply", f"defaults: [/nemotron_h_tiny/pretrain]\nsources:\n  k0: lol\n{chain}"),
            ("an interpolation of itself", "defaults: [/nemotron_h_tiny/pretrain, _self_]\nname: ${name}\n"),
            ("half an interpolation", "defaults: [/nemotron_h_tiny/pretrain, _self_]\nname: ${na\n"),
        )
    )


def settings(rng: random.Random, folder: Path) -> Iterator[Bad]:
    """Yield `key=value` of `nemotron-h`'s command line, by `compose`."""
    while True:
        base, _, key, value = _recipe_change(rng)
        text = f"{key}={json.dumps(value, ensure_ascii=False)}".replace("NaN", ".nan").replace("Infinity", ".inf")
        if rng.random() < 0.2:
            key = "optim.peak_lr"
            text = rng.choice((key, f"{key}=[", f"{key}={{a", f"{key}=!!binary x", f"{key}={'[' * 9999}", f"={key}"))
        command = () if "\0" in text else ("recipe", "check", base, text)
        yield Bad(f"setting: {text[:60]!r}", (key,), lambda base=base, text=text: compose(base, [text]), command)


def task_settings(rng: random.Random, keys: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield key and `key=value` of `nemo`'s command line for keys of a built task that are a recipe's numbers too."""
    allowed = ranges(RecipeConfig)
    while True:
        key = rng.choice(sorted(keys))
        yield key, f"{key}={rng.choice([v for v in bad_numbers(allowed[key]) if v is not True])}"


_BLEND = """\
name: words
tokenizer: {kind: bpe, vocab_size: 400, train_on: [web], train_bytes: 1M}
sources:
  web: {category: web, format: jsonl, path: web.jsonl, licence: mine}
  talk: {category: talk, format: text, path: talk.txt, licence: mine, split_on: "x"}
phases:
  - {name: one, weights: {web: 70, talk: 30}, until: {fraction: 0.5}}
  - name: two
    weights: {web: 50, talk: 50}
"""


def blends(rng: random.Random, folder: Path) -> Iterator[Bad]:
    """Yield blends, by `load_blend`."""
    of_source = {key.split(".")[-1]: allowed for key, allowed in _source_ranges().items()}
    for number in range(10**6):
        path = folder / f"blend{number}.yaml"
        names: tuple[str, ...] = (path.name,)
        if rng.random() < 0.4:
            what, data = broken(rng, _BLEND, "name")
        else:
            content = yaml.safe_load(_BLEND)
            keys, value = _blend_change(rng, of_source)
            node: Any = content
            for key in keys[:-1]:
                node = node[key]
            node[keys[-1]] = value
            what, data = f"{'.'.join(map(str, keys))}: {str(value)[:40]!r}", yaml.safe_dump(content).encode()
        path.write_bytes(data)
        command = ("data", "show", str(path), "--tokens", "1M")
        yield Bad(f"blend: {what}", names, lambda path=path: load_blend(path), command)


def _source_ranges() -> dict[str, Range]:
    from nemotron_h.data.blend import Source

    return ranges(Source)


def _blend_change(rng: random.Random, of_source: dict[str, Range]) -> tuple[list[Any], Any]:
    field = rng.choice(sorted(of_source))
    source = {"category": "web", "format": "text", "path": "x"}
    return rng.choice(
        (
            (["sources", "web", field], rng.choice(bad_numbers(of_source[field]))),
            (["tokenizer", "vocab_size"], rng.choice(bad_numbers(ranges(Blend)["tokenizer.vocab_size"]))),
            (["phases", rng.randrange(2), "weights", "web"], rng.choice(("no", [1], {"a": 1}, -1, 1e300))),
            (["phases", 0, "until"], rng.choice(({"fraction": float("nan")}, {"tokens": "x"}, {"fraction": 7}, 5, {}))),
            (["phases"], rng.choice(([], {}, "x", [1], [[1]], {"a": 1}))),
            (["sources"], rng.choice(([1], "x", {}, {"a": 1}, {"a": [1]}, None))),
            (["sources", rng.choice(("tokenizer", "manifest.json", *BAD_NAMES[:8]))], source),
            (["name"], rng.choice((*BAD_NAMES, [1], {"a": 1}))),
            (["tokenizer", rng.choice(("kind", "train_bytes", "blend"))], rng.choice(("../x", "\u2603", [1], -5))),
            (["sources", "web", "path"], rng.choice(({"a": 1}, [1, 2], [["a"]], None, ""))),
            (["sources", "web", rng.choice(("format", "chat"))], rng.choice(("jsonll", [1], 7))),
            (["sources", "web", _mistyped(rng, "licence")], "mine"),
            ([_mistyped(rng, "phases")], []),
        )
    )


def cluster_files(rng: random.Random, folder: Path) -> Iterator[Bad]:
    """Yield cluster files and settings of them, by `launch.load`."""
    text = (configs_dir() / "cluster" / "slurm.yaml").read_text().replace("???", "filled")
    whole = yaml.safe_load(text) | {"work_dir": "/shared", "time": "04:00:00"}
    for number in range(10**6):
        path = folder / f"cluster{number}.yaml"
        key = rng.choice(("time", "chain", "leave_before_end", "nodes", "work_dir", "gpus", "kind", "env"))
        value = rng.choice(([1], {"a": [1]}, float("nan"), "\u2603", -1, 10**40))
        content = copy.deepcopy(whole) | {key: value}
        what, data = f"{key}: {str(value)[:40]!r}", yaml.safe_dump(content).encode()
        if rng.random() < 0.4:
            what, data = broken(rng, yaml.safe_dump(whole), "kind")
        elif rng.random() < 0.3:
            key = _mistyped(rng, key)
            what, data = f"unknown {key}", yaml.safe_dump({**whole, key: 1}).encode()
        path.write_bytes(data)
        yield Bad(f"cluster: {what}", (key, path.name), lambda path=path: clusters.load(str(path)))


def models(rng: random.Random, folder: Path) -> Iterator[Bad]:
    """Yield model definitions, by `compose` with `model=FILE`."""
    text = (configs_dir() / "model" / "nemotron_h_tiny.yaml").read_text()
    whole, allowed = yaml.safe_load(text), ranges(RecipeConfig)
    for number in range(10**6):
        path = folder / f"model{number}.yaml"
        key = rng.choice(sorted(set(whole) & {key.removeprefix("model.") for key in allowed}))
        value = rng.choice([*bad_numbers(allowed[f"model.{key}"]), None])
        what, data = f"{key}: {str(value)[:40]!r}", yaml.safe_dump(whole | {key: value}).encode()
        if rng.random() < 0.4:
            what, data = broken(rng, text, "name")
        path.write_bytes(data)
        setting = f"model={path}"
        yield Bad(
            f"model: {what}",
            (key, path.name),
            lambda setting=setting: compose("nemotron_h_tiny", [setting]),
            ("plan", "nemotron_h_tiny", setting),
        )


def broken_json(rng: random.Random, content: dict[str, Any], *, needed: bool = True) -> tuple[str, bytes]:
    """Return what is wrong with a JSON object, and its bytes; `needed` says that none of its keys may be missing."""
    text = json.dumps(content, indent=1)
    changed = copy.deepcopy(content)
    node, key = changed, rng.choice(sorted(changed))
    while isinstance(node[key], dict) and node[key] and rng.random() < 0.8:
        node, key = node[key], rng.choice(sorted(node[key]))
    removed = needed and rng.random() < 0.3
    if removed:
        del node[key]
    else:
        node[key] = rng.choice(({"a": [1]}, [1, {"b": 2}]))
    deep = rng.choice((2_000, 200_000))
    return rng.choice(
        (
            (f"{key} is {'missing' if removed else 'of another type'}", json.dumps(changed).encode()),
            (f"{key} is {'missing' if removed else 'of another type'}", json.dumps(changed).encode()),
            ("it ends early", text[: rng.randrange(len(text) - 1)].encode()),
            ("deep lists", b"[" * deep),
            ("deep objects", b'{"a":' * deep),
            ("a list", b"[1, 2]"),
            ("null", b"null"),
            ("nothing", b""),
            ("UTF-16", text.encode("utf-16")),
            ("not UTF-8", b'{"\xff": 1}'),
        )
    )


def run_records(rng: random.Random, folder: Path) -> Iterator[Bad]:
    """Yield the `run.json` of checkpoints that a recipe takes its model from, by `read_model`."""
    model = yaml.safe_load((configs_dir() / "model" / "nemotron_h_tiny.yaml").read_text())
    keys = ("name", "pattern", "hidden_size", "vocab_size", "family")
    for number in range(10**6):
        checkpoint = folder / f"checkpoint{number}"
        (checkpoint / "weights").mkdir(parents=True)
        what, data = broken_json(rng, {"model": {key: model[key] for key in keys}})
        (checkpoint / "run.json").write_bytes(data)
        command = ("recipe", "check", "nemotron_h_tiny", f"model={checkpoint}")
        yield Bad(f"run.json: {what}", ("run.json",), lambda c=checkpoint: read_model(c, "mine.yaml"), command)


def manifests(rng: random.Random, folder: Path) -> Iterator[Bad]:
    """Yield the manifests of prepared data, by `check_manifest`."""
    split = {"prefix": "web/train", "documents": 3, "tokens": 9, "bytes": 1, "dtype": "uint16"}
    source = {"category": "web", "licence": "", "hash_of_inputs": "x"}
    whole = {
        "format_version": 1,
        "blend": "words",
        "blend_hash": "x",
        "tokenizer": {"kind": "bpe", "vocab_size": 400, "eod_id": 0, "sha256": "x", "path": "t", "lossless": True},
        "sources": {
            name: {**source, "splits": {"train": {**split, "sha256_bin": "x", "sha256_idx": "x"}}}
            for name in ("web", "talk")
        },
    }
    (folder / "words.yaml").write_text(_BLEND)
    for number in range(10**6):
        root = folder / f"root{number}"
        (root / "words").mkdir(parents=True)
        what, data = broken_json(rng, whole)
        (root / "words" / "manifest.json").write_bytes(data)
        yield Bad(
            f"manifest: {what}",
            ("manifest.json",),
            lambda root=root: check_manifest(root, load_blend(folder / "words.yaml")),
            ("data", "verify", "--blend", str(folder / "words.yaml"), "--root", str(root)),
        )


def integrity_files(rng: random.Random, folder: Path) -> Iterator[Bad]:
    """Yield the `integrity.json` of checkpoints, by `read_integrity`."""
    for number in range(10**6):
        checkpoint = folder / f"checkpoint{number}"
        checkpoint.mkdir()
        what, data = broken_json(rng, {"run.json": [10, "ab"], "weights/__0_0.distcp": [20, "cd"]}, needed=False)
        (checkpoint / "integrity.json").write_bytes(data)
        yield Bad(f"integrity.json: {what}", ("integrity.json",), lambda c=checkpoint: folders.read_integrity(c))


def tokenizers(rng: random.Random, folder: Path) -> Iterator[Bad]:
    """Yield folders of tokenizers, by `load_tokenizer`: what says how to read one, and the one that it names."""
    for number in range(10**6):
        place = folder / f"tokenizer{number}"
        place.mkdir()
        what, data = broken_json(rng, {"kind": "bpe"})
        if rng.random() < 0.5:
            what, data = "no such kind", json.dumps({"kind": _mistyped(rng, "bpe")}).encode()
        elif rng.random() < 0.5:
            what, library = broken_json(rng, {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}})
            what, data = f"tokenizer.json: {what}", b'{"kind": "bpe"}'
            (place / "tokenizer.json").write_bytes(library)
        (place / META_FILE).write_bytes(data)
        yield Bad(f"tokenizer: {what}", (place.name,), lambda place=place: load_tokenizer(place))


#: door -> how many of its inputs a test takes
DOORS: dict[Callable[[random.Random, Path], Iterator[Bad]], int] = {
    recipes: 80,
    settings: 50,
    blends: 60,
    cluster_files: 30,
    models: 20,
    run_records: 25,
    manifests: 25,
    integrity_files: 15,
    tokenizers: 15,
}


def bad_inputs(seed: int, folder: Path) -> Iterator[Bad]:
    """Yield every door's inputs, of a seed."""
    for door, count in DOORS.items():
        rng, place = random.Random(f"{seed} {door.__name__}"), folder / door.__name__
        place.mkdir()
        for _, bad in zip(range(count), door(rng, place), strict=False):
            yield bad
