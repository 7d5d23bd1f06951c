"""Contents of a prepared blend: `manifest.json`, and the quick check that training makes before it starts.

Layout under the data root (`--root`, else the environment's `NEMOTRON_H_DATA`, else `./data`):

    <root>/<blend>/manifest.json
    <root>/<blend>/tokenizer/
    <root>/<blend>/<source>/{train,validation}.{bin,idx}    Megatron's indexed format; every document ends with the
    EOD token <root>/<blend>/<source>/source.json                     the source's part of the manifest
    <root>/<blend>/<source>/{train,validation}.loss         conversations: a byte per token, 1 where it is to be learnt
    <root>/<blend>/<source>/{train,validation}.rewards      pairs: two float32 per document
    <root>/<blend>/<source>/{train,validation}.images       conversations with images: their files, joined
    <root>/<blend>/<source>/{train,validation}.places       their places: `PLACES` per image
    <root>/<blend>/<source>/image_files.jsonl               the files that they came from, to tell when one changes
    <root>/<blend>/chat_template.jinja                      conversations: the template that wrote them
    <root>/<blend>/<source>/quarantine.jsonl                records that could not be read, with file and position
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from nemotron_h.core.errors import UserError
from nemotron_h.core.files import read_json_object, write_json
from nemotron_h.core.strict import from_json
from nemotron_h.data.blend import Blend
from nemotron_h.data.indexed import TokenStream, read_index_header

FORMAT_VERSION = 1
ROOT_VARIABLE = "NEMOTRON_H_DATA"
SPLITS = ("train", "validation")
TEMPLATE = "chat_template.jinja"
#: an image of a conversation: the conversation and the token where it stands, its bytes in the blob, its size in pixels
#: (upright), and a digest of its bytes
PLACES = np.dtype(
    [
        ("document", "<i8"),
        ("token", "<i8"),
        ("begin", "<i8"),
        ("size", "<i8"),
        ("width", "<i4"),
        ("height", "<i4"),
        ("digest", "V16"),
    ]
)
_PROBE_BLOCKS, _PROBE_BYTES = 16, 4096


@dataclass
class SplitManifest:
    """Facts of one `.bin/.idx` pair.

    Args:
        prefix: path without `.bin`; relative paths start at the folder of `manifest.json`.
        documents: number of documents.
        tokens: number of tokens, the EOD of every document included.
        bytes: UTF-8 bytes of the text; 0 where it is not known (ready `.bin/.idx`).
        dtype: numpy name of the token type in the `.bin` file.
        sha256_bin: of the `.bin` file.
        sha256_idx: of the `.idx` file.
        probe: sha256 over evenly spaced blocks of all its files, cheap enough to compare at every start (see `probe`).
        sha256_loss: conversations only: of the `.loss` file, a byte per token: 1 where it is to be learnt. A pair is
            one document, the chosen conversation and then the rejected one, where 2 is added.
        sha256_rewards: pairs only: of the `.rewards` file, float32 [documents, 2]; NaN where a record states none.
        images: images of conversations, in all places.
        image_bytes: of the `.images` file, which has each image once.
        sha256_images, sha256_places: conversations with images only: of the `.images` and the `.places` file.
    """

    prefix: str
    documents: int
    tokens: int
    bytes: int
    dtype: str
    sha256_bin: str
    sha256_idx: str
    probe: str = ""
    sha256_loss: str = ""
    sha256_rewards: str = ""
    images: int = 0
    image_bytes: int = 0
    sha256_images: str = ""
    sha256_places: str = ""

    def beside(self) -> dict[str, tuple[str, int]]:
        """Return suffix -> sha256 and bytes of the files that it has beside `.bin` and `.idx`."""
        files = {
            ".loss": (self.sha256_loss, self.tokens),
            ".rewards": (self.sha256_rewards, 8 * self.documents),
            ".images": (self.sha256_images, self.image_bytes),
            ".places": (self.sha256_places, self.images * PLACES.itemsize),
        }
        return {suffix: (sha256, size) for suffix, (sha256, size) in files.items() if sha256}


@dataclass
class SourceManifest:
    """Result of preparing one source.

    Args:
        category: of the blend's phases.
        licence: as the blend states it.
        hash_of_inputs: sha256 over everything that the tokens depend on: input files, settings, tokenizer.
        splits: `train`, and `validation` where documents were held out.
        duplicates_dropped: documents equal to an earlier one of this source.
        empty_dropped: documents without a visible character.
        quarantined: unreadable records; each is a line of `quarantine.jsonl`.
        settings_hash: of the blend's settings for this source, to tell when they were edited since.
        origin: of the Hub: repository, commit, configuration and split.
    """

    category: str
    licence: str
    hash_of_inputs: str
    splits: dict[str, SplitManifest]
    duplicates_dropped: int = 0
    empty_dropped: int = 0
    quarantined: int = 0
    settings_hash: str = ""
    origin: str = ""


@dataclass
class TokenizerManifest:
    """The tokenizer that made the tokens.

    Args:
        kind: as in the blend.
        vocab_size: number of ids.
        eod_id: the id that ends every document.
        sha256: the tokenizer's fingerprint.
        path: its folder; relative paths start at the folder of `manifest.json`.
        lossless: whether the probe texts (several scripts, emoji, code) survive encoding and decoding.
    """

    kind: str
    vocab_size: int
    eod_id: int
    sha256: str
    path: str
    lossless: bool


@dataclass
class Manifest:
    """`manifest.json`. `folder` is where it lies and is not written into it."""

    format_version: int
    blend: str
    blend_hash: str
    tokenizer: TokenizerManifest
    sources: dict[str, SourceManifest]
    folder: str = field(default="", metadata={"omegaconf_ignore": True})

    def prefix(self, source: str, split: str) -> str | None:
        """Return the absolute prefix of a source's `.bin/.idx`, or None when the source has no such split."""
        entry = self.sources[source].splits.get(split)
        return None if entry is None else str(Path(self.folder) / entry.prefix)

    def stream(self, source: str, split: str) -> TokenStream:
        """Return the tokens of a source's split, to be read; ids that the tokenizer lacks are refused."""
        return TokenStream(self.prefix(source, split), self.tokenizer.vocab_size)

    def tokens(self, split: str = "train") -> dict[str, int]:
        """Return source -> number of tokens of a split (0 where it has none)."""
        return {name: s.splits[split].tokens if split in s.splits else 0 for name, s in self.sources.items()}

    def texts(self, split: str) -> dict[str, str]:
        """Return source -> sha256 of its text of a split, for those that have one."""
        return {name: s.splits[split].sha256_bin for name, s in self.sources.items() if split in s.splits}

    def tokenizer_path(self) -> str:
        """Return the absolute path of the tokenizer's folder."""
        return str(Path(self.folder) / self.tokenizer.path)

    def save(self) -> None:
        """Write `manifest.json` atomically, with the sha256 of its content: no value of it can change unseen."""
        content = dataclasses.asdict(self)
        del content["folder"]
        write_json(Path(self.folder) / "manifest.json", {**content, "sha256": _sha256(content)})


