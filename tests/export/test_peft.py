"""`nemotron-h export peft`: the files stand for the merged model, by hand and in PEFT itself."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from adapted_model import ALL, KINDS, adapted_config, adapted_model, randomize_adapters
from export_command import invoke
from safetensors.torch import load_file, save_file
from save_checkpoint import save
from small_model import pure_config, relative_error, small_model, tokens
from test_hf_round_trip import export, theirs
from test_merge import ROUTED, adapted_experts, save_adapter, trained_logits
from test_transformers import PYTHON

from nemotron_h.core.errors import UserError

pytestmark = pytest.mark.usefixtures("megatron")

MODULES = {"in_proj", "q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"}


class Adapted:
    """A trained model at scale 1 with adapters on every matrix, its checkpoints, and their exports."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.kind, self.folder = kind, folder
        self.model, base = adapted_model(adapted_config(kind, dropout=0.1))
        randomize_adapters(self.model)
        self.model.eval()
        self.base = save(base, folder / "base")
        self.checkpoint = save_adapter(self.model, folder / "adapter", self.base)
        self.said = invoke("export", "peft", self.checkpoint, folder / "peft", "--base-model", folder / "hf")
        export(self.base, folder / "hf")
        self.merged = theirs(export(self.checkpoint, folder / "merged"))

    @property
    def config(self) -> dict:
        return json.loads((self.folder / "peft" / "adapter_config.json").read_text())


