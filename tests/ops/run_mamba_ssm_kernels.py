"""Run mamba-ssm's kernels under Triton's interpreter, behind our adapters, beside our ops; print the differences.

Usage: python run_mamba_ssm_kernels.py DIRECTORY-OF-THE-PACKAGE, with TRITON_INTERPRET=1 and MAMBA_DETERMINISTIC=1
(else its autotuner asks for a GPU driver). float32 only: in the interpreter bfloat16 products are wrong.

A process of its own: it puts stand-ins for what the kernels ask of CUDA into torch.
"""

from __future__ import annotations

import contextlib
import json
import sys
import types
import unittest.mock
from pathlib import Path

import torch


def load_kernels(package: Path):
    """The kernels without the package's ``__init__`` (it imports a compiled extension), and without a GPU."""
    empty = types.ModuleType("mamba_ssm")
    empty.__path__ = [str(package)]
    sys.modules["mamba_ssm"] = empty
    torch.cuda.device = lambda index: contextlib.nullcontext()
    torch.cuda.get_device_properties = lambda device: types.SimpleNamespace(multi_processor_count=4)

    from mamba_ssm.ops.triton import ssd_combined

    from nemotron_h.ops.conv1d import causal_conv1d
    from nemotron_h.ops.select import _mamba_ssm_kernels

    # the fused path calls causal-conv1d's CUDA functions on [batch, channels, length] views: ours stand in
    def conv(x, weight, bias, seq_idx, *_):
        return causal_conv1d(x.transpose(1, 2), weight, bias, seq_idx=seq_idx).transpose(1, 2)

    def conv_backward(x, weight, bias, dout, seq_idx, initial, dfinal, dx, *_):
        inputs = [t.detach().requires_grad_() for t in (x, weight, bias)]
        with torch.enable_grad():
            grads = torch.autograd.grad(conv(*inputs, seq_idx), inputs, dout)
        if dx is not None:
            dx.copy_(grads[0])
        return (*grads, None)

    ssd_combined.causal_conv1d_fwd_function = conv
    ssd_combined.causal_conv1d_bwd_function = conv_backward
    return _mamba_ssm_kernels()


def differences(ours, kernel, inputs: dict[str, torch.Tensor], **options) -> dict[str, float]:
    """max |a - b| / max |b| of every output and gradient, over the same random weights."""
    results = []
    for function in (ours, kernel):
        leaves = {k: v.clone().requires_grad_() for k, v in inputs.items()}
        out = function(**leaves, **options)
        out = out if isinstance(out, tuple) else (out,)
        generator = torch.Generator().manual_seed(1)
        loss = sum((o * torch.randn(o.shape, generator=generator)).sum() for o in out)
        grads = torch.autograd.grad(loss, list(leaves.values()))
        results.append(
            {f"out{i}": o.detach() for i, o in enumerate(out)}
            | {f"d{k}": g for k, g in zip(leaves, grads, strict=True)}
        )
    a, b = results
    return {k: ((a[k] - b[k]).abs().max() / b[k].abs().max()).item() for k in b}


def moved(function, name: str, inputs: dict[str, torch.Tensor], end: int, **options) -> dict[str, float]:
    """Change `inputs[name]` before position `end` of row 0: return the largest difference of the outputs and
    gradients of everything from there on, whose sum is learnt.
    """
    results = []
    for change in (0.0, 1.0):
        leaves = {k: v.clone() for k, v in inputs.items()}
        leaves[name][0, :end] += change
        leaves = {k: v.requires_grad_() for k, v in leaves.items()}
        out = function(**leaves, **options)
        learnt = torch.cat([out[0, end:].flatten(), out[1:].flatten()])
        generator = torch.Generator().manual_seed(1)
        grads = torch.autograd.grad((learnt * torch.randn(learnt.shape, generator=generator)).sum(), leaves.values())
        results.append({"out": learnt.detach()} | {f"d{k}": g for k, g in zip(leaves, grads, strict=True)})
    assert all(value.abs().max() > 0 for value in results[0].values())
    return {k: (results[1][k] - value).abs().max().item() for k, value in results[0].items()}


