"""Exported folders in mlx-lm and vLLM, loaded unmodified: the same log-probabilities and greedy tokens.

Both need environments of their own, gigabytes each: `make test-other-readers` sets them up; NEMOTRON_H_MLX_PYTHON and
NEMOTRON_H_VLLM_PYTHON name others.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from save_checkpoint import save
from small_model import small_config, small_model, tokens

from nemotron_h.data.tokenizer import load_tokenizer
from nemotron_h.export import hf_writer
from nemotron_h.inference.generate import generate
from nemotron_h.inference.model import load_model
from nemotron_h.inference.sampling import Sampling

ROOT = Path(__file__).parents[2]
LENGTHS, GENERATED = (300, 41), 20
CONFIGS = {
    # vLLM's kernels take heads of 32 channels and more
    "groups_2": lambda: small_config(2, hidden_size=64, kv_channels=32),
    "pruned": lambda: small_config(hidden_size=64, kv_channels=32, pattern="MM*-M--", ffn_hidden_size=56),
}
TOLERANCE = 1e-4  # of log-probabilities, weights at scale 1


@pytest.mark.usefixtures("megatron")
@pytest.mark.slow
@pytest.mark.parametrize("reader", ["mlx", "vllm"])
def test_same_numbers_and_tokens(reader: str, tokenizer: Path, tmp_path: Path) -> None:
    named = os.environ.get(f"NEMOTRON_H_{reader.upper()}_PYTHON")
    python = Path(named or ROOT / ".bench" / reader / "bin" / "python")
    if not python.is_file():
        pytest.skip(f"no {python}; `make test-other-readers` sets it up")
    text = load_tokenizer(tokenizer)
    prompts = [tokens(1, length, seed=length)[0].tolist() for length in LENGTHS]
    folders = []
    for name, config in CONFIGS.items():
        checkpoint = save(small_model(config()), tmp_path / name / "checkpoint")
        folders.append(tmp_path / name / "hf")
        hf_writer.write(hf_writer.plan(checkpoint, text, None, 10**9), folders[-1], text)
        (tmp_path / name / "request.json").write_text(json.dumps({"prompts": prompts, "generated": GENERATED}))
    command = [str(python), str(Path(__file__).with_name("read_with.py")), reader, *map(str, folders)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    for name in CONFIGS:
        answer = json.loads((tmp_path / name / "answer.json").read_text())
        model = load_model(tmp_path / name / "checkpoint")
        expected = generate(model, prompts, max_tokens=GENERATED, sampling=Sampling(temperature=0))
        assert answer["generated"] == expected, name
        for ids, scores in zip(prompts, answer["scores"], strict=True):
            hidden = model.extend(torch.tensor([ids]), model.new_states(1, len(ids)))
            logits = model.logits(hidden)[0, :-1]
            assert logits.std() > 0.5  # at the scale that the tolerance is meant for
            ours = logits.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
            torch.testing.assert_close(torch.tensor(scores), ours, atol=TOLERANCE, rtol=0)
            print(reader, answer["version"], name, len(ids), (torch.tensor(scores) - ours).abs().max().item())
