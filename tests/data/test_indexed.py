"""Our index writer against megatron-core's, byte by byte."""

from __future__ import annotations

import os
import pickle

import numpy as np
import pytest
import torch

from nemotron_h.core.errors import UserError
from nemotron_h.core.files import file_sha256
from nemotron_h.data import indexed


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
@pytest.mark.parametrize("chunk", [3, 1 << 20])
def test_same_bytes_as_megatron(tmp_path, monkeypatch, dtype, chunk):
    from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

    monkeypatch.setattr(indexed, "_CHUNK", chunk)
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 60_000, size=n).astype(dtype) for n in (5, 1, 300, 2, 2, 77, 9)]
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=dtype)
    for document in documents:
        builder.add_item(torch.from_numpy(document.astype(np.int64)))
        builder.end_document()
    builder.finalize(str(tmp_path / "theirs.idx"))
    lengths = np.array([len(d) for d in documents], dtype=np.int32)
    sha256 = indexed.write_index(tmp_path / "ours.idx", lengths, np.dtype(dtype))
    assert (tmp_path / "ours.idx").read_bytes() == (tmp_path / "theirs.idx").read_bytes()
    assert sha256 == file_sha256(tmp_path / "ours.idx")
    assert indexed.index_is_plain(tmp_path / "ours.idx")
    assert indexed.read_index_header(tmp_path / "ours.idx").file_size == (tmp_path / "ours.idx").stat().st_size
    read = IndexedDataset(str(tmp_path / "theirs"))
    assert all(np.array_equal(read[n], d) for n, d in enumerate(documents))


def test_reordered_offsets_are_not_plain(tmp_path):
    indexed.write_index(tmp_path / "a.idx", np.array([3, 4, 5], dtype=np.int32), np.dtype(np.uint16))
    data = bytearray((tmp_path / "a.idx").read_bytes())
    start = 34 + 3 * 4
    data[start : start + 8], data[start + 8 : start + 16] = data[start + 8 : start + 16], data[start : start + 8]
    (tmp_path / "a.idx").write_bytes(data)
    assert not indexed.index_is_plain(tmp_path / "a.idx")


def test_what_is_no_index(tmp_path):
    (tmp_path / "a.idx").write_bytes(b"MMIDIDX\x00\x00" + b"\x07" * 40)
    with pytest.raises(ValueError, match=r"a\.idx"):
        indexed.read_index_header(tmp_path / "a.idx")


def test_token_type_holds_every_id():
    assert [indexed.token_dtype(n).name for n in (256, 65_535, 65_536, 131_072)] == [
        "uint16",
        "uint16",
        "int32",
        "int32",
    ]


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_a_stream_reads_what_lies_there_and_tells_what_does_not(tmp_path, monkeypatch, dtype):
    rng = np.random.default_rng(0)
    lengths = rng.integers(0, 4, 5000).astype(np.int32)  # some documents are empty
    ids = rng.integers(0, 300, lengths.sum()).astype(dtype)
    ids.tofile(tmp_path / "a.bin")
    indexed.write_index(tmp_path / "a.idx", lengths, np.dtype(dtype))
    stream = pickle.loads(pickle.dumps(indexed.TokenStream(str(tmp_path / "a"), 300)))
    begins = np.cumsum(lengths) - lengths
    monkeypatch.setattr(indexed, "_BLOCK", 7)
    for start, count in ((0, 10), (4000, 100), (len(ids) - 20, 50), (3, 2 * len(ids))):
        places = np.arange(start, start + count) % len(ids)
        assert np.array_equal(stream.read(start, count), ids[places])
        assert np.array_equal(stream.document_starts(start, count), np.flatnonzero(np.isin(places, begins)))
    for wrong in (300, 65_535 if dtype == np.uint16 else -1):
        changed = ids.copy()
        changed[[70, 90]] = np.array(wrong).astype(dtype)
        changed.tofile(tmp_path / "a.bin")
        with pytest.raises(UserError, match=rf"a.bin: token 70 has the id {wrong:,}, the tokenizer has 300 ids"):
            stream.read(60, 40)
    for suffix, size, read in ((".bin", 100, stream.read), (".idx", 4000, stream.document_starts)):
        os.truncate(f"{tmp_path}/a{suffix}", size)
        with pytest.raises(UserError, match=rf"a{suffix} ends at byte {size:,}: it was truncated since"):
            read(3000, 40)
    with pytest.raises(ValueError, match="truncated: 991 of 5,000 lengths"):
        indexed.read_lengths(tmp_path / "a.idx")
