"""Work of a preparation's processes: a shard of text to tokens, and a source's shards to one `.bin/.idx`
pair per split.

A shard's files count only once its record (`<prefix>.json`) is there; it is renamed into place last.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np

from nemotron_h.core.files import write_json
from nemotron_h.data.blend import PREFERENCE, Source
from nemotron_h.data.chat import ChatTemplate, Encoded
from nemotron_h.data.images.read import ImageError
from nemotron_h.data.images.store import FILES, Loaded, Loader, Writer, files_changed
from nemotron_h.data.images.store import SUFFIXES as IMAGE_SUFFIXES
from nemotron_h.data.images.store import join as join_images
from nemotron_h.data.indexed import write_index
from nemotron_h.data.manifest import SPLITS, probe
from nemotron_h.data.messages import ChatError
from nemotron_h.data.pairs import encode_pair
from nemotron_h.data.prepare.extend import extended
from nemotron_h.data.prepare.sources import Bad, Document, Piece, read_documents
from nemotron_h.data.tokenizer import Tokenizer, load_tokenizer

_BATCH_DOCUMENTS, _BATCH_CHARACTERS = 256, 1 << 20
_COPY_BYTES = 1 << 22
_HASH_BYTES = 16
#: suffix of a shard's files that are joined for a source as they are -> the name of the joined file
PER_SOURCE = {".bad": "quarantine.jsonl", ".files": FILES}

_tokenizer: Tokenizer | None = None  # of this worker process
_template: ChatTemplate | None = None


@dataclass(frozen=True)
class ShardJob:
    """Turn the documents of `pieces` into tokens.

    Args:
        source: how to read them.
        pieces: what to read.
        prefix: of the files to write.
        dtype: numpy name of the token type.
    """

    source: Source
    pieces: list[Piece]
    prefix: str
    dtype: str


@dataclass(frozen=True)
class MergeJob:
    """Join a source's shards, in order.

    Args:
        source: whose shards they are.
        prefixes: of the shards.
        folder: of the source; the joined files get names that begin with a dot.
        dtype: numpy name of the token type.
    """

    source: Source
    prefixes: list[str]
    folder: str
    dtype: str


@dataclass
class ShardRecord:
    """Counts of a finished shard.

    Args:
        joined: how many conversations went into long ones, less these.
        unread: field of messages that is not read -> how many have it.
        sizes: file suffix -> bytes, so that a shard with lost files is not trusted.
    """

    documents: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    empty: int = 0
    bad: int = 0
    joined: int = 0
    unread: dict[str, int] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class _Ready:
    """A document that goes into the shard: its text and `document_hash`, and a conversation's tokens and images."""

    text: str
    hash: bytes
    held_out: bool
    tokens: Encoded | None = None
    images: tuple[Loaded, ...] = ()


def beside_tokens(source: Source) -> tuple[str, ...]:
    """Return the suffixes of the files that a source has beside its tokens, in each split."""
    suffixes = [".loss"] * bool(source.chat) + [".rewards"] * (source.chat == PREFERENCE)
    return (*suffixes, *IMAGE_SUFFIXES) if source.has_images() else tuple(suffixes)


def start_worker(tokenizer_path: str, chat_template: str = "") -> None:
    """Give a worker process one thread, and its own tokenizer and chat template."""
    global _tokenizer, _template
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _tokenizer = load_tokenizer(tokenizer_path)
    _template = ChatTemplate(chat_template, _tokenizer) if chat_template else None


def finished_shard(prefix: str) -> ShardRecord | None:
    """Return the record of a shard when it is complete, and its images are still those of its records."""
    try:
        record = ShardRecord(**json.loads(Path(prefix + ".json").read_text(encoding="utf-8")))
        whole = all(os.path.getsize(prefix + s) == n for s, n in record.sizes.items())
        if whole and ".files" in record.sizes:
            whole = not files_changed(Path(prefix + ".files"))
        return record if whole else None
    except (OSError, ValueError, TypeError):
        return None


def document_hash(text: str) -> bytes:
    """Return 16 bytes that stand for a document's text: equal texts share them, and they choose the split."""
    return hashlib.blake2b(text.encode("utf-8"), digest_size=_HASH_BYTES).digest()


def is_validation(hash_of_document: bytes, share: float) -> bool:
    """Return True for a held-out document: a property of its text, so neither order nor other documents matter."""
    return int.from_bytes(hash_of_document[-8:], "big") < share * 2**64


