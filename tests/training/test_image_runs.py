"""Runs with images: one whose projector alone trains, the paper's first stage, resumed = straight, the rest stays; a
fine-tuning on prepared pictures, resumed = straight, of two ranks = of one, and what answers it gives.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small_run import Small, assert_same
from test_frozen import weights

from nemotron_h.checkpoint.index import read_index
from nemotron_h.planning.flops import flops_per_token
from nemotron_h.planning.plan import make_plan
from nemotron_h.recipe.compose import compose

pytestmark = pytest.mark.slow

STEPS = 6
VISION = """init_std: 0.1
  vision: {name: small, num_layers: 1, hidden_size: 24, ffn_hidden_size: 40, num_attention_heads: 4, image_size: 16,
           patch_size: 4, qkv_bias: true, init_std: 0.1, layer_scale: 1.0}"""
CHANGES = (
    ("tokens: 6144 # 12 steps", "tokens: 3072"),
    ("every_steps: 4", "every_steps: 2"),
    ("init_std: 0.1", VISION),
    # layers: four matrices, seven biases, LayerScale and norms; patches, class token, positions
    (
        "parameters: 163376",
        f"parameters: 163376, vision: {4 * 24 * 24 + 2 * 24 * 40 + 11 * 24 + 40 + 24 * (48 + 1 + 1 + 17)}",
    ),
    ("peak_lr: 1e-2,", "frozen: [vision, language], peak_lr: 1e-2,"),
)
WORKER = Path(__file__).with_name("image_worker.py")


def test_straight_equals_resumed_and_the_projector_alone_trains(small: Small) -> None:
    names = ("images", "images_killed")
    recipes = [small.variant(name, *CHANGES) for name in names]
    small.train("images", recipe=recipes[0], program=WORKER)
    small.train("images_killed", "kill=3", check=False, recipe=recipes[1], program=WORKER)
    assert "resumed at step 2" in small.train("images_killed", recipe=recipes[1], program=WORKER).stdout
    assert_same(small, *names)
    assert small.same_tensors(*names, STEPS)
    first, last = (weights(small.run_dir("images") / f"checkpoints/step-{step:06d}") for step in (STEPS - 2, STEPS))
    trained = {"projector.norm.weight", "projector.linear_fc1.weight", "projector.linear_fc2.weight"}
    assert {name for name in first if not first[name].equal(last[name])} == trained
    assert {name for name in first if name.startswith("vision.")}
    keys = read_index(small.run_dir("images") / f"checkpoints/step-{STEPS:06d}/weights").state_dict_metadata
    states = {key.split(".", 3)[3] for key in keys if key.startswith("optimizer.state.")}
    assert {name.removeprefix("module.") for name in states} == trained
    assert make_plan(compose(str(recipes[0]))).trained == sum(first[name].numel() for name in trained)


BLEND = """
name: pictures
tokenizer: {kind: bpe, blend: words}
chat_template: nemotron_h
sources:
  pictures: {category: seen, format: jsonl, chat: messages, images: ., path: pictures.jsonl, licence: ours,
             validation: 0.1}
phases:
  - {name: all, weights: {seen: 100}}
