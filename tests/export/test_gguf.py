"""`nemotron-h export gguf`: the file's bytes against a reader of its own, and every refusal before any work."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from export_command import invoke
from save_checkpoint import save
from small_model import MULTIPLIERS, VOCABULARY, pure_config, small_config, small_model

from nemotron_h.core.errors import UserError
from nemotron_h.data.tokenizer import Tokenizer, load_tokenizer, write_meta
from nemotron_h.export import gguf_tokenizer, gguf_writer
from nemotron_h.export.gguf_format import F16, Q8_0, TensorEntry, begin, numbers_of
from nemotron_h.export.source import ModelSource

pytestmark = pytest.mark.usefixtures("megatron")

_SCALARS = {4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q"}
_DTYPES = {0: "<f4", 1: "<f2", 30: "<u2"}


class Gguf:
    """Reads a file by the format's description alone."""

    def __init__(self, path: Path) -> None:
        self.data, self.place = path.read_bytes(), 0
        assert self.take(4) == b"GGUF"
        version, tensors, values = struct.unpack("<IQQ", self.take(20))
        assert version == 3
        self.values = {self.text(): self.value(self.number("<I")) for _ in range(values)}
        entries = {self.text(): self.entry() for _ in range(tensors)}
        self.start = -(-self.place // 32) * 32
        self.entries = entries
        assert all(offset % 32 == 0 for _, _, offset in entries.values())

    def take(self, count: int) -> bytes:
        self.place += count
        return self.data[self.place - count : self.place]

    def number(self, form: str):
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def text(self) -> str:
        return self.take(self.number("<Q")).decode()

    def value(self, kind: int):
        if kind == 8:
            return self.text()
        if kind == 9:
            inner, count = self.number("<I"), self.number("<Q")
            return [self.value(inner) for _ in range(count)]
        return self.number(_SCALARS[kind])

    def entry(self) -> tuple[tuple[int, ...], int, int]:
        axes = [self.number("<Q") for _ in range(self.number("<I"))]
        return tuple(reversed(axes)), self.number("<I"), self.number("<Q")

    def tensor(self, name: str) -> np.ndarray:
        """In float32."""
        shape, kind, offset = self.entries[name]
        count = int(np.prod(shape))
        if kind == 8:
            block = np.dtype([("scale", "<f2"), ("numbers", "i1", 32)])
            blocks = np.frombuffer(self.data, block, count // 32, self.start + offset)
            return (blocks["scale"].astype(np.float32)[:, None] * blocks["numbers"]).reshape(shape)
        found = np.frombuffer(self.data, _DTYPES[kind], count, self.start + offset).reshape(shape)
        if kind == 30:
            return (found.astype("<u4") << 16).view("<f4")
        return found.astype(np.float32)


def test_values_and_tensors(run: Path, tmp_path: Path) -> None:
    said = invoke("export", "gguf", run, tmp_path / "small.gguf")
    assert "small.gguf" in said
    file = Gguf(tmp_path / "small.gguf")
    v = file.values
    assert (v["general.architecture"], v["general.name"], v["general.file_type"]) == ("nemotron_h", "small", 0)
    assert v["nemotron_h.context_length"] == 128
    assert v["nemotron_h.feed_forward_length"] == [80 if s == "-" else 0 for s in "M-M*-M-"]
    assert v["nemotron_h.attention.head_count_kv"] == [2 if s == "*" else 0 for s in "M-M*-M-"]
    assert (v["nemotron_h.ssm.inner_size"], v["nemotron_h.ssm.time_step_rank"]) == (128, 8)
    source = ModelSource(run / "checkpoints" / "step-000001")
    theirs = source.read({name for row in source.rows for name in row.theirs}, torch.float32)
    assert len(file.entries) == len(theirs)
    assert sum(np.prod(shape) for shape, _, _ in file.entries.values()) == source.definition.parameters

    def same(name: str, expected: torch.Tensor) -> None:
        np.testing.assert_array_equal(file.tensor(name), expected.numpy())

    same("token_embd.weight", theirs["backbone.embeddings.weight"])
    same("output.weight", theirs["lm_head.weight"])
    same("blk.3.attn_k.weight", theirs["backbone.layers.3.mixer.k_proj.weight"])
    same("blk.0.ssm_a", -theirs["backbone.layers.0.mixer.A_log"].exp()[:, None])
    same("blk.0.ssm_d", theirs["backbone.layers.0.mixer.D"][:, None])
    same("blk.0.ssm_conv1d.weight", theirs["backbone.layers.0.mixer.conv1d.weight"].squeeze(1))
    same("blk.0.ssm_norm.weight", theirs["backbone.layers.0.mixer.norm.weight"].view(2, 64))
    last, (shape, _, offset) = list(file.entries.items())[-1]
    assert last == "output.weight"
    assert file.start + offset + 4 * np.prod(shape) == len(file.data)


def test_tokenizer_and_conversations(run: Path, tokenizer: Path, tmp_path: Path) -> None:
    invoke("export", "gguf", run, tmp_path / "small.gguf")
    v, text = Gguf(tmp_path / "small.gguf").values, load_tokenizer(tokenizer)
    library = json.loads((tokenizer / "tokenizer.json").read_text())
    assert (v["tokenizer.ggml.model"], v["tokenizer.ggml.pre"]) == ("gpt2", "tekken")
    assert v["tokenizer.ggml.merges"] == [" ".join(pair) for pair in library["model"]["merges"]]
    assert {name: i for i, name in enumerate(v["tokenizer.ggml.tokens"])} == library["model"]["vocab"]
    special = set(text.special_tokens.values())
    assert v["tokenizer.ggml.token_type"] == [3 if i in special else 1 for i in range(VOCABULARY)]
    assert v["tokenizer.ggml.eos_token_id"] == text.eod_id
    assert v["tokenizer.ggml.eot_token_id"] == text.tokens_to_ids("<SPECIAL_11>")
    assert v["tokenizer.ggml.add_bos_token"] is False
    assert "<SPECIAL_11>" in v["tokenizer.chat_template"]


@pytest.mark.parametrize(("dtype", "step"), [("f16", 2**-11), ("bf16", 2**-8), ("q8_0", None)])
def test_smaller_types(tmp_path: Path, dtype: str, step: float | None) -> None:
    """Matrices are rounded once; norms, the convolution and the scan's parameters stay as they are."""
    run = save(small_model(small_config(hidden_size=64)), tmp_path / "run")
    paths = {name: tmp_path / f"{name}.gguf" for name in ("f32", dtype)}
    for name, path in paths.items():
        invoke("export", "gguf", run, path, "--dtype", name, "--no-tokenizer")
    exact, rounded = (Gguf(path) for path in paths.values())
    assert rounded.values["tokenizer.ggml.model"] == "none"
    smaller = 0
    for name, (_, kind, _) in rounded.entries.items():
        a, b = exact.tensor(name), rounded.tensor(name)
        if kind == 0:
            np.testing.assert_array_equal(a, b)
            continue
        smaller += 1
        if step is None:
            blocks = np.abs(a.reshape(-1, 32)).max(axis=1, keepdims=True)
            assert (np.abs(a - b).reshape(-1, 32) <= blocks / 127 * 0.5 + blocks * 2**-10).all()
        else:
            np.testing.assert_allclose(b, a, rtol=step, atol=2**-24)
    kept = {name.partition(".")[2].partition(".")[2] for name, (_, kind, _) in rounded.entries.items() if kind == 0}
    assert smaller >= 8
    assert {"ssm_a", "ssm_d", "ssm_dt.bias", "ssm_conv1d.weight", "ssm_norm.weight", "attn_norm.weight"} <= kept
    assert paths[dtype].stat().st_size < paths["f32"].stat().st_size


def test_bf16_checkpoint_stays_so(tmp_path: Path) -> None:
    checkpoint = save(small_model(small_config(dtype=torch.bfloat16)), tmp_path / "c")
    invoke("export", "gguf", checkpoint, tmp_path / "small.gguf", "--no-tokenizer")
    file = Gguf(tmp_path / "small.gguf")
    assert (file.values["general.file_type"], file.entries["output.weight"][1]) == (32, 30)
    source = ModelSource(checkpoint)
    expected = source.read({"lm_head.weight"}, torch.bfloat16)["lm_head.weight"]
    np.testing.assert_array_equal(file.tensor("output.weight"), expected.float().numpy())


def test_mamba_alone_has_an_architecture_of_its_own(tmp_path: Path) -> None:
    checkpoint = save(small_model(pure_config("M")), tmp_path / "c")
    invoke("export", "gguf", checkpoint, tmp_path / "m.gguf", "--no-tokenizer")
    assert Gguf(tmp_path / "m.gguf").values["general.architecture"] == "mamba2"


def test_falcon_h1(tmp_path: Path) -> None:
    """Each tensor's name is that of llama.cpp's package; multipliers, which llama.cpp has none of, are in the rows."""
    checkpoint = save(small_model(pure_config("PS")), tmp_path / "c")
    invoke("export", "gguf", checkpoint, tmp_path / "f.gguf", "--no-tokenizer")
    file, m = Gguf(tmp_path / "f.gguf"), MULTIPLIERS
    v = {key.removeprefix("falcon-h1."): value for key, value in file.values.items()}
    assert (v["general.architecture"], v["block_count"], v["feed_forward_length"]) == ("falcon-h1", 2, 80)
    assert (v["attention.head_count"], v["attention.head_count_kv"], v["rope.freq_base"]) == (4, 2, 100)
    assert (v["ssm.inner_size"], v["ssm.group_count"], v["ssm.time_step_rank"]) == (128, 2, 8)
    source = ModelSource(checkpoint)
    theirs = source.read({name for row in source.rows for name in row.theirs}, torch.float32)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.FALCON_H1, 2)
    parts = {"in_proj": [m["ssm_in"] * m[f"ssm_{part}"] for part in ("z", "x", "b", "c", "dt")]}
    parts |= {name: [m["attention_in"]] for name in ("q_proj", "v_proj")}
    parts |= {"k_proj": [m["attention_in"] * m["key"]], "o_proj": [m["attention_out"]], "out_proj": [m["ssm_out"]]}
    parts |= {"gate_proj": [m["ffn_gate"]], "down_proj": [m["ffn_down"]]}
    parts |= {"embed_tokens": [m["embedding"]], "lm_head": [m["head"]]}
    assert len(file.entries) == len(theirs)
    for name, tensor in theirs.items():
        written = file.tensor(names.get_name(name.replace("dt_bias", "dt_proj.bias"), (".weight", ".bias")))
        expected = -tensor.exp() if name.endswith("A_log") else tensor
        key = name.split(".")[-2]
        scales = parts.get(key, [1.0])
        rows = [128, 128, 32, 32, 8] if key == "in_proj" else [len(tensor)]
        expected = torch.cat([part * scale for part, scale in zip(expected.split(rows), scales, strict=True)])
        np.testing.assert_allclose(written.ravel(), expected.numpy().ravel(), rtol=2e-7, err_msg=name)
    assert set(parts) <= {name.split(".")[-2] for name in theirs}


@pytest.mark.parametrize(("dtype", "code", "error"), [("f32", 0, 0), ("bf16", 30, 2**-8), ("q8_0", 8, 2**-7)])
def test_experts(tmp_path: Path, dtype: str, code: int, error: float) -> None:
    """Names are those of llama.cpp's package; a tensor has one matrix of all experts, the router is float32."""
    widths = {"hidden_size": 64, "expert_hidden_size": 32, "shared_expert_hidden_size": 96}
    checkpoint = save(small_model(pure_config("E", **widths)), tmp_path / "c")
    invoke("export", "gguf", checkpoint, tmp_path / "e.gguf", "--dtype", dtype, "--no-tokenizer")
    file, source = Gguf(tmp_path / "e.gguf"), ModelSource(checkpoint)
    v = {key.removeprefix("nemotron_h_moe."): value for key, value in file.values.items()}
    assert v["general.architecture"] == "nemotron_h_moe"
    assert v["feed_forward_length"] == [32 if letter == "E" else 0 for letter in "MEM*EME"]
    lengths = [v[f"expert_{name}"] for name in ("feed_forward_length", "shared_feed_forward_length")]
    assert (v["expert_count"], v["expert_used_count"], v["expert_shared_count"], *lengths) == (6, 2, 1, 32, 96)
    assert (v["expert_weights_norm"], v["expert_weights_scale"], v["expert_gating_func"]) == (True, 1.5, 2)
    theirs = source.read({name for row in source.rows for name in row.theirs}, torch.float32)
    assert sum(np.prod(shape) for shape, _, _ in file.entries.values()) == source.definition.parameters
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.NEMOTRON_H_MOE, 7)
    stacks = 0
    for layer in (1, 4, 6):
        for name, tensor in theirs.items():
            own = name.removeprefix(f"backbone.layers.{layer}.mixer.")
            if own == name:
                continue
            if own.startswith("experts."):
                _, number, side, _ = own.split(".")
                written = f"blk.{layer}.ffn_{side.removesuffix('_proj')}_exps.weight"
                found, stacks = file.tensor(written)[int(number)], stacks + 1
            else:
                written = names.get_name(name.replace("_bias", ".bias"), (".weight", ".bias"))
                found = file.tensor(written)
            exact = "gate" in own
            assert file.entries[written][1] == (0 if exact else code), name
            least = 0 if exact else error
            np.testing.assert_allclose(found, tensor.numpy(), rtol=0, atol=least * float(tensor.abs().max()))
    assert stacks == 3 * 6 * 2


