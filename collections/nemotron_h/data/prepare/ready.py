"""Ready-made Megatron `.bin/.idx` pairs: used in place, after checking that they fit the blend's tokenizer."""

from __future__ import annotations

import os

import numpy as np

from nemotron_h.core.errors import UserError
from nemotron_h.core.files import file_sha256
from nemotron_h.data.indexed import index_is_plain, read_index_header, read_lengths
from nemotron_h.data.manifest import SplitManifest, probe
from nemotron_h.data.tokenizer import Tokenizer

_CHUNK_TOKENS = 1 << 24


def adopt_split(key: str, prefix: str, tokenizer: Tokenizer) -> SplitManifest:
    """Check a pair and describe it.

    Args:
        key: of the source in the blend, for messages.
        prefix: absolute path without `.bin`.
        tokenizer: the ids must be its own and every document must end with its EOD.

    Errors:
        UserError: naming the file and what does not fit.
    """
    for suffix in (".bin", ".idx"):
        if not os.path.isfile(prefix + suffix):
            raise UserError(f"{key}.path: there is no {prefix}{suffix}", "Give the path without .bin and .idx.")
    try:
        header, lengths = read_index_header(prefix + ".idx"), read_lengths(prefix + ".idx")
        plain = index_is_plain(prefix + ".idx")
    except ValueError as error:
        raise UserError(f"{key}: {error}") from error
    if header.dtype.kind not in "iu":
        raise UserError(f"{key}: {prefix}.idx holds {header.dtype.name}, not tokens")
    if not plain:
        raise UserError(f"{key}: {prefix}.idx is not one sequence per document, in order, without gaps")
    tokens = int(lengths.sum(dtype=np.int64))
    if not tokens or os.path.getsize(prefix + ".bin") != tokens * header.dtype.itemsize:
        raise UserError(f"{key}: {prefix}.bin is empty, or its size is not the {tokens:,} tokens that its .idx lists")
    content = np.memmap(prefix + ".bin", dtype=header.dtype, mode="r")
    for first in range(0, tokens, _CHUNK_TOKENS):
        part = content[first : first + _CHUNK_TOKENS]
        if int(part.max()) >= tokenizer.vocab_size or int(part.min()) < 0:
            raise UserError(
                f"{key}: {prefix}.bin has token {int(part.max())}, the tokenizer has {tokenizer.vocab_size:,} ids",
                "It was made with another tokenizer: name that one in the blend.",
            )
    last = content[np.cumsum(lengths, dtype=np.int64) - 1]
    wrong = np.flatnonzero(last != tokenizer.eod_id)
    if len(wrong):
        raise UserError(
            f"{key}: {prefix}.bin: document {wrong[0]} ends with {last[wrong[0]]}, not with EOD {tokenizer.eod_id}",
            "Prepare it with --append-eod and this tokenizer.",
        )
    hashes = {f"sha256_{suffix}": file_sha256(f"{prefix}.{suffix}") for suffix in ("bin", "idx")}
    return SplitManifest(prefix, header.sequences, tokens, 0, header.dtype.name, **hashes, probe=probe(prefix))
