"""Llama, Qwen2 and Qwen3 in Hugging Face transformers' own implementations, and their config.json.

The pinned transformers has the types, so this needs no environment of another's.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from adapted_model import KINDS, adapter, randomize_adapters
from safetensors.torch import load_file, save_file
from save_checkpoint import save
from small_model import SCALED, VOCABULARY, pure_config, relative_error, small_model, tokens
from test_hf_round_trip import export, read_all, theirs
from test_merge import save_adapter

from nemotron_h.core.errors import UserError
from nemotron_h.export import hf_reader, peft_writer
from nemotron_h.export.config import check_plain
from nemotron_h.export.gguf_format import F32
from nemotron_h.export.gguf_model import values
from nemotron_h.export.hf_types import check_expressible, from_config, to_config
from nemotron_h.inference.generate import generate
from nemotron_h.inference.model import load_model
from nemotron_h.inference.sampling import Sampling

IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
BATCH, LENGTH, PREFILL = 2, 90, 80  # beyond the original length of the scaled positions, 64
TOLERANCE = 1e-4
_PLAIN = {**dict.fromkeys(SCALED, 0), "share_embeddings_and_output_weights": False}
CONFIGS = {
    "llama": {"add_qkv_bias": False, "qk_layernorm": False},  # tied, scaled positions, head_dim apart
    "llama_untied": {**_PLAIN, "add_qkv_bias": False, "qk_layernorm": False, "kv_channels": 12},
    "qwen2": {"qk_layernorm": False, **dict.fromkeys(SCALED, 0)},  # tied
    "qwen3": {**_PLAIN, "add_qkv_bias": False},  # head_dim apart
}
CLASSES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}


@pytest.fixture(scope="module", params=CONFIGS)
def exported(
    request: pytest.FixtureRequest, megatron: None, tmp_path_factory: pytest.TempPathFactory
) -> tuple[torch.nn.Module, Path, Path]:
    """The training model, its checkpoint, and the exported folder."""
    root = tmp_path_factory.mktemp(request.param)
    model = small_model(pure_config("*S", **CONFIGS[request.param])).eval()
    checkpoint = save(model, root / "checkpoint")
    return model, checkpoint, export(checkpoint, root / "hf", shard_size=30_000)


@torch.no_grad()
def test_transformers_computes_the_same(exported: tuple[torch.nn.Module, Path, Path]) -> None:
    """Logits of a whole pass, of steps from its cache, and greedy tokens; every weight loaded and none left over."""
    from transformers import AutoModelForCausalLM

    trained, checkpoint, folder = exported
    model, loading = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    config = json.loads((folder / "config.json").read_text())
    assert type(model).__name__ == CLASSES[config["model_type"]] == config["architectures"][0]
    assert not {name: found for name, found in loading.items() if found}
    assert model.num_parameters() == load_model(checkpoint).definition.parameters
    ids = tokens(BATCH, LENGTH)
    expected = trained(input_ids=ids)[..., :VOCABULARY]
    assert 0.3 < expected.std() < 3  # at the scale that the tolerance is meant for
    torch.testing.assert_close(model(input_ids=ids, use_cache=False).logits, expected, atol=TOLERANCE, rtol=0)

    ours = load_model(checkpoint)
    states = ours.new_states(BATCH, LENGTH)
    out = model(input_ids=ids[:, :PREFILL], use_cache=True)
    actual, steps = [ours.logits(ours.extend(ids[:, :PREFILL], states))], [out.logits]
    for position in range(PREFILL, LENGTH):
        actual.append(ours.logits(ours.step(ids[:, position], states))[:, None])
        token = ids[:, position : position + 1]
        out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
        steps.append(out.logits)
    torch.testing.assert_close(torch.cat(actual, dim=1), expected, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(torch.cat(steps, dim=1), expected, atol=TOLERANCE, rtol=0)
    by_op = ours.to(torch.float64)  # other steps than float32's on the CPU
    states = by_op.new_states(BATCH, LENGTH)
    by_op.extend(ids[:, :PREFILL], states)
    step = by_op.logits(by_op.step(ids[:, PREFILL], states))
    torch.testing.assert_close(step.float(), expected[:, PREFILL], atol=TOLERANCE, rtol=0)

    prompt = ids[:1, :PREFILL]
    written = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, do_sample=False, eos_token_id=None
    )
    expected_text = generate(ours, [prompt[0].tolist()], max_tokens=8, sampling=Sampling(temperature=0))[0]
    assert written[0, PREFILL:].tolist() == expected_text


def test_every_tensor_comes_back(exported: tuple[torch.nn.Module, Path, Path], tmp_path: Path) -> None:
    """From ours and, saved anew by transformers, from theirs; what comes back can be a teacher too."""
    from transformers import AutoModelForCausalLM

    from nemotron_h.training.stages.distillation.stage import held_parameters

    _, first, folder = exported
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "saved", max_shard_size=30_000)
    assert len(list((tmp_path / "saved").glob("*.safetensors"))) > 1
    before = read_all(first)
    for name, source in (("ours", folder), ("saved", tmp_path / "saved")):
        hf_reader.write(hf_reader.examine(source, "small"), tmp_path / f"{name}_in")
        after = read_all(tmp_path / f"{name}_in")
        definition = load_model(tmp_path / f"{name}_in").definition
        assert held_parameters(tmp_path / f"{name}_in", definition) == definition.parameters
        assert held_parameters(first, definition) == definition.parameters
        assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
        again = export(tmp_path / f"{name}_in", tmp_path / f"{name}_again")
        a, b = theirs(folder), theirs(again)
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)
        written, back = (json.loads((where / "config.json").read_text()) for where in (folder, again))
        assert written == back


@torch.no_grad()
@pytest.mark.usefixtures("megatron")
@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_is_the_trained_model_in_generation_and_in_peft(kind: str, tmp_path: Path) -> None:
    """Over biases too, which DoRA's lengths do not scale."""
    pytest.importorskip("peft", reason="NeMo brings it")
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    qwen = CONFIGS["qwen2"]
    base = small_model(pure_config("*S", **qwen))
    settings = replace(adapter(kind), targets=["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"])
    trained = pure_config("*S", adapter=settings, **qwen).configure_model(None)
    trained.load_state_dict(base.state_dict())
    randomize_adapters(trained)
    trained.eval()
    first = save(base, tmp_path / "base")
    checkpoint = save_adapter(trained, tmp_path / "adapter", first)
    peft_writer.write(peft_writer.plan(checkpoint), tmp_path / "peft")
    ids = tokens(BATCH, LENGTH)
    expected = trained(input_ids=ids)[..., :VOCABULARY]
    assert relative_error(base(input_ids=ids)[..., :VOCABULARY], expected) > 0.1
    ours = load_model(checkpoint)
    assert relative_error(ours.logits(ours.extend(ids, ours.new_states(BATCH, LENGTH))), expected) < TOLERANCE
    whole = AutoModelForCausalLM.from_pretrained(export(first, tmp_path / "hf"))
    theirs_too = PeftModel.from_pretrained(whole, tmp_path / "peft").eval()
    assert relative_error(theirs_too(input_ids=ids, use_cache=False).logits, expected) < TOLERANCE


