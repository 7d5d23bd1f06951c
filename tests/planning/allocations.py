"""Bytes that torch's CPU allocator holds, over time, from the allocation events of torch.profiler."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch._C._profiler import _EventType


@dataclass
class Live:
    """What was held while the block ran; blocks that were there before it do not count.

    Attributes:
        peaks: largest number of bytes within each `mark`, by its name.
        after: bytes held at each mark's end.
        peak_ops: the operation that allocated last before each mark's peak, with its callers.
    """

    peaks: dict[str, int] = field(default_factory=dict)
    after: dict[str, int] = field(default_factory=dict)
    peak_ops: dict[str, str] = field(default_factory=dict)


def mark(name: str) -> torch.autograd.profiler.record_function:
    """A stretch of the block to report on; `with mark("step"): ...`."""
    return torch.autograd.profiler.record_function(f"mark:{name}")


@contextmanager
def live_bytes() -> Iterator[Live]:
    """Follow every allocation inside the block; the result is filled at its end.

    gloo's threads release the buffers of a collective where the profiler does not see it: such a buffer counts until
    the next collective begins. Its release is missing: what its address sees next is an allocation, or nothing.
    """
    live = Live()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        yield live
    held: dict[int, int] = {}
    total = 0
    spans, allocations, collectives = [], [], []
    stack = [(event, "") for event in profiler.profiler.kineto_results.experimental_event_tree()]
    while stack:
        event, callers = stack.pop()
        kind, fields = event.typed
        if kind == _EventType.Allocation:
            allocations.append((event.start_time_ns, fields.ptr, fields.alloc_size, callers))
            continue
        if event.name.startswith("c10d::"):
            collectives.append(event.start_time_ns)
        if event.name.startswith("mark:"):
            spans.append((event.start_time_ns, event.end_time_ns, event.name.removeprefix("mark:")))
        path = f"{callers} > {event.name}" if callers else event.name
        stack.extend((child, path) for child in event.children)
    allocations.sort(key=lambda a: a[0])
    for _, _, name in spans:
        live.peaks[name] = live.after[name] = 0
    following: dict[int, int] = {}  # of each address, the size of its next event
    next_sizes = []
    for _, pointer, size, _ in reversed(allocations):
        next_sizes.append(following.get(pointer))
        following[pointer] = size
    unseen: list[int] = []
    collectives.sort(reverse=True)
    for (time, pointer, size, callers), next_size in zip(allocations, reversed(next_sizes), strict=True):
        while collectives and collectives[-1] <= time:
            collectives.pop()
            total -= sum(unseen)
            unseen.clear()
        sent = "c10d::" in callers or "gloo:" in callers
        if size > 0 and (next_size > 0 if next_size is not None else sent):
            unseen.append(size)
            total += size
        elif size > 0:
            total += size - held.pop(pointer, 0)
            held[pointer] = size
        else:
            total -= held.pop(pointer, 0)
        for begin, end, name in spans:
            if begin <= time <= end and total > live.peaks[name]:
                live.peaks[name], live.peak_ops[name] = total, callers
            if time <= end:
                live.after[name] = total
