"""Write `written/`, what a small run leaves on the disk, and `expected.json`, what follows from it.

`python tests/compat/write.py`: run it only on a tree whose formats are to be the reference, for it replaces what
`test_written_before.py` holds later trees to. It works in a folder whose name tells nothing of the machine, because
records name absolute paths, and leaves out what no command needs and would name it: events, locks, what was scanned.

written/words.jsonl, words.yaml     texts of random words, and the blend of them
written/talk.jsonl, talk.yaml       conversations of these words, and their blend
written/data/                       both blends as `nemotron-h data prepare` left them
written/small.yaml, small_lora.yaml recipes: a pretraining of 8 steps, a LoRA fine-tuning of 4
written/runs/small/                 the pretraining, told to stop at step 4
written/runs/small_lora/            the fine-tuning of that checkpoint, told to stop at step 2
"""

from __future__ import annotations

import json
import random
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))

from continued import BASE, STEPS, WORKER, orders, outcome, processor, run_program, steps_of

HERE = Path(__file__).parent
#: where it is written; nothing reads from there afterwards
FOLDER = Path("/tmp/nemotron_h_written")

WORDS = """\
name: words
tokenizer: {kind: bpe, vocab_size: 304}
sources:
  words: {category: web, format: jsonl, path: words.jsonl, licence: ours, validation: 0.1}
phases:
  - {name: all, weights: {web: 100}}
"""

TALK = """\
name: talk
tokenizer: {kind: bpe, blend: words}
chat_template: nemotron_h
sources:
  talk: {category: chat, format: jsonl, chat: messages, path: talk.jsonl, licence: ours, validation: 0.1}
phases:
  - {name: all, weights: {chat: 100}}
"""

RECIPE = """\
# @package _global_
defaults:
  - /base/pretrain
  - _self_
name: small
tokens: 1024 # 8 steps
precision: bf16
model:
  name: small
  family: nemotron_h
  pattern: M*-
  hidden_size: 8
  ffn_hidden_size: 24
  num_attention_heads: 2
  num_query_groups: 1
  head_dim: 4
  mamba_num_heads: 2
  mamba_head_dim: 8
  mamba_num_groups: 1
  mamba_state_dim: 8
  vocab_size: 304
  conv_kernel: 4
  init_std: 0.1
  expect: {mamba: 1, attention: 1, ffn: 1, parameters: 6182}
data: {blend: words.yaml, root: data, seq_length: 32, global_batch_size: 4, micro_batch_size: 2}
optim: {peak_lr: 1e-2, final_lr: 1e-4, warmup_tokens: 128}
checkpoint: {every_steps: 4}
log: {dir: runs, validate_every_steps: 4, validation_batches: 1}
"""

#: the recipe of the fine-tuning differs from the other one in these
LORA = (
    ("- /base/pretrain", "- /base/sft"),
    ("name: small\ntokens: 1024 # 8 steps", f"name: small_lora\ntokens: 512\ninit: {{checkpoint: {BASE}}}"),
    ("blend: words.yaml", "blend: talk.yaml"),
    ("every_steps: 4}\n", "every_steps: 2}\n"),
    ("validate_every_steps: 4", "validate_every_steps: 2"),
)
ADAPTER = """\
adapter:
  kind: lora
  rank: 2
  alpha: 4
  dropout: 0.1
  targets: [in_proj, out_proj, linear_qkv, linear_proj, linear_fc1, linear_fc2]
"""


def write_texts(folder: Path) -> None:
    """Write the texts, the blends and the recipes."""
    rng = random.Random(1)
    words = ["".join(rng.choices("abcdefgh", k=rng.randint(2, 5))) for _ in range(40)]

    def said(shortest: int, longest: int) -> str:
        return " ".join(rng.choices(words, k=rng.randint(shortest, longest)))

    texts = [{"text": said(5, 30)} for _ in range(40)]
    talks = [
        {"messages": [{"role": role, "content": said(1, 6)} for role in ("user", "assistant") * rng.randint(1, 2)]}
        for _ in range(40)
    ]
    for name, lines in (("words", texts), ("talk", talks)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "words.yaml").write_text(WORDS)
    (folder / "talk.yaml").write_text(TALK)
    (folder / "small.yaml").write_text(RECIPE)
    text = RECIPE
    for before, after in LORA:
        assert before in text, before
        text = text.replace(before, after)
    (folder / "small_lora.yaml").write_text(text + ADAPTER)


def write_runs(folder: Path) -> dict[str, dict]:
    """Prepare the blends, start both runs and stop them; return what their steps would be without a stop."""
    orders(folder, *(("data", "prepare", "--blend", f"{blend}.yaml", "--root", "data") for blend in ("words", "talk")))
    shutil.copy(WORKER, folder / "worker.py")  # its path goes into the records
    whole = {}
    for run, (stop, _) in STEPS.items():
        run_program(folder, "worker.py", f"{run}.yaml", f"log.explicit_log_dir=whole/{run}")
        whole[run] = steps_of(folder, "whole")
        run_program(folder, "worker.py", f"{run}.yaml", f"signal={stop}:0:SIGTERM", code=75)
        steps_of(folder, "runs")
    return whole


def clean(folder: Path) -> None:
    """Remove what no command needs and what would tell of the machine."""
    shutil.rmtree(folder / "whole")
    patterns = ("worker.py", "run.out", "run.err", "runs/start.pt", "**/.lock", "**/.scans.json", "runs/*/*.txt")
    for path in [path for pattern in (*patterns, "runs/*/cmd-args.log") for path in folder.glob(pattern)]:
        path.unlink()
    for path in folder.glob("runs/*/tensorboard"):
        shutil.rmtree(path)


def main() -> None:
    """Write both."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir()
    write_texts(FOLDER)
    whole = write_runs(FOLDER)
    clean(FOLDER)
    shutil.rmtree(HERE / "written", ignore_errors=True)
    shutil.copytree(FOLDER, HERE / "written")
    found = {"processor": processor(), **outcome(FOLDER)}
    for run, steps in found["computed"]["steps"].items():
        assert steps == {step: whole[run][step] for step in steps}, f"{run}: a resumed run differs from a whole one"
    (HERE / "expected.json").write_text(json.dumps(found, indent=1) + "\n")
    shutil.rmtree(FOLDER)


if __name__ == "__main__":
    main()
