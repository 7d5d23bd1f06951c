"""Generation of the same model with Hugging Face transformers' own `generate` and cache, ordered over stdin.

Runs in its own virtual environment: transformers with this model and NeMo cannot share one.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import torch
from safetensors.torch import load_file
from stepper import serve_generation
from train_step_hf import answers, build
from transformers import StoppingCriteria, StoppingCriteriaList


class Clock(StoppingCriteria):
    """Called by `generate` after every token; it never stops."""

    def __init__(self, mark) -> None:
        self.mark = mark

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor, **_: object) -> torch.Tensor:
        self.mark()
        return torch.zeros(len(ids), dtype=torch.bool)


def main() -> None:
    """Serve."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--definition", required=True, help="the model definition as JSON")
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    definition = json.loads(args.definition)
    model = build(definition, 128).eval()
    model.load_state_dict(load_file(args.weights), strict=True)
    model.config.use_cache = True
    model.generation_config.eos_token_id = None  # no token ends a row, as on our side
    model.to(getattr(torch, args.dtype))

    @torch.inference_mode()
    def run(prompts: list[list[int]], count: int, mark) -> list[list[int]]:
        ids = torch.tensor(prompts)
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            do_sample=False,
            use_cache=True,
            pad_token_id=0,
            stopping_criteria=StoppingCriteriaList([Clock(mark)]),
        )
        return out[:, ids.shape[1] :].tolist()

    serve_generation(answers, run, definition["vocab_size"])


if __name__ == "__main__":
    main()
