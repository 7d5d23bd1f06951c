"""Mixers that begin from attention: what they compute, what training leaves of their error, and the command.

Axes: b batch, l tokens, n query heads, g groups, d channels of a head, h hidden.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from plain_model import definition, model
from save_checkpoint import finish, save
from small_model import VOCABULARY, pure_config, relative_error, small_config, small_model
from test_prune_cli import invoke, place  # noqa: F401
from torch import Tensor

from nemotron_h.architecture.blocks.transplant import attention_layers, transplants
from nemotron_h.checkpoint.reader import WeightFile
from nemotron_h.compression.forward import Forward
from nemotron_h.compression.puzzle.local import Piece, Training, imitate
from nemotron_h.compression.transplant import child
from nemotron_h.compression.transplant.layers import all_but_every, child_definition, listed
from nemotron_h.compression.transplant.matrices import MATRIX
from nemotron_h.core.errors import UserError
from nemotron_h.inference.model import load_model
from nemotron_h.model.blocks.registry import RUNNING
from nemotron_h.model.blocks.transplant import mixer_tensors
from nemotron_h.ops.conv1d import causal_conv1d
from nemotron_h.ops.select import Ops

#: three query heads for each of two keys
HEADS = {"num_attention_heads": 6, "num_query_groups": 2}


def _rows(name: str, heads: int) -> Tensor:
    g = torch.Generator().manual_seed(sum(map(ord, name)))
    return torch.randn(heads * 16, 48, dtype=torch.float64, generator=g) / math.sqrt(48)


@pytest.mark.parametrize("groups", [6, 3, 2, 1])
def test_a_bare_mixer_is_the_attention_without_softmax(groups: int) -> None:
    """With steps of 1, no decay, no D, no gate, no norm and a convolution that does nothing."""
    d = definition("*-", **HEADS)
    chosen = transplants(d.blocks, [0], groups, "")
    mixer = child_definition(d, chosen, "child").blocks[0]
    norm, q, k, v = torch.ones(48, dtype=torch.float64), _rows("q", 6), _rows("k", 2), _rows("v", 2)
    out = _rows("o", 6).T.contiguous()
    tensors = mixer_tensors(chosen[0], mixer, (norm, q, k, v, out), layer=0, seed=0)
    running = RUNNING[mixer.letter](mixer, d.norm_epsilon)
    w = running.loaded(running.weights(tensors))
    w.in_proj[-6:] = 0
    w.dt_bias.fill_(math.log(math.expm1(1)))
    w.A, w.D = torch.zeros(6, dtype=torch.float64), torch.zeros(6, dtype=torch.float64)
    w.conv_weight.zero_()[:, -1] = 1
    w.conv_bias.zero_()
    bare = Ops(conv1d=partial(causal_conv1d, activation=None), gated_rms_norm=lambda y, z, *_, **__: y)
    h = torch.randn(2, 50, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    actual = running.whole(bare, w, h, None, None, {})

    queries, keys, values = ((h @ each.T).unflatten(-1, (-1, 16)).numpy() for each in (q, k, v))
    size, heads = 6 // groups, []
    for head in range(6):
        shared = range(head // size * size, head // size * size + size)  # query heads of its group
        query = np.mean([queries[:, :, each] for each in shared], axis=0)
        key = np.mean([keys[:, :, each // 3] for each in shared], axis=0)
        scores = np.tril(np.einsum("btd,bsd->bts", query, key))
        heads.append(np.einsum("bts,bsd->btd", scores, values[:, :, head // 3]))
    expected = torch.from_numpy(np.concatenate(heads, axis=-1)) @ out.T
    assert relative_error(actual, expected) < 1e-10


def test_children_are_ordinary_definitions() -> None:
    """Positions and switches stay where attention does, and other widths are those of a layer alone."""
    rotary = {"position_embedding": "rope", "rope_base": 100, "rope_percent": 1.0}
    parent = definition("*-*-", **rotary, qkv_bias=True)
    assert parent.family == "transformer"
    half = child_definition(parent, transplants(parent.blocks, [0], None, ""), "half")
    assert (half.pattern, half.family, half.position_embedding, half.qkv_bias) == ("M-*-", "pruned", "rope", True)
    assert (half.mamba_num_heads, half.mamba_num_groups, half.mamba_head_dim, half.mamba_state_dim) == (4, 4, 16, 16)
    assert (half.conv_kernel, half.overrides, half.sources["pattern"]) == (4, {}, "transplanted from small")
    none = child_definition(parent, transplants(parent.blocks, [0, 2], 2, ""), "none")
    assert (none.position_embedding, none.rope_base, none.qkv_bias, none.head_dim) == ("none", 0, False, 0)
    assert none.mamba_num_groups == 2
    assert none.family == "nemotron_h"
    plain = definition("*-*-")
    assert child_definition(plain, transplants(plain.blocks, [0], None, ""), "half").family == "nemotron_h"
    hybrid = definition("M*-M*-")
    mixed = child_definition(hybrid, transplants(hybrid.blocks, [1], None, ""), "mixed")
    own = {"mamba_num_heads": 4, "mamba_num_groups": 4}
    assert (mixed.pattern, mixed.overrides, mixed.mamba_num_heads) == ("MM-M*-", {1: own}, 16)
    wide = definition("*-*-", overrides={2: {"num_attention_heads": 8}})
    of_wide = child_definition(wide, transplants(wide.blocks, [0, 2], None, ""), "wide")
    assert of_wide.overrides == {2: {"mamba_num_heads": 8, "mamba_num_groups": 8}}


def test_layers_are_listed_or_every_so_many_th_stays() -> None:
    d = definition("*-" * 6)
    assert attention_layers(d.blocks) == [0, 2, 4, 6, 8, 10]
    assert listed(d, " 8,0", "") == [0, 8]
    assert all_but_every(d, 2, "") == [0, 4, 8]
    assert all_but_every(d, 3, "") == [0, 2, 6, 8]
    assert all_but_every(d, 6, "") == [0, 2, 4, 6, 8]


def _text(rows: int, seed: int) -> np.ndarray:
    """Return tokens [rows, 24]: of each row four of the 32 alone, which attention has to find out."""
    rng = np.random.default_rng(seed)
    return np.stack([rng.choice(rng.permutation(32)[:4], 24) for _ in range(rows)])


@pytest.fixture(scope="module")
def trained() -> Forward:
    """A Transformer of two layers that was trained on `_text`, in float32."""
    parent = model(definition("*-*-", vocab_size=32, **HEADS), torch.float32)
    weights = [parent.embedding, parent.final_norm, parent.output]
    weights += [tensor for layer in parent.layers for tensor in vars(layer).values()]
    optimizer = torch.optim.Adam([tensor.requires_grad_() for tensor in weights], 3e-3)
    forward = Forward(parent)
    for step in range(250):
        tokens = torch.from_numpy(_text(16, step))
        x = forward.embed(tokens)
        for layer in range(4):
            x = x + forward.layer(layer, forward.weights(layer), x)
        loss = torch.nn.functional.cross_entropy(forward.logits(x[:, 8:-1]).flatten(0, 1), tokens[:, 9:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for tensor in weights:
        tensor.requires_grad_(False)
    assert loss < 2.3, "a guess is 3.47 nats; of four tokens that are known it is 1.39"
    return forward


def test_training_begins_better_from_attention_than_from_nothing(trained: Forward) -> None:
    """After as many tokens, each against the mixer whose projections are sampled too."""
    d = trained.definition
    chosen = transplants(d.blocks, [0, 2], None, "")
    blocks = child_definition(d, chosen, "child").blocks
    for layer in chosen:
        w = trained.weights(layer)
        qkv = w.qkv.unflatten(0, (2, 5, 16))
        q, k, v = (part.flatten(0, -2) for part in (qkv[:, :3], qkv[:, 3], qkv[:, 4]))
        pieces = {
            start: Piece(
                blocks[layer],
                mixer_tensors(chosen[layer], blocks[layer], (w.norm, q, k, v, w.proj), layer, 0, start),
                trained,
            )
            for start in ("transplant", "random")
        }
        lengths = dict.fromkeys(pieces, Training(16 * 24 * 100, 16, 3e-3))
        there = range(layer, layer + 1)
        errors = imitate(trained, there, pieces, lengths, lambda step: _text(16, 1000 + step), _text(32, 999))
        assert errors["transplant"][1] < 0.5 * errors["transplant"][0]
        assert errors["transplant"][1] < 0.97 * errors["random"][1]


def test_matrices_are_those_that_the_layers_mix_by() -> None:
    """In float64: applied to the values of each head, what the layer computes without gate, norm and projection."""
    rotary = {"position_embedding": "rope", "rope_base": 100, "rope_percent": 1.0}
    parent = model(definition("*-M", **HEADS, **rotary), torch.float64)
    forward = Forward(parent)
    h = torch.randn(2, 90, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    values = {}
    for layer in (0, 2):
        w, running = forward.weights(layer), parent.running[layer]
        out = next(name for name in ("proj", "out_proj") if hasattr(w, name))
        setattr(w, out, torch.eye(getattr(w, out).shape[1], dtype=torch.float64))
        ops = Ops(gated_rms_norm=lambda y, *_, **__: y)
        if layer == 0:
            values = running.split_qkv(w, torch.nn.functional.linear(h, w.qkv), forward.rotary(h))[2]
            values = values.repeat_interleave(3, dim=2)  # [b, l, n, d]
        else:
            xbc = running._split(torch.nn.functional.linear(h, w.in_proj))[1]
            values = running._split_conv(causal_conv1d(xbc, w.conv_weight, w.conv_bias))[0]
        mixing = running.mixing(ops, w, h, forward.rotary(h))
        assert all(factor.dtype == torch.float64 for factor in mixing.factors)
        mixed = mixing.matrix(*mixing.factors) @ values.transpose(1, 2).flatten(0, 1)
        actual = mixed.unflatten(0, (2, -1)).transpose(1, 2).flatten(2)
        assert relative_error(actual, running.whole(ops, w, h, forward.rotary(h), None, {})) < 1e-10


def test_a_matrix_learns_the_attention_s(trained: Forward) -> None:
    """By C, B, dt, A, D and their convolution; x, z, norms and output projection stay bit for bit."""
    d = trained.definition
    chosen = transplants(d.blocks, [0], None, "")
    block = child_definition(d, chosen, "child").blocks[0]
    w = trained.weights(0)
    q, k, v = (part.flatten(0, -2) for part in w.qkv.unflatten(0, (2, 5, 16)).split([3, 1, 1], dim=1))
    piece = Piece(block, mixer_tensors(chosen[0], block, (w.norm, q, k, v, w.proj), 0, 0), trained)
    before = [tensor.clone() for tensor in piece.tensors]
    lengths = {"": Training(16 * 24 * 60, 16, 3e-2)}  # D = 1 has a long way
    text = (lambda step: _text(16, 1000 + step), _text(32, 999))
    first, last = imitate(trained, range(1), {"": piece}, lengths, *text, aim=MATRIX)[""]
    assert last < 0.8 * first
    names = ("norm", "in_proj", "conv", "conv_bias", "A", "D", "dt_bias", "gated_norm", "out")
    changed = {name: a != b for name, a, b in zip(names, before, piece.tensors, strict=True)}
    assert not any(changed[name].any() for name in ("norm", "gated_norm", "out"))
    inner = block.d_inner
    assert not changed["in_proj"][: 2 * inner].any(), "z and x"
    assert changed["in_proj"][2 * inner :].any(1).all(), "B, C and dt"
    for name in ("conv", "conv_bias"):
        assert not changed[name][:inner].any()
        assert changed[name][inner:].flatten(1).any(1).all() if name == "conv" else changed[name][inner:].any()
    assert all(changed[name].all() for name in ("A", "D", "dt_bias"))


#: a Llama with all that dense Transformers have beside projections, and a Transformer that Nemotron-H's rules can hold
MODELS = {
    "llama": lambda **changes: pure_config("*S", hybrid_override_pattern="*S*S*S", **{**HEADS, **changes}),
    "plain": lambda **changes: pure_config(
        "*", position_embedding_type="none", rotary_base=0, rotary_percent=0.0, **changes
    ),
}


def _run(place: Path, folder: Path, config) -> Path:  # noqa: F811
    data = {"tokenizer": str(place / "data" / "lines" / "tokenizer"), "seq_length": 64}
    return save(small_model(config), folder, data=data)


@pytest.fixture(scope="module")
def llama(place: Path) -> Path:  # noqa: F811
    """A Llama of three attention layers, 0, 2 and 4, each of six query and two key-value heads of 16 channels."""
    return _run(place, place / "llama", MODELS["llama"]())


def _tensors(checkpoint: Path) -> dict[str, Tensor]:
    """Return all tensors; norms once, although Transformer Engine's layers have another name for them."""
    file = WeightFile(checkpoint)
    shapes = {name: shape for name, shape in file.shapes.items() if not name.endswith("layer_norm_weight")}
    tensors = {name: torch.empty(shape, dtype=file.dtypes[name]) for name, shape in shapes.items()}
    file.read(tensors)
    return tensors


