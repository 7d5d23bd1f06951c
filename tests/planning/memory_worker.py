"""One rank of the memory tests: train each case two steps and report the allocator's peak of the last.

`memory_worker.py OUT CASES`: CASES is JSON, a list of cases (see `Case`); OUT gets one JSON list of each rank's peaks.
The model is wrapped as NeMo's `MegatronStrategy` wraps it: Megatron's DDP with float32 gradient sums, `Float16Module`
for bf16, and megatron-core's optimizer and forward-backward functions.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from nemotron_h.platform import cpu, quiet

quiet.hush()
cpu.install()
sys.path.append(str(Path(__file__).parents[1] / "parallel"))

from allocations import live_bytes, mark  # noqa: E402
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
from process_groups import leave_model_parallel  # noqa: E402
from small_models import as_definition  # noqa: E402

from nemotron_h.model.module import NemotronHConfig  # noqa: E402
from nemotron_h.platform import megatron_fixes  # noqa: E402
from nemotron_h.schema.recipe import AdapterSchema  # noqa: E402
from nemotron_h.training import frozen_model  # noqa: E402
from nemotron_h.training.stages.distillation.model import DistillationConfig  # noqa: E402

STEPS = 2  # the first allocates the optimizer's state, the second is as all that follow


@dataclasses.dataclass
class Case:
    """A model (the keyword arguments of `NemotronHConfig`), its layout, its batch on this rank, its adapters (those of
    `AdapterSchema`), and a teacher (as the model), which makes it a distillation.
    """

    name: str
    model: dict[str, Any]
    seq_length: int
    micro_batch: int = 1
    documents: bool = False
    micro_batches: int = 1
    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    expert: int = 1
    sequence: bool = False
    distributed_optimizer: bool = True
    precision: str = "fp32"
    adapter: dict[str, Any] | None = None
    teacher: dict[str, Any] | None = None


def mean_distillation(sums: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Mean over the tokens, of the sums that a distilling model returns."""
    loss = sums[0] / sums[1]
    return loss, {"loss": loss.detach().clone()}


def distillation(config: NemotronHConfig, teacher: dict[str, Any]) -> DistillationConfig:
    """The configuration of a student, with a teacher whose weights are drawn, not read."""
    values = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.init}
    values.pop("forward_step_fn")
    made = DistillationConfig(**values)
    made.__dict__["teacher_definition"] = as_definition(teacher)
    made.__dict__["teacher_checkpoint"] = None
    frozen_model.load_weights = lambda model, _: model.initialize(2)
    return made


def mean_loss(losses: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Mean over the tokens, and what to report."""
    loss = losses.mean()
    return loss, {"loss": loss.detach().clone()}


def training_step(case: Case) -> Callable[[], None]:
    """Build the case's model and optimizer; a step of it."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[case.precision]
    model_settings = dict(case.model)
    if case.adapter:
        model_settings["adapter"] = AdapterSchema(**case.adapter)
    config = NemotronHConfig(
        definition_name=case.name,
        **model_settings,
        seq_length=case.seq_length,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        tensor_model_parallel_size=case.tensor,
        pipeline_model_parallel_size=case.pipeline,
        expert_model_parallel_size=case.expert,
        sequence_parallel=case.sequence,
        context_parallel_size=case.context,
    )
    if case.teacher:
        config = distillation(config, case.teacher)
    module = config.configure_model(None)
    if config.bf16:
        module = Float16Module(config, module)
    ddp = DistributedDataParallelConfig(
        check_for_nan_in_grad=True, grad_reduce_in_fp32=True, use_distributed_optimizer=case.distributed_optimizer
    )
    model = DistributedDataParallel(config, ddp, module)
    config.finalize_model_grads_func = finalize_model_grads
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=1e-4,
            clip_grad=1.0,
            bf16=config.bf16,
            params_dtype=dtype,
            use_distributed_optimizer=case.distributed_optimizer,
        ),
        [model],
    )

    def forward(iterator: Iterator[torch.Tensor], model: torch.nn.Module) -> tuple[torch.Tensor, Callable]:
        tokens = next(iterator)
        if case.teacher:
            mask = torch.ones(tokens.shape[0], tokens.shape[1] - 1)
            labels = tokens[:, 1:].contiguous()
            return model(input_ids=tokens[:, :-1], labels=labels, loss_mask=mask), mean_distillation
        documents = None
        if case.documents:  # of 60 tokens and the rest
            documents = (torch.arange(case.seq_length) // 60).int().expand(case.micro_batch, -1)
        labels = tokens[:, 1:].contiguous()
        return model(input_ids=tokens[:, :-1], labels=labels, seq_idx=documents), mean_loss

    def step() -> None:
        length = case.seq_length // case.context
        tokens = torch.randint(config.vocab_size, (case.micro_batches, case.micro_batch, length + 1))
        model.zero_grad_buffer()
        optimizer.zero_grad()
        get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=iter(tokens),
            model=[model],
            num_microbatches=case.micro_batches,
            seq_length=case.seq_length,
            micro_batch_size=case.micro_batch,
            forward_only=False,
        )
        optimizer.step()

    return step


def measure(case: Case) -> dict[str, Any]:
    """Train the case; bytes of this rank."""
    parallel_state.initialize_model_parallel(
        case.tensor,
        case.pipeline,
        context_parallel_size=case.context,
        expert_model_parallel_size=case.expert,
        expert_tensor_parallel_size=1,
    )
    model_parallel_cuda_manual_seed(1)
    with live_bytes() as live:
        step = training_step(case)
        for number in range(STEPS):
            with mark(f"step{number}"):
                step()
                gc.collect()  # cycles of finished graphs
    del step
    stage = parallel_state.get_pipeline_model_parallel_rank()
    leave_model_parallel()
    last = f"step{STEPS - 1}"
    return {"stage": stage, "peak": live.peaks[last], "states": live.after[last], "at": live.peak_ops[last]}


def main(out: Path, cases: list[Case]) -> None:
    """Measure every case in turn."""
    torch.distributed.init_process_group("gloo")
    torch.set_num_threads(1)
    megatron_fixes.install()
    results = {case.name: measure(case) for case in cases}
    gathered: list = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, results)
    if torch.distributed.get_rank() == 0:
        out.write_text(json.dumps({case.name: [rank[case.name] for rank in gathered] for case in cases}, indent=1))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), [Case(**case) for case in json.loads(Path(sys.argv[2]).read_text())])