"""
TUNING = (
    ("- /base/pretrain", "- /base/sft\n  - /vision: internvit_tiny"),
    ("parameters: 163376", "parameters: 163376, vision: 808832"),
    ("  name: small", "  name: small_vlm"),
    ("words.yaml", "pictures.yaml"),
    ("seq_length: 64", "seq_length: 192"),
    ("every_steps: 4", "every_steps: 2"),
    ("validate_every_steps: 6", "validate_every_steps: 2"),
)


def write_pictures(small: Small, count: int) -> None:
    """Write squares of two greys with their names, wide ones of several tiles and texts among them; prepare them."""
    rng = np.random.default_rng(1)
    lines = []
    for number in range(count):
        dark, wide = bool(number % 2), number % 5 == 0
        pixels = rng.integers(0, 90, (32, 96 if wide else 32), dtype=np.uint8) + (0 if dark else 160)
        Image.fromarray(pixels.astype(np.uint8)).save(small.folder / f"{number}.png")
        asked = [{"type": "image", "image": f"{number}.png"}, {"type": "text", "text": "dark or light"}]
        answer = {"role": "assistant", "content": "dark" if dark else "light"}
        lines.append({"messages": [{"role": "user", "content": asked if number % 7 else "say dark"}, answer]})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (small.folder / "pictures.jsonl").write_text(text)
    (small.folder / "pictures.yaml").write_text(BLEND)
    small.prepare("pictures.yaml")


def test_a_fine_tuning_reads_pictures(small: Small, straight: dict[int, dict]) -> None:
    write_pictures(small, 60)
    start = small.folder / "start"
    small.command("start", "import", "vision", str(small.run_dir("straight")), "internvit_tiny", str(start))
    tokens = ("tokens: 6144 # 12 steps", f"tokens: {4 * 8 * 192}\ninit: {{checkpoint: {start}}}")
    names = ("tuned", "tuned_killed", "tuned_two")
    recipes = {name: small.variant(name, *TUNING, tokens) for name in names}
    small.train("tuned", recipe=recipes["tuned"])
    small.train("tuned_killed", "kill=3", check=False, recipe=recipes["tuned_killed"])
    assert "resumed at step 2" in small.train("tuned_killed", recipe=recipes["tuned_killed"]).stdout
    assert_same(small, "tuned", "tuned_killed")
    assert small.same_tensors("tuned", "tuned_killed", 4)
    record = json.loads((small.run_dir("tuned") / "run.json").read_text())
    assert record["data"]["conversations"]["pictures"]["tiles"] > 45  # wide ones have four

    rates = json.loads((small.run_dir("tuned") / "progress.jsonl").read_text().splitlines()[0])["metrics"]
    per_token = rates["tflops_per_rank"] * 1e12 / rates["tokens_per_second_per_rank"]
    model = make_plan(compose(str(recipes["tuned"]))).definition
    none, one = (flops_per_token(model, 192, tiles=tiles).total for tiles in (0, 1))
    assert 1 < (per_token - none) / (one - none) < 192 / model.encoder.tokens_per_tile  # tiles of a window

    half = ("trainer.plugins.name=fp32", "trainer.max_steps=2")
    named = (TUNING[2][1], f"{TUNING[2][1]}\n  vision: {{name: another, init_std: 0.5}}")  # not in weights
    small.train("tuned_one", *half, recipe=small.variant("tuned_one", *TUNING, named, tokens))
    two = ("trainer.devices=2", "trainer.strategy.tensor_model_parallel_size=2")
    small.train("tuned_two", *half, *two, recipe=recipes["tuned_two"], ranks=2)
    one, two = ([float.fromhex(s["loss"]) for s in small.steps(name).values()] for name in ("tuned_one", "tuned_two"))
    assert two == pytest.approx(one, rel=1e-4)

    out, run = str(small.folder / "answers"), str(small.run_dir("tuned"))
    pictures = small.folder / "asked.jsonl"
    lines = (small.folder / "pictures.jsonl").read_text().splitlines()
    pictures.write_text("\n".join([line for line in lines if "image" in line][:6]))
    said = small.command("vqa", "vqa", run, "--test", str(pictures), "--max-tokens", "4", "--out", out)
    with (small.folder / "answers/vqa.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["asked with"] for row in rows] == ["own images", "others' images", "no images"]
    assert {row["questions"] for row in rows} == {"6"}
    assert "report.html" in said.stdout
    assert (small.folder / "answers/questions.svg").read_text().count("<image") == 6
    assert (small.folder / "answers/report.html").read_text().count("<img") == 6
    asked = small.command("look", "generate", run, "dark or light", "--image", str(small.folder / "1.png"), "--json")
    assert json.loads(asked.stdout.splitlines()[-1])["prompt"] == "dark or light"
    text = small.command("blind", "generate", str(small.run_dir("straight")), "a", "--image",
                         str(small.folder / "1.png"), check=False)  # fmt: skip
    assert text.returncode == 2
    assert "reads text alone" in text.stderr
