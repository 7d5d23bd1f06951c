"""Training steps of a recipe's model through our stack, ordered over stdin (see `stepper.py`).

The model is wrapped as NeMo's `MegatronStrategy` wraps it: Megatron's DDP with float32 gradient sums, `Float16Module`
for bf16, the distributed optimizer over our AdamW, and megatron-core's forward-backward function.

With `--weights FILE` it writes a model of scale-1 weights with its tokens and loss for the other side to check, and
ends.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from stepper import Answers, resident_mib, serve

answers = Answers()

import torch  # noqa: E402

from nemotron_h.platform import cpu, quiet  # noqa: E402

quiet.hush()
cpu.install()

import fiddle  # noqa: E402
from megatron.core import parallel_state  # noqa: E402
from megatron.core.distributed import (  # noqa: E402
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer  # noqa: E402
from megatron.core.pipeline_parallel import get_forward_backward_func  # noqa: E402
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed  # noqa: E402
from megatron.core.transformer.module import Float16Module  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from nemotron_h.model.module import NemotronHConfig, NemotronHMegatronModel  # noqa: E402
from nemotron_h.precision.plugins import plugin  # noqa: E402
from nemotron_h.recipe.compose import compose  # noqa: E402
from nemotron_h.training.stages.pretrain import model_config  # noqa: E402

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def batches(vocab_size: int, batch: int, length: int) -> Iterator[torch.Tensor]:
    """Random tokens, int [batch, length + 1]; both sides draw the same."""
    generator = torch.Generator().manual_seed(0)
    while True:
        yield torch.randint(vocab_size, (batch, length + 1), generator=generator)


def single_rank() -> None:
    """A process group and Megatron's parallel state of this process alone."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)


def configuration(recipe: str, length: int, precision: str) -> NemotronHConfig:
    """The recipe's model in this precision, as the precision plugin would set it."""
    composed = compose(recipe)
    config = fiddle.build(model_config(composed.model, length, composed.init_seed))
    dtypes = plugin(precision).dtype_config
    config.bf16, config.params_dtype = dtypes.bf16, dtypes.params_dtype
    config.pipeline_dtype, config.autocast_dtype = dtypes.pipeline_dtype, dtypes.autocast_dtype
    return config


def training_step(config: NemotronHConfig, batch: int, length: int) -> tuple[Callable[[], float], int]:
    """A step of `batch` sequences of `length` tokens, and the model's number of parameters."""
    module = config.configure_model(None)
    parameters = sum(p.numel() for p in module.parameters())
    if config.bf16:
        module = Float16Module(config, module)
    ddp = DistributedDataParallelConfig(
        check_for_nan_in_grad=True, grad_reduce_in_fp32=True, use_distributed_optimizer=True
    )
    model = DistributedDataParallel(config, ddp, module)
    config.finalize_model_grads_func = finalize_model_grads
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=1e-4,
            adam_beta2=0.95,
            weight_decay=0.1,
            clip_grad=1.0,
            bf16=config.bf16,
            params_dtype=config.params_dtype,
            use_distributed_optimizer=True,
        ),
        [model],
    )
    data = batches(config.vocab_size, batch, length)

    def forward(iterator: Iterator[torch.Tensor], model: torch.nn.Module) -> tuple[torch.Tensor, Callable]:
        tokens = next(iterator)
        return model(input_ids=tokens[:, :-1], labels=tokens[:, 1:].contiguous()), mean_loss

    def step() -> float:
        model.zero_grad_buffer()
        optimizer.zero_grad()
        losses = get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=data,
            model=[model],
            num_microbatches=1,
            seq_length=length,
            micro_batch_size=batch,
            forward_only=False,
        )
        optimizer.step()
        return float(losses[0]["loss"])

    return step, parameters


def mean_loss(losses: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Mean over the tokens, and what to report."""
    loss = losses.mean()
    return loss, {"loss": loss.detach().clone()}


def as_hugging_face(model: NemotronHMegatronModel) -> dict[str, torch.Tensor]:
    """The weights under the names that transformers' `NemotronHForCausalLM` gives them."""
    config = model.config
    weights = {
        "model.embeddings.weight": model.embedding.word_embeddings.weight,
        "model.norm_f.weight": model.decoder.final_norm.weight,
        "lm_head.weight": model.output_layer.weight,
    }
    for index, layer in enumerate(model.decoder.layers):
        to = f"model.layers.{index}"
        symbol = config.hybrid_override_pattern[index]
        if symbol == "M":
            weights[f"{to}.norm.weight"] = layer.norm.weight
            weights |= {f"{to}.mixer.{name}": value for name, value in layer.mixer.named_parameters()}
        elif symbol == "-":
            weights[f"{to}.norm.weight"] = layer.pre_mlp_layernorm.weight
            weights[f"{to}.mixer.up_proj.weight"] = layer.mlp.linear_fc1.weight
            weights[f"{to}.mixer.down_proj.weight"] = layer.mlp.linear_fc2.weight
        else:
            weights[f"{to}.norm.weight"] = layer.input_layernorm.weight
            # Megatron interleaves: per key-value head its queries, then its key, then its value
            groups, heads = config.num_query_groups, config.num_attention_heads // config.num_query_groups
            qkv = layer.self_attention.linear_qkv.weight.unflatten(0, (groups, heads + 2, config.kv_channels))
            for name, part in zip("qkv", qkv.split([heads, 1, 1], dim=1), strict=True):
                weights[f"{to}.mixer.{name}_proj.weight"] = part.flatten(0, 2)
            weights[f"{to}.mixer.o_proj.weight"] = layer.self_attention.linear_proj.weight
    return {name: value.detach().contiguous() for name, value in weights.items()}


@torch.no_grad()
def write_check(config: NemotronHConfig, batch: int, length: int, path: Path) -> float:
    """Write weights that give every part of the model a say, tokens, and the loss of each; their mean.

    Each matrix is drawn with standard deviation 1 / sqrt(inputs), vectors at scale 1. With the small initial weights
    of training the scan's part would vanish in rounding.
    """
    model = config.configure_model(None)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith(("A_log", "dt_bias")):
            continue  # the initial decays, from short to long
        if parameter.dim() > 1 and "embedding" not in name:
            noise /= parameter[0].numel() ** 0.5
        elif name.endswith(("norm.weight", "layernorm.weight", ".D")):
            noise = 1 + 0.3 * noise
        parameter.copy_(noise)
    tokens = next(batches(config.vocab_size, batch, length))
    losses = model(input_ids=tokens[:, :-1], labels=tokens[:, 1:].contiguous())
    save_file({**as_hugging_face(model), "tokens": tokens, "losses": losses.contiguous()}, path)
    return float(losses.mean())


def main() -> None:
    """Serve steps, or write the check."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", required=True)
    parser.add_argument("--precision", choices=DTYPES, default="fp32")
    parser.add_argument("--batch", type=int, required=True, help="sequences per step")
    parser.add_argument("--length", type=int, required=True, help="tokens per sequence")
    parser.add_argument("--weights", type=Path, help="write the check of equal losses here and end")
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    single_rank()
    config = configuration(args.recipe, args.length, args.precision)
    if args.weights:
        answers.send(loss=write_check(config, args.batch, args.length, args.weights))
        return
    before = resident_mib()
    step, parameters = training_step(config, args.batch, args.length)
    serve(answers, step, parameters, before)


if __name__ == "__main__":
    main()
