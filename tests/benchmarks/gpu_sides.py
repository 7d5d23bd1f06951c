"""The two sides of the GPU benchmark: our model and NeMo's own, each behind the same Megatron training step.

The step is what NeMo's `MegatronStrategy` runs: `Float16Module`, Megatron's DDP with float32 gradient sums and the NaN
check, the distributed optimizer over Transformer Engine's Adam, megatron-core's forward-backward function and
`finalize_model_grads`. Lightning's loop around it, logging and data loading are left out on both sides.
"""

from __future__ import annotations

import dataclasses
import gc
import os
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from repository import import_repository

import_repository()

import torch  # noqa: E402

from nemotron_h.platform import cpu, quiet  # noqa: E402

quiet.hush()
cpu.install()

import fiddle  # noqa: E402
from megatron.core import dist_checkpointing, parallel_state  # noqa: E402
from megatron.core.distributed import (  # noqa: E402
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer  # noqa: E402
from megatron.core.pipeline_parallel import get_forward_backward_func  # noqa: E402
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed  # noqa: E402
from megatron.core.transformer.module import Float16Module  # noqa: E402
from nemo.lightning.pytorch.plugins.mixed_precision import update_config_with_dtype_overrides  # noqa: E402

from nemotron_h.architecture.definition import ModelDefinition  # noqa: E402
from nemotron_h.model.module import NemotronHConfig  # noqa: E402
from nemotron_h.platform import flat_shards, megatron_fixes  # noqa: E402
from nemotron_h.precision.plugins import plugin  # noqa: E402
from nemotron_h.training.optimizer import adam_of, state_dtypes  # noqa: E402

ON_GPU = torch.cuda.is_available()


@dataclass(frozen=True)
class Shape:
    """What both sides train.

    Attributes:
        pattern: one letter per layer.
        widths: the model definition's numbers, as `NemotronHConfig` names them.
        vocab_size: of embedding and output matrix.
        seq_length: tokens per sequence; a micro-batch is one sequence.
        micro_batches: sequences per step and data-parallel rank.
    """

    pattern: str
    widths: dict[str, Any]
    vocab_size: int
    seq_length: int
    micro_batches: int

    @property
    def tokens(self) -> int:
        """Of one step and rank."""
        return self.seq_length * self.micro_batches

    def changed(self, **changes: Any) -> Shape:
        """A copy with other values."""
        return dataclasses.replace(self, **changes)


@dataclass(frozen=True)
class Layout:
    """How ranks share the work; data parallel is what remains."""

    tensor: int = 1
    sequence: bool = False
    overlap: bool = False


ONE = Layout()


def sync() -> None:
    """Wait for the device."""
    if ON_GPU:
        torch.cuda.synchronize()


def start(layout: Layout = ONE, seed: int = 1) -> None:
    """Process group (from torchrun's environment, or of this process alone) and Megatron's parallel state."""
    if not torch.distributed.is_initialized():
        if "RANK" not in os.environ:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = probe.getsockname()[1]
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
        if ON_GPU:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.distributed.init_process_group("nccl" if ON_GPU else "gloo")
        megatron_fixes.install()
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(layout.tensor)
    model_parallel_cuda_manual_seed(seed)


def batches(vocab_size: int, length: int) -> Iterator[torch.Tensor]:
    """Random tokens, int64 [1, length + 1]; every side, rank and layout draws its own from the same stream."""
    rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    rng = torch.Generator().manual_seed(0)
    index = 0
    while True:
        tokens = torch.randint(vocab_size, (1, length + 1), generator=rng)
        if index % size == rank:
            yield tokens.cuda() if ON_GPU else tokens
        index += 1


def ours(shape: Shape, precision: str, layout: Layout, **changes: Any) -> NemotronHConfig:
    """Our configuration of this shape with the precision plugin's settings."""
    config = NemotronHConfig(
        definition_name="benchmark",
        hybrid_override_pattern=shape.pattern,
        vocab_size=shape.vocab_size,
        seq_length=shape.seq_length,
        tensor_model_parallel_size=layout.tensor,
        sequence_parallel=layout.sequence,
        **shape.widths,
        **changes,
    )
    return update_config_with_dtype_overrides(plugin(precision).dtype_config, config)


def stock(shape: Shape, precision: str, layout: Layout, **changes: Any) -> Any:
    """NeMo's `NemotronHConfig8B` with the pattern of `shape`, in NeMo's own precision recipes.

    The widths are asserted equal, not set. `attention_backend` is `auto`, as its default needs the flash-attn package.
    """
    from megatron.core.transformer.enums import AttnBackend
    from nemo.collections.llm import NemotronHConfig8B
    from nemo.collections.llm.recipes.precision import mixed_precision

    config = NemotronHConfig8B(
        hybrid_override_pattern=shape.pattern,
        num_layers=len(shape.pattern),
        seq_length=shape.seq_length,
        vocab_size=shape.vocab_size,
        tensor_model_parallel_size=layout.tensor,
        sequence_parallel=layout.sequence,
        attention_backend=AttnBackend.auto,
        **changes,
    )
    for name, value in shape.widths.items():
        if name in ("hidden_size", "ffn_hidden_size", "num_attention_heads", "mamba_state_dim", "mamba_num_groups"):
            assert getattr(config, name) == value, f"NeMo's 8B has {name} = {getattr(config, name)}, not {value}"
    recipe = {
        "bf16": mixed_precision.bf16_mixed,
        "fp8_current_scaling": mixed_precision.nemotron_h_bf16_with_fp8_current_scaling_mixed,
    }[precision]
    return update_config_with_dtype_overrides(fiddle.build(recipe()).dtype_config, config)


class Side:
    """A model with its optimizer and data, ready to take steps.

    Args:
        make: `ours` or `stock`.
        precision: name of the precision plugin.
        moments, gradients: dtypes of Adam's moments and of gradient sums, as a recipe's `optim`.
        changes: further fields of the configuration.
    """

    def __init__(
        self,
        make: Callable[..., Any],
        shape: Shape,
        precision: str,
        layout: Layout = ONE,
        moments: str = "fp32",
        gradients: str = "fp32",
        **changes: Any,
    ) -> None:
        began = time.perf_counter()
        start(layout)
        if ON_GPU:
            torch.cuda.reset_peak_memory_stats()
        self.shape = shape
        self.config = config = make(shape, precision, layout, **changes)
        module = config.configure_model(None if make is ours else SimpleNamespace(vocab_size=shape.vocab_size))
        module = module.cuda() if ON_GPU else module
        self.parameters = sum(p.numel() for p in module.parameters())
        wrapped = Float16Module(config, module) if config.bf16 else module
        fp8_gather = bool(getattr(config, "fp8_param", False))
        ddp = DistributedDataParallelConfig(
            check_for_nan_in_grad=True,
            grad_reduce_in_fp32=gradients == "fp32",
            use_distributed_optimizer=True,
            overlap_grad_reduce=layout.overlap,
            fp8_param_gather=fp8_gather,
        )
        self.model = DistributedDataParallel(config, ddp, wrapped)
        config.finalize_model_grads_func = finalize_model_grads
        if layout.overlap:
            config.no_sync_func = self.model.no_sync
        optimizer = OptimizerConfig(
            optimizer="adam",
            lr=1e-4,
            adam_beta1=0.9,
            adam_beta2=0.95,
            weight_decay=0.1,
            clip_grad=1.0,
            bf16=config.bf16,
            params_dtype=config.params_dtype,
            use_distributed_optimizer=True,
            **state_dtypes(moments),
            **({"fp8_recipe": config.fp8_recipe} if fp8_gather else {}),
        )
        with adam_of(optimizer):
            self.optimizer = get_megatron_optimizer(optimizer, [self.model])
        self.data = batches(shape.vocab_size, shape.seq_length)
        self.positions = torch.arange(shape.seq_length, device="cuda" if ON_GPU else "cpu")[None]
        self.seconds: list[float] = []
        self.losses: list[float] = []
        self.grad_norm = 0.0
        sync()
        self.build_seconds = time.perf_counter() - began

    def _forward(self, iterator: Iterator[torch.Tensor], model: torch.nn.Module) -> tuple[torch.Tensor, Callable]:
        tokens = next(iterator)
        losses = model(
            input_ids=tokens[:, :-1],
            position_ids=self.positions,
            attention_mask=None,
            labels=tokens[:, 1:].contiguous(),
        )

        def mean(losses: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            loss = losses.float().mean()
            return loss, {"loss": loss.detach().clone()}  # megatron divides the loss in place

        return losses, mean

    def step(self) -> float:
        """One training step; its loss, mean over the data-parallel ranks."""
        sync()
        began = time.perf_counter()
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        reports = get_forward_backward_func()(
            forward_step_func=self._forward,
            data_iterator=self.data,
            model=[self.model],
            num_microbatches=self.shape.micro_batches,
            seq_length=self.shape.seq_length,
            micro_batch_size=1,
            forward_only=False,
        )
        _, grad_norm, _ = self.optimizer.step()
        sync()
        self.seconds.append(time.perf_counter() - began)
        loss = torch.stack([report["loss"] for report in reports]).mean()
        if parallel_state.get_data_parallel_world_size() > 1:
            torch.distributed.all_reduce(loss, group=parallel_state.get_data_parallel_group())
            loss /= parallel_state.get_data_parallel_world_size()
        self.losses.append(float(loss))
        self.grad_norm = float(grad_norm)
        return self.losses[-1]

    def peak_gib(self) -> float:
        """Largest memory that tensors took on the GPU since the model was built."""
        return torch.cuda.max_memory_allocated() / 2**30 if ON_GPU else 0.0

    def definition(self) -> ModelDefinition:
        """For the operations of a step; equal for both sides by construction."""
        return ours(self.shape, "bf16", ONE).definition()

    def _state(self, loading: bool) -> dict[str, Any]:
        model = self.model.module.sharded_state_dict()
        kind = {"distrib_optim_sharding_type": flat_shards.SHARDING}
        return {
            "model": model,
            "optimizer": self.optimizer.sharded_state_dict(model, is_loading=loading, metadata=kind),
        }

    def save(self, folder: Path) -> None:
        """A Megatron distributed checkpoint of weights and optimizer."""
        folder.mkdir(parents=True)
        dist_checkpointing.save(self._state(False), str(folder))

    def load(self, folder: Path) -> None:
        """Continue from `save`."""
        state = dist_checkpointing.load(self._state(True), str(folder))
        self.model.module.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])

    def close(self) -> None:
        """Give the memory back."""
        self.config.no_sync_func = self.config.finalize_model_grads_func = None
        del self.model, self.optimizer, self.data
        gc.collect()
        if ON_GPU:
            from transformer_engine.pytorch.fp8 import FP8GlobalStateManager

            FP8GlobalStateManager.reset()
            torch.cuda.empty_cache()


@dataclass
class Result:
    """What was measured of one side, over all its rounds."""

    name: str
    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    peak_gib: float = 0.0
    parameters: int = 0
    first_step_seconds: float = 0.0