@pytest.mark.parametrize(("dtype", "groups"), [(torch.float32, None), (torch.bfloat16, 2), (torch.float32, 3)])
def test_what_is_written_is_the_parent_s(
    place: Path,  # noqa: F811
    llama: Path,
    tmp_path: Path,
    dtype: torch.dtype,
    groups: int | None,
) -> None:
    """Bit for bit: a group's one key-value head, and queries where a group has one."""
    run = llama if dtype == torch.float32 else _run(place, tmp_path / "run", MODELS["llama"](dtype=dtype))
    out = tmp_path / "Half Of It"
    said = invoke("transplant", run, out, "--every", 2, *(["--groups", groups] if groups else []))
    assert "half_of_it, MS*SMS, attention stays in layers 2; " in said
    assert said.count("; dropped: position_embedding, qkv_bias, qk_norm") == 2
    before, after = _tensors(run), _tensors(out)
    count, mixers = groups or 6, ("decoder.layers.0.", "decoder.layers.4.")
    assert {name for name in before if not name.startswith(mixers)} == {
        name for name in after if not name.startswith(mixers)
    }
    for name, tensor in after.items():  # a vocabulary without its padding
        assert name.startswith(mixers) or torch.equal(tensor, before[name][: len(tensor)]), name
    for layer in mixers:
        q, k, v = before[f"{layer}self_attention.linear_qkv.weight"].reshape(2, 5, 16, 48).split([3, 1, 1], dim=1)
        k, v = (each.expand(2, 3, 16, 48).reshape(6, 16, 48) for each in (k, v))
        of_groups = [each.double().reshape(count, -1, 16, 48).mean(1).to(dtype).reshape(-1, 48) for each in (q, k)]
        expected = {"C": of_groups[0], "B": of_groups[1], "x": v.reshape(96, 48)}
        if count == 6:
            assert torch.equal(of_groups[0], q.reshape(96, 48))
        if count != 3:
            assert torch.equal(of_groups[1], k[:: 6 // count].reshape(-1, 48))
        for part, tensor in expected.items():
            assert torch.equal(after[f"{layer}mixer.in_proj.weight.{part}"], tensor), part
        assert torch.equal(after[f"{layer}mixer.out_proj.weight"], before[f"{layer}self_attention.linear_proj.weight"])
        assert torch.equal(after[f"{layer}norm.weight"], before[f"{layer}input_layernorm.weight"])
        assert (after[f"{layer}mixer.D"] == 1).all()
        assert after[f"{layer}mixer.A_log"].dtype == torch.float32
        assert 0 <= after[f"{layer}mixer.A_log"].min() < after[f"{layer}mixer.A_log"].max() < math.log(16)
    z = [after[f"{layer}mixer.in_proj.weight.z"] for layer in mixers]
    assert z[0].abs().max() <= 48**-0.5 + 1e-3
    assert not torch.equal(*z)
    record = json.loads((out / "run.json").read_text())["transplanted"]
    assert (record["model"], record["chosen_by"], record["seed"]) == ("small", "every", 0)
    assert [(row["layer"], row["heads"], row["groups"]) for row in record["layers"]] == [(0, 6, count), (4, 6, count)]
    assert record["groups"].startswith(f"{groups}, as asked" if groups else "one for each query head")
    assert record["layers"][0]["dropped"] == ["position_embedding", "qkv_bias", "qk_norm"]


def test_it_generates_and_trains(llama: Path, tmp_path: Path) -> None:
    """Generation, a whole pass and Megatron's model compute the same, and every weight has a gradient."""
    from megatron.core import dist_checkpointing

    out = tmp_path / "half"
    invoke("transplant", llama, out, "--layers", "0,4")
    assert invoke("generate", out, "line", "--max-tokens", 4, "--temperature", 0)
    widths = {"mamba_num_heads": 6, "mamba_num_groups": 6, "mamba_head_dim": 16, "mamba_state_dim": 16}
    pattern = {"hybrid_override_pattern": "MS*SMS", "family": "pruned", "conv_kernel": 4}
    dense = {key: getattr(MODELS["llama"](), key) for key in _OF_LLAMA}
    trained = small_config(**{**dense, **HEADS, **widths, **pattern}).configure_model(None)
    state = dist_checkpointing.load(trained.sharded_state_dict(prefix="module."), str(out / "weights"))
    trained.load_state_dict({key.removeprefix("module."): value for key, value in state.items()})
    ids = torch.randint(VOCABULARY, (2, 60), generator=torch.Generator().manual_seed(0))
    model_of = load_model(out)
    expected = model_of.logits(model_of.extend(ids, model_of.new_states(*ids.shape)))
    assert relative_error(trained(ids)[..., :VOCABULARY].detach(), expected) < 1e-4
    trained(ids, labels=ids).mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in trained.parameters())
    with pytest.raises(UserError, match="has swiglu layers, which Hugging Face's nemotron_h does not know"):
        invoke("export", "hf", out, tmp_path / "hf")


_OF_LLAMA = (
    *("position_embedding_type", "rotary_base", "rotary_percent", "add_qkv_bias", "qk_layernorm"),
    *("share_embeddings_and_output_weights", "rope_scaling_factor", "rope_low_freq_factor", "rope_high_freq_factor"),
    "rope_original_length",
)


def test_a_hybrid_that_a_format_holds_is_exported(place: Path, tmp_path: Path) -> None:  # noqa: F811
    run = _run(place, tmp_path / "run", MODELS["plain"]())
    assert "dropped" not in invoke("transplant", run, tmp_path / "half", "--layers", 0)
    assert load_model(tmp_path / "half").definition.family == "nemotron_h"
    invoke("export", "hf", tmp_path / "half", tmp_path / "hf")
    invoke("import", "hf", tmp_path / "hf", tmp_path / "back")
    one, other = (
        invoke("generate", tmp_path / n, "line", "--max-tokens", 6, "--temperature", 0) for n in ("half", "back")
    )
    assert one == other


def _blend(place: Path) -> tuple[object, ...]:  # noqa: F811
    return "--blend", place / "lines.yaml", "--root", place / "data", "--samples", 4


def test_mixers_train_and_the_least_harmful_are_taken(place: Path, llama: Path, tmp_path: Path) -> None:  # noqa: F811
    options = ("--count", 1, *_blend(place), "--batch", 2)
    options += ("--matrices", "2K", "--tokens", "4K", "--lr", 3e-3, "--groups", 2)
    said = invoke("transplant", llama, tmp_path / "one", *options)
    line = r"^layer (\d): error ([\d.]+) transplanted, [\d.]+ with its matrix trained \(.*\), ([\d.]+) trained$"
    errors = re.findall(line, said, re.MULTILINE)
    assert [layer for layer, *_ in errors] == ["0", "2", "4"]
    assert all(float(after) < float(before) for _, before, after in errors)
    rows = re.findall(r"^(\d) +([\d.]+) +([\d.]+) *(yes)? *$", said, re.MULTILINE)
    best = min(rows, key=lambda row: float(row[1]))
    assert len(rows) == 3
    assert [row for row in rows if row[3]] == [best]
    record = json.loads((tmp_path / "one" / "run.json").read_text())["transplanted"]
    assert [row["layer"] for row in record["layers"]] == [int(best[0])]
    error = record["layers"][0]["error"]
    assert error["trained"] < error["transplanted"]
    assert error["matrix"]["trained"] < error["matrix"]["transplanted"]
    told = (record["tokens"], record["matrices"], record["batch"], record["samples"], record["blend"])
    assert told == (4000, 2000, 2, 4, "lines")
    for row, (layer, kl, left_out, _) in zip(record["scores"], rows, strict=True):
        assert row == pytest.approx(
            {"layer": int(layer), "transplanted": float(kl), "left out": float(left_out)}, abs=1e-4
        )
    # scored, a child of that layer has the divergence that its row tells
    pattern = load_model(tmp_path / "one").definition.pattern
    assert pattern == "".join("M" if layer == int(best[0]) else letter for layer, letter in enumerate("*S*S*S"))
    assert _divergence(place, llama, tmp_path / "one") == pytest.approx(float(best[1]), abs=1e-3)


def _divergence(place: Path, parent: Path, other: Path) -> float:  # noqa: F811
    """Return the KL divergence on the windows that the command scores, in nats per token."""
    from nemotron_h.cli.calibration import CalibrationText

    windows = CalibrationText.of(parent, str(place / "lines.yaml"), place / "data", None, 4, 0).held_out()
    ids = torch.from_numpy(windows[:, :-1])
    logs = []
    for folder in (parent, other):
        model_of = load_model(folder, dtype=torch.float64)
        logs.append(model_of.logits(model_of.extend(ids, model_of.new_states(*ids.shape))).log_softmax(-1))
    return float((logs[0].exp() * (logs[0] - logs[1])).sum(-1).mean())


def test_a_mixer_that_is_written_wrong_is_not_saved(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = child._reader

    def damaged(*arguments):
        read = right(*arguments)
        return lambda row: {key: t.flip(0) if "out_proj" in key else t for key, t in read(row).items()}

    monkeypatch.setattr(child, "_reader", damaged)
    with pytest.raises(UserError, match="computes something else than it should: logits differ by"):
        invoke("transplant", llama, tmp_path / "wrong", "--layers", 0)
    assert not list(tmp_path.iterdir())


def test_refusals(place: Path, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    text = _blend(place)
    for arguments, message in (
        ((), "no layer is chosen"),
        (("--layers", "0", "--every", 2), "--layers and --every exclude each other"),
        (("--layers", "1"), "layer 1 of small is SwiGLU, not attention"),
        (("--layers", "6"), "small has layers 0 to 5"),
        (("--layers", "0,x"), "'x' is no number of a layer"),
        (("--layers", "0,0"), "names a layer twice"),
        (("--every", 1), "--every = 1: small has 3 attention layers"),
        (("--every", 4), "--every = 4: small has 3 attention layers"),
        (("--count", 3, *text), "--count = 3: small has 3 attention layers, so there is no choice"),
        (("--count", 1), "--count needs text"),
        (("--layers", "0", "--tokens", "1K"), "--tokens needs text"),
        (("--layers", "0", "--matrices", "1K"), "--matrices needs text"),
        (("--layers", "0", "--matrices", "1K", *text, "--seq-length", 9000), "a matrix of every head would have 9,000"),
        (("--layers", "0", *text), "--samples, --root, --blend: no text is read"),
        (("--layers", "0", "--lr", 0.1), "--lr: nothing is trained"),
        (("--layers", "0", "--tokens", "many", *text), "transplant: --tokens"),
        (("--layers", "0", "--tokens", "1B", *text), "too little training text for"),
        (("--layers", "0", "--groups", 4), "--groups = 4 does not divide the 6 query heads of layer 0"),
        (("--layers", "0", "--name", "a/b"), "the child's name = 'a/b' is not a name"),
    ):
        with pytest.raises(UserError, match=message):
            invoke("transplant", llama, tmp_path / "child", *arguments)
    with pytest.raises(UserError, match="exists already"):
        invoke("transplant", llama, llama, "--layers", 0)
    with pytest.raises(UserError, match="small has layers 0 to 6"):
        invoke("transplant", place / "run", tmp_path / "child", "--layers", 9)
    falcon = _run(place, tmp_path / "falcon", pure_config("PS"))
    with pytest.raises(UserError, match="has no layer that is attention alone"):
        invoke("transplant", falcon, tmp_path / "child", "--every", 2)
    adapter = Path(shutil.copytree(llama, tmp_path / "adapter"))
    record = json.loads((adapter / "run.json").read_text())
    (adapter / "run.json").write_text(json.dumps(record | {"adapter": {"kind": "lora"}}))
    finish(adapter)
    with pytest.raises(UserError, match="adapter is an adapter, not a whole model"):
        invoke("transplant", adapter, tmp_path / "child", "--every", 2)
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1})())
    monkeypatch.setattr("nemotron_h.cli.transplant._measure", lambda *_: pytest.fail("it began to measure"))
    with pytest.raises(UserError, match="GB are needed"):
        invoke("transplant", llama, tmp_path / "child", "--layers", 0, "--tokens", "1K", *text)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "falcon"]
