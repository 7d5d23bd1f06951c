"""Load exported GGUF files in llama.cpp's server, unmodified, and write down what it computes.

`run_llama_cpp.py REQUEST.json` runs in llama.cpp's own virtual environment. The request names the files and, for
each, the prompts to read; the answer goes to `answer.json` beside it. Everything stays on this machine: the server
runs in the process and listens on the loopback interface.
"""

from __future__ import annotations

import json
import sys
import urllib.request
from pathlib import Path


def answer(file: Path, request: dict) -> dict:
    """What llama.cpp makes of one file."""
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(file)
    parameters.n_ctx = 512
    parameters.n_batch = parameters.n_ubatch = request["batch"]
    parameters.n_parallel = 1
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = 1
    parameters.warmup = False
    # the defaults round keys and values to float16, 5e-4 of the logits
    parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    server = xllamacpp.Server(parameters)
    greedy = {"temperature": 0, "cache_prompt": False, "return_tokens": True}
    found: dict = {"log_probabilities": []}
    for prompt in request["prompts"]:
        # the probabilities are those before the bias; llama.cpp gives none for a token that ends or is half a character
        whole = {"n_predict": 1, "n_probs": request["vocabulary"], "logit_bias": [[request["plain_token"], 1000.0]]}
        said = post(server, "completion", {**greedy, **whole, "prompt": prompt})
        row = {entry["id"]: entry["logprob"] for entry in said["completion_probabilities"][0]["top_logprobs"]}
        found["log_probabilities"].append([row[i] for i in range(request["vocabulary"])])
    wanted = {**greedy, "prompt": request["prompts"][-1], "n_predict": request["generated"]}
    said = post(server, "completion", wanted)
    found["generated"], found["stop"] = said["tokens"], said["stop_type"]
    if request["texts"]:
        bias = [[request["turn_token"], 1000.0]]  # an answer that goes on with another turn has ended
        said = post(server, "completion", {"prompt": [request["plain_token"]], "n_predict": 3, "logit_bias": bias})
        found["end_of_answer"] = said["stop_type"]
        plain = {"parse_special": False}  # as training reads documents
        found["ids"] = [post(server, "tokenize", {"content": text, **plain})["tokens"] for text in request["texts"]]
        found["back"] = [post(server, "detokenize", {"tokens": ids})["content"] for ids in found["ids"]]
        said = post(server, "apply-template", {"messages": request["conversation"]})
        found["chat"] = said["prompt"]
        found["chat_ids"] = post(server, "tokenize", {"content": said["prompt"], "parse_special": True})["tokens"]
    return found


def post(server, path: str, content: dict) -> dict:
    """A request to the server, as its users send it."""
    address = server.listening_address
    request = urllib.request.Request(
        f"{address}/{path}", json.dumps(content).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as reply:
        return json.load(reply)


if __name__ == "__main__":
    request_file = Path(sys.argv[1])
    request = json.loads(request_file.read_text())
    answers = {name: answer(Path(file), request | changes) for name, (file, changes) in request["files"].items()}
    request_file.with_name("answer.json").write_text(json.dumps(answers))