@pytest.fixture(scope="module")
def made(megatron: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Adapted]:
    return {kind: Adapted(kind, tmp_path_factory.mktemp(f"peft_{kind}")) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_the_files_and_the_base_make_the_merged_export(made: dict[str, Adapted], kind: str) -> None:
    """Every tensor of the merged export, by PEFT's formula from the files; and every tensor of the file is used."""
    adapted = made[kind]
    found = load_file(adapted.folder / "peft" / "adapter_model.safetensors")
    scale, changed = adapted.config["lora_alpha"] / adapted.config["r"], set()
    for name, weight in theirs(adapted.folder / "hf").items():
        module = f"base_model.model.model.{name.removeprefix('backbone.').removesuffix('.weight')}"
        parts = {key: found.pop(f"{module}.{key}", None) for key in ("lora_A.weight", "lora_B.weight", "weight")}
        a, b, whole = parts.values()
        lengths = found.pop(f"{module}.lora_magnitude_vector", None)
        assert (lengths is None) == (kind == "lora" or a is None)
        if whole is not None:
            changed.add(name)
            assert torch.equal(whole, adapted.merged[name])
        elif a is not None:
            changed.add(name)
            weight = weight + scale * b @ a
            if lengths is not None:
                weight = weight * (lengths / weight.norm(dim=1))[:, None]
            assert relative_error(weight, adapted.merged[name]) < 1e-6, name
        else:
            assert torch.equal(weight, adapted.merged[name]), name
    assert not found
    assert {name.split(".")[-2] for name in changed} == {*MODULES, "out_proj"}
    assert len(changed) == 2 * 6 + 4  # of six Mamba-2 and FFN layers, and one of attention


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_configuration_says(made: dict[str, Adapted], kind: str) -> None:
    adapted = made[kind]
    config = adapted.config
    assert (config["peft_type"], config["r"], config["lora_alpha"], config["lora_dropout"]) == ("LORA", 4, 8.0, 0.1)
    assert config["use_dora"] is (kind == "dora")
    assert (set(config["target_modules"]), config["modules_to_save"]) == (MODULES, ["out_proj"])
    assert config["base_model_name_or_path"] == str(adapted.folder / "hf")
    assert "3 whole matrices of out_proj" in adapted.said


def test_a_part_of_the_targets_has_no_whole_matrices(tmp_path: Path) -> None:
    model, base = adapted_model(adapted_config("lora", targets=["linear_qkv"]))
    checkpoint = save_adapter(model, tmp_path / "adapter", save(base, tmp_path / "base"))
    invoke("export", "peft", checkpoint, tmp_path / "peft")
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert (config["target_modules"], config["modules_to_save"]) == (["q_proj", "k_proj", "v_proj"], None)
    found = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    assert len(found) == 6
    assert len({tensor.data_ptr() for tensor in found.values()}) == 6


def test_refused(made: dict[str, Adapted], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no adapter") as error:
        invoke("export", "peft", made["lora"].base, tmp_path / "out")
    assert "export hf" in error.value.hint
    with pytest.raises(UserError, match="exists already"):
        invoke("export", "peft", made["lora"].checkpoint, tmp_path)
    model, base = adapted_model(adapted_config("lora", targets=["out_proj"]))
    checkpoint = save_adapter(model, tmp_path / "adapter", save(base, tmp_path / "base"))
    with pytest.raises(UserError, match="adapts out_proj alone, which PEFT puts no adapter on"):
        invoke("export", "peft", checkpoint, tmp_path / "out")
    rotary = pure_config("*-", adapter=adapted_config("lora", targets=ALL[2:]).adapter)
    base = save(small_model(pure_config("*-")), tmp_path / "rotary_base")
    checkpoint = save_adapter(rotary.configure_model(None), tmp_path / "rotary", base)
    with pytest.raises(UserError, match="has rope positions"):
        invoke("export", "peft", checkpoint, tmp_path / "out")
    assert not (tmp_path / "out").exists()


class OfExperts:
    """Adapters on routed and shared experts and more, or on one matrix of the routed ones, and their exports."""

    def __init__(self, targets: list[str], folder: Path) -> None:
        self.folder = folder
        self.model, self.checkpoint = adapted_experts("lora", targets, folder)
        self.model.eval()
        export(folder / "base", folder / "hf")
        self.said = invoke("export", "peft", self.checkpoint, folder / "peft", "--base-model", folder / "hf")
        self.merged = theirs(export(self.checkpoint, folder / "merged"))

    @property
    def config(self) -> dict:
        return json.loads((self.folder / "peft" / "adapter_config.json").read_text())


@pytest.fixture(scope="module")
def of_experts(megatron: None, tmp_path_factory: pytest.TempPathFactory) -> list[OfExperts]:
    targets = (["in_proj", "out_proj", *ROUTED, "shared_experts.linear_fc1"], ROUTED[1:])
    return [OfExperts(each, tmp_path_factory.mktemp(f"peft_experts_{len(each)}")) for each in targets]


def test_files_of_experts_by_hand(of_experts: list[OfExperts]) -> None:
    """Expert by expert, as PEFT takes them apart."""
    both, one = of_experts
    assert both.config["target_parameters"] == ["mixer.experts.up_proj", "mixer.experts.down_proj"]
    assert (both.config["target_modules"], both.config["modules_to_save"]) == (["in_proj", "up_proj"], ["out_proj"])
    assert (one.config["target_parameters"], one.config["target_modules"]) == (["mixer.experts.down_proj"], [])
    base = theirs(both.folder / "hf")
    for made, inside, matrix in (
        (both, "experts.base_layer", "up_proj"),
        (both, "experts", "down_proj"),
        (one, "experts", "down_proj"),
    ):
        found = load_file(made.folder / "peft" / "adapter_model.safetensors")
        a, b = (found[f"base_model.model.model.layers.1.mixer.{inside}.lora_{part}.weight"] for part in "AB")
        a, b = a.unflatten(0, (6, 4)), b.unflatten(1, (4, 6))
        for number in range(6):
            name = f"backbone.layers.1.mixer.experts.{number}.{matrix}.weight"
            assert relative_error(base[name] + 2.0 * b[:, :, number] @ a[number], made.merged[name]) < 1e-6, name


def test_lengths_of_experts_are_refused(megatron: None, tmp_path: Path) -> None:
    _, checkpoint = adapted_experts("dora", ROUTED, tmp_path)
    with pytest.raises(UserError, match="has DoRA on routed experts, where PEFT has LoRA alone") as error:
        invoke("export", "peft", checkpoint, tmp_path / "out")
    assert "export hf" in error.value.hint


@pytest.mark.slow
@pytest.mark.skipif(not PYTHON.is_file(), reason=f"no {PYTHON}; `make test-hf` sets it up")
def test_peft_computes_the_trained_model(made: dict[str, Adapted], of_experts: list[OfExperts]) -> None:
    ids, every = tokens(2, 200), [*made.values(), *of_experts]
    for adapted in every:
        save_file({"tokens": ids}, adapted.folder / "peft" / "request.safetensors")
    command = [str(PYTHON), str(Path(__file__).with_name("run_peft.py"))]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    folders = [str(adapted.folder / "peft") for adapted in every]
    done = subprocess.run([*command, *folders], capture_output=True, text=True, timeout=300, env=environment)
    if "No module named 'peft'" in done.stderr:
        pytest.skip(f"{PYTHON} has no peft; `make test-hf` sets it up")
    assert done.returncode == 0, done.stderr[-3000:]
    for adapted in every:
        answer = load_file(adapted.folder / "peft" / "answer.safetensors")
        expected = trained_logits(adapted.model, ids)
        assert expected.std() > 0.5
        for name in ("adapter", "merged", "export"):
            torch.testing.assert_close(answer[name], expected, atol=1e-4, rtol=0, msg=lambda m, n=name: f"{n}: {m}")
        assert (answer["base"] - expected).abs().max() > 0.5
