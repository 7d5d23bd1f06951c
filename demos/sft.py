"""`make demo-sft`: fine-tune the model of `make demo`, talk with it before and after, export it and check the export.

Every step is a command of the project, printed before it runs. What an earlier run has finished is not done again; a
run that was stopped continues.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

from weights import differing

from nemotron_h.checkpoint import folders
from nemotron_h.checkpoint.reader import find_checkpoint
from nemotron_h.core.errors import UserError
from nemotron_h.platform.ranks import report_mistakes

BASE, TUNED = Path("runs/nemotron_h_tiny"), Path("runs/nemotron_h_tiny_sft")
EXPORTED, IMPORTED = Path("runs/nemotron_h_tiny_sft_hf"), Path("runs/nemotron_h_tiny_sft_from_hf")
LOSSES = Path("runs/nemotron_h_tiny_sft_losses.json")
TURNS = ("Give three tips for staying healthy.", "Which of them is the most important?")


def run(*command: object, said: str | None = None) -> str:
    """Run a command of this environment, its errors and progress shown; its standard output comes back."""
    program, *arguments = (str(part) for part in command)
    print(f"\n$ {' '.join((program, *arguments))}", flush=True)
    path = Path(sys.executable).with_name(program)
    done = subprocess.run([path, *arguments], input=said, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        print(done.stdout, end="")
        raise SystemExit(done.returncode)
    return done.stdout


def talk(checkpoint: Path) -> None:
    """The same two turns, the most probable answers."""
    options = ("--template", "nemotron_h", "--temperature", 0, "--max-tokens", 60)
    said = "".join(f"{turn}\n" for turn in TURNS)
    print("\n".join(f"> {turn}" for turn in TURNS))
    print(run("nemotron-h", "chat", checkpoint, *options, said=said).strip())


def fine_tune() -> tuple[str, str]:
    """Run it, its progress shown; the loss on held-out answers before the first step and after the last."""
    command = ("nemo", "llm", "finetune", "--factory", "nemotron_h_tiny", "--yes")
    print(f"\n$ {' '.join(command)}", flush=True)
    path = Path(sys.executable).with_name(command[0])
    with subprocess.Popen([path, *command[1:]], stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout or ():
            print(line, end="", flush=True)
            if found := re.match(r"validation loss\s+(\S+) first, (\S+) last", line):
                LOSSES.write_text(json.dumps(found.groups()))  # a run that is complete says it no more
    if process.returncode:
        raise SystemExit(process.returncode)
    if not LOSSES.is_file():  # fine-tuned by hand, before this
        return "unknown", f"{json.loads((TUNED / folders.RECORD).read_text())['metrics']['val_loss']:.4f}"
    before, after = json.loads(LOSSES.read_text())
    return before, after


def main() -> None:
    """All of it."""
    if not folders.finished(BASE):
        raise UserError(f"{BASE} has no checkpoint to start from", hint="train one first: make demo")
    print(run("nemotron-h", "data", "prepare", "--blend", "sft_sample").strip())

    print("\nBefore fine-tuning")
    talk(BASE)
    before_loss, after_loss = fine_tune()
    print("\nAfter fine-tuning")
    talk(TUNED)
    print(f"\nLoss on held-out answers: {before_loss} before, {after_loss} after")

    for folder in (EXPORTED, IMPORTED):
        shutil.rmtree(folder, ignore_errors=True)  # of an earlier demo
    print(run("nemotron-h", "export", "hf", TUNED, EXPORTED).strip())
    print(run("nemotron-h", "import", "hf", EXPORTED, IMPORTED).strip())
    if changed := differing(find_checkpoint(TUNED), IMPORTED):
        raise SystemExit(f"the export changed {len(changed)} tensors: {', '.join(changed[:5])}")
    print(f"all tensors came back from {EXPORTED}, bit for bit")
    greedy = ("The capital of", "--temperature", 0, "--max-tokens", 30)
    texts = [run("nemotron-h", "generate", checkpoint, *greedy) for checkpoint in (TUNED, IMPORTED)]
    print(texts[1].strip())
    if texts[0] != texts[1]:
        raise SystemExit(f"the export writes another text than {TUNED}: {json.dumps(texts)}")
    print("the export writes the same text as the run that it came from")


if __name__ == "__main__":
    report_mistakes()
    main()
