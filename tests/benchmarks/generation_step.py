"""Generation with a recipe's model through `GenerationModel`, ordered over stdin: one JSON object a line, one back.

With `--weights FILE` it first writes its weights, under the names of Hugging Face transformers, for the other side.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from stepper import Answers, serve_generation

answers = Answers()

import torch  # noqa: E402
from random_model import random_model  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from nemotron_h.inference.generate import Generation  # noqa: E402
from nemotron_h.inference.model import GenerationModel  # noqa: E402
from nemotron_h.inference.sampling import Sampling  # noqa: E402
from nemotron_h.model.blocks.attention import AttentionWeights  # noqa: E402
from nemotron_h.model.blocks.mamba import MambaWeights  # noqa: E402
from nemotron_h.recipe.checks import definition_of  # noqa: E402
from nemotron_h.recipe.compose import compose  # noqa: E402


def as_hugging_face(model: GenerationModel) -> dict[str, torch.Tensor]:
    """The weights under the names that transformers' `NemotronHForCausalLM` gives them."""
    d = model.definition
    found = {"model.embeddings.weight": model.embedding, "model.norm_f.weight": model.final_norm}
    found["lm_head.weight"] = model.output
    for index, w in enumerate(model.layers):
        to = f"model.layers.{index}"
        found[f"{to}.norm.weight"] = w.norm
        if isinstance(w, MambaWeights):
            found |= {f"{to}.mixer.in_proj.weight": w.in_proj, f"{to}.mixer.out_proj.weight": w.out_proj}
            found |= {f"{to}.mixer.conv1d.weight": w.conv_weight[:, None], f"{to}.mixer.conv1d.bias": w.conv_bias}
            found |= {f"{to}.mixer.A_log": (-w.A).log(), f"{to}.mixer.D": w.D, f"{to}.mixer.dt_bias": w.dt_bias}
            found[f"{to}.mixer.norm.weight"] = w.gated_norm
        elif isinstance(w, AttentionWeights):
            # ours interleaves: per key-value head its queries, then its key, then its value
            heads = d.num_attention_heads // d.num_query_groups
            qkv = w.qkv.unflatten(0, (d.num_query_groups, heads + 2, d.head_dim))
            for name, part in zip("qkv", qkv.split([heads, 1, 1], dim=1), strict=True):
                found[f"{to}.mixer.{name}_proj.weight"] = part.flatten(0, 2)
            found[f"{to}.mixer.o_proj.weight"] = w.proj
        else:
            found |= {f"{to}.mixer.up_proj.weight": w.up, f"{to}.mixer.down_proj.weight": w.down}
    return {name: value.contiguous() for name, value in found.items()}


def main() -> None:
    """Write the weights, then serve."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", required=True)
    parser.add_argument("--weights", type=Path, required=True, help="write the weights here")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    drawn = random_model(definition_of(compose(args.recipe), args.recipe), torch.float32, "cpu")
    save_file(as_hugging_face(drawn), args.weights)
    dtype = getattr(torch, args.dtype)
    model = drawn if dtype == torch.float32 else drawn.to(dtype)

    def run(prompts: list[list[int]], count: int, mark) -> list[list[int]]:
        rows: list[list[int]] = [[] for _ in prompts]
        for items in Generation(model, prompts, max_tokens=count, sampling=Sampling(temperature=0)):
            mark()
            for row, tokens in zip(rows, items, strict=True):
                row += tokens
        return rows

    serve_generation(answers, run, model.definition.vocab_size)


if __name__ == "__main__":
    main()
