"""Load exported folders in Hugging Face transformers, unmodified, and write down what it computes.

`run_transformers.py FOLDER...` runs in transformers' own virtual environment. Each folder also holds the request:
`request.safetensors` with `tokens` [batch, length]. Answers go to `answer.safetensors` and `answer.json` beside it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

#: tokens read at once before steps of one token
PREFILL = 260
GENERATED = 12
CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "größe 日本?"},
    {"role": "assistant", "content": "abc"},
    {"role": "user", "content": "def"},
]


@torch.no_grad()
def answer(folder: Path) -> None:
    """What transformers makes of one folder."""
    import transformers  # here, because the tests read the constants above
    from transformers import AutoModelForCausalLM, AutoTokenizer

    request = load_file(folder / "request.safetensors")
    ids = request["tokens"]
    model, loading = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
    cached = model.config.use_cache
    results = {"full": model(input_ids=ids, use_cache=False).logits.float()}
    if cached:
        out = model(input_ids=ids[:, :PREFILL], use_cache=True)
        steps = [out.logits]
        for position in range(PREFILL, ids.shape[1]):
            out = model(input_ids=ids[:, position : position + 1], past_key_values=out.past_key_values, use_cache=True)
            steps.append(out.logits)
        results["cached"] = torch.cat(steps, dim=1).float()
    prompt = ids[:1, :PREFILL]
    # as a user calls it, with the folder's generation_config.json
    text = model.generate(prompt, max_new_tokens=GENERATED, do_sample=False)
    results["generated"] = text[0, PREFILL:]
    save_file({name: tensor.contiguous() for name, tensor in results.items()}, folder / "answer.safetensors")
    facts = {
        "transformers": transformers.__version__,
        "class": type(model).__name__,
        "dtype": str(model.dtype),
        "loading": {name: sorted(map(str, found)) for name, found in loading.items() if found},
        "eos": model.generation_config.eos_token_id,
    }
    if (folder / "tokenizer.json").is_file():
        tokenizer = AutoTokenizer.from_pretrained(folder)
        chat = {"tokenize": False, "add_generation_prompt": True}
        facts["ids"] = tokenizer.encode(CONVERSATION[1]["content"], add_special_tokens=False)
        facts["text"] = tokenizer.decode(facts["ids"])
        facts["chat"] = tokenizer.apply_chat_template(CONVERSATION, **chat)
        facts["chat_ids"] = tokenizer.apply_chat_template(CONVERSATION, add_generation_prompt=True)["input_ids"]
        facts["no_system"] = tokenizer.apply_chat_template(CONVERSATION[1:2], **chat)
    (folder / "answer.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in sys.argv[1:]:
        answer(Path(name))
