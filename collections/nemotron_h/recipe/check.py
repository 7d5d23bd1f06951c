"""Everything about a recipe that can be checked without starting a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nemotron_h.checkpoint.hub_cache import path_of
from nemotron_h.core.errors import UserError
from nemotron_h.core.hub import is_hub
from nemotron_h.core.units import count_of
from nemotron_h.data.blend import Blend, load_blend
from nemotron_h.data.manifest import check_manifest, data_root
from nemotron_h.data.phases import Horizon, PhaseSpan, phase_spans
from nemotron_h.recipe.checks import definition_of, named_checkpoints
from nemotron_h.recipe.compose import trace
from nemotron_h.schema.recipe import RecipeConfig


@dataclass(frozen=True)
class Checked:
    """Recipe that passed its checks, with its sizes and schedule.

    Attributes:
        name: of the recipe.
        parameters: of the model.
        horizon: tokens and steps of the run.
        warmup_steps: of the learning rate.
        phases: of the blend, in steps.
        unchecked: what only a run (or its preparation) can tell, each as a few words.
        recipe: itself.
    """

    name: str
    parameters: int
    horizon: Horizon
    warmup_steps: int
    phases: list[PhaseSpan]
    unchecked: list[str]
    recipe: RecipeConfig

    def line(self) -> str:
        """Return all of it on one line."""
        switches = ", ".join(f"{span.name} from {span.first_step:,}" for span in self.phases)
        return (
            f"ok  {self.name}: {self.parameters:,} parameters; {self.horizon.steps:,} steps of "
            f"{self.horizon.tokens_per_step:,} tokens, warm-up {self.warmup_steps:,}; {switches}"
            + (f"  (not checked: {'; '.join(self.unchecked)})" if self.unchecked else "")
        )


def examine(name_or_path: str, overrides: Sequence[str] = ()) -> Checked:
    """Compose a recipe, which checks what it says, and hold it against its blend's tokenizer and prepared data.

    Errors:
        UserError: the first thing that is wrong.
    """
    recipe = trace(name_or_path, overrides).recipe
    definition = definition_of(recipe, name_or_path)
    data = recipe.data
    tokens = count_of(recipe.tokens, "tokens", name_or_path)
    horizon = Horizon(tokens, data.seq_length * data.global_batch_size)
    warmup = horizon.step_at(count_of(recipe.optim.warmup_tokens, "optim.warmup_tokens", name_or_path))
    blend = load_blend(data.blend)
    spans = phase_spans(blend.phases, horizon)
    unchecked = check_vocabulary(recipe, blend, name_or_path)
    unchecked += [
        f"{key}, which a run fetches: {checkpoint}"
        for key, checkpoint in named_checkpoints(recipe).items()
        if is_hub(checkpoint) and not path_of(checkpoint).is_dir()
    ]
    if recipe.overrides:
        unchecked.append(f"keys and types of overrides, which nemo ... --dryrun checks: {', '.join(recipe.overrides)}")
    if recipe.minipuzzle is not None and recipe.minipuzzle.evaluate:
        unchecked.append(f"the command of minipuzzle.evaluate, run with --allow-evaluate: {recipe.minipuzzle.evaluate}")
    return Checked(recipe.name, definition.parameters, horizon, warmup, spans, unchecked, recipe)


def check_vocabulary(recipe: RecipeConfig, blend: Blend, origin: str) -> list[str]:
    """Check that the blend's tokenizer has the model's vocabulary, and return what cannot be known yet.

    Errors:
        UserError: the sizes differ, or the prepared data does not fit the blend.
    """
    folder = data_root(recipe.data.root) / blend.name
    unchecked = []
    if (folder / "manifest.json").is_file():
        size = check_manifest(recipe.data.root, blend).tokenizer.vocab_size
    elif blend.tokenizer.is_trained():
        size = blend.tokenizer.vocab_size
        unchecked.append(f"the data: there is none in {folder} yet")
    else:
        return [f"data and vocabulary: there is no data in {folder} yet"]
    if size != recipe.model.vocab_size:
        raise UserError(
            f"{origin}: the tokenizer of blend {blend.name} has {size:,} tokens, model {recipe.model.name} a "
            f"vocabulary of {recipe.model.vocab_size:,}",
            hint="choose another data.blend, or change model.vocab_size (and model.expect.parameters)",
        )
    return unchecked
