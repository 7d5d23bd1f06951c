"""Write a page for each model, `docs/models/*.md`, and the table of models in README: `python docs/write_models.py`.

All of it is read from `configs/model`, `configs/paper.yaml`, `recipes/` and the verification cards; a test compares.
"""

from __future__ import annotations

import functools
import os
import re
import tempfile
import textwrap
from pathlib import Path

import write_cards

from nemotron_h.architecture.definition import ModelDefinition
from nemotron_h.core.units import GIB, gib
from nemotron_h.data.blend import parse_count
from nemotron_h.planning.plan import make_plan
from nemotron_h.recipe.checks import definition_of
from nemotron_h.recipe.compose import configs_dir, factory_of, known_recipes, stage_of
from nemotron_h.recipe.fidelity import published
from nemotron_h.recipe.shipped import read_shipped
from nemotron_h.schema.reason import ROUNDS
from nemotron_h.schema.recipe import PIPELINES, STAGES, RecipeConfig

DOCS = Path(__file__).resolve().parent
README = DOCS.parent / "README.md"
#: between these the table of README is written
BEGIN, END = "<!-- models: written by docs/write_models.py -->", "<!-- end of models -->"
WIDTHS = (
    *("hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "head_dim", "mamba_num_heads"),
    *("mamba_head_dim", "mamba_num_groups", "mamba_state_dim", "conv_kernel", "num_experts", "experts_per_token"),
    *("expert_hidden_size", "shared_expert_hidden_size", "expert_scaling", "position_embedding", "rope_base"),
    *("rope_scaling_factor", "rope_low_freq_factor", "rope_high_freq_factor", "rope_original_length"),
    *("qkv_bias", "qk_norm", "tied_embeddings", "vocab_size", "norm_epsilon", "init_std"),
)
#: models that share a row of README's table: its title, and their family
SERIES = {"nemotron_t": "transformer", "llama": "llama", "falcon_h1": "falcon_h1"}
#: what was measured of a model beyond its cards, and the page that names the command
RESULTS = {
    "nemotron_h_tiny": (
        "`make demo` pretrains it: [training](../training.md).",
        "`make demo-sft` fine-tunes it: [fine-tuning](../sft.md#a-demonstration).",
        "`make demo-compress` and `nemotron-h minipuzzle nemotron_h_tiny`: [compression](../results/compression.md).",
        "FP8 against BF16 over 5 M tokens: [precision](../results/precision.md).",
        "Speed of a step and of generation on two CPU cores: [CPU](../results/cpu.md), "
        "[generation](../results/generation.md).",
    ),
    "nemotron_h_100m": (
        "FP8 against BF16 over 5 M tokens: [precision](../results/precision.md).",
        "All stages of `nemotron-h minipuzzle nemotron_h_100m`: [compression](../results/compression.md).",
    ),
    "nemotron_h_8b": (
        "The whole model was not trained here. Its widths in 13, 26 and 39 layers: [GPUs](../results/gpu.md).",
        "Generation of the whole model with random weights on one H100: [generation](../results/generation.md).",
    ),
    "smollm2_135m": ("Not trained here. How to import and fine-tune it: [dense Transformers](../llama.md).",),
    "nemotron_h_4b": ("Its grid of candidates was counted, nothing trained: [compression](../compression.md).",),
    "nemotron_h_47b": ("Its grid of candidates was counted, nothing trained: [compression](../compression.md).",),
    "nemotron_t_8b": (
        "Not trained here. Generation with random weights on one H100: [generation](../results/generation.md).",
    ),
}


def models() -> list[str]:
    """Return the models that have recipes, from the smallest."""
    names = {name.split("/")[0] for name in known_recipes()}
    return sorted(names, key=lambda name: (definition(name).parameters, name))


def recipes(model: str) -> list[str]:
    """Return the recipes of a model: stages in the order of a model's life."""
    own = [name for name in known_recipes() if name.startswith(f"{model}/")]
    order = [*STAGES, *PIPELINES]
    return sorted(own, key=lambda name: (order.index(stage_of(name)), name))


@functools.cache
def recipe_of(name: str) -> RecipeConfig:
    """Return a recipe, composed once."""
    return read_shipped(name)


def definition(model: str) -> ModelDefinition:
    """Return a model's definition, as the first of its recipes has it."""
    return definition_of(recipe_of(recipes(model)[0]), model)


def about(model: str) -> list[str]:
    """Return what the head of the definition's file says of a model, and `configs/paper.yaml` of its training."""
    text = (configs_dir() / "model" / f"{model}.yaml").read_text()
    paragraphs = [" ".join(line.removeprefix("#").strip() for line in text.split("name:")[0].splitlines())]
    if model in published():
        said = published()[model]["about"].replace("The rest is as above.", "The rest is the 47B's.")
        link = f"[fidelity](../results/fidelity.md#{model.replace('.', '')})"  # as headings become anchors
        paragraphs.append(f"{said} Paper against recipe, value by value: {link}.")
    return [textwrap.fill(" ".join(said.split()), 118, break_on_hyphens=False) for said in paragraphs]


def layers(model: ModelDefinition, letters: bool = False) -> str:
    """Return the layers of each kind that a model has: `24 Mamba-2, 4 attention, 24 FFN`, or `24M 4* 24-`."""
    if letters:
        return " ".join(f"{model.count(kind.letter)}{kind.letter}" for kind in model.kinds)
    return ", ".join(f"{model.count(kind.letter)} {kind.title}" for kind in model.kinds)


def size(parameters: int) -> str:
    """Return a count in millions or billions: `8.10 B`."""
    return f"{parameters / 1e9:.2f} B" if parameters >= 1e9 else f"{parameters / 1e6:.1f} M"


def tokens(recipe: RecipeConfig) -> str:
    """Return the tokens of a run: `15 T`."""
    count = parse_count(recipe.tokens)
    for unit, name in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if count >= unit:
            return f"{count / unit:.4g} {name}"
    return f"{count:,}"


def command(name: str) -> str:
    """Return the command that runs a recipe."""
    stage = stage_of(name)
    if stage in PIPELINES:
        return f"nemotron-h {PIPELINES[stage]} {name.removesuffix(f'/{stage}')}"
    return f"nemo llm {STAGES[stage]} --factory {factory_of(name)} --yes"


def stages(model: str) -> list[str]:
    """Return the table of a model's recipes and what a plan says of each."""
    columns = "recipe | tokens | batch | precision | GPUs: tensor x data | GiB a GPU, of an H100's | fits | checkpoint"
    rows = [f"| {columns} |", "|---|---|---|---|---|---|---|---|"]
    for name in recipes(model):
        recipe = recipe_of(name)
        if stage_of(name) in PIPELINES:  # several runs of the parent and its children, each with a plan of its own
            batch = f"{recipe.data.global_batch_size} x {recipe.data.seq_length:,}"
            gpus = recipe.parallel.nodes * recipe.parallel.devices
            rows.append(f"| `{name}` | {tokens(recipe)} | {batch} | `{recipe.precision}` | {gpus:,} | | | |")
            continue
        plan = make_plan(recipe, "h100")
        layout = plan.layout
        gpus = recipe.parallel.nodes * recipe.parallel.devices
        peak, room = plan.largest.peak / GIB, plan.gpu.memory / GIB
        fit = "yes" if plan.fits else f"no: {'; '.join(remedy.settings for remedy in plan.remedies) or 'larger GPUs'}"
        context = f" x context {layout.context}" if layout.context > 1 else ""
        rows.append(
            f"| `{name}` | {tokens(recipe)} | {recipe.data.global_batch_size} x {recipe.data.seq_length:,} "
            f"| `{recipe.precision}` | {gpus:,}: {layout.tensor} x {layout.data:,}{context} "
            f"| {peak:.1f} of {room:.1f} | {fit} | {gib(sum(plan.checkpoint.values()))} |"
        )
    return rows


def widths(model: str) -> list[str]:
    """Return the table of a model's widths, with their sources."""
    d = definition(model)
    rows = ["| | | source |", "|---|---|---|", f"| `pattern` | `{d.pattern}` | {d.sources.get('pattern', '')} |"]
    for key in WIDTHS:
        value = getattr(d, key)
        if value:
            shown = str(value).lower() if isinstance(value, bool) else f"{value:,}" if isinstance(value, int) else value
            rows.append(f"| `{key}` | {shown} | {d.sources.get(key, '')} |")
    rows.append(f"| parameters | {d.parameters:,} | counted, and `expect` of the definition |")
    if d.has_experts:
        rows.append(f"| parameters that a token passes | {d.active_parameters:,} | counted, and `expect` |")
    return rows


def commands(model: str) -> list[str]:
    """Return the commands of a model's stages: data once for each blend, then the stage."""
    lines, prepared = [], {ROUNDS}  # which each round prepares
    for name in recipes(model):
        blend = recipe_of(name).data.blend
        if blend not in prepared:
            lines.append(f"    nemotron-h data prepare --blend {blend}")
            prepared.add(blend)
        lines.append(f"    {command(name)}")
    planned = model if f"{model}/pretrain" in recipes(model) else recipes(model)[0]
    return [*lines, f"    nemotron-h plan {planned}    # or any recipe below by its name"]


def results(model: str) -> list[str]:
    """Return what was measured of a model, or that nothing was."""
    lines = [f"- {line}" for line in RESULTS.get(model, ())]
    own = {name: card for name, card in write_cards.cards().items() if card["recipe"].split("/")[0] == model}
    if own:
        lines += [""] * bool(lines) + write_cards.table(own, "../results/cards.md")
    return lines or ["Not trained here."]


def page(model: str) -> str:
    """Return the page of a model."""
    d = definition(model)
    own = any("sample" not in (blend := recipe_of(name).data.blend) and blend != ROUNDS for name in recipes(model))
    active = f", {size(d.active_parameters)} of them active," if d.has_experts else ""
    parts = [
        f"# {model}",
        *about(model),
        f"{size(d.parameters)} parameters{active} in {d.num_layers} layers: {layers(d)}.",
        "## Widths",
        "`paper` is Nemotron-H, arXiv 2504.03624.",
        "\n".join(widths(model)),
        "## Stages",
        "\n".join(commands(model)),
        *(["Blends that are no sample read your own text: [data](../data.md)."] if own else []),
        "\n".join(stages(model)),
        "GPUs, memory and checkpoint are what `nemotron-h plan` computes, not measurements: "
        "[planning](../planning.md).",
        "## Results",
        "\n".join(results(model)),
    ]
    return "\n\n".join(parts) + "\n"


def stage_names(*models: str) -> str:
    """Return the stages that have recipes of some models, each once, in the order of a model's life."""
    there = {stage_of(name) for model in models for name in recipes(model)}
    return ", ".join(stage for stage in (*STAGES, *PIPELINES) if stage in there)


def brief(stages: str) -> str:
    """Return stages as README's table has room for them: several pipelines by their number."""
    names = stages.split(", ")
    pipelines = [name for name in names if name in PIPELINES]
    if len(pipelines) < 3:
        return stages
    return ", ".join([*(name for name in names if name not in PIPELINES), f"{len(pipelines)} pipelines"])


def index() -> str:
    """Return the page that lists the models."""
    rows = ["| model | layers | parameters | recipes |", "|---|---|---|---|"]
    for model in models():
        d = definition(model)
        own = ", ".join(f"`{name.split('/')[1]}`" for name in recipes(model))
        rows.append(f"| [{model}]({model}.md) | {layers(d)} | {d.parameters:,} | {own} |")
    text = "A page for each, written by `python docs/write_models.py`; `nemotron-h recipe list` prints the recipes."
    return "\n".join(["# Models", "", text, "", *rows, ""])


def table() -> str:
    """Return README's table of models, in lines of at most 100 characters."""
    rows = ["| model | layers | parameters | stages with a recipe |", "|---|---|---|---|"]
    of_series = {
        title: [name for name in models() if definition(name).family == family] for title, family in SERIES.items()
    }
    for model in models():
        d = definition(model)
        if not any(model in names for names in of_series.values()):
            rows.append(f"| {model} | {layers(d, letters=True)} | {size(d.parameters)} | {brief(stage_names(model))} |")
    for title, names in of_series.items():
        ends = [definition(name) for name in (names[0], names[-1])]
        letters = " and ".join(kind.letter for kind in ends[0].kinds)
        span = " to ".join(size(end.parameters) for end in ends)
        rows.append(f"| {title}, {len(names)} sizes | {letters} | {span} | {stage_names(*names)} |")
    return "\n".join(rows)


def readme() -> str:
    """Return README with its table as it is now."""
    pattern = re.compile(f"({re.escape(BEGIN)}\n).*?(\n{re.escape(END)})", re.DOTALL)
    return pattern.sub(lambda match: f"{match[1]}{table()}{match[2]}", README.read_text())


def pages() -> dict[Path, str]:
    """Return file -> content of all that this script writes."""
    before = os.getcwd()
    with tempfile.TemporaryDirectory() as empty:  # a plan reads runs that are in the folder, such as the teacher
        os.chdir(empty)
        try:
            written = {DOCS / "models" / f"{model}.md": page(model) for model in models()}
            return {**written, DOCS / "models" / "index.md": index(), README: readme()}
        finally:
            os.chdir(before)


if __name__ == "__main__":
    for file, content in pages().items():
        file.parent.mkdir(exist_ok=True)
        file.write_text(content)
