"""Write the shards of a checkpoint in threads of the rank, from staged copies, while training goes on.

megatron-core forks a process for a save, one for each file, and spawns another one for their results, which first
imports all that the run imports. A signal to the process group (Slurm, systemd, GNU timeout and ctrl-c send such) ends
them and with them the save, and the spawned one outlives a rank that is killed. Threads know neither, and an error of
the file system arrives as it was raised.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from megatron.core.dist_checkpointing.strategies import async_utils, filesystem_async
from torch import Tensor
from torch.distributed.checkpoint.filesystem import SerializationFormat, _write_item
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult

from nemotron_h.core.files import HashedFile
from nemotron_h.platform.staging import Staging

#: ours: a rank writes one file per so many bytes, each in a thread, and not more than so many. A thread hashes and
#: writes about 0.8 GB/s, so these are more than a disk takes; thousands of ranks have less and write one each.
FILE_BYTES, MOST_FILES = 1 << 28, 8
#: seconds between questions to the other ranks, where a save is waited for
ASK_EVERY_S = 0.2

STAGING = Staging()
_abandoned = threading.Event()


@dataclass
class Written:
    """Files that this rank's threads wrote of one checkpoint.

    Attributes:
        files: name in `weights` -> [bytes, sha256].
        seconds: from the copy until the last file was on the disk.
        allocating: seconds of the save in which memory for the copies was allocated; 0 in later ones.
    """

    files: dict[str, list] = field(default_factory=dict)
    seconds: float = 0.0
    allocating: float = 0.0


_written: dict[str, Written] = {}


def take_written(weights: Path) -> Written:
    """Return, once, what this rank wrote into a checkpoint's `weights` folder."""
    return _written.pop(str(weights), Written())


def abandon() -> None:
    """Have the threads of this process stop with what they are writing: it ends, and nobody waits for them."""
    _abandoned.set()


def advance(size: int) -> None:
    """Take note of so many bytes that a thread has written.

    Errors:
        RuntimeError: the save is abandoned.
    """
    if _abandoned.is_set():
        raise RuntimeError("the process ends")


class CheckpointWriter(filesystem_async.FileSystemWriterAsync):
    """megatron-core's writer with copies staged in one block of host memory, and threads in place of processes."""

    def prepare_write_data(self, plan: SavePlan, planner: SavePlanner) -> None:
        """Have this rank's shards copied and divide them into files.

        Training may change buffers when this returns, and weights and optimizer states after `STAGING.wait_on_gpu`.
        """
        sizes = [filesystem_async._item_size(i) for i in plan.items if i.type != WriteItemType.BYTE_IO]
        STAGING.reserve(sizes)
        self.thread_count = min(MOST_FILES, max(1, math.ceil(sum(sizes) / FILE_BYTES)))
        super().prepare_write_data(plan, _StagedPlanner(planner))
        STAGING.seal()
        _abandoned.clear()  # of a run before in this process, a notebook's
        self.results_queue = SimpleQueue() if self.write_buckets else None
        _written[str(self.checkpoint_dir)] = Written(allocating=STAGING.seconds)

    def write_preloaded_data_multiproc(
        self, transforms: Sequence[Any], use_msc: bool, rank: int, buckets: list[Any], results: SimpleQueue
    ) -> None:
        """Write each bucket into its file; the results, or the first error, go into the queue."""
        STAGING.wait()
        began = time.monotonic()
        written = _written[str(self.checkpoint_dir)]
        outcomes: dict[int, list[WriteResult]] = {}
        error: Exception | None = None
        with ThreadPoolExecutor(len(buckets), thread_name_prefix="checkpoint") as pool:
            futures = [pool.submit(_write, transforms[0], bucket) for bucket in buckets]
        for number, (future, (path, name, _)) in enumerate(zip(futures, buckets, strict=True)):
            try:
                outcomes[number], written.files[name] = future.result()
            except Exception as failure:
                error = error or _of_file_system(failure, path)
        written.seconds = time.monotonic() - began
        results.put(error or outcomes)


class _StagedPlanner:
    """Planner whose tensors are copies."""

    def __init__(self, planner: SavePlanner) -> None:
        self.planner = planner

    def resolve_data(self, item: WriteItem) -> Any:
        data = self.planner.resolve_data(item)
        return STAGING.copy(data) if isinstance(data, Tensor) else data


def _write(transforms: Any, bucket: tuple[str, str, tuple[list, list]]) -> tuple[list[WriteResult], list]:
    """Write a file and return where each item lies in it, and the file's size and sha256.

    torch takes a CRC-32 of each tensor beside, a third of a thread's time: by it a reader of weights alone finds damage
    without reading the optimizer's states.
    """
    path, name, (objects, tensors) = bucket
    with HashedFile(Path(path), advance) as file:
        places = [
            _write_item(transforms, file, data, item, name, SerializationFormat.TORCH_SAVE)
            for item, data in (*objects, *tensors)
        ]
        file.sync()
    return places, [file.size, file.sha256]


def _of_file_system(error: Exception, path: str) -> Exception:
    """Return the operating system's error behind one of a write, with the file's path, or the error itself.

    torch closes a file that could not be written to, fails again, and hides the first error behind the second.
    """
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    return error if cause is None else OSError(cause.errno, cause.strerror, path)


class ThreadCaller(async_utils.AsyncCaller):
    """Caller of megatron-core's queue of saves that starts a thread."""

    def __init__(self) -> None:
        self.thread: threading.Thread | None = None

    def schedule_async_call(self, async_req: async_utils.AsyncRequest) -> None:
        """Start the thread, where this rank has something to write."""
        if async_req.async_fn is not None:
            self.thread = threading.Thread(
                target=async_req.async_fn, args=async_req.async_fn_args, kwargs=async_req.async_fn_kwargs, daemon=True
            )
            self.thread.start()

    def is_current_async_call_done(self, blocking: bool = False, no_dist: bool = False) -> bool:
        """Tell whether all ranks have written. Where that is waited for, each waits for its own thread and asks the
        others every now and then: no collective operation lasts as long as the slowest disk.
        """
        while True:
            if blocking and self.thread is not None:
                self.thread.join(ASK_EVERY_S)
            writing = self.thread is not None and self.thread.is_alive()
            if not writing if no_dist else bool(self.sync_all_async_calls(int(writing))):
                return True
            if not blocking:
                return False

    def close(self, abort: bool = False) -> None:
        """Wait for the thread."""
        if self.thread is not None:
            self.thread.join()

    def __del__(self) -> None:
        """Leave the thread to the process: the interface asks for this."""
