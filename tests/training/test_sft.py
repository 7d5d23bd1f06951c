"""Fine-tuning starts from the weights of a pretraining run, and resumes bit for bit as that does."""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import Small

from nemotron_h.errors import UserError

pytestmark = pytest.mark.slow
STEPS = 6

BLEND = """
name: talk
tokenizer: {kind: bpe, blend: words}
chat_template: nemotron_h
sources:
  talk: {category: chat, format: jsonl, chat: messages, path: talk.jsonl, licence: ours, validation: 0.1}
phases:
  - {name: all, weights: {chat: 100}}
"""


def sft_recipe(small: Small, name: str) -> Path:
    """The recipe of `Small` as a fine-tuning from the run `straight`."""
    text = small.recipe(name).read_text()
    for before, after in (
        ("- /base/pretrain", "- /base/sft"),
        ("tokens: 6144 # 12 steps", f"tokens: {STEPS * 512}\ninit: {{checkpoint: {small.run_dir('straight')}}}"),
        ("words.yaml", "talk.yaml"),
        ("peak_lr: 1e-2, final_lr: 1e-4, warmup_tokens: 1024", "peak_lr: 3e-3, final_lr: 1e-4, warmup_tokens: 512"),
        ("every_steps: 4", "every_steps: 3"),
        ("validate_every_steps: 6", "validate_every_steps: 3"),
    ):
        assert before in text
        text = text.replace(before, after)
    path = small.folder / f"{name}.yaml"
    path.write_text(text)
    return path


@pytest.fixture(scope="module")
def talk(small: Small, straight: dict[int, dict]) -> Small:
    """With conversations prepared beside the texts that `straight` was trained on."""
    draw = random.Random(2)
    words = (small.folder / "low.jsonl").read_text().split()[:400]
    words = [word for word in words if word.isalpha()]

    def said() -> str:
        return " ".join(draw.choices(words, k=draw.randint(1, 12)))

    lines = [
        {"messages": [{"role": role, "content": said()} for role in ("user", "assistant") * draw.randint(1, 2)]}
        for _ in range(300)
    ]
    (small.folder / "talk.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (small.folder / "talk.yaml").write_text(BLEND)
    arguments = ["data", "prepare", "--blend", str(small.folder / "talk.yaml"), "--root", str(small.folder / "data")]
    subprocess.run([sys.executable, "-m", "nemotron_h", *arguments], check=True, capture_output=True, text=True)
    return small


def test_straight_equals_killed_and_resumed(talk: Small) -> None:
    done = talk.train("sft", recipe=sft_recipe(talk, "sft"))
    assert f"weights from {talk.run_dir('straight')}/checkpoints/step-000012" in done.stdout
    record = json.loads((talk.run_dir("sft") / "run.json").read_text())
    assert record["recipe"]["init"]["checkpoint"] == str(talk.run_dir("straight"))
    assert record["data"]["conversations"]["talk"]["used"] > 250

    killed = talk.train("sft_resumed", "kill=4", check=False, recipe=sft_recipe(talk, "sft_resumed"))
    assert killed.returncode < 0
    out = talk.train("sft_resumed", recipe=sft_recipe(talk, "sft_resumed"))
    assert "resumed at step 3" in out.stdout
    assert talk.steps("sft_resumed") == talk.steps("sft")
    samples = [i for s in talk.steps("sft").values() for i in s["samples"]]
    assert sorted(samples) == list(range(STEPS * 8))

    # the optimizer's own copy of the weights was loaded too: from random ones the second step would fall back
    losses = [float.fromhex(talk.steps("sft")[s]["loss"]) for s in range(1, STEPS + 1)]
    assert max(losses) < math.log(512) - 0.2
    assert losses[-1] < losses[0]
    saved = weights_of(talk.run_dir("straight"))
    start = torch.load(talk.folder / "sft" / "start.pt")
    found = 0
    for name, weight in saved.items():
        same = [value for key, value in start.items() if key.endswith("." + name)]
        if same:
            assert torch.equal(same[0].float(), weight.float()), name
            found += 1
    assert found >= 10


def weights_of(run_dir: Path) -> dict[str, torch.Tensor]:
    """The tensors of a run's newest checkpoint, read without megatron-core."""
    from nemotron_h.inference.checkpoint import WeightFile, find_checkpoint

    file = WeightFile(find_checkpoint(run_dir))
    found = {name: torch.empty(shape) for name, shape in file.shapes.items()}
    file.read(found)
    return found


def test_data_of_another_tokenizer_is_refused(talk: Small) -> None:
    from nemotron_h.inference.checkpoint import find_checkpoint
    from nemotron_h.training.resume import CheckTokenizer

    checkpoint = find_checkpoint(talk.run_dir("straight"))
    record = json.loads((checkpoint / "run.json").read_text())["data"]["tokenizer_sha256"]
    manifest = SimpleNamespace(blend="talk", tokenizer=SimpleNamespace(sha256=record))
    trainer = SimpleNamespace(datamodule=SimpleNamespace(manifest=manifest))
    check = CheckTokenizer(checkpoint)
    check.setup(trainer, None, "fit")
    manifest.tokenizer.sha256 = "0" * 64
    with pytest.raises(UserError, match="wrong tokenizer: blend talk"):
        check.setup(trainer, None, "fit")
