"""Shards are copied at once, and written and hashed in threads without another process."""

from __future__ import annotations

import errno
import hashlib
import threading
from collections.abc import Iterator
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import psutil
import pytest
import torch

from nemotron_h.core.files import HashedFile, file_sha256
from nemotron_h.platform.staging import Staging


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[Any]:
    """megatron-core's writer as this project has it write."""
    from nemotron_h.platform import checkpoint_writer, megatron_fixes

    megatron_fixes.install()
    yield checkpoint_writer.CheckpointWriter(tmp_path)
    checkpoint_writer.take_written(tmp_path)


def write(writer: Any, *paths: Path) -> Any:
    """Write a tensor into each path; return the results, or the error."""
    from torch.distributed.checkpoint.metadata import MetadataIndex
    from torch.distributed.checkpoint.planner import WriteItem, WriteItemType

    from nemotron_h.platform import checkpoint_writer

    checkpoint_writer._written[str(writer.checkpoint_dir)] = checkpoint_writer.Written()
    results: SimpleQueue = SimpleQueue()
    item = WriteItem(MetadataIndex("weight"), WriteItemType.TENSOR)
    buckets = [(str(path), path.name, ([], [(item, torch.arange(10_000.0))])) for path in paths]
    writer.write_preloaded_data_multiproc([writer.transforms], False, 0, buckets, results)
    return results.get_nowait()


def test_checkpoints_are_written_without_another_process(writer: Any, tmp_path: Path) -> None:
    from nemotron_h.platform.checkpoint_writer import take_written

    before = set(psutil.Process().children(recursive=True))
    results = write(writer, tmp_path / "a", tmp_path / "b")
    assert set(psutil.Process().children(recursive=True)) <= before
    written = take_written(tmp_path)
    for number, name in enumerate("ab"):
        path = tmp_path / name
        assert results[number][0].size_in_bytes == path.stat().st_size
        assert torch.equal(torch.load(path), torch.arange(10_000.0))
        assert written.files[name] == [path.stat().st_size, file_sha256(path)]
    assert written.seconds > 0
    assert take_written(tmp_path).files == {}, "once"


def test_the_error_of_a_write_names_its_file(writer: Any, tmp_path: Path) -> None:
    full = write(writer, tmp_path / "c", Path("/dev/full"))
    assert (type(full), full.errno, full.filename) == (OSError, errno.ENOSPC, "/dev/full")
    missing = write(writer, tmp_path / "absent" / "a")
    assert (missing.errno, missing.filename) == (errno.ENOENT, str(tmp_path / "absent" / "a"))


def test_an_abandoned_save_ends_soon(writer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nemotron_h.platform import checkpoint_writer

    monkeypatch.setattr(checkpoint_writer, "_abandoned", threading.Event())
    checkpoint_writer.abandon()
    assert isinstance(write(writer, tmp_path / "a"), RuntimeError)
    assert (tmp_path / "a").stat().st_size < 40_000


def test_a_large_rank_writes_several_files(writer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.distributed.checkpoint import DefaultSavePlanner

    from nemotron_h.platform import checkpoint_writer

    monkeypatch.setattr(checkpoint_writer, "FILE_BYTES", 1000)
    for count, files in ((1, 1), (7, 2), (400, checkpoint_writer.MOST_FILES)):
        planner = DefaultSavePlanner()
        planner.set_up_planner({str(n): torch.full((50,), float(n)) for n in range(count)}, is_coordinator=True)
        plan, _ = planner.create_global_plan([planner.create_local_plan()])
        (plan,) = writer.prepare_global_plan(plan)
        writer.prepare_write_data(planner.finish_plan(plan), planner)
        assert len(writer.write_buckets) == files


def test_copies_have_storages_of_their_own_in_one_block_that_is_reused() -> None:
    staging = Staging()
    base = torch.arange(24.0).view(4, 6)
    tensors = [base[1:3], base.t(), base.bfloat16(), torch.empty(0), torch.tensor(True), torch.zeros((), dtype=int)]
    addresses = []
    for turn in range(2):
        staging.reserve(tensor.nbytes for tensor in tensors)
        assert (staging.seconds > 0) == (turn == 0)
        copies = [staging.copy(tensor) for tensor in tensors]
        staging.wait()
        expected = [tensor.clone() for tensor in tensors]
        base.add_(1)
        for copy, tensor in zip(copies, expected, strict=True):
            assert copy.dtype == tensor.dtype
            assert torch.equal(copy, tensor)
            assert copy.is_contiguous()
            assert copy.untyped_storage().nbytes() == copy.nbytes, "torch.save writes whole storages"
        addresses.append([copy.data_ptr() for copy in copies if copy.numel()])
    assert addresses[0] == addresses[1]
    staging.reserve([staging.size + 1])
    assert staging.seconds > 0


def test_a_hashed_file_need_not_be_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HashedFile, "_PIECE", 1000)
    pieces: list[int] = []
    with HashedFile(tmp_path / "a", pieces.append) as file:
        assert [file.write(data) for data in (b"", b"ab", memoryview(bytes(range(250)) * 10))] == [0, 2, 2500]
        assert file.tell() == file.size == 2502
        file.sync()
    content = (tmp_path / "a").read_bytes()
    assert content == b"ab" + bytes(range(250)) * 10
    assert file.sha256 == hashlib.sha256(content).hexdigest()
    assert pieces == [2, 1000, 1000, 500]
