"""Depthwise causal convolution along the length, with bias and SiLU, in plain PyTorch, and its one-token step.

Axes: b batch, l length, c channels, k taps (the filter's width); halo = k - 1, the tokens before a block that its
first tokens read.

Mamba-2 runs it over x, B and C before the scan (Dao and Gu 2024, arXiv 2405.21060, section 7.1): per channel

    z_t = bias + sum_k w_k x_{t - halo + k}          y_t = z_t sigmoid(z_t)

and backward, with ``dz_t = dy_t silu'(z_t)``, ``dx_t = sum_k w_k dz_{t + halo - k}`` (the same sum with the taps
reversed) and ``dw_k = sum_t dz_t x_{t - halo + k}``.

The work goes in blocks of tokens laid out [l, b, c] (channels last, as the model's activations are),
where a depthwise convolution is one fast library call and no transposing copy is made. The backward keeps the inputs
only.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# ours: elements of a block; its few float32 buffers stay in cache.
BLOCK_ELEMENTS = 1 << 18


def _correlate(x: Tensor, weight: Tensor) -> Tensor:
    """Return y[t] = sum_k weight[:, k] * x[t + k], [rows, b, c], for x [rows + halo, b, c] (contiguous) and weight
    [c, k].
    """
    if x.dtype == torch.float32 and x.device.type == "cpu" and torch.backends.mkldnn.is_available():
        # Channels-last image, height the tokens and width the batch: oneDNN has a depthwise kernel for exactly this.
        image = x.unsqueeze(0).permute(0, 3, 1, 2)  # [1, c, rows + halo, b]
        return F.conv2d(image, weight[:, None, :, None], groups=weight.shape[0]).permute(0, 2, 3, 1)[0]
    rows = x.shape[0] - weight.shape[1] + 1
    y = x[:rows] * weight[:, 0]
    for k in range(1, weight.shape[1]):
        y.addcmul_(x[k : k + rows], weight[:, k])
    return y


def _blocks(length: int, row_elements: int, halo: int) -> Iterator[tuple[int, int]]:
    step = max(BLOCK_ELEMENTS // row_elements, 4 * halo, 1)
    for t0 in range(0, length, step):
        yield t0, min(t0 + step, length)


def _window(x: Tensor, initial: Tensor | None, t0: int, t1: int, halo: int, dtype: torch.dtype) -> Tensor:
    """Copy tokens t0 - halo to t1 to a new [t1 - t0 + halo, b, c] buffer; before the start the initial state."""
    batch, _, channels = x.shape
    out = torch.empty(t1 - t0 + halo, batch, channels, dtype=dtype, device=x.device)
    missing = max(halo - t0, 0)
    if missing:
        if initial is None:
            out[:missing] = 0
        else:
            out[:missing].copy_(initial[:, t0 : t0 + missing].transpose(0, 1))
    out[missing:].copy_(x[:, t0 - halo + missing : t1].transpose(0, 1))
    return out


def _same_document(seq_idx: Tensor | None, halo: int) -> Tensor | None:
    """Return same[d - 1, t, b], [halo, l, b]: token t - d (d = 1..halo) is of t's document, as are those before the
    first token.
    """
    if seq_idx is None:
        return None
    doc = seq_idx.transpose(0, 1)
    before = torch.cat([doc[:1].expand(halo, -1), doc])  # [halo + l, b]
    length = doc.shape[0]
    return torch.stack([before[halo - d : halo - d + length] == doc for d in range(1, halo + 1)])


def _preactivation(window: Tensor, weight: Tensor, bias: Tensor | None, same: Tensor | None) -> Tensor:
    z = _correlate(window, weight)
    if same is not None:
        # Only the first tokens of a document differ: recompute those from their own taps.
        halo = same.shape[0]
        t, b = (~same.all(0)).nonzero(as_tuple=True)
        fixed = window[t + halo, b] * weight[:, halo]  # [tokens to fix, c]
        for d in range(1, halo + 1):
            # where, not multiply: nothing of the other document comes in, not even its NaN
            tap = torch.where(same[d - 1, t, b].unsqueeze(-1), window[t + halo - d, b], 0)
            fixed.addcmul_(tap, weight[:, halo - d])
        z[t, b] = fixed
    return z if bias is None else z.add_(bias)


def _tap_by_tap(x: Tensor, weight: Tensor, bias: Tensor | None, initial: Tensor | None, silu: bool, y: Tensor) -> None:
    """Convolve one document straight from ``x`` into ``y``: without the copies on both sides of a library call."""
    batch, length, channels = x.shape
    halo = weight.shape[1] - 1
    taps = weight.t().contiguous()  # [k, c]
    begin = min(halo, length)
    head = _window(x, initial, 0, begin, halo, x.dtype).transpose(0, 1)  # [b, begin + halo, c]
    parts = [(head, y[:, :begin])] if begin else []
    parts += [
        (x[:, t0 : t1 + halo], y[:, t0 + halo : t1 + halo]) for t0, t1 in _blocks(length - begin, batch * channels, 1)
    ]
    for source, out in parts:
        torch.addcmul(taps.new_zeros(()) if bias is None else bias, source[:, : out.shape[1]], taps[0], out=out)
        for k in range(1, halo + 1):
            out.addcmul_(source[:, k : k + out.shape[1]], taps[k])
        if silu:
            F.silu(out, inplace=True)


class _CausalConv1d(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, initial_state, seq_idx, silu):
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        halo = weight.shape[1] - 1
        w, b = weight.to(dtype), None if bias is None else bias.to(dtype)
        same = _same_document(seq_idx, halo)
        y = torch.empty_like(x)
        with torch.autocast(x.device.type, enabled=False):
            if same is None and x.dtype == dtype:
                _tap_by_tap(x, w, b, initial_state, silu, y)
            else:
                for t0, t1 in _blocks(x.shape[1], x.shape[0] * x.shape[2], halo):
                    window = _window(x, initial_state, t0, t1, halo, dtype)
                    z = _preactivation(window, w, b, None if same is None else same[:, t0:t1])
                    y[:, t0:t1].copy_((F.silu(z, inplace=True) if silu else z).transpose(0, 1))
        ctx.save_for_backward(x, weight, bias, initial_state, same)
        ctx.silu = silu
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight, bias, initial_state, same = ctx.saved_tensors
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        batch, length, channels = x.shape
        halo = weight.shape[1] - 1
        w, b = weight.to(dtype), None if bias is None else bias.to(dtype)
        flipped = w.flip(1).contiguous()
        dx = torch.empty_like(x)
        dw, db = torch.zeros_like(w), w.new_zeros(channels)
        after = w.new_zeros(halo, batch, channels)  # gradient of the preactivation of the next block's first tokens
        with torch.autocast(x.device.type, enabled=False):
            for t0, t1 in reversed(list(_blocks(length, batch * channels, halo))):
                rows = t1 - t0
                window = _window(x, initial_state, t0, t1, halo, dtype)  # [rows + halo, b, c]
                here = None if same is None else same[:, t0:t1]  # [halo, rows, b]
                dz = torch.empty(rows + halo, batch, channels, dtype=dtype, device=x.device)
                dz[rows:] = after
                dyb = dy[:, t0:t1].transpose(0, 1)  # [rows, b, c]
                if ctx.silu:
                    z = _preactivation(window, w, b, here)
                    dz[:rows] = torch.ops.aten.silu_backward(dyb.to(dtype).contiguous(), z)
                else:
                    dz[:rows] = dyb
                own = dz[:rows]
                db += own.sum((0, 1))
                for d in range(halo + 1):
                    product = own * window[halo - d : halo - d + rows]
                    if d and here is not None:
                        product[~here[d - 1]] = 0
                    dw[:, halo - d] += product.sum((0, 1))
                dxb = _correlate(dz, flipped)  # [rows, b, c]
                if same is not None:
                    _fix_dx(dxb, dz, w, same, t0)
                dx[:, t0:t1].copy_(dxb.transpose(0, 1))
                after = dz[:halo].clone()
            dinitial = _initial_gradient(after, w, same) if initial_state is not None and halo else None
        grads = (
            dx,
            dw.to(weight.dtype),
            None if bias is None else db.to(bias.dtype),
            None if dinitial is None else dinitial.transpose(0, 1).to(initial_state.dtype),
        )
        return (*(g if need else None for g, need in zip(grads, ctx.needs_input_grad, strict=False)), None, None)


def _fix_dx(dx: Tensor, dz: Tensor, w: Tensor, same: Tensor, t0: int) -> None:
    """Recompute dx of the tokens whose followers are partly of another document."""
    halo = same.shape[0]
    reach = torch.stack([_shift_up(same[d - 1], d)[t0 : t0 + dx.shape[0]] for d in range(1, halo + 1)])
    t, b = (~reach.all(0)).nonzero(as_tuple=True)
    fixed = dz[t, b] * w[:, halo]
    for d in range(1, halo + 1):
        fixed.addcmul_(torch.where(reach[d - 1, t, b].unsqueeze(-1), dz[t + d, b], 0), w[:, halo - d])
    dx[t, b] = fixed


def _shift_up(same: Tensor, d: int) -> Tensor:
    """Shift row t to row t + d; past the end nothing is lost (there the gradient is zero already)."""
    return torch.cat([same[d:], torch.ones_like(same[:d])])[: same.shape[0]]


def _initial_gradient(first: Tensor, w: Tensor, same: Tensor | None) -> Tensor:
    """Return the gradient of the tokens before the start, [halo, b, c], from dz of the first tokens."""
    halo = first.shape[0]
    out = torch.zeros_like(first)
    for t in range(halo):
        for d in range(t + 1, halo + 1):  # token t reads token t - d < 0
            part = first[t] * w[:, halo - d]
            if same is not None:
                if t >= same.shape[1]:
                    continue
                part = torch.where(same[d - 1, t].unsqueeze(-1), part, 0)
            out[halo + t - d] += part
    return out


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = "silu",
    seq_idx: Tensor | None = None,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Return ``act(bias + sum_k weight[:, k] * x[t - width + 1 + k])`` per channel, differentiable once.

    Any strides will do; channels should be the fastest dimension. The output follows the memory order of ``x``: a
    view of [length, batch, channels] activations gives such a view back.

    Args:
        x: [batch, length, channels].
        weight: [channels, width].
        bias: [channels] or None.
        activation: "silu" or None.
        seq_idx: integer [batch, length], the document of each token, non-decreasing. A window never reaches into
            another document.
        initial_state: [batch, width - 1, channels], the inputs before the first token (oldest first; of the first
            token's document), or None for zeros.
        return_final_state: also return the last ``width - 1`` inputs, [batch, width - 1, channels], in ``x``'s dtype,
            ready for ``causal_conv1d_step`` and as the next call's ``initial_state``. Inputs of an earlier document
            than the last token's are zero in it. Differentiable too.

    Returns:
        y [batch, length, channels] in ``x``'s dtype, float32 (float64 for float64) inside; and the final state if
        asked.

    Errors:
        ValueError: shapes that do not fit together or an unknown activation.
    """
    if activation not in ("silu", None):
        raise ValueError(f"causal_conv1d: activation must be 'silu' or None, got {activation!r}")
    if x.dim() != 3 or weight.dim() != 2 or weight.shape[0] != x.shape[2]:
        raise ValueError(
            "causal_conv1d: x must be [batch, length, channels] and weight [channels, width], got "
            f"{tuple(x.shape)} and {tuple(weight.shape)}"
        )
    if 0 in x.shape:
        raise ValueError(f"causal_conv1d: nothing to convolve in x of shape {tuple(x.shape)}")
    halo = weight.shape[1] - 1
    expected = {
        "bias": (bias, (x.shape[2],)),
        "seq_idx": (seq_idx, tuple(x.shape[:2])),
        "initial_state": (initial_state, (x.shape[0], halo, x.shape[2])),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"causal_conv1d: {name} must have shape {shape}, got {tuple(tensor.shape)}")
    y = _CausalConv1d.apply(x, weight, bias, initial_state, seq_idx, activation == "silu")
    return (y, conv_state(x, halo, seq_idx, initial_state)) if return_final_state else y


