"""Exported folders in Hugging Face transformers' own implementation, loaded unmodified.

transformers with this model needs an environment of its own: NEMOTRON_H_HF_PYTHON names its interpreter (default: the
one that `make test-hf` and `make bench` set up).
"""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from run_transformers import CONVERSATION, GENERATED, PREFILL
from safetensors.torch import load_file, save_file
from save_checkpoint import save
from small_model import pure_config, small_config, small_model, tokens

from nemotron_h.data.chat import FAMILY_SOURCE, ChatTemplate
from nemotron_h.data.messages import Turn
from nemotron_h.data.tokenizer import load_tokenizer
from nemotron_h.export import hf_writer
from nemotron_h.inference.generate import generate
from nemotron_h.inference.model import load_model
from nemotron_h.inference.sampling import Sampling

PYTHON = Path(os.environ.get("NEMOTRON_H_HF_PYTHON", Path(__file__).parents[2] / ".bench" / "hf" / "bin" / "python"))
pytestmark = [
    pytest.mark.skipif(not PYTHON.is_file(), reason=f"no {PYTHON}; `make test-hf` sets it up"),
    pytest.mark.usefixtures("megatron"),
    pytest.mark.slow,
]

BATCH, LENGTH = 2, 300  # transformers' chunks have 128 tokens: two whole ones and a part
CONFIGS = {
    "groups_1": lambda: small_config(1),
    "groups_2": lambda: small_config(2),
    "groups_8": lambda: small_config(8),
    "pruned": lambda: small_config(pattern="MM*-M--", ffn_hidden_size=56),
    "no_attention": lambda: small_config(pattern="MM-M-", num_attention_heads=0, num_query_groups=0, kv_channels=0),
    "mamba2": lambda: pure_config("M"),
    "experts_groups_1": lambda: pure_config("E", mamba_num_groups=1),
    "experts_groups_2": lambda: pure_config("E"),
    "bf16": lambda: small_config(2, dtype=torch.bfloat16),
}
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Case:
    """An exported model: the checkpoint, the folder, and what transformers made of it."""

    checkpoint: Path
    folder: Path
    tokens: torch.Tensor

    @property
    def results(self) -> dict[str, torch.Tensor]:
        return load_file(self.folder / "answer.safetensors")

    @property
    def facts(self) -> dict:
        return json.loads((self.folder / "answer.json").read_text())

    def ours(self) -> torch.Tensor:
        """Our logits [batch, length, vocabulary] in float32."""
        model = load_model(self.checkpoint)
        return model.logits(model.extend(self.tokens, model.new_states(BATCH, LENGTH)))


@pytest.fixture(scope="module")
def cases(megatron: None, tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    """All models, exported, and read by one transformers process."""
    root, made = tmp_path_factory.mktemp("transformers"), {}
    text = load_tokenizer(tokenizer)
    for name, config in CONFIGS.items():
        checkpoint = save(small_model(config()), root / name / "checkpoint", data={"tokenizer": str(tokenizer)})
        folder = root / name / "hf"
        hf_writer.write(hf_writer.plan(checkpoint, text, None, 40_000), folder, text)
        made[name] = Case(checkpoint, folder, tokens(BATCH, LENGTH))
        save_file({"tokens": made[name].tokens}, folder / "request.safetensors")
    worker = Path(__file__).with_name("run_transformers.py")
    command = [str(PYTHON), str(worker), *(str(case.folder) for case in made.values())]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return made


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "bf16"])
def test_logits(cases: dict[str, Case], name: str) -> None:
    case, expected = cases[name], cases[name].ours()
    assert expected.std() > 0.5  # at the scale that the tolerance is meant for
    torch.testing.assert_close(case.results["full"], expected, atol=TOLERANCE, rtol=0)
    if "*" in load_model(case.checkpoint).definition.pattern:
        torch.testing.assert_close(case.results["cached"], expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "bf16"])
def test_generated_tokens(cases: dict[str, Case], name: str) -> None:
    prompt = cases[name].tokens[0, :PREFILL].tolist()
    sampling = Sampling(temperature=0)
    expected = generate(load_model(cases[name].checkpoint), [prompt], max_tokens=GENERATED, sampling=sampling)[0]
    actual = cases[name].results["generated"].tolist()
    assert actual == expected[: len(actual)]
    ends = cases[name].facts["eos"]
    assert len(actual) == GENERATED or actual[-1] in ends


@pytest.mark.parametrize("name", CONFIGS)
def test_loads_whole(cases: dict[str, Case], name: str) -> None:
    """No weight is missing, left over or drawn anew, and the dtype is the folder's."""
    facts = cases[name].facts
    assert (facts["class"], facts["loading"]) == ("NemotronHForCausalLM", {})
    assert facts["dtype"] == ("torch.bfloat16" if name == "bf16" else "torch.float32")


def test_bf16_is_near(cases: dict[str, Case]) -> None:
    """transformers rounds activations and steps to bfloat16; both models predict much the same."""
    actual, expected = cases["bf16"].results["full"], cases["bf16"].ours()
    assert (actual - expected).norm() / expected.norm() < 0.1


def test_tokenizer_and_chat_template(cases: dict[str, Case], tokenizer: Path) -> None:
    facts, text = cases["groups_2"].facts, load_tokenizer(tokenizer)
    assert facts["ids"] == text.text_to_ids(CONVERSATION[1]["content"])
    assert facts["text"] == CONVERSATION[1]["content"]
    assert facts["chat"] == (
        "<SPECIAL_10>System\nBe brief.\n<SPECIAL_11>User\ngröße 日本?\n<SPECIAL_11>Assistant\nabc\n"
        "<SPECIAL_11>User\ndef\n<SPECIAL_11>Assistant\n"
    )
    assert facts["no_system"] == "<SPECIAL_11>User\ngröße 日本?\n<SPECIAL_11>Assistant\n"
    turns = tuple(Turn(message["role"], message["content"]) for message in CONVERSATION)
    assert facts["chat_ids"] == ChatTemplate(FAMILY_SOURCE, text).prompt(turns)  # what the model is trained on
    turn = text.tokens_to_ids("<SPECIAL_11>")
    assert facts["eos"] == [text.eod_id, turn]
