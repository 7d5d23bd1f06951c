"""Select the implementation of the ops: the mamba-ssm and causal-conv1d kernels on a GPU (and ours in Triton, for the
attention of generation and for windows of a few tokens), plain PyTorch elsewhere.

mamba-ssm's scan is replaced by ours (`nemotron_h.ops.mamba_ssm_scan`). All come behind the signatures of
``nemotron_h.ops.ssd``, ``.conv1d``, ``.norm``, ``.attention`` and ``.ssd_window``, so the model holds one code path.

Axes: b batch, l length, h heads, p channels of a head, n state (as in `nemotron_h.ops.ssd`), c channels of the
convolution.
"""

from __future__ import annotations

import functools
import importlib.metadata
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import Tensor

from nemotron_h.ops import attention
from nemotron_h.ops.conv1d import causal_conv1d, causal_conv1d_advance, causal_conv1d_step, causal_conv1d_window
from nemotron_h.ops.norm import gated_rms_norm
from nemotron_h.ops.ssd import ssd_chunk_scan, ssd_step
from nemotron_h.ops.ssd_window import ssd_advance, ssd_window

logger = logging.getLogger(__name__)

VARIABLE = "NEMOTRON_H_OPS"
CHOICES = ("torch", "mamba_ssm")
# megatron-core's MambaMixer runs mamba-ssm's scan with 128; ours has a chunk of its own
KERNEL_CHUNK = 128


@dataclass(frozen=True)
class Ops:
    """Operations by name; the signatures are those of the functions in ``nemotron_h.ops`` they default to."""

    ssd: Callable[..., Tensor | tuple[Tensor, Tensor]] = ssd_chunk_scan
    conv1d: Callable[..., Tensor | tuple[Tensor, Tensor]] = causal_conv1d
    gated_rms_norm: Callable[..., Tensor] = gated_rms_norm
    ssd_step: Callable[..., Tensor] = ssd_step
    conv1d_step: Callable[..., Tensor] = causal_conv1d_step
    ssd_window: Callable[..., Tensor] = ssd_window
    ssd_advance: Callable[..., None] = ssd_advance
    conv1d_window: Callable[..., None] = causal_conv1d_window
    conv1d_advance: Callable[..., None] = causal_conv1d_advance
    attention_step: Callable[..., Tensor] = attention.attention_step
    attention_window: Callable[..., Tensor] = attention.attention_window
    cache_append: Callable[..., None] = attention.cache_append
    #: whether a step reads lengths and positions on the device, so that a CUDA graph of it stays right
    graphs: bool = False
    #: convolution, scan and gated norm as one memory-saving kernel (see ``_kernel_fused_mixer``), or None
    fused_mixer: Callable[..., Tensor] | None = None
    #: which packages these are, and why, for logs and reports
    origin: str = "torch"


def select_ops(device: torch.device | None = None) -> Ops:
    """Select the ops for this process; logged once, by rank 0.

    ``NEMOTRON_H_OPS=torch`` or ``=mamba_ssm`` forces one.

    Args:
        device: of the tensors; None is the GPU where one is visible. Tensors on the CPU have no kernels.
    Errors:
        ValueError: the variable holds something else.
        RuntimeError: kernels are asked for that cannot run here.
    """
    forced = os.environ.get(VARIABLE, "").strip() or None
    if forced not in (None, *CHOICES):
        raise ValueError(f"{VARIABLE}={forced!r} is not one of {', '.join(CHOICES)}; unset it to choose by machine")
    if device is not None and device.type == "cpu" and torch.cuda.is_available():
        return Ops(origin="torch (on the CPU)")
    return _select(forced)


@functools.cache
def _select(forced: str | None) -> Ops:
    ops = _build(forced)
    if int(os.environ.get("RANK", "0")) == 0:
        logger.info("Mamba-2 ops: %s", ops.origin)
    return ops


