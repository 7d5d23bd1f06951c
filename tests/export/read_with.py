"""Load an exported folder, unmodified, in mlx-lm or vLLM, and write down what it computes.

`read_with.py READER FOLDER...` runs in the reader's own virtual environment. Each folder's request is `request.json`
beside it, with `prompts` (token ids) and `generated`; the answer goes to `answer.json` beside it: for each prompt the
log-probability of every token after the first, and the greedy continuation.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path


def read_mlx(folder: Path, request: dict) -> dict:
    import mlx.core as mx
    import mlx_lm
    from mlx_lm.generate import generate_step

    model, _ = mlx_lm.load(str(folder))
    found: dict = {"version": mlx_lm.__version__, "scores": [], "generated": []}
    for ids in request["prompts"]:
        logits = model(mx.array(ids)[None])[0].astype(mx.float32)
        scores = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        found["scores"].append([scores[place, token].item() for place, token in enumerate(ids[1:])])
        steps = generate_step(mx.array(ids), model, max_tokens=request["generated"])  # greedy is its default
        found["generated"].append([int(token) for token, _ in steps])
    return found


def read_vllm(folder: Path, request: dict) -> dict:
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"  # GiB
    import vllm

    # with prefix caching this build fails on a prompt of more than one chunk of the scan: IndexError in its mixer
    model = vllm.LLM(str(folder), dtype="float32", max_model_len=512, enforce_eager=True, enable_prefix_caching=False)
    greedy = vllm.SamplingParams(temperature=0, max_tokens=request["generated"], prompt_logprobs=0, ignore_eos=True)
    found: dict = {"version": vllm.__version__, "scores": [], "generated": []}
    for ids in request["prompts"]:
        said = model.generate([{"prompt_token_ids": ids}], greedy, use_tqdm=False)[0]
        rows = zip(said.prompt_logprobs[1:], ids[1:], strict=True)
        found["scores"].append([row[token].logprob for row, token in rows])
        found["generated"].append(list(said.outputs[0].token_ids))
    return found


if __name__ == "__main__":
    reader = {"mlx": read_mlx, "vllm": read_vllm}[sys.argv[1]]
    for folder in map(Path, sys.argv[2:]):
        request = json.loads(folder.with_name("request.json").read_text())
        folder.with_name("answer.json").write_text(json.dumps(reader(folder, request)))
