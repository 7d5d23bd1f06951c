"""The function that `nemo llm distill` calls, known to nemo-run without the stage that builds its arguments.

The command is this project's: NeMo's own `llm.distill` reads checkpoints of NeMo's GPT models with a stored object
graph, which this family's are not. `nemo llm distill student_model_path=... teacher_model_path=...` still means NeMo's.
"""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
from nemo.collections import llm
from nemo.lightning import AutoResume, NeMoLogger, OptimizerModule, Trainer


def distill(
    model: pl.LightningModule | None = None,
    data: pl.LightningDataModule | None = None,
    trainer: Trainer | None = None,
    log: NeMoLogger | None = None,
    resume: AutoResume | None = None,
    optim: OptimizerModule | None = None,
    student_model_path: str | None = None,
    teacher_model_path: str | None = None,
    distillation_config_path: str | None = None,
) -> Path:
    """Distill a student from a frozen teacher.

    Args:
        model: a `DistillationModel`, which names its teacher.
        data, trainer, log, resume, optim: as of `llm.pretrain`.
        student_model_path, teacher_model_path, distillation_config_path: of NeMo's `llm.distill`, in place of `model`.
    Returns:
        the run's folder.
    """
    if student_model_path is not None:
        return llm.distill(
            student_model_path, teacher_model_path, data, trainer, distillation_config_path, log, resume, optim
        )
    return llm.train(model=model, data=data, trainer=trainer, log=log, resume=resume, optim=optim, tokenizer="data")