def _build(forced: str | None) -> Ops:
    if forced == "torch":
        return Ops(origin=f"torch ({VARIABLE}=torch)")
    if not torch.cuda.is_available():
        if forced:
            raise RuntimeError(f"{VARIABLE}=mamba_ssm needs a GPU, and torch sees none; unset it to run on the CPU")
        return Ops(origin="torch (no GPU is visible)")
    kernels, no_kernels = _try(_mamba_ssm_kernels)
    conv, no_conv = _try(_causal_conv1d_kernels)
    triton_kernels, no_triton = _try(_triton_kernels)
    if forced and (no_kernels or no_conv):
        raise RuntimeError(f"{VARIABLE}=mamba_ssm, but {no_kernels or no_conv}; run pip install '.[cuda]' or unset it")
    if kernels is None:
        return Ops(origin=f"torch (on a GPU this is slow: {no_kernels}; pip install '.[cuda]')")
    chosen: dict[str, Callable] = {
        "ssd": functools.partial(_kernel_ssd, kernels),
        "ssd_step": functools.partial(_kernel_ssd_step, kernels),
        "gated_rms_norm": functools.partial(_kernel_gated_rms_norm, kernels),
    }
    origin = f"mamba-ssm {_version('mamba-ssm')} with our scan"
    if triton_kernels is None:
        origin += f", attention of single tokens and windows in torch ({no_triton})"
    else:
        chosen |= vars(triton_kernels)
    if conv is None:
        return Ops(**chosen, origin=f"{origin}, convolution in torch ({no_conv})")
    return Ops(
        **chosen,
        conv1d=functools.partial(_kernel_conv1d, conv),
        conv1d_step=functools.partial(_kernel_conv1d_step, conv),
        fused_mixer=functools.partial(_kernel_fused_mixer, kernels),
        graphs=triton_kernels is not None,
        origin=f"{origin}, causal-conv1d {_version('causal-conv1d')}",
    )


def _try(load: Callable[[], SimpleNamespace]) -> tuple[SimpleNamespace | None, str]:
    try:
        return load(), ""
    except Exception as error:  # a package built for another torch or CUDA fails in many ways; the reason is reported
        name = load.__name__.strip("_").removesuffix("_kernels")
        return None, f"{name} does not import: {type(error).__name__}: {error}"


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "of unknown version"


def _mamba_ssm_kernels() -> SimpleNamespace:
    from mamba_ssm.ops.triton.layernorm_gated import rmsnorm_fn
    from mamba_ssm.ops.triton.selective_state_update import selective_state_update
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined, mamba_split_conv1d_scan_combined

    from nemotron_h.ops import mamba_ssm_fixes, mamba_ssm_scan

    mamba_ssm_fixes.install()
    mamba_ssm_scan.install()
    return SimpleNamespace(
        scan=mamba_chunk_scan_combined,
        split_scan=mamba_split_conv1d_scan_combined,
        state_update=selective_state_update,
        rmsnorm=rmsnorm_fn,
    )


def _causal_conv1d_kernels() -> SimpleNamespace:
    from causal_conv1d import causal_conv1d_fn, causal_conv1d_update

    return SimpleNamespace(conv=causal_conv1d_fn, update=causal_conv1d_update)


def _triton_kernels() -> SimpleNamespace:
    from nemotron_h.ops import attention_kernel, window_kernel

    return SimpleNamespace(
        attention_step=attention_kernel.attention_step,
        attention_window=attention_kernel.attention_window,
        cache_append=attention_kernel.cache_append,
        ssd_window=window_kernel.ssd_window,
        ssd_advance=window_kernel.ssd_advance,
        conv1d_window=window_kernel.conv1d_window,
        conv1d_advance=window_kernel.conv1d_advance,
    )


