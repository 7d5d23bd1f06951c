"""Corrections of mamba-ssm 2.3, applied where its kernels are chosen (`nemotron_h.ops.select`)."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

#: ours, measured on an H100 (docs/performance.md): warps of the gated norm's backward per multiprocessor
WARPS = 32


def install() -> None:
    """Apply each correction once."""
    _spread_gated_norm_backward()


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
