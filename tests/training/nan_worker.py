"""Run a recipe whose layer 3 gets a weight, or a gradient, that is not a number: `nan_worker.py RECIPE STEP weight`.

`gradient` is another part, `saved` a weight after the step; `disk` has no room from that step on.
"""

from __future__ import annotations

import os
import shutil
import sys
from types import SimpleNamespace

from nemotron_h.platform import quiet

quiet.hush()

import fiddle as fdl  # noqa: E402
import lightning.pytorch as pl  # noqa: E402
import nemo_run as run  # noqa: E402
import torch  # noqa: E402
from megatron.core.utils import get_attr_wrapped_model  # noqa: E402

from nemotron_h.core.errors import UserError  # noqa: E402
from nemotron_h.recipe.compose import compose  # noqa: E402
from nemotron_h.training.stages.pretrain import build  # noqa: E402


class Poison(pl.Callback):
    """Set one weight of the attention layer to NaN before this step (from 1), or let its gradient become infinite."""

    def __init__(self, step: int, part: str) -> None:
        self.step, self.part = step, part

    @torch.no_grad()
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if trainer.global_step + 1 == self.step and self.part == "disk":
            shutil.disk_usage = lambda _: SimpleNamespace(free=1000)
        elif trainer.global_step + 1 == self.step and self.part != "saved":
            weight = self.weight(pl_module)
            if self.part == "weight":
                weight[0, 0] = torch.nan
            else:
                weight.register_hook(lambda gradient: gradient * torch.inf)

    @torch.no_grad()
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if trainer.global_step == self.step and self.part == "saved":
            self.weight(pl_module)[0, 0] = torch.nan

    @staticmethod
    def weight(pl_module) -> torch.Tensor:
        model = get_attr_wrapped_model(pl_module, "decoder", return_model_obj=True)
        return model.decoder.layers[3].self_attention.linear_proj.weight


def main(recipe: str, step: str, part: str) -> None:
    """Build, poison, run."""
    task = build(compose(recipe))
    task.trainer.callbacks.append(run.Config(Poison, step=int(step), part=part))
    try:
        fdl.build(task)()
    except UserError as error:
        print(error, file=sys.stderr)
        os._exit(error.EXIT_CODE)


if __name__ == "__main__":
    main(*sys.argv[1:])