def conv_state(x: Tensor, halo: int, seq_idx: Tensor | None = None, initial_state: Tensor | None = None) -> Tensor:
    """Return the last ``halo`` inputs of the last token's document, [batch, halo, channels]; see ``causal_conv1d``."""
    missing = max(halo - x.shape[1], 0)
    state = x[:, x.shape[1] - (halo - missing) :]
    if seq_idx is not None:
        own = seq_idx[:, x.shape[1] - (halo - missing) :] == seq_idx[:, -1:]
        state = torch.where(own.unsqueeze(-1), state, 0)
    if not missing:
        return state.clone()
    if initial_state is None:
        return F.pad(state, (0, 0, missing, 0))
    before = initial_state[:, halo - missing :].to(x.dtype)
    if seq_idx is not None:
        before = torch.where((seq_idx[:, 0] == seq_idx[:, -1])[:, None, None], before, 0)
    return torch.cat([before, state], dim=1)


def causal_conv1d_window(state: Tensor, inputs: Tensor, weight: Tensor, bias: Tensor, out: Tensor) -> None:
    """Convolve the last tokens of a window with SiLU, for generation; `state` stays. Not differentiable.

    Args:
        state: [batch, width - 1, channels], the inputs before the window, oldest first.
        inputs: [batch, window, channels].
        weight: [channels, width].
        bias: [channels].
        out: [batch, length, channels], of the last tokens; is written.
    """
    dtype = torch.float64 if inputs.dtype == torch.float64 else torch.float32
    first = inputs.shape[1] - out.shape[1]
    taps = torch.cat([state, inputs], dim=1)[:, first:]  # [b, k - 1 + l, c]
    z = (taps.to(dtype).unfold(1, weight.shape[1], 1) * weight.to(dtype)).sum(-1)  # of [b, l, c, k]
    out.copy_(F.silu(z.add_(bias.to(dtype))))


