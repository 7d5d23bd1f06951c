"""Training steps of the same model in Hugging Face transformers, ordered over stdin (see `stepper.py`).

Runs in its own virtual environment: transformers with this model and NeMo cannot share one. bf16 is transformers' usual
mixed precision, autocast over float32 weights; `bf16-weights` also keeps weights and optimizer state in bf16, which
saves time and loses small updates.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from stepper import Answers, resident_mib, serve

answers = Answers()

import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from transformers import NemotronHConfig, NemotronHForCausalLM  # noqa: E402


def batches(vocab_size: int, batch: int, length: int) -> Iterator[torch.Tensor]:
    """Random tokens, int [batch, length + 1]; both sides draw the same."""
    generator = torch.Generator().manual_seed(0)
    while True:
        yield torch.randint(vocab_size, (batch, length + 1), generator=generator)


def build(definition: dict, chunk: int) -> NemotronHForCausalLM:
    """The model of this definition (the fields of `nemotron_h.architecture.definition.ModelDefinition`)."""
    config = NemotronHConfig(
        vocab_size=definition["vocab_size"],
        hidden_size=definition["hidden_size"],
        hybrid_override_pattern=definition["pattern"],
        num_attention_heads=definition["num_attention_heads"],
        num_key_value_heads=definition["num_query_groups"],
        head_dim=definition["head_dim"],
        intermediate_size=definition["ffn_hidden_size"],
        mamba_num_heads=definition["mamba_num_heads"],
        mamba_head_dim=definition["mamba_head_dim"],
        n_groups=definition["mamba_num_groups"],
        ssm_state_size=definition["mamba_state_dim"],
        conv_kernel=definition["conv_kernel"],
        layer_norm_epsilon=definition["norm_epsilon"],
        initializer_range=definition["init_std"],
        chunk_size=chunk,
        use_cache=False,
    )
    model = NemotronHForCausalLM(config)
    for module in model.modules():
        if hasattr(module, "time_step_limit"):
            module.time_step_limit = (0.0, float("inf"))  # it clamps dt at time_step_min, the architecture does not
    return model.train()


def training_step(
    model: NemotronHForCausalLM, precision: str, vocab_size: int, batch: int, length: int
) -> Callable[[], float]:
    """A step of `batch` sequences of `length` tokens."""
    if precision == "bf16-weights":
        model.to(torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    data = batches(vocab_size, batch, length)

    def step() -> float:
        tokens = next(data)
        targets = tokens[:, 1:].contiguous()
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = model(input_ids=tokens[:, :-1], labels=targets, shift_labels=targets).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.item()

    return step


@torch.no_grad()
def loss_of(model: NemotronHForCausalLM, path: Path) -> dict[str, float]:
    """Mean loss with the weights and tokens of `train_step.py --weights`; its largest difference of a token."""
    weights = load_file(path)
    tokens, losses = weights.pop("tokens"), weights.pop("losses")
    model.load_state_dict(weights, strict=True)
    logits = model(input_ids=tokens[:, :-1]).logits
    own = torch.nn.functional.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")
    return {"loss": float(own.mean()), "largest_difference": float((own - losses).abs().max())}


def main() -> None:
    """Serve steps, or compute the check's loss."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--definition", required=True, help="the model definition as JSON")
    parser.add_argument("--precision", choices=("fp32", "bf16", "bf16-weights"), default="fp32")
    parser.add_argument("--chunk", type=int, default=128, help="tokens per chunk of the scan (its default: 128)")
    parser.add_argument("--batch", type=int, required=True, help="sequences per step")
    parser.add_argument("--length", type=int, required=True, help="tokens per sequence")
    parser.add_argument("--weights", type=Path, help="only print the loss with these weights")
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    torch.manual_seed(1)
    definition = json.loads(args.definition)
    before = resident_mib()
    model = build(definition, args.chunk)
    if args.weights:
        answers.send(**loss_of(model, args.weights))
        return
    step = training_step(model, args.precision, definition["vocab_size"], args.batch, args.length)
    serve(answers, step, sum(p.numel() for p in model.parameters()), before)


if __name__ == "__main__":
    main()
