"""Put our scan (`nemotron_h.ops.scan_kernel`) behind mamba-ssm 2.3's functions: of the scan, and of the whole mixer.

Both call one forward and one backward, which are replaced. What our kernels do not take runs as before, and the log
says so once with the reason: gradients of first and last states, a gate inside, other widths.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

from torch import Tensor

from nemotron_h.ops import scan_kernel

logger = logging.getLogger(__name__)

#: what mamba-ssm's functions pass where they ask for no more than our kernels compute
PLAIN = {"z": None, "cu_seqlens": None, "dt_limit": (0.0, float("inf"))}
PLAIN_BACKWARD = {**PLAIN, "initial_states": None, "dfinal_states": None, "dz": None, "recompute_output": False}


def install() -> None:
    """Replace the forward and the backward, once."""
    from mamba_ssm.ops.triton import ssd_combined

    forward, backward = ssd_combined._mamba_chunk_scan_combined_fwd, ssd_combined._mamba_chunk_scan_combined_bwd
    if getattr(forward, "nemotron_h", False):
        return

    @functools.wraps(forward)
    def run(
        x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk_size: int, D: Tensor | None = None, **options: Any
    ) -> tuple[Tensor | None, ...]:
        own = _own(x, B, D, options, PLAIN)
        if own is None:
            return forward(x, dt, A, B, C, chunk_size, D=D, **options)
        initial, bias = own.pop("initial_states", None), own.pop("dt_bias", None)
        y, final = scan_kernel.ssd_scan(x, dt, A, B, C, D, bias, initial_state=initial, **own)
        return y, None, None, None, None, final  # between: what the backward here computes anew

    @functools.wraps(backward)
    def run_backward(
        dout: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, out: Tensor, chunk_size: int,
        D: Tensor | None = None, recompute_output: bool = False, **options: Any,
    ) -> tuple[Tensor | None, ...]:  # fmt: skip
        options["recompute_output"] = recompute_output
        own = _own(x, B, D, options, PLAIN_BACKWARD)
        if own is None:
            return backward(dout, x, dt, A, B, C, out, chunk_size, D=D, **options)
        bias = own.pop("dt_bias", None)
        dx, ddt, dA, dB, dC, dD, dbias = scan_kernel.ssd_scan_gradients(dout, x, dt, A, B, C, D, bias, **own)
        return dx, ddt, dA, dB, dC, dD, None, dbias, None

    run.nemotron_h = True  # type: ignore[attr-defined]
    ssd_combined._mamba_chunk_scan_combined_fwd = run
    ssd_combined._mamba_chunk_scan_combined_bwd = run_backward


def _own(
    x: Tensor, B: Tensor, D: Tensor | None, options: dict[str, Any], plain: dict[str, Any]
) -> dict[str, Any] | None:
    """Return the options without those of `plain`; None, with the reason in the log, where our kernels cannot run."""
    asked = [name for name in options if name in plain and not _same(options[name], plain[name])]
    reason = f"{' and '.join(asked)} asked for" if asked else scan_kernel.refusal(x, B, D)
    if reason:
        _log(reason)
        return None
    return {name: value for name, value in options.items() if name not in plain}


def _same(value: Any, plain: Any) -> bool:
    return value is plain or (not isinstance(value, Tensor) and value == plain)


@functools.cache
def _log(reason: str) -> None:
    logger.info("Mamba-2 scan: mamba-ssm's kernels, not the faster ones of nemotron_h.ops.scan_kernel: %s", reason)