def test_an_output_matrix_beside_tied_embeddings(megatron: None, tmp_path: Path) -> None:
    """Is left out where it is the embedding once more, and refused where it is not."""
    checkpoint = save(small_model(pure_config("*S", **CONFIGS["llama"])), tmp_path / "checkpoint")
    folder = export(checkpoint, tmp_path / "hf")
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, file)
    hf_reader.examine(folder)
    tensors["lm_head.weight"][7, 3] += 1
    save_file(tensors, file)
    with pytest.raises(UserError, match=r"tie_word_embeddings.*lm_head\.weight is not model\.embed_tokens\.weight"):
        hf_reader.examine(folder)


#: config.json of releases, without keys that say nothing of the model; their parameters
RELEASES = {
    "llama32_1b": (
        {
            "model_type": "llama",
            "attention_bias": False,
            "head_dim": 64,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "mlp_bias": False,
            "num_attention_heads": 32,
            "num_hidden_layers": 16,
            "num_key_value_heads": 8,
            "pretraining_tp": 1,
            "rms_norm_eps": 1e-05,
            "rope_scaling": {
                "factor": 32.0,
                "high_freq_factor": 4.0,
                "low_freq_factor": 1.0,
                "original_max_position_embeddings": 8192,
                "rope_type": "llama3",
            },
            "rope_theta": 500000.0,
            "tie_word_embeddings": True,
            "vocab_size": 128256,
        },
        1_235_814_400,
    ),
    "llama31_8b": (
        {
            "model_type": "llama",
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_attention_heads": 32,
            "num_hidden_layers": 32,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-05,
            "rope_scaling": {
                "factor": 8.0,
                "high_freq_factor": 4.0,
                "low_freq_factor": 1.0,
                "original_max_position_embeddings": 8192,
                "rope_type": "llama3",
            },
            "rope_theta": 500000.0,
            "tie_word_embeddings": False,
            "vocab_size": 128256,
        },
        8_030_261_248,
    ),
    "qwen25_1.5b": (
        {
            "model_type": "qwen2",
            "hidden_size": 1536,
            "intermediate_size": 8960,
            "max_window_layers": 28,
            "num_attention_heads": 12,
            "num_hidden_layers": 28,
            "num_key_value_heads": 2,
            "rms_norm_eps": 1e-06,
            "rope_theta": 1000000.0,
            "sliding_window": 131072,
            "tie_word_embeddings": True,
            "use_mrope": False,
            "use_sliding_window": False,
            "vocab_size": 151936,
        },
        1_543_714_304,
    ),
    "qwen3_0.6b": (
        {
            "model_type": "qwen3",
            "attention_bias": False,
            "head_dim": 128,
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "max_window_layers": 28,
            "num_attention_heads": 16,
            "num_hidden_layers": 28,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-06,
            "rope_scaling": None,
            "rope_theta": 1000000,
            "sliding_window": None,
            "tie_word_embeddings": True,
            "use_sliding_window": False,
            "vocab_size": 151936,
        },
        596_049_920,
    ),
    "smollm2_135m": (
        {
            "model_type": "llama",
            "hidden_size": 576,
            "intermediate_size": 1536,
            "is_llama_config": True,
            "num_attention_heads": 9,
            "num_hidden_layers": 30,
            "num_key_value_heads": 3,
            "pretraining_tp": 1,
            "rms_norm_eps": 1e-05,
            "rope_interleaved": False,
            "rope_scaling": None,
            "rope_theta": 100000,
            "tie_word_embeddings": True,
            "vocab_size": 49152,
        },
        134_515_008,
    ),
}


