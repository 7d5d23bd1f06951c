"""`nemotron-h data ...`: prepare and verify blends, and look at what a run makes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from nemotron_h.cli.long_questions import long_questions
from nemotron_h.cli.pictures import pictures
from nemotron_h.cli.retrieval import retrieval
from nemotron_h.cli.solutions import solutions
from nemotron_h.core.errors import UserError
from nemotron_h.core.units import parse_count
from nemotron_h.data.blend import load_blend
from nemotron_h.schema.recipe import DataSchema

app = typer.Typer(no_args_is_help=True, help="Prepare, verify and look at data blends.", rich_markup_mode=None)

BlendOption = Annotated[
    str, typer.Option("--blend", help="Name of a shipped blend (sample_small, sample, nemotron_h) or a YAML file.")
]
RootOption = Annotated[
    Path | None,
    typer.Option("--root", envvar="NEMOTRON_H_DATA", help="Where prepared data lives.", show_default="./data"),
]


@app.command()
def prepare(
    blend: BlendOption,
    root: RootOption = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes.", show_default="all cores")] = None,
    force: Annotated[bool, typer.Option("--force", help="Rebuild everything, the tokenizer included.")] = False,
) -> None:
    """Fetch, tokenise and index a blend. Run it again at any time: it continues, or does nothing when all is up to
    date.
    """
    from nemotron_h.data.prepare.pipeline import prepare as run

    run(load_blend(blend), root, workers=workers, force=force, console=Console())


@app.command()
def verify(blend: BlendOption, root: RootOption = None) -> None:
    """Compare prepared data with its manifest: counts, hashes, structure, and a decoded sample of every source."""
    from nemotron_h.data.prepare.verify import verify as run

    run(load_blend(blend), root, console=Console())


@app.command()
def problems(
    out: Annotated[Path, typer.Option("--out", help="Folder to write.")],
    tasks: Annotated[
        str, typer.Option("--tasks", help="arithmetic, modular, lists, countdown, joined by commas.")
    ] = "arithmetic,modular,lists,countdown",
    count: Annotated[int, typer.Option("--count", min=1, help="Problems of each task to train on.")] = 10_000,
    test_count: Annotated[int, typer.Option("--test-count", min=1, help="Test problems of each task.")] = 200,
    difficulty: Annotated[str, typer.Option("--difficulty", help="Operations, such as 2 or 1-3.")] = "2-3",
    seed: Annotated[int, typer.Option("--seed", min=0, help="The same seed writes the same files.")] = 0,
    thoughts: Annotated[
        bool,
        typer.Option("--thoughts", help="Conversations ask for a thought, which has the steps, and for none by turns."),
    ] = False,
) -> None:
    """Write problems whose answers can be checked, with solutions in steps: texts, conversations, test problems.

    Test problems are none of those to train on, whatever the seeds. --out gets problems.yaml and problems_chat.yaml,
    the blends for pretraining and fine-tuning. Example:

    nemotron-h data problems --tasks arithmetic,countdown --count 20000 --seed 1 --out runs/problems

    nemotron-h data problems --tasks arithmetic --difficulty 1-3 --thoughts --out runs/thoughts
    """
    from nemotron_h.core.errors import naming
    from nemotron_h.evaluation.problems.generate import difficulties, write_folder

    names = [name.strip() for name in tasks.split(",") if name.strip()]
    if not names or len({*names}) < len(names):
        raise UserError(f"--tasks {tasks[:80]!r} names none, or one twice")
    with naming("--out"):
        files = write_folder(out, names, count, test_count, difficulties(difficulty), seed, thoughts)
    typer.echo("\n".join(map(str, files)))


app.command()(solutions)
app.command()(retrieval)
app.command()(pictures)
app.command("questions")(long_questions)


@app.command()
def pin(
    blend: Annotated[str, typer.Argument(help="A YAML file, whose revisions are replaced; or a shipped blend's name.")],
    out: Annotated[
        Path | None, typer.Option("--out", help="Of a shipped blend: the file to write, which has the revisions alone.")
    ] = None,
) -> None:
    """Write the newest commit of every data set of the Hub that a blend leaves unpinned, or names by branch or tag.

    Asks the Hub (HF_ENDPOINT, HF_TOKEN). Commits that a blend names already stay as they are.
    """
    from nemotron_h.data.pin import pin as run

    run(blend, out, typer.echo)


def _tokens(value: str) -> int:
    try:
        return parse_count(value)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


_BLEND_HELP = "Name of a shipped blend (sample_small, sample, nemotron_h) or a YAML file."
TokensOption = Annotated[
    int | None, typer.Option("--tokens", parser=_tokens, metavar="COUNT", help="Length of the run: 15T, 380B, 983040.")
]
SeqLengthOption = Annotated[int | None, typer.Option("--seq-length", min=1, help="Tokens per sequence.")]
GlobalBatchOption = Annotated[int | None, typer.Option("--global-batch", min=1, help="Sequences per step.")]


@app.command()
def show(
    blend: Annotated[str, typer.Argument(help=_BLEND_HELP)],
    tokens: TokensOption = None,
    seq_length: SeqLengthOption = None,
    global_batch: GlobalBatchOption = None,
    root: RootOption = None,
    png: Annotated[Path | None, typer.Option("--png", help="Also plot the shares over the run.")] = None,
) -> None:
    """Show phases x categories, where the phases switch, and tokens, epochs and disk of every source.

    With --tokens: tokens and epochs over a run of that length, and a warning where a source is repeated more often than
    its limit. With --seq-length and --global-batch: the switches in steps.
    """
    from nemotron_h.data import show as shown

    if (seq_length is None) != (global_batch is None) or (seq_length and tokens is None):
        raise UserError("switches in steps need all of --tokens, --seq-length and --global-batch")
    tokens_per_step = seq_length * global_batch if seq_length and global_batch else None
    view = shown.overview(load_blend(blend), root, tokens, tokens_per_step)
    console = Console(highlight=False)
    shown.show(view, console)
    if png is not None:
        from nemotron_h.data.plot import plot

        plot(view, png)
        console.print(f"Wrote {png}", soft_wrap=True, markup=False)


@app.command()
def peek(
    blend: Annotated[str | None, typer.Argument(help=_BLEND_HELP, show_default="the recipe's")] = None,
    step: Annotated[
        int | None,
        typer.Option("--step", min=0, help="Which step of the run, from 0.", show_default="the checkpoint's, or 0"),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option("--recipe", help="Take the run's settings from this recipe; options below replace them."),
    ] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option("--checkpoint", help="A checkpoint, or a run: what a run that resumes there sees."),
    ] = None,
    blend_change: Annotated[
        str | None,
        typer.Option("--blend-change", metavar="from_step", help="As resume.blend_change: the data may be another."),
    ] = None,
    tokens: TokensOption = None,
    seq_length: SeqLengthOption = None,
    global_batch: GlobalBatchOption = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Of the order.", show_default="the run's, or 1234")] = None,
    root: RootOption = None,
    limit: Annotated[int, typer.Option(min=0, help="Samples to show; 0: all.")] = 8,
    characters: Annotated[int, typer.Option(min=0, help="Of each sample; 0: all.")] = 600,
) -> None:
    """Show the decoded samples that a step of a run sees, each with its source, epoch and window.

    What is not given comes from the recipe, then from the checkpoint. With --checkpoint, a run is continued there: with
    other data than before, --blend-change from_step (or the recipe's resume.blend_change) shows what it sees then.
    """
    from nemotron_h.core.units import count_of
    from nemotron_h.data.feed.peek import Peek, RunSettings
    from nemotron_h.data.feed.peek import show as show_samples
    from nemotron_h.data.feed.phase_plan import RANDOM_ORDER
    from nemotron_h.recipe.checks import check_blend_change
    from nemotron_h.recipe.compose import compose

    given = {
        "blend": blend,
        "--tokens": tokens,
        "--seq-length": seq_length,
        "--global-batch": global_batch,
        "--seed": seed,
    }
    if blend_change is not None and checkpoint is None:
        raise UserError("--blend-change says how a checkpoint is continued", "Name it: --checkpoint runs/NAME")
    check_blend_change(blend_change, "--blend-change as ")
    values: dict[str, Any] = {"--seed": DataSchema.seed}
    phase_order = DataSchema.phase_order
    recorded = None if checkpoint is None else _recorded(checkpoint)
    if recorded is not None:
        plan = recorded["order"]["plan"]
        known = recorded["blend_file"] if Path(recorded["blend_file"]).is_file() else recorded["blend"]
        lengths = (recorded["horizon_tokens"], plan["seq_length"], plan["global_batch_size"], plan["seed"])
        values = dict(zip(given, (known, *lengths), strict=True))
        phase_order = "random" if plan["phases"][0]["name"] == RANDOM_ORDER else phase_order
    if recipe is not None:
        composed = compose(recipe)
        data, root = composed.data, root or composed.data.root
        length = count_of(composed.tokens, "tokens", f"recipe {recipe}")
        values = dict(zip(given, (data.blend, length, data.seq_length, data.global_batch_size, data.seed), strict=True))
        phase_order = data.phase_order
        blend_change = blend_change or composed.resume.blend_change
    values |= {key: value for key, value in given.items() if value is not None}
    missing = [key for key in given if key not in values]
    if missing:
        raise UserError(f"the run is not known: {', '.join(missing)} missing", "Give them, --recipe or --checkpoint.")
    name, *settings = (values[key] for key in given)
    state = None
    if recorded is not None:
        root, state = root or recorded["root"], recorded["order"]
    run = Peek(load_blend(name), RunSettings(*settings, phase_order), root, state, blend_change)
    if step is None:
        step = state["step"] if state else 0
    show_samples(run, step, Console(highlight=False), limit or None, characters or None)


def _recorded(checkpoint: Path) -> dict[str, Any]:
    """Return what a checkpoint's record says of its data."""
    from nemotron_h.checkpoint.reader import find_checkpoint, read_record

    found = find_checkpoint(checkpoint)
    data = read_record(found)["data"]
    if "order" not in data:
        raise UserError(f"{found} was written by an older version, which did not record how far the data was read")
    return data
