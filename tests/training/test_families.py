"""A Transformer with rotary positions, Mamba-2 alone and Falcon-H1 train, write a checkpoint, and generate from it."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_run import Small

from nemotron_h.inference.generate import generate
from nemotron_h.inference.model import load_model
from nemotron_h.inference.sampling import Sampling
from nemotron_h.report.run import read_run

pytestmark = pytest.mark.slow

MODELS = {
    "transformer": """
model:
  name: small
  family: transformer
  pattern: "*-*-"
  hidden_size: 64
  ffn_hidden_size: 96
  num_attention_heads: 4
  num_query_groups: 2
  head_dim: 16
  position_embedding: rope
  rope_base: 10000
  rope_percent: 0.5
  vocab_size: 512
  init_std: 0.1
  expect: {mamba: 0, attention: 2, ffn: 2, parameters: 115008}
""",
    "mamba2": """
model:
  name: small
  family: mamba2
  pattern: MMM
  hidden_size: 64
  mamba_num_heads: 8
  mamba_head_dim: 16
  mamba_num_groups: 2
  mamba_state_dim: 16
  conv_kernel: 4
  vocab_size: 512
  init_std: 0.1
  expect: {mamba: 3, attention: 0, ffn: 0, parameters: 156680}
""",
    "falcon_h1": """
model:
  name: small
  family: falcon_h1
  pattern: PSPS
  hidden_size: 64
  ffn_hidden_size: 96
  num_attention_heads: 4
  num_query_groups: 2
  head_dim: 16
  mamba_num_heads: 8
  mamba_head_dim: 16
  mamba_num_groups: 1
  mamba_state_dim: 16
  conv_kernel: 4
  mamba_norm: false
  multipliers: {rule: falcon_h1}
  position_embedding: rope
  rope_base: 10000
  rope_percent: 1.0
  vocab_size: 512
  init_std: 0.1
  expect: {mamba: 0, attention: 0, ffn: 0, parallel: 2, swiglu: 2, parameters: 183216}
""",
}


def recipe(small: Small, family: str) -> Path:
    """The small recipe with another model."""
    path = small.recipe(family)
    head, _, rest = path.read_text().partition("\nmodel:\n")
    path.write_text(head + MODELS[family] + rest[rest.index("data:\n") :])
    return path


@pytest.mark.parametrize("family", MODELS)
def test_trains_and_generates(small: Small, family: str) -> None:
    options = ("trainer.max_steps=3", "optim.warmup_steps=1", "trainer.val_check_interval=2")
    small.train(family, *options, recipe=recipe(small, family))
    assert list(read_run(small.run_dir(family)).validation) == [0, 2, 3], "the finished model's is known"
    losses = [float.fromhex(step["loss"]) for step in small.steps(family).values()]
    assert len(losses) == 3
    assert losses[2] < losses[0]
    model = load_model(small.run_dir(family))
    assert model.definition.family == family
    assert model.definition.position_embedding == ("none" if family == "mamba2" else "rope")
    assert len(generate(model, [[1, 2, 3]], max_tokens=5, sampling=Sampling(temperature=0))[0]) == 5