def causal_conv1d_advance(state: Tensor, inputs: Tensor, counts: Tensor) -> None:
    """Shift the first tokens of each sequence's window into `state` IN PLACE.

    Args:
        state, inputs: as `causal_conv1d_window`'s.
        counts: int64 [batch], tokens of each sequence, 0 to the window.
    """
    taps = torch.cat([state, inputs], dim=1)  # [b, k - 1 + w, c]
    places = counts[:, None] + torch.arange(state.shape[1], device=counts.device)  # [b, k - 1]
    state.copy_(taps.gather(1, places.unsqueeze(-1).expand_as(state)))


def causal_conv1d_step(
    state: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = "silu",
) -> Tensor:
    """Convolve one token, for generation: shifts ``x`` into ``state`` IN PLACE and returns y. Not
    differentiable.

    Args:
        state: [batch, width - 1, channels], the last inputs, oldest first.
        x: [batch, channels].
        weight: [channels, width].
        bias: [channels] or None.

    Returns:
        y [batch, channels] in ``x``'s dtype.
    """
    if activation not in ("silu", None):
        raise ValueError(f"causal_conv1d_step: activation must be 'silu' or None, got {activation!r}")
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        taps = torch.cat([state, x.unsqueeze(1).to(state.dtype)], dim=1)  # [b, k, c]
        y = (taps.to(dtype) * weight.to(dtype).t()).sum(1)
        if bias is not None:
            y += bias.to(dtype)
        state.copy_(taps[:, 1:])
        return (F.silu(y) if activation else y).to(x.dtype)