def build_shard(job: ShardJob) -> ShardRecord:
    """Read, split and encode one shard; runs in a worker."""
    record = ShardRecord()
    kinds = [".tokens", ".lengths", ".bytes", ".hashes", *beside_tokens(job.source)]
    suffixes = [f".{split}{kind}" for split in SPLITS for kind in kinds] + [".bad"]
    suffixes += [".files"] * job.source.has_images()
    with contextlib.ExitStack() as stack:
        files = {s: stack.enter_context(open(job.prefix + s, "wb")) for s in suffixes}
        writers = {}
        if job.source.has_images():
            writers = {split: Writer(*(files[f".{split}{suffix}"] for suffix in IMAGE_SUFFIXES)) for split in SPLITS}
        for batch in _batches(job, record, files):
            encoded = [item.tokens for item in batch] if job.source.chat else _plain([item.text for item in batch])
            for split, wanted in zip(SPLITS, (False, True), strict=True):
                chosen = [i for i, item in enumerate(batch) if item.held_out is wanted]
                if chosen:
                    _append(files, split, [encoded[i] for i in chosen], [batch[i].text for i in chosen], job.dtype)
                    files[f".{split}.hashes"].write(b"".join(batch[i].hash for i in chosen))
                    for number, i in enumerate(chosen, record.documents[split]):
                        if batch[i].images:
                            writers[split].add(number, encoded[i].images, batch[i].images)
                    record.documents[split] += len(chosen)
    record.sizes = {s: os.path.getsize(job.prefix + s) for s in suffixes}
    write_json(Path(job.prefix + ".json"), asdict(record))
    return record


def _plain(texts: list[str]) -> list[Encoded]:
    """Return texts as tokens that end with EOD; all of them are learnt, so no mask is made."""
    return [Encoded([*ids, _tokenizer.eod_id], []) for ids in _tokenizer.encode_batch(texts)]


def _applied(item: Document | Bad, loader: Loader | None, validation: float) -> _Ready | Bad:
    """Return a document, a conversation with its tokens and images; one that the template refuses, or an image of which
    cannot be used, is bad.

    Conversations with equal texts about different images are not equal, and those about one image are on one side: a
    conversation is held out by its first image.
    """
    if isinstance(item, Bad):
        return item
    text, encoded, images = item.text, None, ()
    try:
        if item.pair is not None:
            encoded = encode_pair(_template, item.pair)
        elif item.conversation is not None:
            encoded = _template.encode(item.conversation)
            images = tuple(loader.load(picture) for turn in item.conversation for picture in turn.images)
    except (ChatError, ImageError) as error:
        return Bad(item.file, item.position, str(error), item.text[:160])
    if images:
        text = json.dumps([text, *(image.digest.hex() for image in images)], ensure_ascii=False)
    digest, held_out = document_hash(text), item.held_out
    if held_out is None:
        held_out = is_validation(images[0].digest if images else digest, validation)
    return _Ready(text, digest, held_out, encoded, images)


def _documents(job: ShardJob, record: ShardRecord) -> Iterator[Document | Bad]:
    """Return the documents of the shard's files, joined to long conversations where the source says so."""
    items = _counted(read_documents(job.source, job.pieces), record)
    if job.source.extend is None:
        return items

    def held_out(document: Document) -> bool:
        return is_validation(document_hash(document.text), job.source.validation)

    return extended(items, job.source.extend, _template, held_out, record)


def _counted(items: Iterator[Document | Bad], record: ShardRecord) -> Iterator[Document | Bad]:
    for item in items:
        for turn in item.turns() if isinstance(item, Document) else ():
            for name in turn.unread:
                record.unread[name] = record.unread.get(name, 0) + 1
        yield item


def _batches(job: ShardJob, record: ShardRecord, files: dict[str, IO[bytes]]) -> Iterator[list[_Ready]]:
    """Yield documents in batches of bounded size; bad and empty records are counted on the way."""
    batch: list[_Ready] = []
    size = 0
    loader = Loader(files[".files"]) if job.source.has_images() else None
    for document in _documents(job, record):
        item = _applied(document, loader, job.source.validation)
        if isinstance(item, Bad):
            record.bad += 1
            files[".bad"].write(json.dumps(asdict(item), ensure_ascii=False).encode("utf-8", "replace") + b"\n")
        elif not item.text.strip():
            record.empty += 1
        else:
            batch.append(item)
            size += len(item.text) + sum(len(image.data) for image in item.images)
            if len(batch) == _BATCH_DOCUMENTS or size >= _BATCH_CHARACTERS:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def _append(files: dict[str, IO[bytes]], split: str, encoded: list[Encoded], texts: list[str], dtype: str) -> None:
    for document in encoded:
        files[f".{split}.tokens"].write(np.array(document.ids, dtype=dtype).tobytes())
        if document.loss:
            files[f".{split}.loss"].write(np.array(document.loss, dtype=np.uint8).tobytes())
        if document.rewards is not None:
            files[f".{split}.rewards"].write(np.array(document.rewards, dtype=np.float32).tobytes())
    files[f".{split}.lengths"].write(np.array([len(document.ids) for document in encoded], dtype=np.int32).tobytes())
    files[f".{split}.bytes"].write(np.array([len(text.encode()) for text in texts], dtype=np.int32).tobytes())


