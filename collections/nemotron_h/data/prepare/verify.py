"""Comparing prepared data with its manifest: hashes, structure, and documents decoded and encoded again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from rich.console import Console

from nemotron_h.core.errors import UserError
from nemotron_h.core.files import file_sha256
from nemotron_h.data.blend import Blend
from nemotron_h.data.images.store import Images
from nemotron_h.data.indexed import index_is_plain, read_index_header, read_lengths
from nemotron_h.data.manifest import Manifest, check_manifest
from nemotron_h.data.tokenizer import Tokenizer, load_tokenizer

_SAMPLES = 20  # documents per split that are decoded and encoded again
_SHOWN_CHARACTERS = 70


def verify(blend: Blend, root: str | Path | None = None, console: Console | None = None) -> Manifest:
    """Check everything that was prepared against the manifest, and print a line per split.

    Args:
        blend: from `load_blend`.
        root: the data root; see `data_root`.
        console: where the lines go.

    Returns:
        The manifest, when all is well.

    Errors:
        UserError: listing every difference found.
    """
    console = console or Console()
    manifest = check_manifest(root, blend)
    tokenizer = load_tokenizer(manifest.tokenizer_path())
    problems = []
    if tokenizer.fingerprint() != manifest.tokenizer.sha256:
        problems.append(f"{manifest.tokenizer_path()}: not the tokenizer that made the data")
    for key in ("eod_id", "vocab_size"):
        recorded, actual = getattr(manifest.tokenizer, key), getattr(tokenizer, key)
        if recorded != actual:
            problems.append(f"manifest.json: tokenizer.{key} is {recorded:,}, the tokenizer's {actual:,}")
    for name in blend.sources:
        for split, entry in manifest.sources[name].splits.items():
            found = _split_problems(manifest, name, split, tokenizer)
            problems += [f"{name}, {split}: {problem}" for problem in found]
            state = "; ".join(found) or f"ok, {entry.documents:,} documents, {entry.tokens:,} tokens"
            shown = "" if found else _first_words(manifest.prefix(name, split), tokenizer)
            console.print(f"{name}, {split}: {state}{shown}", highlight=False, markup=False, soft_wrap=True)
    if problems:
        raise UserError(
            "the prepared data differs from its manifest:\n" + "\n".join(f"  {p}" for p in problems),
            f"Remove the folders of these sources under {manifest.folder} and prepare again, or restore the files.",
        )
    return manifest


def _split_problems(manifest: Manifest, source: str, split: str, tokenizer: Tokenizer) -> list[str]:
    entry, prefix = manifest.sources[source].splits[split], manifest.prefix(source, split)
    files = {".bin": entry.sha256_bin, ".idx": entry.sha256_idx}
    files |= {suffix: sha256 for suffix, (sha256, _) in entry.beside().items()}
    problems = [
        f"the content of {Path(prefix).name}{suffix} changed since it was prepared"
        for suffix, expected in files.items()
        if file_sha256(prefix + suffix) != expected
    ]
    if not index_is_plain(prefix + ".idx"):
        return [*problems, "the index is not one sequence per document, in order, without gaps"]
    lengths, tokens = read_lengths(prefix + ".idx"), _tokens(prefix)
    if int(lengths.sum(dtype=np.int64)) != entry.tokens:
        return [
            *problems,
            f"the index lists {int(lengths.sum(dtype=np.int64)):,} tokens, the manifest {entry.tokens:,}",
        ]
    ends = np.cumsum(lengths, dtype=np.int64)
    if int(tokens.max()) >= tokenizer.vocab_size:
        problems.append(f"token {int(tokens.max())} is outside the tokenizer's {tokenizer.vocab_size:,}")
    elif entry.sha256_loss:
        if entry.sha256_places and not problems:
            problems += _image_problems(prefix, tokens, ends - lengths, lengths, tokenizer)
    elif (tokens[ends - 1] != tokenizer.eod_id).any():
        problems.append("a document does not end with EOD")
    elif entry.bytes and manifest.tokenizer.lossless and not _samples_survive(tokens, ends, lengths, tokenizer):
        # not asked of ready-made pairs (bytes 0), which may hold what no text encodes to: special tokens
        problems.append("a decoded document does not encode to its tokens")
    return problems


def _image_problems(
    prefix: str, tokens: np.ndarray, starts: np.ndarray, lengths: np.ndarray, tokenizer: Tokenizer
) -> list[str]:
    """Return what is wrong with images: places that are none, and of evenly spaced ones those that cannot be read."""
    images = Images(prefix)
    documents, places = images.places["document"], images.places["token"]
    order = documents * (int(lengths.max()) + 1) + places  # grows from place to place
    if not ((documents < len(lengths)).all() and (places < lengths[documents]).all() and (np.diff(order) > 0).all()):
        return ["the places of images are not in the order of conversations and their tokens"]
    if (tokens[starts[documents] + places] != tokenizer.pad_id).any():
        return ["a token stands where an image belongs"]
    try:
        for number in np.linspace(0, len(places) - 1, min(_SAMPLES, len(places))).astype(int).tolist():
            images.read(number)
    except UserError as error:
        return [error.message]
    return []


def _tokens(prefix: str) -> np.ndarray:
    return np.memmap(prefix + ".bin", dtype=read_index_header(prefix + ".idx").dtype, mode="r")


def _samples_survive(tokens: np.ndarray, ends: np.ndarray, lengths: np.ndarray, tokenizer: Tokenizer) -> bool:
    """Return True if evenly spaced documents come back token by token."""
    for number in np.linspace(0, len(ends) - 1, min(_SAMPLES, len(ends))).astype(int):
        ids = tokens[ends[number] - lengths[number] : ends[number] - 1].tolist()
        if tokenizer.text_to_ids(tokenizer.ids_to_text(ids)) != ids:
            return False
    return True


def _first_words(prefix: str, tokenizer: Tokenizer) -> str:
    text = tokenizer.ids_to_text(_tokens(prefix)[:_SHOWN_CHARACTERS].tolist())[:_SHOWN_CHARACTERS]
    return f", begins {text!r}"
