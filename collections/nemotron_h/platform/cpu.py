"""Run NeMo and megatron-core where no GPU is visible.

Both ask `torch.cuda` for the device that they run on, even where nothing they do needs a GPU. This module answers
those questions with the CPU, one name at a time, in the way that other accelerators' transfer modules do. Nothing is
changed where a GPU is visible. `PATCHES` lists every changed name with the caller that needs it.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch

from nemotron_h.platform import imports
from nemotron_h.platform.adamw import CheckpointableAdamW

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Patch:
    """Name that the CPU answers: `owner.name`, what answers for it, and who asks."""

    owner: str
    name: str
    make: Callable[[Any], Any]
    caller: str


def _is_cuda(device: Any) -> bool:
    return (isinstance(device, str) and device.startswith("cuda")) or (
        isinstance(device, torch.device) and device.type == "cuda"
    )


def _factory(original: Callable) -> Callable:
    """Return a tensor factory whose `device="cuda"` means the CPU; pinned memory needs a GPU, so it is plain memory."""

    @functools.wraps(original)
    def create(*args: Any, **kwargs: Any) -> torch.Tensor:
        if "device" in kwargs and _is_cuda(kwargs["device"]):
            kwargs["device"] = CPU
        kwargs.pop("pin_memory", None)
        return original(*args, **kwargs)

    return create


def _to(original: Callable) -> Callable:
    @functools.wraps(original)
    def to(self: Any, *args: Any, **kwargs: Any) -> Any:
        args = tuple(CPU if _is_cuda(a) else a for a in args)
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = CPU
        return original(self, *args, **kwargs)

    return to


def _type(original: Callable) -> Callable:
    @functools.wraps(original)
    def type_(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        if dtype is None:
            return original(self).replace("torch.", "torch.cuda.", 1)
        return original(self, dtype, *args, **kwargs)

    return type_


def _constant(value: Any) -> Callable[[Any], Any]:
    return lambda original: lambda *args, **kwargs: value


def _value(value: Any) -> Callable[[Any], Any]:
    return lambda original: value


def _identity(original: Any) -> Callable:
    return lambda self, *args, **kwargs: self


def _megatrons(name: str) -> Callable[[Any], Any]:
    """Return the megatron-core function that it takes where neither Transformer Engine nor Apex is installed."""
    return lambda original: getattr(import_module("megatron.core.utils"), name)


def _move_to_host(original: Any) -> Callable:
    def move(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    return move


class CpuStream:
    """Work on the CPU is done in program order: a stream has nothing to order."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def wait_stream(self, stream: Any) -> None:
        pass

    def wait_event(self, event: Any) -> None:
        pass

    def record_event(self, event: Any = None) -> Any:
        return event or self  # an event is asked for `synchronize` alone

    def synchronize(self) -> None:
        pass


def _get_rng_state(original: Any) -> Callable:
    return lambda *args, **kwargs: torch.get_rng_state()


def _set_rng_state(original: Any) -> Callable:
    return lambda new_state, *args, **kwargs: torch.set_rng_state(new_state)


def _manual_seed(original: Any) -> Callable:
    return lambda seed: torch.default_generator.manual_seed(seed)


_FACTORIES = (
    "arange",
    "as_tensor",
    "empty",
    "empty_like",
    "full",
    "ones",
    "ones_like",
    "tensor",
    "zeros",
    "zeros_like",
)

#: of optimizers, bound at import to Transformer Engine's kernels where it is installed
_MULTI_TENSOR = (
    ("clip_grads", "multi_tensor_applier", "local_multi_tensor_applier"),
    ("clip_grads", "l2_norm_impl", "local_multi_tensor_l2_norm"),
    ("clip_grads", "multi_tensor_scale_impl", "local_multi_tensor_scale"),
    ("optimizer", "multi_tensor_applier", "local_multi_tensor_applier"),
    ("optimizer", "multi_tensor_scale_impl", "local_multi_tensor_scale"),
)