def _sha256(content: dict[str, Any]) -> str:
    """Return the sha256 of a manifest's content, in one order of keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def data_root(root: str | Path | None = None) -> Path:
    """Return the data root: the argument, else `$NEMOTRON_H_DATA`, else `./data`."""
    return Path(root or os.environ.get(ROOT_VARIABLE) or "data").expanduser()


def preparation(root: str | Path | None, blend: str) -> str:
    """Return the fix of what is not prepared, or not as it was: the command that prepares a blend, by name or file."""
    return f"Run: nemotron-h data prepare --blend {blend} --root {data_root(root)}"


def load_manifest(root: str | Path | None, blend_name: str, blend: str | None = None) -> Manifest:
    """Read `<root>/<blend_name>/manifest.json`.

    Args:
        blend: what `data prepare` would be given, where it is not the name.

    Errors:
        UserError: when it is absent, unreadable or of another format version.
    """
    path = data_root(root) / blend_name / "manifest.json"
    again = preparation(root, blend or blend_name)
    if not path.exists():
        raise UserError(f"blend {blend_name!r} is not prepared: there is no {path}", again)
    try:
        content = read_json_object(path)
        sha256 = content.pop("sha256", None)  # manifests of before have none
        version = content.get("format_version", FORMAT_VERSION)
        manifest = from_json(Manifest, content) if version == FORMAT_VERSION else None
    except UserError as error:
        raise UserError(f"{path} is damaged: {error.message}", again) from error
    if manifest is None:
        raise UserError(f"{path}: format version {version}, this version reads {FORMAT_VERSION}", again)
    for name, source in manifest.sources.items():
        if wrong := sorted({"train"} - {*source.splits} or {*source.splits} - {*SPLITS}):
            raise UserError(f"{path} is damaged: sources.{name}.splits: {wrong[0]} is missing or unknown", again)
    if sha256 not in (None, _sha256(content)):
        raise UserError(f"{path} is damaged: its content is not what was written", again)
    manifest.folder = str(path.parent.resolve())
    return manifest


def check_manifest(root: str | Path | None, blend: Blend) -> Manifest:
    """Check before training that everything is there, of the right size, by this tokenizer and for these sources.

    Reads only the manifest, the files' sizes and the `.idx` headers: milliseconds per source. `verify` compares
    contents.

    Errors:
        UserError: naming the file and what to do.
    """
    manifest = load_manifest(root, blend.name, blend.path)
    path = Path(manifest.folder) / "manifest.json"
    again = preparation(root, blend.path or blend.name)
    missing = [name for name in blend.sources if name not in manifest.sources]
    if missing:
        raise UserError(f"{path}: the blend's sources {', '.join(missing)} are not prepared", again)
    spec, prepared = blend.tokenizer, manifest.tokenizer
    if spec.kind != prepared.kind or (spec.is_trained() and spec.vocab_size != prepared.vocab_size):
        was = f"{prepared.kind} of {prepared.vocab_size:,}"
        now = f"{spec.kind} of {spec.vocab_size:,}" if spec.is_trained() else spec.kind
        raise UserError(
            f"{path}: prepared with another tokenizer ({was}; the blend says {now})",
            again,
        )
    for name, source in blend.sources.items():
        recorded = manifest.sources[name].settings_hash
        if recorded and recorded != source.settings_hash():
            raise UserError(f"{path}: sources.{name} was edited after it was prepared", again)
        for split in manifest.sources[name].splits:
            problem = split_problem(manifest, name, split)
            if problem:
                raise UserError(problem, again)
    return manifest


def split_problem(manifest: Manifest, source: str, split: str) -> str:
    """Return the fault of one `.bin/.idx` pair by sizes and headers; empty when there is none."""
    entry = manifest.sources[source].splits[split]
    prefix = manifest.prefix(source, split)
    for suffix in (".bin", ".idx"):
        if not os.path.isfile(prefix + suffix):
            return f"{prefix}{suffix} is missing (source {source}, {split})"
    try:
        header = read_index_header(prefix + ".idx")
    except ValueError as error:
        return str(error)
    if header.dtype.name != entry.dtype:
        return f"{prefix}.idx: token type {header.dtype.name}, the manifest says {entry.dtype}"
    if header.sequences != entry.documents:
        return f"{prefix}.idx: {header.sequences} documents, the manifest says {entry.documents}"
    for suffix, expected in ((".bin", entry.tokens * header.dtype.itemsize), (".idx", header.file_size)):
        size = os.path.getsize(prefix + suffix)
        if size != expected:
            state = "truncated" if size < expected else "too long"
            return f"{prefix}{suffix} is {state}: {size:,} bytes, {expected:,} expected (source {source}, {split})"
    beside = tuple(entry.beside())
    for suffix, (_, size) in entry.beside().items():
        file = prefix + suffix
        if not (os.path.isfile(file) and os.path.getsize(file) == size):
            return f"{file} is missing or of another size than {size:,} bytes (source {source}, {split})"
    # formerly a probe had the first two files alone
    if entry.probe and entry.probe not in {probe(prefix, suffixes) for suffixes in {beside, ()}}:
        names = "/".join((".bin", ".idx", *beside))
        return f"{prefix}{names} are not the files that were prepared (source {source}, {split})"
    return ""


def probe(prefix: str, beside: Sequence[str] = ()) -> str:
    """Return the sha256 over 16 evenly spaced blocks of 4 KiB of each of `prefix`.bin, `prefix`.idx and the files of
    `beside`, which are suffixes.
    """
    digest = hashlib.sha256()
    for suffix in (".bin", ".idx", *beside):
        with open(prefix + suffix, "rb", buffering=0) as file:
            last = max(0, os.fstat(file.fileno()).st_size - _PROBE_BYTES)
            for number in range(_PROBE_BLOCKS):
                file.seek(last * number // (_PROBE_BLOCKS - 1))
                digest.update(file.read(_PROBE_BYTES))
    return digest.hexdigest()
