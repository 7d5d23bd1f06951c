"""Run a step that is not finite again, before it reaches a weight, and stop where it is not finite again."""

from __future__ import annotations

import math
import socket
from collections.abc import Callable
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from nemotron_h.core import incidents
from nemotron_h.core.errors import UserError
from nemotron_h.training.callbacks.incidents import note_in_run
from nemotron_h.training.guarded_optimizer import Measured
from nemotron_h.training.not_finite import Place, Search, fingerprint


class NanGuard(pl.Callback):
    """Tell a fault of the machine from one of model or data where loss or gradient norm of a step is NaN or infinite.

    All ranks run the step again, of the same micro-batches, weights and states of the generators. Finite then, the run
    goes on with that result and an incident `transient`. Not finite again, it stops on all ranks alike: no weight has
    changed and no checkpoint is written. The error says whether the second run had the same bits, and names step,
    samples, and the layer or the weights where the first such value was.

    As Megatron's rerun state machine, which NeMo does not call; that one leaves at a transient fault too, and waits for
    the device at every step.
    """

    def __init__(self) -> None:
        super().__init__()
        self.finite: list[Tensor] = []
        self.search: Search | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Be asked where a step is not finite."""
        trainer.optimizers[0].rerun = partial(self.run_again, trainer, pl_module)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, index: int) -> None:
        """Begin a new step."""
        self.finite = []

    def on_megatron_microbatch_start(self, step: Any, batch: dict[str, Any], **_: Any) -> None:
        """Tell a search of it."""
        if self.search is not None:
            self.search.begin(batch)

    def on_megatron_microbatch_end(self, step: Any, output: Tensor, **_: Any) -> None:
        """Keep whether this rank's losses are finite; the device is not waited for."""
        if self.search is not None:
            self.search.end(output)
        elif not step.forward_only and parallel_state.is_pipeline_last_stage():
            self.finite.append(torch.isfinite(output.detach()).all())

    def run_again(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        run: Callable[[], Measured],
        loss: float,
        norm: float,
    ) -> Measured:
        """Run a step again, and return what that measured.

        Args:
            run: runs it.
            loss, norm: of the first run, of which one is not finite.
        Errors:
            UserError: on every rank, where one is not finite again.
        """
        before = fingerprint(pl_module)
        seen = f"rank {trainer.global_rank} on {socket.gethostname()}" if not all(self.finite) else ""
        with Search(trainer, pl_module, partial(samples, trainer)) as self.search, trainer.strategy.inputs.repeated():
            measured = run()
        search, self.search = self.search, None
        _, *again = measured
        same = torch.equal(before, fingerprint(pl_module)) and str([loss, norm]) == str(again)
        ranks = everywhere((seen, same, search.place))
        if all(map(math.isfinite, again)):
            self._note(trainer, (loss, norm), again, [seen for seen, _, _ in ranks if seen])
            return measured
        place = min((place for _, _, place in ranks), key=lambda place: place.order)
        verdict = (
            "Run again it has the same bits: a persistent fault, of the model or the data."
            if all(same for _, same, _ in ranks)
            else "Run again it is not finite either, with other values: a fault of the machine, or of operations that "
            "are not deterministic."
        )
        raise self._error(trainer, again[0], place, len(search.batches), verdict)

    @staticmethod
    def _note(trainer: pl.Trainer, first: tuple[float, ...], second: list[float], seen: list[str]) -> None:
        """Note that the second run was finite."""
        names = ("loss", "gradient norm")
        values = {name: [f"{one:.6g}", two] for name, one, two in zip(names, first, second, strict=True)}
        said = "; ".join(f"{name} {one}, run again {two:.6g}" for name, (one, two) in values.items())
        where = f" (losses of {', '.join(seen)})" if seen else ""
        note_in_run(
            trainer,
            incidents.TRANSIENT,
            f"{said}: a transient fault of the machine{where}",
            {**values, "seen": seen},
        )

    @staticmethod
    def _error(trainer: pl.Trainer, loss: float, place: Place, micro_batches: int, verdict: str) -> UserError:
        step, where = f"step {trainer.global_step + 1:,}", place.where(micro_batches)
        if math.isfinite(loss):
            said = f"a gradient of {step} is not finite, though its loss is ({where}). {place.first_gradient()}"
        else:
            said = f"the loss of {step} is not finite ({where}). {place.first_value()}"
        last = str(trainer.checkpoint_callback.best_model_path or "").removesuffix(".ckpt")
        return UserError(
            f"{said} {verdict}",
            f"No weight was changed and no checkpoint was written. Last good checkpoint: {last or 'none yet'}.",
        )


def everywhere(value: Any) -> list[Any]:
    """Return each rank's value, on all ranks."""
    values = [value] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def samples(trainer: pl.Trainer, batch: dict[str, Any]) -> str:
    """Return the numbers and sources of the micro-batch's samples, where the data module gives them."""
    ids = batch.get("sample_ids")
    if ids is None:
        return ""
    order = getattr(trainer.datamodule, "order", None)
    sources = [f" ({', '.join(order.sources(int(i)))})" if order is not None else "" for i in ids]
    return ", ".join(f"{int(i)}{source}" for i, source in zip(ids, sources, strict=True))
