"""Load exported adapters with Hugging Face's PEFT, unmodified, and write down what it computes.

`run_peft.py FOLDER...` runs in transformers' own virtual environment. Each FOLDER is an adapter that names its base; it
also holds `request.safetensors` with `tokens` [batch, length]. The logits of the base, of the adapter over it, of both
merged by PEFT, and of our merged export in `../merged` go to `answer.safetensors` beside it.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM


@torch.no_grad()
def answer(folder: Path) -> None:
    """What PEFT makes of one adapter."""
    ids = load_file(folder / "request.safetensors")["tokens"]
    model = AutoPeftModelForCausalLM.from_pretrained(folder)
    results = {"adapter": model(input_ids=ids, use_cache=False).logits}
    with model.disable_adapter():
        results["base"] = model(input_ids=ids, use_cache=False).logits
    results["merged"] = model.merge_and_unload()(input_ids=ids, use_cache=False).logits
    export = AutoModelForCausalLM.from_pretrained(folder.with_name("merged"))
    results["export"] = export(input_ids=ids, use_cache=False).logits
    save_file({name: logits.contiguous() for name, logits in results.items()}, folder / "answer.safetensors")


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in sys.argv[1:]:
        answer(Path(name))
