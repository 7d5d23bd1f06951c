"""Falcon-H1 in Hugging Face transformers' own implementation, and its config.json.

The pinned transformers has the type, so this needs no environment of another's.
"""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from adapted_model import KINDS, adapter, randomize_adapters
from save_checkpoint import save
from small_model import MULTIPLIERS, VOCABULARY, pure_config, relative_error, small_model, tokens
from test_hf_round_trip import export, read_all, theirs
from test_merge import save_adapter

from nemotron_h.architecture.definition import ModelDefinition
from nemotron_h.core.errors import UserError
from nemotron_h.export import hf_reader, peft_writer
from nemotron_h.export.hf_types import from_config, to_config
from nemotron_h.inference.generate import generate
from nemotron_h.inference.model import load_model
from nemotron_h.inference.sampling import Sampling
from nemotron_h.recipe.checks import definition_of
from nemotron_h.recipe.compose import compose

IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
SIZES = ("tiny", "0.5b", "1.5b", "1.5b_deep", "3b", "7b", "34b")
BATCH, LENGTH, PREFILL = 2, 150, 140  # transformers' chunks have 128 tokens: a whole one and a part
TOLERANCE = 1e-4
CONFIGS = {
    "groups_1": {"mamba_num_groups": 1},
    "groups_2": {"mamba_num_groups": 2},
    "no_norm": {"mamba_norm": False},
}


@pytest.fixture(scope="module", params=CONFIGS)
def exported(
    request: pytest.FixtureRequest, megatron: None, tmp_path_factory: pytest.TempPathFactory
) -> tuple[torch.nn.Module, Path, Path]:
    """The training model, its checkpoint, and the exported folder."""
    root = tmp_path_factory.mktemp(request.param)
    model = small_model(pure_config("PS", **CONFIGS[request.param])).eval()
    checkpoint = save(model, root / "checkpoint")
    return model, checkpoint, export(checkpoint, root / "hf", shard_size=60_000)


@torch.no_grad()
def test_transformers_computes_the_same(exported: tuple[torch.nn.Module, Path, Path]) -> None:
    """Logits of a whole pass, of steps from its cache, and greedy tokens; every weight loaded and none left over.

    `generate` gets the mask: without it transformers takes id 0 in a prompt for padding. Its steps read one sequence:
    of several its gated norm drops an axis on the CPU (4.57.6), and they mix.
    """
    from transformers import AutoModelForCausalLM
    from transformers.models.falcon_h1.modeling_falcon_h1 import FalconHybridMambaAttentionDynamicCache as Cache

    trained, checkpoint, folder = exported
    model, loading = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert type(model).__name__ == "FalconH1ForCausalLM"
    assert not {name: found for name, found in loading.items() if found}
    ids = tokens(BATCH, LENGTH)
    expected = trained(input_ids=ids)[..., :VOCABULARY]
    assert 0.3 < expected.std() < 3  # at the scale that the tolerance is meant for
    torch.testing.assert_close(model(input_ids=ids, use_cache=False).logits, expected, atol=TOLERANCE, rtol=0)

    ours = load_model(checkpoint)
    states, cpu = ours.new_states(1, LENGTH), ["cpu"] * model.config.num_hidden_layers
    row, cache = ids[:1], Cache(model.config, 1, torch.float32, cpu)
    actual = [ours.logits(ours.extend(row[:, :PREFILL], states))]
    steps = [model(input_ids=row[:, :PREFILL], past_key_values=cache, use_cache=True).logits]
    for position in range(PREFILL, LENGTH):
        actual.append(ours.logits(ours.step(row[:, position], states))[:, None])
        at = torch.tensor([position])
        read = {"cache_position": at, "position_ids": at[None], "past_key_values": cache, "use_cache": True}
        steps.append(model(input_ids=row[:, position : position + 1], **read).logits)
    torch.testing.assert_close(torch.cat(actual, dim=1), expected[:1], atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(torch.cat(steps, dim=1), expected[:1], atol=TOLERANCE, rtol=0)

    prompt = ids[:1, :PREFILL]
    written = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, do_sample=False, eos_token_id=None
    )
    expected_text = generate(ours, [prompt[0].tolist()], max_tokens=8, sampling=Sampling(temperature=0))[0]
    assert written[0, PREFILL:].tolist() == expected_text


def test_every_tensor_comes_back(exported: tuple[torch.nn.Module, Path, Path], tmp_path: Path) -> None:
    _, first, folder = exported
    hf_reader.write(hf_reader.examine(folder), tmp_path / "second")
    before, after = read_all(first), read_all(tmp_path / "second")
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    again = export(tmp_path / "second", tmp_path / "again")
    a, b = theirs(folder), theirs(again)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert json.loads((folder / "config.json").read_text()) == json.loads((again / "config.json").read_text())


