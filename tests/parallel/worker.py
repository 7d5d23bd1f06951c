"""One rank of the layout tests: train a small model a few steps in each layout and save what rank 0 can assemble.

Run by `test_layouts.py` through torchrun: `worker.py OUT LAYOUT...` with layouts such as `tp2`, `tp2sp`, `pp2`, `dp2`,
or `mamba2-tp2` and `transformer-pp2` for the pure patterns; `tp2spagain` computes layers and logits again in the
backward pass; `cp2` splits sequences, `packed-cp2` those of several documents of which not every token counts;
`preference-tp2` learns from packed pairs of answers, `lora-tp2` and `dora-tp2` train adapters; `tp2optmuon` trains the
layers' matrices with Muon; `vision-tp2` reads images.
"""

from __future__ import annotations

import contextlib
import functools
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from nemotron_h.platform import cpu, quiet

quiet.hush()
cpu.install()

from megatron.core import parallel_state  # noqa: E402
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories  # noqa: E402
from megatron.core.distributed import (  # noqa: E402
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer  # noqa: E402
from megatron.core.pipeline_parallel import get_forward_backward_func  # noqa: E402
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed  # noqa: E402
from process_groups import leave_model_parallel  # noqa: E402

from nemotron_h.architecture.rank import Layout  # noqa: E402
from nemotron_h.data.feed.preference_module import pair_window  # noqa: E402
from nemotron_h.model import adapters, init  # noqa: E402
from nemotron_h.model.context_parallel import own_tokens  # noqa: E402
from nemotron_h.model.expert_layers import routers  # noqa: E402
from nemotron_h.model.module import NemotronHConfig  # noqa: E402
from nemotron_h.model.step import TokenLoss, data_step, forward_step  # noqa: E402
from nemotron_h.ops import output_matmul  # noqa: E402
from nemotron_h.planning.layouts import exchanged_bytes  # noqa: E402
from nemotron_h.planning.memory import stage_memory  # noqa: E402
from nemotron_h.schema.multipliers import MultipliersSchema  # noqa: E402
from nemotron_h.schema.recipe import AdapterSchema  # noqa: E402
from nemotron_h.schema.vision import ProjectorSchema, VisionSchema  # noqa: E402
from nemotron_h.training import muon, muon_parts  # noqa: E402
from nemotron_h.training.callbacks.expert_load import balance  # noqa: E402
from nemotron_h.training.qk_clip import largest_logit, of_attentions  # noqa: E402
from nemotron_h.training.stages.preference.loss import BATCH_KEYS, PreferenceLoss  # noqa: E402

#: the hybrid and the pure patterns; 5, 6 and 3 layers, so that two stages are uneven or part a pair
FAMILIES = {
    "nemotron_h": {"hybrid_override_pattern": "M-M*-"},
    "transformer": {
        "hybrid_override_pattern": "*-*-*-",
        "position_embedding_type": "rope",
        "rotary_base": 100,
        "rotary_percent": 0.5,
    },
    "mamba2": {"hybrid_override_pattern": "MMM"},
    "falcon_h1": {
        "hybrid_override_pattern": "PSPSPS",
        "position_embedding_type": "rope",
        "rotary_base": 100,
        "rotary_percent": 1.0,
        "multipliers": MultipliersSchema(
            embedding=1.3,
            head=0.9,
            attention_in=0.95,
            key=1.2,
            attention_out=0.6,
            ssm_in=1.25,
            ssm_out=0.5,
            ssm_z=0.7,
            ssm_x=1.1,
            ssm_b=0.85,
            ssm_c=1.4,
            ssm_dt=0.65,
            ffn_gate=1.15,
            ffn_down=1.35,
        ),
    },
    # biases, norms of heads, scaled positions and an output matrix that is the embedding: on two stages it is two
    "llama": {
        "hybrid_override_pattern": "*S*S",
        "position_embedding_type": "rope",
        "rotary_base": 100,
        "rotary_percent": 1.0,
        "rope_scaling_factor": 4.0,
        "rope_low_freq_factor": 1.0,
        "rope_high_freq_factor": 4.0,
        "rope_original_length": 32,
        "add_qkv_bias": True,
        "qk_layernorm": True,
        "share_embeddings_and_output_weights": True,
    },
    "preference": {"hybrid_override_pattern": "M-M*-"},
    "packed": {"hybrid_override_pattern": "M-M*-"},
    # three queries of a group, which two ranks do not divide
    "padded": {"hybrid_override_pattern": "M*-", "overrides": {1: {"num_attention_heads": 6}}},
    # as Puzzle makes them: every kind has a layer with a width of its own
    "linear": {
        "hybrid_override_pattern": "M-ML*-L",
        "overrides": {1: {"ffn_hidden_size": 48}, 2: {"mamba_num_heads": 4}, 4: {"num_attention_heads": 8}},
    },
    "vision": {
        "hybrid_override_pattern": "M-M*-",
        "vision": VisionSchema("small", 2, 24, 40, 4, 16, 4, qkv_bias=True, qk_norm=True, init_std=0.2),
        "projector": ProjectorSchema(),
    },
    # two stages: one without experts
    "experts": {
        "hybrid_override_pattern": "M*EE",
        "num_experts": 4,
        "experts_per_token": 2,
        "expert_hidden_size": 48,
        "shared_expert_hidden_size": 64,
        "expert_scaling": 1.5,
        "balance_loss": 0.05,
    },
}
#: large, so that choices change within the steps
BIAS_UPDATE = 0.05
#: what is trained -> the model
ADAPTED = {"lora": "nemotron_h", "dora": "nemotron_h", "falconlora": "falcon_h1"}
ADAPTED |= {"expertslora": "experts", "expertsdora": "experts", "lineardora": "linear"}
TARGETS = ["in_proj", "out_proj", "linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"]
TARGETS_OF_EXPERTS = [
    *("in_proj", "experts.linear_fc1", "experts.linear_fc2", "shared_experts.linear_fc1", "shared_experts.linear_fc2")
]
RECOMPUTE = {"recompute_mamba": "layer", "recompute_attention": "layer", "recompute_ffn": "activation"}
RECOMPUTE |= {"recompute_parallel": "layer", "recompute_swiglu": "activation", "recompute_experts": "layer"}
RECOMPUTE |= {"recompute_linear": "layer", "recompute_logits": "chunks", "recompute_vision": "layer"}
RECOMPUTE |= {"recompute_offload": True}
STEPS, BATCH, LENGTH, VOCABULARY = 4, 4, 40, 256
#: of attention logits with Muon: some groups of a step are over it
LIMIT = 4.0


def layout(name: str) -> dict[str, int | bool]:
    """`tp2sp` -> tensor 2, sequence parallel; `opt` is the distributed optimizer."""
    sizes = {key: int(value) for key, value in re.findall(r"(tp|pp|dp|ep|cp)(\d)", name)}
    counts = {key: sizes.get(key, 1) for key in ("tp", "pp", "ep", "cp")}
    return {**counts, "sp": "sp" in name, "opt": "opt" in name}


def batches(step: int) -> torch.Tensor:
    """Global batch of a step: int [batch, length + 1]."""
    return torch.randint(VOCABULARY, (BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(step))


def pairs(step: int) -> list[dict[str, torch.Tensor]]:
    """Micro-batches of a step, a window of two pairs each."""
    rng = np.random.default_rng(step)
    made = []
    for ids in batches(step).numpy():
        # conversations of 12, 7, 11 and 8 tokens whose ends are answers
        sides = [(part[:-1], np.arange(len(part) - 1) > 3) for part in np.split(ids, (13, 21, 33))]
        both = [[(a, b.astype(np.float32)) for a, b in sides[n : n + 2]] for n in (0, 2)]
        made.append(pair_window(both, rng.normal(-40, 4, (2, 2)), rng.normal(size=2), LENGTH, 0))
    return [{key: value.unsqueeze(0) for key, value in window.items()} for window in made]


def documents(step: int) -> list[dict[str, torch.Tensor]]:
    """Micro-batches of a step, a row each: documents begin anywhere, within a convolution's window of each other too,
    and at the edge of ranks, the last row is four sequences of one length; not every token counts, in the last quarter
    of a row none.
    """
    rng, made = torch.Generator().manual_seed(step), []
    for ids, starts in zip(batches(step).split(1), ((7, 8, 10, 23), (20,), (3, 30, 39), (10, 20, 30)), strict=True):
        seq_idx = torch.zeros(1, LENGTH, dtype=torch.int32)
        for start in starts:
            seq_idx[:, start:] += 1
        mask = (torch.rand(1, LENGTH, generator=rng) < 0.7).float()
        mask[:, LENGTH * 3 // 4 :] = 0
        made.append({"tokens": ids[:, :-1], "labels": ids[:, 1:], "loss_mask": mask, "seq_idx": seq_idx})
    return [{**batch, "position_ids": batch["tokens"]} for batch in made]


def windows(step: int) -> list[dict[str, torch.Tensor]]:
    """`batches` as micro-batches of the data module, one document a row."""
    ones = torch.ones(1, LENGTH)
    return [
        {"tokens": ids[:, :-1], "position_ids": ids[:, :-1], "labels": ids[:, 1:], "loss_mask": ones}
        for ids in batches(step).split(1)
    ]


def images(step: int) -> list[dict[str, torch.Tensor]]:
    """`windows` with tiles of four tokens: at the ends of a row, over the edge of ranks; and a row of text."""
    rng, made = torch.Generator().manual_seed(step), windows(step)
    for batch, starts in zip(made, ((3, 18), (), (0, 4, 36), (30,)), strict=True):
        places = torch.zeros(1, LENGTH, dtype=torch.bool)
        for start in starts:
            places[:, start : start + 4] = True
        batch["image_mask"] = places
        batch["tiles"] = torch.randint(256, (len(starts), 3, 16, 16), generator=rng).byte()
    return made


def assemble(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Whole tensors from every rank's shards, on rank 0."""
    pieces = []
    state = model.sharded_state_dict()
    apply_factories(state)

    def collect(node: object) -> None:
        if isinstance(node, ShardedTensor):
            data = node.data.detach().clone().view(*[1] * node.prepend_axis_num, *node.data.shape)
            pieces.append((node.key, node.global_shape, node.global_offset, data))
        elif isinstance(node, dict):
            for value in node.values():
                collect(value)
        elif isinstance(node, list | tuple):
            for value in node:
                collect(value)

    collect(state)
    gathered: list = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, pieces)
    whole: dict[str, torch.Tensor] = {}
    for key, shape, offset, data in (piece for rank in gathered for piece in rank):
        target = whole.setdefault(key, torch.full(shape, torch.nan))
        target[tuple(slice(o, o + n) for o, n in zip(offset, data.shape, strict=True))] = data
    return whole


def randomize_adapters(module: torch.nn.Module) -> None:
    """Adapters as large as the weights, the same in every layout."""
    for layer in module.decoder.layers:
        for name, linear in adapters.adapted(layer):
            adapter, key = linear.adapter, f"{layer.layer_number}.{name}"
            rank, size = adapter.group.rank(), adapter.group.size()
            split = {"axis": 0, "tp_rank": rank, "tp_size": size} if adapter.split == "outputs" else {}
            if adapter.routed:  # mlp.experts.local_experts.N.linear_fc1
                *_, number, matrix = name.split(".")
                key = f"{layer.layer_number}.{layer.mlp.local_expert_indices[int(number)]}.{matrix}"
            if name.endswith("in_proj"):
                split["sections"] = layer.mixer.in_proj_sections
            if name.endswith("linear_fc1") and layer.mlp.config.gated_linear_unit:
                split["sections"] = [len(linear.weight) // 2] * 2
            init.fill(adapter.b, f"{key}.b", init.normal(0.2), 7, **split)
            if adapter.magnitude is not None:
                init.fill(adapter.magnitude, f"{key}.magnitude", init.uniform(1.0, 3.0), 7, **split)


def forward(reduction, iterator, model):
    """Megatron's forward step function, its loss that of a training stage."""
    batch = data_step(iter([next(iterator)]), BATCH_KEYS)
    reduction.setup(batch)
    return forward_step(model, batch), reduction


def moments(optimizer: MegatronOptimizer) -> list[int]:
    """Bytes of the optimizer's moments on every rank."""
    own = sum(
        tensor.numel() * tensor.element_size()
        for each in getattr(optimizer, "chained_optimizers", [])
        for state in each.optimizer.state.values()
        for tensor in state.values()
    )
    every = [0] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(every, own)
    return every


def planned_moments(config: NemotronHConfig, name: str) -> float:
    """Bytes that all ranks together have, by the plan: in float32 an optimizer keeps nothing else."""
    ranks, stages, tensor = torch.distributed.get_world_size(), config.pipeline_model_parallel_size, layout(name)["tp"]
    planned = Layout(
        seq_length=LENGTH,
        tensor=tensor,
        pipeline=stages,
        data=ranks // stages // tensor,
        expert=config.expert_model_parallel_size,
        precision="fp32",
        backend="cpu",
        optimizer="muon" if name.endswith("muon") else "adamw",
        adapter=config.adapter or AdapterSchema(),
    )
    return sum(stage_memory(config.definition(), planned, n).optimizer for n in range(stages)) * ranks / stages


@torch.no_grad()
def sums_over_ranks(module: torch.nn.Module) -> int:
    """All-reduces of a forward pass of this rank's layers."""
    calls, all_reduce = [], torch.distributed.all_reduce

    def counted(*args: object, **kwargs: object) -> object:
        calls.append(args)
        return all_reduce(*args, **kwargs)

    torch.distributed.all_reduce = counted
    try:
        if parallel_state.get_pipeline_model_parallel_world_size() == 1:
            module(input_ids=batches(0)[:1, :-1])
    finally:
        torch.distributed.all_reduce = all_reduce
    return len(calls)


@contextlib.contextmanager
def sent_tokens() -> Iterator[list[int]]:
    """Bytes of each exchange between context-parallel ranks, those that stay left out."""
    ours, sizes, exchange = parallel_state.get_context_parallel_group(), [], torch.distributed.all_to_all_single

    def counted(output: torch.Tensor, input: torch.Tensor, *args: object, group: object = None, **options: object):
        if group is ours:
            sizes.append(input.nbytes * (ours.size() - 1) // ours.size())
        return exchange(output, input, *args, group=group, **options)

    torch.distributed.all_to_all_single = counted
    try:
        yield sizes
    finally:
        torch.distributed.all_to_all_single = exchange


def planned_exchange(config: NemotronHConfig, micro_batches: int) -> int:
    """Bytes that a rank sends in a step, by the plan."""
    planned = Layout(
        seq_length=LENGTH,
        micro_batches=micro_batches,
        tensor=config.tensor_model_parallel_size,
        context=config.context_parallel_size,
        precision="fp32",
        **{key: getattr(config, key) for key in RECOMPUTE},
    )
    return exchanged_bytes(config.definition(), planned)


def reach(module: torch.nn.Module) -> list[list[float]]:
    """Largest gradient of the loss of each document of a row, row by row: at its own embeddings, and at the others'."""
    group, found, embedded = parallel_state.get_context_parallel_group(), [], []
    with contextlib.ExitStack() as stack:
        stack.callback(module.embedding.register_forward_hook(lambda *args: embedded.append(args[-1])).remove)
        for batch in documents(0):
            every = {**batch, "loss_mask": torch.ones_like(batch["loss_mask"])}  # that of a document has no loss at all
            for document in batch["seq_idx"].unique():
                losses = forward_step(module, data_step(iter([every])))
                own = own_tokens(batch["seq_idx"] == document, group, 1)  # [1, s]
                (gradient,) = torch.autograd.grad((losses * own).sum(), embedded.pop())  # [s, 1, h]
                size = gradient.abs().amax(-1).t()
                largest = torch.stack([(size * own).max(), (size * ~own).max()])
                torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX, group=group)
                found.append(largest.tolist())
    return found


def train(name: str) -> dict[str, object]:
    """Losses of every step, gradients of the first, and final weights."""
    family = name.partition("-")[0] if "-" in name else "nemotron_h"
    kind = family[-len("lora") :] if family in ADAPTED else "none"
    family = ADAPTED.get(family, family)
    targets = {"experts": TARGETS_OF_EXPERTS, "linear": [*TARGETS, "linear"]}.get(family, TARGETS)
    shape = layout(name)
    parallel_state.initialize_model_parallel(
        shape["tp"],
        shape["pp"],
        context_parallel_size=shape["cp"],
        expert_model_parallel_size=shape["ep"],
        expert_tensor_parallel_size=1,
    )
    model_parallel_cuda_manual_seed(1)
    config = NemotronHConfig(
        definition_name="test",
        family=family,
        **FAMILIES[family],
        hidden_size=64,
        ffn_hidden_size=96,
        num_attention_heads=4,
        num_query_groups=2,
        kv_channels=16,
        mamba_num_heads=8,
        mamba_head_dim=16,
        mamba_num_groups=2,
        mamba_state_dim=16,
        vocab_size=VOCABULARY,
        seq_length=LENGTH,
        init_method_std=0.2,
        params_dtype=torch.float32,
        bf16=False,
        pipeline_dtype=torch.float32,
        tensor_model_parallel_size=shape["tp"],
        pipeline_model_parallel_size=shape["pp"],
        context_parallel_size=shape["cp"],
        expert_model_parallel_size=shape["ep"],
        calculate_per_token_loss="sum" in name or family == "preference",
        sequence_parallel=shape["sp"],
        adapter=AdapterSchema(kind, 4, 8.0, 0.0, targets) if kind != "none" else None,
        **(RECOMPUTE if name.endswith("again") else {}),
    )
    module = config.configure_model(None)
    encoded: list[int] = []
    if hasattr(module, "vision"):
        module.vision.register_forward_pre_hook(lambda _, arguments: encoded.append(len(arguments[0])))
    randomize_adapters(module)
    ddp = DistributedDataParallelConfig(use_distributed_optimizer=shape["opt"], grad_reduce_in_fp32=True)
    model = DistributedDataParallel(config, ddp, module)
    with muon.chosen() if name.endswith("muon") else contextlib.nullcontext():
        settings = {"adam_eps": 1e-5, "use_distributed_optimizer": shape["opt"], "clip_grad": 1.0}
        optimizer = get_megatron_optimizer(OptimizerConfig(optimizer="adam", lr=1e-3, **settings), [model])
    clip = of_attentions([model], LIMIT) if name.endswith("muon") else None
    if name.endswith("muon"):
        muon.attach(optimizer, [model], 0.95, "simple", clip)
    config.finalize_model_grads_func = finalize_model_grads
    rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    losses, gradients, sizes, logits = [], {}, [], []
    reduction = PreferenceLoss("rpo_bwd_kl", 0.2, 1.0)
    if family != "preference":
        reduction = TokenLoss(config.calculate_per_token_loss)
    for step in range(STEPS):
        whole = {"preference": pairs, "packed": documents, "vision": images}.get(family, windows)(step)
        mine = whole[rank * BATCH // size : (rank + 1) * BATCH // size]
        model.zero_grad_buffer()
        optimizer.zero_grad()
        for router in routers(module):
            router.forget()
        if clip is not None:
            clip.forget()
        with sent_tokens() as sent:
            out = get_forward_backward_func()(
                forward_step_func=functools.partial(forward, reduction),
                data_iterator=iter(mine),
                model=[model],
                num_microbatches=len(mine),
                seq_length=LENGTH,
                micro_batch_size=1,
                forward_only=False,
            )
        loss = torch.tensor(float(reduction.reduce(out)) if out else 0.0)
        torch.distributed.all_reduce(loss, group=parallel_state.get_pipeline_model_parallel_group())
        losses.append(float(loss))
        if step == 0 and not shape["opt"]:
            weights = {n: p.data.clone() for n, p in module.named_parameters()}
            for p in module.parameters():
                p.data.copy_(p.main_grad if p.requires_grad else torch.zeros_like(p))
            gradients = assemble(module)
            gradients = {key: value for key, value in gradients.items() if not key.endswith("expert_bias")}
            if kind != "none":
                gradients = {key: value for key, value in gradients.items() if ".adapter." in key}
            for n, p in module.named_parameters():
                p.data.copy_(weights[n])
        _, norm, _ = optimizer.step()
        losses.append(float(norm))
        if name.endswith("muon"):
            sizes.append(muon.update_rms(optimizer, muon_parts.kinds(module)))
            logits.append(largest_logit(clip))
        if config.num_experts:
            losses += balance(routers(module), BIAS_UPDATE, config.num_layers).flatten().tolist()
    result = {"losses": losses, "gradients": gradients, "weights": assemble(module), "sums": sums_over_ranks(module)}
    result |= {"sizes": sizes, "logits": logits, "states": moments(optimizer), "planned": planned_moments(config, name)}
    result["tiles"] = encoded
    if shape["cp"] > 1:
        result["sent"] = [sum(sent), planned_exchange(config, len(mine))]
    if family == "packed" and shape["pp"] == 1 and not shape["sp"]:
        result["reach"] = reach(module)
    leave_model_parallel()
    return result


def main(out: Path, names: list[str]) -> None:
    """Train every layout in turn; logits in chunks are of a few tokens."""
    output_matmul.CHUNK_ELEMENTS["cpu"] = 7 * VOCABULARY
    torch.distributed.init_process_group("gloo")
    torch.set_num_threads(1)
    results = {name: train(name) for name in names}
    if torch.distributed.get_rank() == 0:
        torch.save(results, out)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
