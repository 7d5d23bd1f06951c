"""The runs of a precision comparison: one recipe each, that differ in precision or in the seed of the weights alone.

Imports no torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nemotron_h.architecture.gemms import FP8_FORMATS
from nemotron_h.core.errors import UserError
from nemotron_h.core.strict import check_one_of
from nemotron_h.data.blend import load_blend
from nemotron_h.data.manifest import check_manifest
from nemotron_h.launch.place import HERE, Place
from nemotron_h.launch.runs import Run
from nemotron_h.recipe.check import check_vocabulary
from nemotron_h.recipe.checks import check
from nemotron_h.recipe.compose import compose
from nemotron_h.schema.recipe import PRECISIONS, PrecisionOptionsSchema, RecipeConfig

#: overrides of a recipe that an option of the command gives
OPTIONS = {"tokens": "--steps", "precision": "--precision", "log.dir": "--out"}
#: settings of a built run that would undo what is compared
FIXED = ("trainer.max_steps", "trainer.plugins", "log.explicit_log_dir", "log.trackers")


@dataclass(frozen=True)
class Comparison:
    """Runs to compare, and the settings that they share.

    Attributes:
        recipe: its name.
        precision, against: the two precisions.
        steps, tokens_per_step: of every run.
        out: folder of the runs and the results.
        runs: `precision`, `against`, `against` with other initial weights, and `precision` with some of those.
        seeds: initial weights that `against` is trained from.
        pairs: the first of them that `precision` is trained from too.
    """

    recipe: str
    precision: str
    against: str
    steps: int
    tokens_per_step: int
    out: Path
    runs: tuple[Run, ...]
    seeds: int = 1
    pairs: int = 1

    @property
    def paired(self) -> list[tuple[Run, Run]]:
        """Return the pairs (`against`, `precision`) of the same initial weights."""
        first, against, more = self.runs[0], self.runs[1 : 1 + self.seeds], self.runs[1 + self.seeds :]
        return list(zip(against[: self.pairs], (first, *more), strict=True))

    @property
    def others(self) -> tuple[Run, ...]:
        """Return the runs of `against` from other initial weights."""
        return self.runs[2 : 1 + self.seeds]


def comparison(
    name: str,
    steps: int,
    precision: str | None = None,
    against: str = "bf16",
    seeds: int = 1,
    out: Path | None = None,
    overrides: Sequence[str] = (),
    pairs: int = 1,
    place: Place = HERE,
) -> Comparison:
    """Return the runs, checked as far as that goes without starting them.

    Args:
        name: a shipped recipe, or the path of a YAML file.
        steps: of every run; the schedule ends there.
        precision: None is the recipe's own where it is FP8, else `fp8_current_scaling`.
        against: the reference.
        seeds: initial weights that `against` is trained from, the pair's included; every run reads the same batches.
        out: None is `<log.dir>/<name of the recipe>-precision`.
        overrides: of the recipe.
        pairs: initial weights that both precisions are trained from; at least so many are `seeds`.
        place: where the runs go.
    Errors:
        UserError: unknown or equal precisions, a run too short for its schedule or phases, data that is not prepared,
            a layout that does not fit the place.
    """
    for override in overrides:
        key = override.split("=")[0]
        if key in OPTIONS:
            raise UserError(f"override {override}: {key} differs between the runs or is set by {OPTIONS[key]}")
    own = compose(name).precision
    if precision is None:
        precision = own if own in FP8_FORMATS and own != against else "fp8_current_scaling"
    for option, value in (("--precision", precision), ("--against", against)):
        check_one_of(option, value, PRECISIONS)
    if precision == against:
        raise UserError(f"--precision and --against are both {precision}", hint="compare two different ones")
    if steps < 1 or seeds < 1 or pairs < 1:
        raise UserError(f"--steps {steps} --seeds {seeds} --pairs {pairs}: all have to be 1 or more")
    seeds = max(seeds, pairs)
    fp8 = precision if precision in FP8_FORMATS else against  # may have `precision_options`
    # overrides are made for a run of `steps`, which is known with them: any would fit into this one
    whole = compose(name, [*overrides, f"precision={fp8}", f"tokens={10**18}"])
    place.check(whole, name)
    out = out or Path(whole.log.dir) / f"{whole.name}-precision"
    whole = place.moved(dataclasses.replace(whole, log=dataclasses.replace(whole.log, dir=str(out))))
    out = Path(whole.log.dir)
    tokens_per_step = whole.data.seq_length * whole.data.global_batch_size
    common = _common(whole, name, steps, tokens_per_step, out, overrides)
    runs = [(precision, common.init_seed), *((against, common.init_seed + n) for n in range(seeds))]
    runs += [(precision, common.init_seed + n) for n in range(1, pairs)]
    made = []
    for chosen, seed in runs:
        run_name = chosen if seed == common.init_seed else f"{chosen}-seed-{seed}"
        made.append(Run(run_name, _variant(common, run_name, chosen, seed, steps, name)))
    check_manifest(whole.data.root, load_blend(whole.data.blend))
    check_vocabulary(whole, load_blend(whole.data.blend), name)
    return Comparison(whole.name, precision, against, steps, tokens_per_step, out, tuple(made), seeds, pairs)


def _common(
    whole: RecipeConfig, name: str, steps: int, tokens_per_step: int, out: Path, overrides: Sequence[str]
) -> RecipeConfig:
    """Return the recipe with what all runs share: length, folder, logging."""
    if whole.stage != "pretrain":
        raise UserError(f"{name} is a recipe of stage {whole.stage}; compared are pretraining runs")
    for setting in whole.overrides:
        if setting.startswith(FIXED):
            raise UserError(f"{name}: overrides has {setting}, which this command sets", hint="leave it out")
    every = whole.log.validate_every_steps
    if not any(override.startswith("log.validate_every_steps=") for override in overrides):
        every = min(every, max(1, steps // 4))  # ours: a short run shows a curve too
    trackers = list(dict.fromkeys(["tensorboard", *whole.log.trackers]))  # whose events are compared
    return dataclasses.replace(
        whole,
        tokens=str(steps * tokens_per_step),
        log=dataclasses.replace(whole.log, dir=str(out), trackers=trackers, every_steps=1, validate_every_steps=every),
    )


def _variant(common: RecipeConfig, run_name: str, precision: str, seed: int, steps: int, name: str) -> RecipeConfig:
    """Return one run's recipe, checked."""
    options = PrecisionOptionsSchema()
    if precision in FP8_FORMATS:
        quarters = sorted({1, *(max(1, steps * n // 4) for n in (1, 2, 3, 4))})
        measured = common.precision_options.measured_steps or quarters
        options = dataclasses.replace(
            common.precision_options, measured_steps=measured if seed == common.init_seed else []
        )
    made = dataclasses.replace(common, name=run_name, precision=precision, init_seed=seed, precision_options=options)
    try:
        check(made, name)
    except UserError as error:
        raise UserError(f"with --steps {steps} ({int(made.tokens):,} tokens): {error.message}", error.hint) from error
    return made