PATCHES: tuple[Patch, ...] = (
    *(Patch("torch", name, _factory, "megatron-core and NeMo ask for device='cuda'") for name in _FACTORIES),
    Patch("torch.Tensor", "to", _to, "NeMo MegatronStrategy logs scalars through .to('cuda')"),
    Patch("torch.Tensor", "cuda", _identity, "NeMo gpt_data_step moves each batch"),
    Patch("torch.nn.Module", "cuda", _identity, "NeMo MegatronParallel moves the model"),
    Patch("torch.Tensor", "type", _type, "megatron-core optimizers compare 'torch.cuda.FloatTensor' as text"),
    Patch("torch.cuda", "current_device", _constant(CPU), "megatron-core creates parameters on the current device"),
    Patch("torch.cuda", "set_device", _constant(None), "NeMo init_model_parallel"),
    Patch("torch.cuda", "synchronize", _constant(None), "megatron-core timers and checkpointing"),
    # before device_count: a PyTorch built for CUDA answers it by counting
    Patch("torch.cuda", "is_available", _constant(False), "Lightning asks before it takes the CPU"),
    Patch("torch.cuda", "device_count", _constant(1), "megatron-core derives local ranks"),
    Patch("torch.cuda", "Stream", _value(CpuStream), "NeMo MegatronParallel wraps DDP on a side stream"),
    Patch("torch.cuda", "stream", lambda original: lambda stream: nullcontext(), "as above"),
    Patch("torch.cuda", "current_stream", lambda original: CpuStream, "megatron-core gradient buffers"),
    Patch("torch.cuda", "default_stream", lambda original: CpuStream, "megatron-core gradient buffers"),
    Patch("torch.cuda", "memory_allocated", _constant(0), "megatron-core memory reports"),
    Patch("torch.cuda", "max_memory_allocated", _constant(0), "megatron-core memory reports"),
    Patch("torch.cuda", "memory_reserved", _constant(0), "megatron-core memory reports"),
    Patch("torch.cuda", "max_memory_reserved", _constant(0), "megatron-core memory reports"),
    Patch("torch.cuda", "get_rng_state", _get_rng_state, "megatron-core RNG tracker"),
    Patch("torch.cuda", "set_rng_state", _set_rng_state, "megatron-core RNG tracker"),
    Patch("torch.cuda", "manual_seed", _manual_seed, "megatron-core RNG tracker"),
    Patch("torch.cuda.nvtx", "range_push", _constant(None), "megatron-core optimizers"),
    Patch("torch.cuda.nvtx", "range_pop", _constant(None), "megatron-core optimizers"),
    Patch("megatron.core.tensor_parallel.random", "_get_cuda_rng_state", _get_rng_state, "RNG tracker forks"),
    Patch("megatron.core.tensor_parallel.random", "_set_cuda_rng_state", _set_rng_state, "RNG tracker forks"),
    Patch(
        "megatron.core.transformer.moe.token_dispatcher",
        "maybe_move_tensor_to_cpu",
        _move_to_host,
        "leaves counts of tokens on the CPU as tensors, which its exchange of tokens refuses",
    ),
    Patch(
        "nemo.lightning.io.pl",
        "_fix_tensors_device",
        lambda original: lambda checkpoint: checkpoint,
        "asserts CUDA before it moves restored tensors between GPUs",
    ),
    *(
        Patch(f"megatron.core.optimizer.{module}", name, _megatrons(own), "gradient norm, clipping, weight copies")
        for module, name, own in _MULTI_TENSOR
    ),
    # torch's own AdamW keeps `step` per parameter, which the distributed optimizer refuses to checkpoint.
    Patch("megatron.core.optimizer", "Adam", _value(CheckpointableAdamW), "get_megatron_optimizer"),
    Patch("megatron.core.optimizer", "USING_PYTORCH_OPTIMIZER", _value(False), "picks Adam's arguments"),
    Patch("megatron.core.optimizer.distrib_optimizer", "Adam", _value(CheckpointableAdamW), "type check"),
    Patch("megatron.core.optimizer.distrib_optimizer", "HAVE_APEX_OR_TE", _value(True), "checkpoint format"),
    Patch("megatron.core.optimizer.distrib_optimizer", "USING_TE_OPTIMIZER", _value(True), "checkpoint format"),
)


def _resolve(owner: str) -> Any:
    parts = owner.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            with imports.without_gpu_builds():
                target: Any = import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for part in parts[cut:]:
            target = getattr(target, part)
        return target
    raise ModuleNotFoundError(owner)


def gpu_visible() -> bool:
    """Return True if PyTorch sees a GPU; the patches do not change the answer."""
    return torch.cuda.is_available()


def keep_freed_memory() -> None:
    """Let glibc keep large freed blocks: activations of each step then reuse pages, not fault in new ones.

    Without it each step's activations are mapped and zeroed by the kernel anew. A no-op without glibc.
    """
    trim_threshold, mmap_max = -1, -4  # malloc.h
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, 2**31 - 1)


_installed: contextlib.ExitStack | None = None


@contextlib.contextmanager
def megatron_on_cpu() -> Iterator[None]:
    """Answer for `torch.cuda` with the CPU inside the block; a no-op where a GPU is visible."""
    if gpu_visible():
        yield
        return
    with torch.device("meta"):  # at its first use PyTorch notes which functions a device context applies to
        torch.empty(0)
    undo: list[tuple[Any, str, Any, bool]] = []
    try:
        for patch in PATCHES:
            owner = _resolve(patch.owner)
            own = patch.name in vars(owner)
            original = getattr(owner, patch.name)
            setattr(owner, patch.name, patch.make(original))
            undo.append((owner, patch.name, original, own))
        yield
    finally:
        for owner, name, original, own in reversed(undo):
            if own:
                setattr(owner, name, original)
            else:
                delattr(owner, name)


def install() -> None:
    """Enter `megatron_on_cpu` for the rest of the process (once; training processes end with their run)."""
    global _installed
    if _installed is None:
        if not gpu_visible():
            keep_freed_memory()
        _installed = contextlib.ExitStack()
        _installed.enter_context(megatron_on_cpu())


def uninstall() -> None:
    """Undo `install`."""
    global _installed
    if _installed is not None:
        _installed.close()
        _installed = None
