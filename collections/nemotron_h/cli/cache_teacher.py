"""`nemotron-h distill-cache`: a teacher's logits on disk, so that distillations need not load the teacher."""

from __future__ import annotations

from typing import Annotated

import typer


def distill_cache(
    name: Annotated[
        str, typer.Argument(metavar="RECIPE", help="A shipped recipe (nemotron_h_tiny), or the path of a YAML file.")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            help="Values to change: distill.teacher_logits=runs/logits distill.top_k=64 parallel.devices=8."
        ),
    ] = None,
) -> None:
    """Write the teacher's logits for every window of a distillation, so that training loads no teacher.

    The recipe's distill.teacher_logits names the folder, distill.top_k how many logits of each token are kept. Run it
    again after an interruption and it goes on. With parallel.devices above 1 it starts that many processes, on this
    machine alone.
    """
    import dataclasses
    import subprocess
    import sys
    from pathlib import Path

    from rich.console import Console

    from nemotron_h.core.children import end_with_parent
    from nemotron_h.core.errors import UserError
    from nemotron_h.core.locks import locked
    from nemotron_h.platform.ranks import check_here
    from nemotron_h.recipe.compose import compose, known_recipes, to_yaml

    full = f"{name}/distill"
    recipe = compose(full if full in known_recipes() else name, overrides or ())
    if recipe.stage != "distill":
        raise UserError(f"{name} is a recipe of stage {recipe.stage}", hint="name a recipe of stage distill")
    if not recipe.distill.teacher_logits:
        raise UserError(
            f"{name}: distill.teacher_logits is not set: where would the cache be?",
            hint="add distill.teacher_logits=DIR here, and the same to the recipe that trains",
        )
    check_here(1, recipe.parallel.devices, f"{name}: ")
    folder = Path(recipe.distill.teacher_logits).expanduser()
    with locked(folder, "written", "distill.teacher_logits"):
        if recipe.parallel.devices == 1:
            from nemotron_h.training.stages.distillation.cache_teacher import write

            write(recipe, Console(highlight=False, soft_wrap=True))
            return
        file = folder / "recipe.yaml"
        file.write_text(to_yaml(dataclasses.asdict(recipe)))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [
            f"--nproc-per-node={recipe.parallel.devices}",
            "-m",
            "nemotron_h.training.stages.distillation.cache_teacher",
            str(file),
        ]
        raise typer.Exit(subprocess.run(command, preexec_fn=end_with_parent).returncode)