def cases(kernels):
    from nemotron_h.ops import scan_kernel, select
    from nemotron_h.ops.conv1d import causal_conv1d
    from nemotron_h.ops.norm import gated_rms_norm
    from nemotron_h.ops.ssd import ssd_chunk_scan, ssd_step

    batch, length, heads, head_dim, groups, n, chunk = 2, 40, 4, 16, 2, 16, 16
    scan = {
        "x": torch.randn(batch, length, heads, head_dim),
        "dt": torch.randn(batch, length, heads),
        "A": -0.5 - torch.rand(heads),
        "B": torch.randn(batch, length, groups, n),
        "C": torch.randn(batch, length, groups, n),
        "D": torch.randn(heads),
        "dt_bias": torch.randn(heads),
    }
    state = torch.randn(batch, heads, head_dim, n)

    def kernel_scan(**values):
        return select._kernel_ssd(kernels, **values)

    yield "scan", differences(ssd_chunk_scan, kernel_scan, scan, chunk_size=chunk)
    with unittest.mock.patch.object(scan_kernel, "WIDEST", 8):
        yield "scan of heads too wide for ours", differences(ssd_chunk_scan, kernel_scan, scan, chunk_size=chunk)
    # documents: cuts at and around a chunk edge and of one token; numbered from 3
    seq_idx = torch.full((batch, length), 3, dtype=torch.int32)
    for i, cut in enumerate((5, chunk, chunk + 1, 36)):
        seq_idx[0, cut:] = 4 + i
    options = {"chunk_size": chunk, "seq_idx": seq_idx, "return_final_state": True}
    name = "scan with documents and states"
    yield name, differences(ssd_chunk_scan, kernel_scan, {**scan, "initial_state": state}, **options)

    # row 0: documents [0, 5) and [5, 16)
    apart = {"chunk_size": chunk, "seq_idx": seq_idx}
    yield "scan, another document changed", moved(kernel_scan, "dt", scan, 5, **apart)

    for optional in ((), ("D", "dt_bias")):
        token = [scan[k][:, 0] for k in ("x", "dt")] + [scan["A"]] + [scan[k][:, 0] for k in ("B", "C")]
        extra = {k: scan[k] for k in optional}
        a, b = state.clone(), state.clone()
        ya, yb = ssd_step(a, *token, **extra), select._kernel_ssd_step(kernels, b, *token, **extra)
        errors = {"out0": (ya - yb).abs().max() / yb.abs().max(), "state": (a - b).abs().max() / b.abs().max()}
        yield f"step with {len(optional)} options", {k: v.item() for k, v in errors.items()}

    inner = heads * head_dim
    gated = {"y": torch.randn(2, 5, inner), "z": torch.randn(2, 5, inner), "weight": torch.randn(inner)}

    def kernel_norm(**values):
        return select._kernel_gated_rms_norm(kernels, **values)

    yield "gated norm", differences(gated_rms_norm, kernel_norm, gated, group_size=inner // groups)

    channels = inner + 2 * groups * n
    mixer = {
        "zxbcdt": torch.randn(batch, length, inner + channels + heads),
        "conv_weight": torch.randn(channels, 4),
        "conv_bias": torch.randn(channels),
        "norm_weight": torch.randn(inner),
        **{k: scan[k] for k in ("dt_bias", "A", "D")},
    }

    def kernel_mixer(**values):
        return select._kernel_fused_mixer(kernels, **values, head_dim=head_dim, groups=groups, chunk_size=chunk)

    def our_mixer(zxbcdt, conv_weight, conv_bias, norm_weight, dt_bias, A, D, seq_idx=None):
        z, xbc, dt = zxbcdt.split([inner, channels, heads], dim=-1)
        xbc = causal_conv1d(xbc, conv_weight, conv_bias, seq_idx=seq_idx)
        x, B, C = xbc.split([inner, groups * n, groups * n], dim=-1)
        B, C = (t.unflatten(-1, (groups, n)) for t in (B, C))
        y = ssd_chunk_scan(
            x.unflatten(-1, (heads, head_dim)), dt, A, B, C, D=D, dt_bias=dt_bias, chunk_size=chunk, seq_idx=seq_idx
        )
        return gated_rms_norm(y.flatten(2), z, norm_weight, group_size=inner // groups)

    yield "fused mixer with documents", differences(our_mixer, kernel_mixer, mixer, seq_idx=seq_idx)
    yield "fused mixer, another document changed", moved(kernel_mixer, "zxbcdt", mixer, 5, seq_idx=seq_idx)


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    kernels = load_kernels(Path(sys.argv[1]))
    json.dump(dict(cases(kernels)), sys.stdout)


if __name__ == "__main__":
    main()