def release(name: str, **changes: object) -> dict:
    """A release's config.json, with the keys that all have."""
    shared = {"hidden_act": "silu", "attention_dropout": 0.0, "initializer_range": 0.02, "use_cache": True}
    shared |= {"torch_dtype": "bfloat16", "transformers_version": "4.45.0", "max_position_embeddings": 131072}
    return {**shared, "architectures": ["X"], "bos_token_id": 1, "eos_token_id": [2, 3], **RELEASES[name][0], **changes}


@pytest.mark.parametrize("name", RELEASES)
def test_releases_have_their_parameters_and_come_back(name: str) -> None:
    definition = from_config(release(name), "x", "config.json")
    assert definition.parameters == RELEASES[name][1]
    config = to_config(definition, dtype="bfloat16", max_positions=131072, token_ids=IDS)
    assert from_config(config, "x", "config.json") == definition
    stated = {key: value for key, value in RELEASES[name][0].items() if key in config}
    assert stated == {key: config[key] for key in stated}
    assert set(RELEASES[name][0]) - set(stated) <= {
        *("pretraining_tp", "max_window_layers", "sliding_window", "use_mrope", "is_llama_config", "rope_interleaved")
    }


def test_transformers_5_writes_positions_elsewhere() -> None:
    config = release("llama32_1b")
    scaled = {**config.pop("rope_scaling"), "rope_theta": config.pop("rope_theta")}
    expected = from_config(release("llama32_1b"), "x", "config.json")
    assert from_config({**config, "rope_parameters": scaled}, "x", "config.json") == expected


