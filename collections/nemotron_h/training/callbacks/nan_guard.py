"""Stop on a loss or a gradient that is not finite, before it reaches a weight, and say where it came from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from megatron.core import parallel_state
from megatron.core.utils import get_attr_wrapped_model, get_model_config
from torch import Tensor, nn

from nemotron_h.core.errors import UserError
from nemotron_h.core.incidents import NUMERICS
from nemotron_h.training.callbacks import run_report


class NanGuard(pl.Callback):
    """Stop a run whose loss is NaN or infinite: step, samples, and the layer where it first appeared.

    Losses are looked at once per step, after the last micro-batch and before gradients are reduced, all ranks
    together, so all stop, no weight has changed and no checkpoint is written. The layer is found by running the
    forward pass of that micro-batch again. A finite loss whose gradient is not finite is found by Megatron's check of
    its gradient buffers, on the rank where it happens; here the weights are named.
    """

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[tuple[dict[str, Any], Tensor]] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look at the losses where Megatron is about to reduce the gradients."""
        config = get_model_config(pl_module)
        reduce_gradients: Callable = config.finalize_model_grads_func

        def check_and_reduce(*args: Any, **kwargs: Any) -> Any:
            self.check(trainer, pl_module)
            return reduce_gradients(*args, **kwargs)

        config.finalize_model_grads_func = check_and_reduce

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, index: int) -> None:
        """Begin a new step."""
        self.batches = []

    def on_megatron_microbatch_end(self, step: Any, batch: dict[str, Any], output: Tensor, **_: Any) -> None:
        """Keep the micro-batch and whether its losses are finite; the device is not waited for."""
        if not step.forward_only and parallel_state.is_pipeline_last_stage():
            self.batches.append((batch, torch.isfinite(output.detach()).all()))

    def check(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Compare notes with all ranks.

        Errors:
            UserError: on every rank, when a loss of any is not finite.
        """
        finite = [flag for _, flag in self.batches]
        all_finite = torch.stack(finite).all() if finite else torch.tensor(True, device=torch.cuda.current_device())
        bad = (~all_finite).to(torch.int32)
        if torch.distributed.get_world_size() > 1:
            torch.distributed.all_reduce(bad, op=torch.distributed.ReduceOp.MAX)
        if bad:
            raise self._error(trainer, pl_module)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Add what Megatron's own check of the gradients, which with overlapped reduction comes first, cannot say."""
        if isinstance(exception, UserError):
            return
        error = None
        if any(not flag for _, flag in self.batches):
            error = self._error(trainer, pl_module)
        elif "local grad norm" in str(exception):
            numbers = [batch.get("sample_ids") for batch, _ in self.batches]
            seen = [int(i) for ids in numbers if ids is not None for i in ids]
            samples = f" (rank {trainer.global_rank}, samples {', '.join(map(str, seen))})" if seen else ""
            error = UserError(
                f"a gradient of step {trainer.global_step + 1:,} is not finite, though its loss is{samples}. "
                f"{gradients_not_finite(pl_module)}",
                self._hint(trainer),
            )
        if error is not None:
            run_report.stop(trainer, error.message, NUMERICS)
            raise error from exception

    @staticmethod
    def _hint(trainer: pl.Trainer) -> str:
        kept = str(trainer.checkpoint_callback.best_model_path or "").removesuffix(".ckpt")
        return f"No weight was changed and no checkpoint was written. Last good checkpoint: {kept or 'none yet'}."

    def _error(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> UserError:
        number = next((n for n, (_, flag) in enumerate(self.batches) if not flag), None)
        step = f"the loss of step {trainer.global_step + 1:,} is not finite"
        hint = self._hint(trainer)
        if number is None:
            return UserError(f"{step} (on another rank, which says where)", hint)
        batch = self.batches[number][0]
        where = f"micro-batch {number + 1} of {len(self.batches)} on rank {trainer.global_rank}"
        samples = self._samples(trainer, batch)
        if samples:
            where += f", samples {samples}"
        return UserError(f"{step} ({where}). {first_not_finite(pl_module, batch)}", hint)

    @staticmethod
    def _samples(trainer: pl.Trainer, batch: dict[str, Any]) -> str:
        """Return the numbers and sources of the micro-batch's samples, where the data module gives them."""
        ids = batch.get("sample_ids")
        if ids is None:
            return ""
        order = getattr(trainer.datamodule, "order", None)
        sources = [f" ({', '.join(order.sources(int(i)))})" if order is not None else "" for i in ids]
        return ", ".join(f"{int(i)}{source}" for i, source in zip(ids, sources, strict=True))


def _named_parts(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules of a forward pass in order, by the names that an error uses."""
    parts: dict[str, nn.Module] = {}
    if getattr(model, "pre_process", True):
        parts["the embedding"] = model.embedding
    blocks = model.config.definition().blocks
    for layer in model.decoder.layers:
        number = layer.layer_number - 1
        parts[f"layer {number} ({blocks[number].name})"] = layer
    if getattr(model, "post_process", True):
        parts["the final norm"] = model.decoder.final_norm
        parts["the output layer"] = model.output_layer
    return parts


@torch.no_grad()
def gradients_not_finite(pl_module: pl.LightningModule) -> str:
    """Return a sentence naming the weights with non-finite gradients, in the order of the backward pass."""
    model = get_attr_wrapped_model(pl_module, "decoder", return_model_obj=True)
    largest = {n: p.main_grad.abs().amax() for n, p in model.named_parameters() if hasattr(p, "main_grad")}
    bad = [name for name, value in largest.items() if not bool(torch.isfinite(value))][::-1]
    if bad:
        return f"Of {len(bad)} of {len(largest)} weights, first in the backward pass: {', '.join(bad[:3])}."
    name = max(largest, key=lambda name: float(largest[name]))
    return f"Each value is finite, their norm is not: the largest is {float(largest[name]):.1e}, of {name}."


def _holds_only_finite(value: Any) -> bool:
    tensors = value if isinstance(value, tuple | list) else (value,)
    return all(bool(torch.isfinite(t).all()) for t in tensors if torch.is_tensor(t) and t.is_floating_point())


@torch.no_grad()
def first_not_finite(pl_module: pl.LightningModule, batch: dict[str, Any]) -> str:
    """Return a sentence naming the first non-finite value when this batch is run forward again."""
    model = get_attr_wrapped_model(pl_module, "decoder", return_model_obj=True)
    weights = [name for name, p in model.named_parameters() if not bool(torch.isfinite(p).all())]
    about_weights = f" Weights that are not finite: {', '.join(weights[:3])}." if weights else ""
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        return f"With pipeline stages the layer is not searched.{about_weights}"
    parts, found = _named_parts(model), []

    def note(name: str) -> Callable:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if not _holds_only_finite(output):
                found.append(name)

        return hook

    handles = [module.register_forward_hook(note(name)) for name, module in parts.items()]
    try:
        losses = model.config.forward_step_fn(pl_module, batch)
    finally:
        for handle in handles:
            handle.remove()
    if found:
        return f"It first appears in the output of {found[0]}.{about_weights}"
    if not _holds_only_finite(losses):
        return f"Every layer's output is finite; the loss itself is not.{about_weights}"
    return f"The forward pass run again is finite: it was no function of weights and batch.{about_weights}"
