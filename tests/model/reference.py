"""The whole model once more, as plainly as it can be said: one token, one tap, one head after the other, in float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def rms(x: Tensor, eps: float) -> Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps)


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def softplus(x: Tensor) -> Tensor:
    return torch.log(1 + torch.exp(x))


def mamba(p: dict[str, Tensor], d, x: Tensor, doc: Tensor) -> Tensor:
    """x [batch, length, hidden], doc [batch, length]."""
    heads, width, groups, n = d.mamba_num_heads, d.mamba_head_dim, d.mamba_num_groups, d.mamba_state_dim
    inner, batch, length = heads * width, x.shape[0], x.shape[1]
    scales = d.scales
    projected = (x * scales.ssm_in) @ p["mixer.in_proj.weight"].T
    parts = {"z": inner, "x": inner, "b": groups * n, "c": groups * n, "dt": heads}
    factors = [torch.full((size,), getattr(scales, f"ssm_{part}"), dtype=x.dtype) for part, size in parts.items()]
    projected = projected * torch.cat(factors)
    z, xbc = projected[..., :inner], projected[..., inner : 2 * inner + 2 * groups * n]
    dt = softplus(projected[..., 2 * inner + 2 * groups * n :] + p["mixer.dt_bias"])
    taps, bias = p["mixer.conv1d.weight"][:, 0], p["mixer.conv1d.bias"]
    convolved = []
    for t in range(length):
        total = bias.expand(batch, -1)
        for back in range(d.conv_kernel):
            if t >= back:
                same = (doc[:, t - back] == doc[:, t])[:, None]
                total = total + torch.where(same, xbc[:, t - back], 0.0) * taps[:, d.conv_kernel - 1 - back]
        convolved.append(silu(total))
    convolved = torch.stack(convolved, dim=1)
    u = convolved[..., :inner].reshape(batch, length, heads, width)
    b = convolved[..., inner : inner + groups * n].reshape(batch, length, groups, n)
    c = convolved[..., inner + groups * n :].reshape(batch, length, groups, n)
    of_head = [head * groups // heads for head in range(heads)]
    a = -torch.exp(p["mixer.A_log"])
    state = torch.zeros(batch, heads, width, n, dtype=x.dtype)
    ys = []
    for t in range(length):
        if t:
            state = torch.where((doc[:, t] == doc[:, t - 1])[:, None, None, None], state, 0.0)
        decay = torch.exp(dt[:, t] * a)[:, :, None, None]
        drive = (dt[:, t, :, None] * u[:, t])[..., None] * b[:, t, of_head][:, :, None, :]
        state = decay * state + drive
        y = (state * c[:, t, of_head][:, :, None, :]).sum(-1) + p["mixer.D"][:, None] * u[:, t]
        ys.append(y.reshape(batch, inner))
    y = torch.stack(ys, dim=1) * silu(z)
    if d.mamba_norm:
        y = rms(y.reshape(batch, length, groups, inner // groups), d.norm_epsilon).reshape(batch, length, inner)
        y = y * p["mixer.norm.weight"]
    return y @ p["mixer.out_proj.weight"].T * scales.ssm_out


def frequency(d, i: int) -> float:
    """The angle per position of pair i of n / 2: 1 / base^(2 i / n); of Llama 3.1's scaling slower for long waves."""
    plain = d.rope_base ** (-2 * i / int(d.head_dim * d.rope_percent))
    if not d.rope_scaling_factor:
        return plain
    wave, slow = 2 * math.pi / plain, plain / d.rope_scaling_factor
    if wave > d.rope_original_length / d.rope_low_freq_factor:
        return slow
    if wave < d.rope_original_length / d.rope_high_freq_factor:
        return plain
    turns = d.rope_original_length / wave
    share = (turns - d.rope_low_freq_factor) / (d.rope_high_freq_factor - d.rope_low_freq_factor)
    return (1 - share) * slow + share * plain


