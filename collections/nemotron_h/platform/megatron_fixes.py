"""Corrections of megatron-core 0.15.3, applied on every machine."""

from __future__ import annotations

import functools
from queue import SimpleQueue
from types import SimpleNamespace
from typing import Any

import numpy
import torch
from megatron.core.dist_checkpointing.strategies import async_utils, filesystem_async
from megatron.core.dist_checkpointing.strategies import torch as torch_dist
from megatron.core.msc_utils import MultiStorageClientFeature
from megatron.core.optimizer import clip_grads
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.tensor_parallel import layers

from nemotron_h.platform.checkpoint_writer import CheckpointWriter, ThreadCaller


def install() -> None:
    """Apply each correction once."""
    _order_mixed_precision_groups()
    _accumulate_weight_gradients_without_apex()
    _flatten_products_of_frozen_weights()
    _write_checkpoints_in_threads()
    _norm_and_clip_gradients_of_each_dtype()
    _multiply_shapes_with_numpy_2()
    _read_files_with_torch()


def _read_files_with_torch() -> None:
    """Turn off the readers of multi-storage-client, which megatron-core takes where that is installed: checkpoints
    are local folders, and `checkpoint.index` keeps PyTorch's readers to data.
    """
    MultiStorageClientFeature.disable()


def _multiply_shapes_with_numpy_2() -> None:
    """Give numpy 2 the `product` of numpy 1, which saving a checkpoint on several ranks calls: without it a run on a
    machine whose numpy is 2 ends at its first checkpoint.
    """
    if not hasattr(numpy, "product"):
        numpy.product = numpy.prod


def _accumulate_weight_gradients_without_apex() -> None:
    """Let torch do what megatron-core's linear layers have Apex's extension for: add a weight's gradient to the float32
    gradient buffer inside the matmul. torch has had matmuls with a float32 result since 2.8.
    """
    if layers._grad_accum_fusion_available:
        return

    def wgrad_gemm_accum_fp32(total_input: torch.Tensor, grad_output: torch.Tensor, main_grad: torch.Tensor) -> None:
        if grad_output.dtype == torch.float32:
            main_grad.addmm_(grad_output.t(), total_input)
        else:
            torch.addmm(main_grad, grad_output.t(), total_input, out_dtype=torch.float32, out=main_grad)

    def wgrad_gemm_accum_fp16(total_input: torch.Tensor, grad_output: torch.Tensor, main_grad: torch.Tensor) -> None:
        main_grad.addmm_(grad_output.t(), total_input)

    layers.fused_weight_gradient_mlp_cuda = SimpleNamespace(
        wgrad_gemm_accum_fp32=wgrad_gemm_accum_fp32, wgrad_gemm_accum_fp16=wgrad_gemm_accum_fp16
    )
    layers._grad_accum_fusion_available = True


def _flatten_products_of_frozen_weights() -> None:
    """Multiply by a frozen weight what has two axes, forward and backward.

    Where the axes of [sequence, batch, channels] do not lie in memory in that order (as with one sequence behind the
    mixer), `matmul` by a weight without a gradient takes the batched matmul, for which the CPU copies the weight once
    for every position: gigabytes.
    """
    product = layers.LinearWithFrozenWeight
    if getattr(product.backward, "nemotron_h", False):
        return

    def flat(original: Any) -> Any:
        @functools.wraps(original)
        def call(ctx: Any, x: torch.Tensor, *args: Any) -> Any:
            found = original(ctx, x.flatten(0, -2), *args)
            if isinstance(found, tuple):
                return found[0].unflatten(0, x.shape[:-1]), *found[1:]
            return found.unflatten(0, x.shape[:-1])

        call.nemotron_h = True  # type: ignore[attr-defined]
        return staticmethod(call)

    product.forward, product.backward = flat(product.forward), flat(product.backward)


def _order_mixed_precision_groups() -> None:
    """Order the parameters of a group as the optimizer holds them: float32 ones first.

    `DistributedOptimizer` numbers them in the order of the gradient buffers, but lists float32 parameters before the
    float32 copies of bfloat16 ones. A group that has both (Mamba's A_log, D and dt_bias beside norms) then saves and
    loads the wrong tensors.
    """
    original = DistributedOptimizer._build_optimizer_group_ranges
    if getattr(original, "nemotron_h", False):
        return

    @functools.wraps(original)
    def build(cls: type, param_groups: list[dict], gbuf_ranges: list[dict]) -> tuple[dict, list[dict]]:
        _, group_ranges = original(param_groups, gbuf_ranges)
        numbers: dict[Any, tuple[int, int]] = {}
        for group_index, group in enumerate(group_ranges):
            group["params"].sort(key=lambda p: p.dtype != torch.float32)  # stable
            numbers.update({p: (group_index, order) for order, p in enumerate(group["params"])})
        return numbers, group_ranges

    build.nemotron_h = True  # type: ignore[attr-defined]
    DistributedOptimizer._build_optimizer_group_ranges = classmethod(build)


def _write_checkpoints_in_threads() -> None:
    """Have threads write checkpoints in place of processes: see `checkpoint_writer`."""
    torch_dist.FileSystemWriterAsync = CheckpointWriter
    async_utils.TemporalAsyncCaller = ThreadCaller
    filesystem_async._results_queue = SimpleQueue()  # in place of a process that serves one


def _norm_and_clip_gradients_of_each_dtype() -> None:
    """Give the kernels of the gradients' norm and of clipping lists of one dtype each.

    They read a whole list as its first tensor's dtype. With gradients in bfloat16 (`optim.gradients`), those of float32
    weights (Mamba's A_log, D and dt_bias) are in the same list: the norm is NaN and nothing is clipped.
    """

    def apart(lists: list[list[torch.Tensor]]) -> list[list[list[torch.Tensor]]]:
        dtypes = dict.fromkeys(tensor.dtype for tensor in lists[0])
        return [
            [[t for t, first in zip(of, lists[0], strict=True) if first.dtype == d] for of in lists] for d in dtypes
        ]

    def norm(kernel: Any) -> Any:
        def call(chunk: int, flag: torch.Tensor, lists: list[list[torch.Tensor]], *args: Any) -> Any:
            groups = apart(lists)
            if len(groups) < 2:
                return kernel(chunk, flag, lists, *args)
            found = [kernel(chunk, flag, group, *args)[0] for group in groups]
            return torch.stack(found).square().sum(dim=0).sqrt(), None

        return call

    def scale(kernel: Any) -> Any:
        def call(chunk: int, flag: torch.Tensor, lists: list[list[torch.Tensor]], *args: Any) -> None:
            for group in apart(lists):
                kernel(chunk, flag, group, *args)

        return call

    for name, wrap in (("l2_norm_impl", norm), ("multi_tensor_scale_impl", scale)):
        original = getattr(clip_grads, name)
        if not getattr(original, "nemotron_h", False):
            wrapped = functools.wraps(original)(wrap(original))
            wrapped.nemotron_h = True  # type: ignore[attr-defined]
            setattr(clip_grads, name, wrapped)
