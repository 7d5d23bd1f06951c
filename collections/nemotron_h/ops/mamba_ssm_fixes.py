"""Corrections of mamba-ssm 2.3, applied where its kernels are chosen (`nemotron_h.ops.select`).

Axes: b batch, h heads, s chunks, c tokens of a chunk, as in `nemotron_h.ops.ssd`.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

#: ours, measured on an H100 (docs/results/gpu_steps.md): warps of the gated norm's backward per multiprocessor
WARPS = 32


def install() -> None:
    """Apply each correction once."""
    _spread_gated_norm_backward()
    _restart_sums_with_documents()


def _restart_sums_with_documents() -> None:
    """Begin the running sums of the decays' exponents anew with each document.

    mamba-ssm adds them up over a chunk and gives other documents no weight, but what these hold shows in how the sums
    are rounded: the last bits of a document moved with the text before it. What the backward adds up is zero across
    documents, so it needs the forward's sums alone.
    """
    from mamba_ssm.ops.triton import ssd_combined

    original = ssd_combined._chunk_cumsum_fwd
    if getattr(original, "nemotron_h", False):
        return
    now = threading.local()  # autograd runs the backward in a thread of its own

    def noting_documents(scan: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(scan)
        def run(*args: Any, seq_idx: Tensor | None = None, **options: Any) -> Any:
            now.seq_idx = seq_idx
            try:
                return scan(*args, seq_idx=seq_idx, **options)
            finally:
                now.seq_idx = None

        return run

    @functools.wraps(original)
    def sums(dt: Tensor, A: Tensor, chunk_size: int, **options: Any) -> tuple[Tensor, Tensor]:
        """Return cumulative sums and step sizes, float32 [b, h, s, c]."""
        total, steps = original(dt, A, chunk_size, **options)
        seq_idx = getattr(now, "seq_idx", None)
        if seq_idx is None:
            return total, steps
        tail = seq_idx[:, -1:].expand(-1, -seq_idx.shape[1] % chunk_size)  # the last chunk ends with its document's sum
        documents = torch.cat([seq_idx, tail], dim=1).unflatten(1, (-1, chunk_size))  # [b, s, c]
        # [b, s, j, i]: token i adds up token j <= i of its document. float64, as float32 may run as TF32
        adds = (documents.unsqueeze(-1) == documents.unsqueeze(-2)).triu().double()
        exponents = (steps * A.float()[:, None, None]).transpose(1, 2)  # [b, s, h, c]
        return (exponents.double() @ adds).transpose(1, 2).float().contiguous(), steps

    sums.nemotron_h = True  # type: ignore[attr-defined]
    ssd_combined._chunk_cumsum_fwd = sums
    for name in ("_mamba_chunk_scan_combined_fwd", "_mamba_chunk_scan_combined_bwd"):
        setattr(ssd_combined, name, noting_documents(getattr(ssd_combined, name)))


def _spread_gated_norm_backward() -> None:
    """Launch the gated norm's backward as more programs.

    mamba-ssm starts four warps per multiprocessor, each of which walks hundreds of rows: too few loads are in flight to
    fill the memory's bandwidth. The kernel is mamba-ssm's, and each program still sums its rows' weight gradient.
    """
    from mamba_ssm.ops.triton import layernorm_gated, ssd_combined

    original = layernorm_gated._layer_norm_bwd
    if getattr(original, "nemotron_h", False):
        return
    kernel = layernorm_gated._layer_norm_bwd_kernel

    @functools.wraps(original)
    def backward(
        dy: Tensor,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        eps: float,
        mean: Tensor | None,
        rstd: Tensor,
        z: Tensor | None = None,
        group_size: int | None = None,
        norm_before_gate: bool = True,
        is_rms_norm: bool = False,
        recompute_output: bool = False,
        dz: Tensor | None = None,
        out: Tensor | None = None,
    ) -> tuple[Tensor | None, ...]:
        if bias is not None or z is None or not is_rms_norm or recompute_output:
            options = {"norm_before_gate": norm_before_gate, "is_rms_norm": is_rms_norm, "dz": dz, "out": out}
            again = {"z": z, "group_size": group_size, "recompute_output": recompute_output, **options}
            return original(dy, x, weight, bias, eps, mean, rstd, **again)
        rows, channels = x.shape
        size = group_size or channels
        block = 1 << (size - 1).bit_length()
        warps = min(max(block // 256, 1), 8)
        groups = channels // size
        processors = torch.cuda.get_device_properties(x.device).multi_processor_count
        splits = min(rows, math.ceil(processors * WARPS / (warps * groups)))
        dx = torch.empty_like(x)
        dz = torch.empty_like(z) if dz is None else dz
        dweight = torch.empty(splits, channels, dtype=torch.float32, device=x.device)
        with torch.cuda.device(x.device.index):
            kernel[(splits, groups)](
                X=x,
                W=weight,
                B=None,
                Z=z,
                Y=None,
                DY=dy,
                DX=dx,
                DW=dweight,
                DB=None,
                DZ=dz,
                Mean=None,
                Rstd=rstd,
                stride_x_row=x.stride(0),
                stride_z_row=z.stride(0),
                stride_y_row=0,
                stride_dy_row=dy.stride(0),
                stride_dx_row=dx.stride(0),
                stride_dz_row=dz.stride(0),
                stride_dw_row=channels,
                stride_db_row=0,
                M=rows,
                N=size,
                eps=eps,
                rows_per_program=math.ceil(rows / splits),
                NORM_BEFORE_GATE=norm_before_gate,
                IS_RMS_NORM=True,
                BLOCK_N=block,
                num_warps=warps,
            )
        return dx, dweight.sum(0).to(weight.dtype), None, dz

    backward.nemotron_h = True  # type: ignore[attr-defined]
    layernorm_gated._layer_norm_bwd = ssd_combined._layer_norm_bwd = backward
