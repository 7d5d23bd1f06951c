"""The first loss of a distillation from full logits of both models, without the code that distils.

`plain_loss.py RECIPE START [key=value ...]`: START holds the student's weights before the first step; prints the mean
KL(teacher || student) of the first global batch.
"""

from __future__ import annotations

import sys

from nemotron_h.platform import quiet

quiet.hush()

import torch  # noqa: E402
from megatron.core import parallel_state  # noqa: E402
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed  # noqa: E402
from torch.utils.data import default_collate  # noqa: E402

from nemotron_h.model.module import NemotronHMegatronModel  # noqa: E402
from nemotron_h.platform import cpu  # noqa: E402
from nemotron_h.recipe.compose import compose  # noqa: E402
from nemotron_h.training.stages.distillation.cache_teacher import Writing  # noqa: E402


def main(path: str, start: str) -> None:
    recipe = compose(path, ["distill.teacher_logits=unused"])
    cpu.install()
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)
    made = Writing(recipe)
    plain = made.config.of_definition(made.config.definition())
    student = plain.megatron_model(NemotronHMegatronModel, True, True).bfloat16()
    weights = torch.load(start)
    for name, parameter in student.named_parameters():
        parameter.data.copy_(next(weight for key, weight in weights.items() if key.endswith(f".{name}")))
    teacher, windows = made.config.teacher_model(True, True), made.data.windows("train")
    assert plain.fp8_emulation == made.config.fp8_emulation == recipe.precision
    total = tokens = 0.0
    with torch.no_grad():
        for first in range(0, recipe.data.global_batch_size, recipe.data.micro_batch_size):
            text = default_collate([windows[first + row] for row in range(recipe.data.micro_batch_size)])["tokens"]
            ours, theirs = (model(text).double().log_softmax(-1) for model in (student, teacher))
            total += float((theirs.exp() * (theirs - ours)).sum())
            tokens += text.numel()
    print(f"loss {total / tokens!r}")


if __name__ == "__main__":
    main(*sys.argv[1:])