def test_what_the_file_leaves_out_is_transformers_default() -> None:
    config = release("smollm2_135m")
    for key in ("rms_norm_eps", "num_key_value_heads", "rope_theta", "tie_word_embeddings"):
        del config[key]
    definition = from_config(config, "x", "config.json")
    assert (definition.norm_epsilon, definition.num_query_groups, definition.rope_base) == (1e-6, 9, 10_000)
    assert (definition.head_dim, definition.tied_embeddings) == (64, False)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("llama32_1b", {"attention_bias": True}, "attention_bias = True, which is not imported"),
        ("qwen3_0.6b", {"attention_bias": True}, "attention_bias = True"),
        ("llama32_1b", {"hidden_act": "gelu"}, "hidden_act = gelu"),
        ("llama32_1b", {"quantization_config": {"quant_method": "fp8"}}, "quantization_config = "),
        ("llama32_1b", {"num_local_experts": 8}, "llama has no key num_local_experts here"),
        ("llama32_1b", {"sliding_window": 4096}, "llama has no key sliding_window here"),
        ("llama32_1b", {"hidden_sise": 8}, "no key hidden_sise .*\n?.*Did you mean hidden_size"),
        ("qwen25_1.5b", {"use_sliding_window": True}, "use_sliding_window = True"),
        ("qwen3_0.6b", {"layer_types": ["full_attention"] * 27 + ["sliding_attention"]}, "layer_types is "),
        ("qwen3_0.6b", {"head_dim": None}, "head_dim is missing; a positive whole number is needed"),
        ("qwen25_1.5b", {"rope_scaling": {"type": "yarn", "factor": 4.0}}, r"rope_scaling\.rope_type = yarn"),
        ("llama32_1b", {"rope_parameters": {"rope_type": "dynamic"}}, r"rope_parameters\.rope_type = dynamic"),
        (
            "llama32_1b",
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
            r"rope_scaling\.low_freq_factor is mis",
        ),
        (
            "llama32_1b",
            {"rope_scaling": {**RELEASES["llama32_1b"][0]["rope_scaling"], "short_factor": 1}},
            "rope_scaling has short_factor",
        ),
        ("llama32_1b", {"rope_theta": 0.5}, "rope_theta is 0.5"),
        ("llama32_1b", {"tie_word_embeddings": 1}, "tie_word_embeddings is 1; true or false is needed"),
        ("smollm2_135m", {"num_attention_heads": 10, "num_key_value_heads": 5}, "hidden_size = 576 is not a multiple"),
        ("llama32_1b", {"num_hidden_layers": 0}, "num_hidden_layers is 0"),
    ],
)
def test_refused(name: str, change: dict, message: str) -> None:
    with pytest.raises(UserError) as error:
        from_config(release(name, **change), "x", "DIR/config.json")
    assert "DIR/config.json" in error.value.message
    with pytest.raises(UserError, match=message):
        raise UserError(f"{error.value.message}\n{error.value.hint}")


def test_what_no_type_has() -> None:
    plain = from_config(release("llama32_1b"), "x", "config.json")
    with pytest.raises(
        UserError, match=r"model\.qkv_bias and model\.qk_norm, which none of Hugging Face's llama, qwen2"
    ):
        check_expressible(replace(plain, qkv_bias=True, qk_norm=True))
    with pytest.raises(UserError, match="does not rotate whole heads"):
        check_expressible(replace(plain, rope_percent=0.5))
    with pytest.raises(UserError, match=r"model\.tied_embeddings, which Hugging Face's nemotron_h"):
        check_plain(plain, "Hugging Face's nemotron_h")
    with pytest.raises(UserError, match="family llama, which is not written as GGUF"):
        values(plain, seq_length=64, file_type=F32)