def rotate(x: Tensor, d) -> Tensor:
    """Turn the pairs (i, i + n / 2) of the first n channels by position * frequency(i); [batch, length, head_dim]."""
    width = int(d.head_dim * d.rope_percent)
    turned = x.clone()
    for i in range(width // 2):
        for t in range(x.shape[1]):
            angle = t * frequency(d, i)
            a, b = x[:, t, i], x[:, t, i + width // 2]
            turned[:, t, i] = a * math.cos(angle) - b * math.sin(angle)
            turned[:, t, i + width // 2] = a * math.sin(angle) + b * math.cos(angle)
    return turned


def attention(p: dict[str, Tensor], d, x: Tensor, doc: Tensor) -> Tensor:
    """Causal within documents; x [batch, length, hidden], doc [batch, length]."""
    batch, length = x.shape[:2]
    per_group = d.num_attention_heads // d.num_query_groups
    scales = d.scales
    projected = x * scales.attention_in @ p["self_attention.linear_qkv.weight"].T
    if d.qkv_bias:
        projected = projected + p["self_attention.linear_qkv.bias"]
    qkv = projected.reshape(batch, length, d.num_query_groups, per_group + 2, d.head_dim)

    def normed(head: Tensor, name: str) -> Tensor:
        return rms(head, d.norm_epsilon) * p[f"self_attention.{name}_layernorm.weight"] if d.qk_norm else head

    allowed = torch.zeros(batch, length, length, dtype=torch.bool)
    for t in range(length):
        for s in range(t + 1):
            allowed[:, t, s] = doc[:, t] == doc[:, s]
    outs = []
    for group in range(d.num_query_groups):
        key = rotate(normed(qkv[:, :, group, per_group] * scales.key, "k"), d)
        value = qkv[:, :, group, per_group + 1]
        for head in range(per_group):
            scores = rotate(normed(qkv[:, :, group, head], "q"), d) @ key.transpose(1, 2) / math.sqrt(d.head_dim)
            weights = torch.exp(scores - scores.amax(-1, keepdim=True)) * allowed
            outs.append(weights @ value / weights.sum(-1, keepdim=True))
    return torch.cat(outs, dim=-1) @ p["self_attention.linear_proj.weight"].T * scales.attention_out


def experts(p: dict[str, Tensor], d, x: Tensor) -> Tensor:
    """A token's experts are those of the highest scores, with the bias; their scores without it weigh their outputs."""

    def ffn(t: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return torch.clamp(t @ up.T, min=0) ** 2 @ down.T

    outs = []
    for token in x.flatten(0, 1):
        scores = 1 / (1 + torch.exp(-(p["mlp.router.weight"] @ token)))
        ranked = sorted(range(d.num_experts), key=lambda n: -(scores[n] + p["mlp.router.expert_bias"][n]).item())
        chosen = ranked[: d.experts_per_token]
        out = ffn(token, p["mlp.shared_experts.linear_fc1.weight"], p["mlp.shared_experts.linear_fc2.weight"])
        for n in chosen:
            expert = f"mlp.experts.local_experts.{n}."
            weight = d.expert_scaling * scores[n] / sum(scores[m] for m in chosen)
            out = out + weight * ffn(token, p[f"{expert}linear_fc1.weight"], p[f"{expert}linear_fc2.weight"])
        outs.append(out)
    return torch.stack(outs).view(x.shape)


def logits(parameters: dict[str, Tensor], d, tokens: Tensor, seq_idx: Tensor | None = None) -> Tensor:
    """Scores [batch, length, padded vocabulary].

    Args:
        parameters: float64, by the Megatron model's names.
        d: the model definition.
    """
    doc = torch.zeros_like(tokens) if seq_idx is None else seq_idx
    x = parameters["embedding.word_embeddings.weight"][tokens] * d.scales.embedding
    for index, symbol in enumerate(d.pattern):
        prefix = f"decoder.layers.{index}."
        p = {name.removeprefix(prefix): value for name, value in parameters.items() if name.startswith(prefix)}
        if symbol == "M":
            x = x + mamba(p, d, rms(x, d.norm_epsilon) * p["norm.weight"], doc)
        elif symbol == "*":
            x = x + attention(p, d, rms(x, d.norm_epsilon) * p["input_layernorm.weight"], doc)
        elif symbol == "P":
            h = rms(x, d.norm_epsilon) * p["norm.weight"]
            x = x + mamba(p, d, h, doc) + attention(p, d, h, doc)
        elif symbol == "S":
            h = (rms(x, d.norm_epsilon) * p["pre_mlp_layernorm.weight"]) @ p["mlp.linear_fc1.weight"].T
            gate, up = h[..., : d.ffn_hidden_size] * d.scales.ffn_gate, h[..., d.ffn_hidden_size :]
            x = x + (silu(gate) * up) @ p["mlp.linear_fc2.weight"].T * d.scales.ffn_down
        elif symbol == "L":
            x = x + (rms(x, d.norm_epsilon) * p["input_layernorm.weight"]) @ p["linear.weight"].T
        elif symbol == "E":
            x = x + experts(p, d, rms(x, d.norm_epsilon) * p["pre_mlp_layernorm.weight"])
        else:
            h = (rms(x, d.norm_epsilon) * p["pre_mlp_layernorm.weight"]) @ p["mlp.linear_fc1.weight"].T
            x = x + torch.clamp(h, min=0) ** 2 @ p["mlp.linear_fc2.weight"].T
    x = rms(x, d.norm_epsilon) * parameters["decoder.final_norm.weight"]
    output = parameters["embedding.word_embeddings.weight" if d.tied_embeddings else "output_layer.weight"]
    return x @ output.T * d.scales.head


def losses(scores: Tensor, labels: Tensor) -> Tensor:
    """-log softmax at the labels, [batch, length]."""
    top = scores.amax(-1, keepdim=True)
    log_sum = top.squeeze(-1) + torch.log(torch.exp(scores - top).sum(-1))
    return log_sum - torch.gather(scores, -1, labels[..., None]).squeeze(-1)