@torch.no_grad()
@pytest.mark.usefixtures("megatron")
@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_is_the_trained_model_in_generation_and_in_peft(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="NeMo brings it")
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    trained, base = pure_config("PS", adapter=adapter(kind)).configure_model(None), small_model(pure_config("PS"))
    trained.load_state_dict(base.state_dict())
    randomize_adapters(trained)
    trained.eval()
    first = save(base, tmp_path / "base")
    checkpoint = save_adapter(trained, tmp_path / "adapter", first)
    plan = peft_writer.plan(checkpoint)
    attention, gated = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
    assert sorted(plan.config["target_modules"]) == sorted(("in_proj", *attention, *gated))
    assert plan.config["modules_to_save"] == ["out_proj"]
    peft_writer.write(plan, tmp_path / "peft")
    ids = tokens(BATCH, LENGTH)
    expected = trained(input_ids=ids)[..., :VOCABULARY]
    assert relative_error(base(input_ids=ids)[..., :VOCABULARY], expected) > 0.1
    ours = load_model(checkpoint)
    assert relative_error(ours.logits(ours.extend(ids, ours.new_states(BATCH, LENGTH))), expected) < TOLERANCE
    whole = AutoModelForCausalLM.from_pretrained(export(first, tmp_path / "hf"))
    theirs_too = PeftModel.from_pretrained(whole, tmp_path / "peft").eval()
    assert relative_error(theirs_too(input_ids=ids, use_cache=False).logits, expected) < TOLERANCE


def shipped(size: str) -> ModelDefinition:
    return definition_of(compose(f"falcon_h1_{size}/pretrain"), size)


def config_of(definition: ModelDefinition) -> dict:
    return to_config(definition, dtype="bfloat16", max_positions=8192, token_ids=IDS)


@pytest.mark.parametrize("size", SIZES)
def test_shipped_sizes_come_back(size: str) -> None:
    """With the multipliers as numbers: a config.json names no rule."""
    definition = shipped(size)
    back = from_config(config_of(definition), definition.name, "config.json")
    assert back.scales == definition.scales
    assert replace(back, multipliers=definition.multipliers) == replace(definition, sources={})


def test_transformers_5_writes_the_base_elsewhere() -> None:
    config = config_of(shipped("tiny"))
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": config.pop("rope_theta")}
    assert from_config(config, "x", "config.json").rope_base == 10**11


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mamba_dt_limit": 1}, "falcon_h1 has no key mamba_dt_limit"),
        ({"keys_multiplier": 1}, "no key keys_multiplier: .*\n?.*Did you mean key_multiplier"),
        ({"mamba_norm_before_gate": True}, "mamba_norm_before_gate = True, which no released"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings = True"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling = "),
        ({"mamba_d_ssm": 100}, "mamba_d_ssm is 100, mamba_n_heads x mamba_d_head is 8 x 32"),
        ({"ssm_multipliers": [1.0, 2.0]}, "ssm_multipliers is .*; 5 numbers are needed"),
        ({"key_multiplier": "x"}, "key_multiplier is 'x'; a positive number is needed"),
        ({"mamba_rms_norm": 1}, "mamba_rms_norm is 1; true or false is needed"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0; a positive whole number is needed"),
        ({"rope_theta": None}, "rope_theta is None"),
    ],
)
def test_refused(change: dict, message: str) -> None:
    config = {**config_of(shipped("tiny")), **change}
    with pytest.raises(UserError) as error:
        from_config(config, "x", "DIR/config.json")
    assert "DIR/config.json" in error.value.message
    with pytest.raises(UserError, match=message):
        raise UserError(f"{error.value.message}\n{error.value.hint}")


def test_what_the_file_leaves_out_is_transformers_default() -> None:
    config = config_of(shipped("tiny"))
    del config["mamba_norm_before_gate"]  # true there
    with pytest.raises(UserError, match="mamba_norm_before_gate is not stated"):
        from_config(config, "x", "config.json")


def test_other_types_do_not_know_multipliers() -> None:
    plain = definition_of(compose("nemotron_h_tiny/pretrain"), "nemotron_h_tiny")
    scaled = ModelDefinition(**{**asdict(plain), "expect": plain.expect, "multipliers": {"head": 0.5}})
    with pytest.raises(UserError, match=r"model\.multipliers, which Hugging Face's nemotron_h does not know"):
        config_of(scaled)
    with pytest.raises(UserError, match=r"model\.mamba_norm, which"):
        config_of(replace(plain, mamba_norm=False))
    pruned = replace(shipped("tiny"), family="pruned", pattern="PSSP")
    with pytest.raises(UserError, match="has parallel, swiglu layers, which"):
        config_of(pruned)
    assert len(MULTIPLIERS) == 14