def test_refused(run: Path, tmp_path: Path) -> None:
    (tmp_path / "there.gguf").write_text("x")
    with pytest.raises(UserError, match="exists already"):
        invoke("export", "gguf", run, tmp_path / "there.gguf")
    with pytest.raises(UserError, match="there is no folder"):
        invoke("export", "gguf", run, tmp_path / "absent" / "x.gguf")
    with pytest.raises(UserError, match="--dtype q4_0 is unknown"):
        invoke("export", "gguf", run, tmp_path / "x.gguf", "--dtype", "q4_0")
    with pytest.raises(UserError, match="neither a checkpoint nor a run"):
        invoke("export", "gguf", tmp_path, tmp_path / "x.gguf")
    for config, message in (
        (pure_config("*-"), "has rope positions; llama.cpp"),
        (pure_config("E", hybrid_override_pattern="M-*E", ffn_hidden_size=80), "has ffn layers, .* nemotron_h_moe"),
        (pure_config("PS", rotary_percent=0.5), "does not rotate whole heads .*; llama.cpp's falcon-h1"),
        (small_config(pattern="MM-M-", num_attention_heads=0, num_query_groups=0, kv_channels=0), "no attention layer"),
    ):
        checkpoint = save(small_model(config), tmp_path / message[:9])
        with pytest.raises(UserError, match=message):
            invoke("export", "gguf", checkpoint, tmp_path / "x.gguf", "--no-tokenizer")
    assert not list(tmp_path.glob("*x.gguf*"))


