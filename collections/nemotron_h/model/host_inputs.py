"""Keep the inputs of recomputed layers in host memory between forward and backward.

A GPU copies them on a stream of its own: an input leaves while its layer runs forward, and comes back while the layer
after it runs backward. So of a pass at most two inputs are on the GPU at a time, and training waits for a copy only
where that takes longer than a layer.
"""

from __future__ import annotations

import contextlib
import logging
import weakref

import torch
from torch import Tensor

from nemotron_h.core.errors import UserError
from nemotron_h.core.units import gib
from nemotron_h.platform.memory import available

logger = logging.getLogger(__name__)


class _Input:
    """Input of a layer in one pass.

    Attributes:
        host: its copy.
        before: input of the recomputed layer before it, which is needed next; None for the first of a pass.
        tensor: on the device; None between the end of the copy and the backward of the next layer.
        copied: event of the last copy, there or back; None on a CPU.
    """

    def __init__(self, tensor: Tensor, host: Tensor, before: _Input | None) -> None:
        self.tensor: Tensor | None = tensor.detach()
        self.host, self.before, self.device = host, before, tensor.device
        self.copied: torch.cuda.Event | None = None


def _block(size: int) -> Tensor:
    """Return so many bytes of host memory.

    Errors:
        UserError: the machine has no more, and would kill a process.
    """
    if size > (there := available()):
        raise UserError(
            f"recompute.offload: the input of a layer takes {gib(size)} of host memory, {gib(there)} are free",
            hint="leave recompute.offload out, split the tokens further (parallel.context, parallel.tensor), or free "
            "memory; nemotron-h plan says what a node needs",
        )
    # PyTorch's own pinned memory: it outlives copies that still run, and is unregistered before its pages are freed
    return torch.empty(size, dtype=torch.uint8, pin_memory=torch.cuda.is_available())


class HostInputs:
    """Inputs that autograd has saved under `saving`. On a CPU they are copied too, from host memory to host memory:
    runs there follow the path of a GPU, and save nothing.
    """

    def __init__(self) -> None:
        self._stream: torch.cuda.Stream | None = None
        if torch.cuda.is_available():
            self._stream = torch.cuda.Stream()
        else:
            logger.info("recompute.offload saves nothing: without a GPU, layers' inputs are in host memory already")
        #: blocks of host memory that no pass uses, by their bytes
        self._unused: dict[int, list[Tensor]] = {}
        self._newest: _Input | None = None
        self._before: _Input | None = None

    def begin_pass(self) -> None:
        """Take note that the next input is of the first layer of a forward pass."""
        self._before = None

    def saving(self) -> contextlib.AbstractContextManager[None]:
        """Have what autograd saves within the block stay in host memory: the input of one checkpointed layer."""
        return torch.autograd.graph.saved_tensors_hooks(self._keep, self._return)

    def _keep(self, tensor: Tensor) -> _Input:
        self._leave_device()
        unused = self._unused.setdefault(tensor.nbytes, [])
        block = unused.pop() if unused else _block(tensor.nbytes)
        entry = _Input(tensor, block.view(tensor.dtype).view(tensor.shape), self._before)
        # graphs of abandoned passes return their blocks too; a copy that still reads or writes one is on the stream
        # before any that the next owner asks for
        weakref.finalize(entry, unused.append, block).atexit = False
        self._copy(entry, entry.host, tensor)
        self._newest = self._before = entry
        return entry

    def _leave_device(self) -> None:
        """Free the newest input, whose layer has been run: the device waits for the end of its copy."""
        newest, self._newest = self._newest, None
        if newest is not None:
            self._wait(newest)
            newest.tensor = None

    def _return(self, entry: _Input) -> Tensor:
        """Return an input for the backward of its layer, and begin to fetch the one that is needed next."""
        if entry is self._newest:
            self._newest = None
        tensor = self._fetch(entry)
        self._wait(entry)
        entry.tensor = None  # autograd has it until the layer's backward ends
        if entry.before is not None:
            self._fetch(entry.before)
        return tensor

    def _fetch(self, entry: _Input) -> Tensor:
        if entry.tensor is None:
            entry.tensor = torch.empty_like(entry.host, device=entry.device)
            self._copy(entry, entry.tensor, entry.host)
        return entry.tensor

    def _copy(self, entry: _Input, into: Tensor, tensor: Tensor) -> None:
        if self._stream is None:
            into.copy_(tensor)
            return
        self._stream.wait_stream(torch.cuda.current_stream())  # it has computed the tensor, and used the memory before
        with torch.cuda.stream(self._stream):
            into.copy_(tensor, non_blocking=True)
            entry.copied = self._stream.record_event()

    def _wait(self, entry: _Input) -> None:
        if entry.copied is not None:
            torch.cuda.current_stream().wait_event(entry.copied)