def _kernel_ssd(
    kernels: SimpleNamespace,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = True,
    chunk_size: int | None = None,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    return_final_state: bool = False,
    matmul_dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    if matmul_dtype not in (None, x.dtype):
        raise ValueError(
            f"mamba-ssm multiplies in the dtype of x, {x.dtype}; matmul_dtype={matmul_dtype} cannot be had"
        )
    if seq_idx is not None:
        # the kernels take document 0 for the one the initial state belongs to
        seq_idx = (seq_idx - seq_idx[:, :1]).to(torch.int32).contiguous()
    return kernels.scan(
        x,
        dt,
        A,
        B,
        C,
        chunk_size=chunk_size or KERNEL_CHUNK,
        D=D,
        dt_bias=dt_bias,
        initial_states=initial_state,
        seq_idx=seq_idx,
        dt_softplus=dt_softplus,
        return_final_states=return_final_state,
    )


def _kernel_ssd_step(
    kernels: SimpleNamespace,
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    *,
    dt_softplus: bool = True,
) -> Tensor:
    head_dim, n = state.shape[2:]
    # One value per head, expanded with stride 0: the kernel then takes its faster path. It reads the strides of D and
    # dt_bias even where they are None, hence the zeros.
    D, dt_bias = (torch.zeros_like(A) if v is None else v for v in (D, dt_bias))
    with torch.no_grad():
        return kernels.state_update(
            state,
            x,
            dt[..., None].expand(-1, -1, head_dim),  # [b, h, p]
            A[:, None, None].expand(-1, head_dim, n),  # [h, p, n]
            B,
            C,
            D=D[:, None].expand(-1, head_dim),  # [h, p]
            dt_bias=dt_bias[:, None].expand(-1, head_dim),
            dt_softplus=dt_softplus,
        )


def _kernel_gated_rms_norm(
    kernels: SimpleNamespace, y: Tensor, z: Tensor, weight: Tensor, *, group_size: int, eps: float = 1e-5
) -> Tensor:
    return kernels.rmsnorm(y, weight, None, z=z, eps=eps, group_size=group_size, norm_before_gate=False)


def _kernel_conv1d(
    kernels: SimpleNamespace,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = "silu",
    seq_idx: Tensor | None = None,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    if seq_idx is not None and (initial_state is not None or return_final_state):
        # the kernel refuses the combination
        return causal_conv1d(
            x,
            weight,
            bias,
            activation=activation,
            seq_idx=seq_idx,
            initial_state=initial_state,
            return_final_state=return_final_state,
        )
    if x.stride(2) != 1 or x.stride(0) % 8 or x.stride(1) % 8:  # what the kernel's channels-last path loads from
        # not `contiguous`, which leaves the strides of a single sequence's single token as they are
        x = x.clone(memory_format=torch.contiguous_format)
    out = kernels.conv(
        x.transpose(1, 2),  # [b, c, l], as the kernel has it
        weight,
        bias,
        seq_idx=None if seq_idx is None else seq_idx.to(torch.int32),
        initial_states=None if initial_state is None else initial_state.transpose(1, 2),
        return_final_states=return_final_state,
        activation=activation,
    )
    return tuple(t.transpose(1, 2) for t in out) if return_final_state else out.transpose(1, 2)


def _kernel_conv1d_step(
    kernels: SimpleNamespace,
    state: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = "silu",
) -> Tensor:
    with torch.no_grad():
        return kernels.update(x, state.transpose(1, 2), weight, bias, activation=activation)


def _kernel_fused_mixer(
    kernels: SimpleNamespace,
    zxbcdt: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    norm_weight: Tensor | None,
    *,
    head_dim: int,
    groups: int,
    eps: float = 1e-5,
    chunk_size: int | None = None,
    seq_idx: Tensor | None = None,
) -> Tensor:
    """Run all between the two projections, for training: the kernel keeps less for its backward than the ops one by
    one.

    Args:
        zxbcdt: [batch, length, 2 * heads * head_dim + 2 * groups * state + heads], the input projection's output.
        conv_weight, conv_bias: [channels, width] and [channels], channels = heads * head_dim + 2 * groups * state.
        dt_bias, A, D: [heads].
        norm_weight: [heads * head_dim], or None without a norm; its groups are the SSM's.

    Returns:
        [batch, length, heads * head_dim], the output projection's input.
    """
    return kernels.split_scan(
        # with a batch in strides, the kernel's backward would write the gradient of z into a copy that it drops
        zxbcdt.contiguous(),
        conv_weight,
        conv_bias,
        dt_bias,
        A,
        D,
        chunk_size or KERNEL_CHUNK,
        seq_idx=None if seq_idx is None else seq_idx.to(torch.int32),
        activation="silu",
        rmsnorm_weight=norm_weight,
        rmsnorm_eps=eps,
        headdim=head_dim,
        ngroups=groups,
        norm_before_gate=False,
    )