def test_nothing_is_left_of_a_failed_export(run: Path, tmp_path: Path) -> None:
    damaged = Path(shutil.copytree(run, tmp_path / "run"))
    file = max(damaged.rglob("*.distcp"), key=lambda f: f.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 4096] = bytes(4096)
    file.write_bytes(content)
    with pytest.raises(UserError, match="does not match its checksum"):
        invoke("export", "gguf", damaged, tmp_path / "x.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_numbers_beyond_float16(tmp_path: Path) -> None:
    model = small_model(small_config())
    with torch.no_grad():
        model.output_layer.weight[0, 0] = 1e5
    checkpoint = save(model, tmp_path / "c")
    with pytest.raises(UserError, match=r"lm_head.weight holds 1e\+05, beyond 65,504"):
        gguf_writer.write(gguf_writer.plan(checkpoint, None, "f16"), tmp_path / "x.gguf")
    gguf_writer.write(gguf_writer.plan(checkpoint, None, "q8_0"), tmp_path / "x.gguf")


def changed(tokenizer: Path, folder: Path, change) -> Tokenizer:
    """A Hugging Face folder of the tokenizer with `change` made to its tokenizer.json."""
    shutil.copytree(tokenizer, folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    change(content)
    (folder / "tokenizer.json").write_text(json.dumps(content))
    write_meta(folder, "huggingface")
    return load_tokenizer(folder)


def test_tokenizers_that_llama_cpp_lacks(tokenizer: Path, tmp_path: Path) -> None:
    same = changed(tokenizer, tmp_path / "same", lambda content: None)
    expected = gguf_tokenizer.values(load_tokenizer(tokenizer), VOCABULARY)
    names, types = "tokenizer.ggml.tokens", "tokenizer.ggml.token_type"
    assert gguf_tokenizer.values(same, VOCABULARY)[names] == expected[names]
    padded = gguf_tokenizer.values(same, VOCABULARY + 84)  # a name for each row of the embedding
    assert (padded[names][:VOCABULARY], len(set(padded[names]))) == (expected[names], VOCABULARY + 84)
    assert padded[types] == expected[types] + [5] * 84  # llama.cpp's number of an unused token
    split = ["pre_tokenizer", "pretokenizers"]
    for name, change, message in (
        (
            "split",
            lambda c: c[split[0]][split[1]][0]["pattern"].update(Regex=r"\w+"),
            "splits words in a way of its own",
        ),
        ("nfc", lambda c: c.update(normalizer={"type": "NFC"}), "has a normalizer"),
    ):
        with pytest.raises(UserError, match=message) as error:
            gguf_tokenizer.values(changed(tokenizer, tmp_path / name, change), VOCABULARY)
        assert "--no-tokenizer" in error.value.hint


def test_format_refuses_what_it_cannot_hold(tmp_path: Path) -> None:
    architecture = {"general.architecture": "mamba2"}
    with pytest.raises(ValueError, match="Empty array"):
        begin(tmp_path / "x", {**architecture, "x": []}, [])
    with pytest.raises(AssertionError):
        begin(tmp_path / "y", architecture, [TensorEntry("x", (2, 2), F16)]).write_tensor_data(np.zeros(3, "f2"))


def test_q8_0_block() -> None:
    """The largest number of a block is 127 steps; halves go away from zero; a block of zeros stays zeros."""
    row = torch.zeros(64)
    row[:4] = torch.tensor([127.0, -2.5, 2.5, 0.4])
    written = numbers_of(row[None], Q8_0).tobytes()
    assert len(written) == TensorEntry("x", (1, 64), Q8_0).size == 68  # two blocks of 34 bytes
    assert np.frombuffer(written, "<f2", 1)[0] == 1
    assert np.frombuffer(written, "i1", 4, 2).tolist() == [127, -3, 3, 0]
    assert written[34:68] == bytes(34)