def merge_shards(job: MergeJob) -> dict[str, Any]:
    """Join finished shards; runs in a worker. The caller renames the files into place.

    Returns:
        splits (split -> documents, tokens, bytes, dtype, sha256_bin, sha256_idx, probe; none for an empty split),
        duplicates, empty, bad, unread.
    """
    records = [finished_shard(prefix) for prefix in job.prefixes]
    result: dict[str, Any] = {"splits": {}, "duplicates": 0}
    result |= {"empty": sum(r.empty for r in records), "bad": sum(r.bad for r in records)}
    result["unread"] = dict(sum((Counter(r.unread) for r in records), Counter()))
    for split in SPLITS:
        if any(r.documents[split] for r in records):
            result["splits"][split], duplicates = _merge_split(job, split)
            result["duplicates"] += duplicates
    for suffix, name in PER_SOURCE.items():
        if os.path.exists(job.prefixes[0] + suffix):
            with open(os.path.join(job.folder, f".{name}.tmp"), "wb") as out:
                for prefix in job.prefixes:
                    out.write(Path(prefix + suffix).read_bytes())
    return result


def _merge_split(job: MergeJob, split: str) -> tuple[dict[str, Any], int]:
    dtype = np.dtype(job.dtype)
    lengths = [np.fromfile(f"{prefix}.{split}.lengths", dtype=np.int32) for prefix in job.prefixes]
    keep = _first_occurrences(job, split) if job.source.deduplicate else np.ones(sum(map(len, lengths)), dtype=bool)
    target = os.path.join(job.folder, f".{split}.tmp")
    ends = np.cumsum([len(of_shard) for of_shard in lengths])[:-1]
    shards = list(zip(job.prefixes, lengths, np.split(keep, ends), strict=True))
    final = np.concatenate([of_shard[kept] for _, of_shard, kept in shards])
    text_bytes = sum(
        int(np.fromfile(f"{prefix}.{split}.bytes", dtype=np.int32)[kept].sum(dtype=np.int64))
        for prefix, _, kept in shards
    )
    sha256 = _join(target + ".bin", [(f"{p}.{split}.tokens", *rest) for p, *rest in shards], dtype)
    content = {
        "documents": len(final),
        "tokens": int(final.sum(dtype=np.int64)),
        "bytes": text_bytes,
        "dtype": dtype.name,
        "sha256_bin": sha256,
        "sha256_idx": write_index(target + ".idx", final, dtype),
    }
    beside = beside_tokens(job.source)
    if ".loss" in beside:
        parts = [(f"{p}.{split}.loss", *rest) for p, *rest in shards]
        content["sha256_loss"] = _join(target + ".loss", parts, np.dtype(np.uint8))
    if ".rewards" in beside:  # two a document
        parts = [(f"{p}.{split}.rewards", np.full(len(of_shard), 2), kept) for p, of_shard, kept in shards]
        content["sha256_rewards"] = _join(target + ".rewards", parts, np.dtype(np.float32))
    if job.source.has_images():
        content |= join_images([(f"{p}.{split}", kept) for p, _, kept in shards], target)
    content["probe"] = probe(target, beside)
    return content, int(len(keep) - len(final))


def _join(path: str, parts: list[tuple[str, np.ndarray, np.ndarray]], dtype: np.dtype) -> str:
    """Join the kept documents of (file, lengths, kept) into one file, flushed to disk; its sha256."""
    digest = hashlib.sha256()
    with open(path, "wb") as out:
        for file, lengths, kept in parts:
            for data in _kept_tokens(file, lengths, kept, dtype):
                digest.update(data)
                out.write(data)
        out.flush()
        os.fsync(out.fileno())
    return digest.hexdigest()


def _kept_tokens(path: str, lengths: np.ndarray, mask: np.ndarray, dtype: np.dtype) -> Iterator[bytes]:
    with open(path, "rb") as file:
        if mask.all():
            while data := file.read(_COPY_BYTES):
                yield data
            return
        for length, wanted in zip(lengths.tolist(), mask.tolist(), strict=True):
            if wanted:
                yield file.read(length * dtype.itemsize)
            else:
                file.seek(length * dtype.itemsize, os.SEEK_CUR)


def _first_occurrences(job: MergeJob, split: str) -> np.ndarray:
    """Return True for documents, bool [documents], whose text is the source's first. Takes 40 bytes per document."""
    hashes = np.concatenate([np.fromfile(f"{p}.{split}.hashes", dtype="<u8").reshape(-1, 2) for p in job.prefixes])
    order = np.lexsort((hashes[:, 1], hashes[:, 0]))  # stable: equal ones stay in document order
    ordered = hashes[order]
    new = np.ones(len(order), dtype=bool)
    new[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    keep = np.zeros(len(order), dtype=bool)
    keep[order[new]] = True
    return keep
