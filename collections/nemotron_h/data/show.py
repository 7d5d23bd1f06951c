"""Summary of a blend over a run: shares per phase, switches, tokens and epochs per source, disk. Imports no torch."""

from __future__ import annotations

import os
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from rich import filesize
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from nemotron_h.core.errors import UserError
from nemotron_h.core.units import short_count
from nemotron_h.data.blend import Blend, Phase
from nemotron_h.data.images.store import SUFFIXES as IMAGE_SUFFIXES
from nemotron_h.data.manifest import Manifest, check_manifest, data_root, load_manifest
from nemotron_h.data.phases import Horizon, PhaseSpan, phase_end, phase_spans
from nemotron_h.data.short_rows import ShortRows, normalised


@dataclass(frozen=True)
class PhaseShares:
    """A phase of a run.

    Attributes:
        name: of the phase.
        begin, end: in tokens; None when the length of the run is not given.
        span: the same in steps; None without seq_length and global_batch_size.
        categories: category -> share of the phase's tokens, normalised.
        sources: source -> share of the phase's tokens, normalised.
        written_sum: of the weights as written.
        short: its short rows; None without any.
    """

    name: str
    begin: Fraction | None
    end: Fraction | None
    span: PhaseSpan | None
    categories: dict[str, float]
    sources: dict[str, float]
    written_sum: float
    short: ShortRows | None = None

    @property
    def tokens(self) -> Fraction:
        """Return the length of the phase."""
        return self.end - self.begin

    @property
    def normalised(self) -> bool:
        """Return True if the shares differ from the weights as written (in percent)."""
        return abs(self.written_sum - 100) > 1e-9


@dataclass(frozen=True)
class SourceUse:
    """A source over the run.

    Attributes:
        name, category, max_epochs: of the source.
        tokens: that the run takes from it; None when the length of the run is not given.
        prepared: tokens of its training text; None when it is not prepared.
        disk: bytes of its `.bin` and `.idx` files, and of its images, of all splits.
        images: of its training conversations, which the prepared tokens do not count.
    """

    name: str
    category: str
    max_epochs: float
    tokens: float | None
    prepared: int | None
    disk: int
    images: int = 0

    @property
    def epochs(self) -> float | None:
        """Return the passes over its training text; None when one of the two is not known."""
        return self.tokens / self.prepared if self.tokens is not None and self.prepared else None

    @property
    def too_many(self) -> bool:
        """Return True if it is repeated more often than its limit."""
        return self.epochs is not None and self.epochs > self.max_epochs


@dataclass(frozen=True)
class Overview:
    """A blend over a run.

    Attributes:
        tokens: of the run, None when not given.
        state: of the prepared data, in words.
        problem: what a run would refuse to start with; empty when nothing.
    """

    blend: Blend
    tokens: int | None
    phases: list[PhaseShares]
    sources: list[SourceUse]
    state: str
    problem: str

    @property
    def categories(self) -> list[str]:
        """Return the categories in the order in which the phases name them."""
        return list(dict.fromkeys(c for phase in self.phases for c in phase.categories))

    def run_share(self, category: str) -> float:
        """Return a category's share of the whole run's tokens."""
        return sum(p.categories.get(category, 0.0) * float(p.tokens) for p in self.phases) / self.tokens

    def warnings(self) -> list[str]:
        """Return a line for each source that is repeated more often than its `max_epochs`."""
        return [
            f"{s.name}: {s.epochs:,.2f} epochs over the run, its limit is {s.max_epochs:g} "
            f"(sources.{s.name}.max_epochs): {short_count(s.tokens / s.max_epochs)} tokens would be enough text"
            for s in self.sources
            if s.too_many
        ]


def overview(
    blend: Blend, root: str | Path | None = None, tokens: int | None = None, tokens_per_step: int | None = None
) -> Overview:
    """Return the consequences of a blend for a run.

    Args:
        blend: from `load_blend`.
        root: the data root, looked into for what is prepared; see `data_root`.
        tokens: length of the run.
        tokens_per_step: seq_length * global_batch_size; says at which steps the phases switch.

    Errors:
        UserError: a phase does not fit into a run of this length, or the manifest is damaged.
    """
    phases = _phases(blend, tokens, tokens_per_step)
    manifest, problem = None, ""
    if (data_root(root) / blend.name / "manifest.json").is_file():
        manifest = load_manifest(root, blend.name)
        try:
            check_manifest(root, blend)
        except UserError as error:
            problem = str(error)
        state = f"prepared in {manifest.folder}"
    else:
        state = f"not prepared: there is no {data_root(root) / blend.name / 'manifest.json'}"
    uses = []
    for name, source in blend.sources.items():
        taken = None if tokens is None else sum(p.sources[name] * float(p.tokens) for p in phases)
        entry = manifest.sources.get(name) if manifest else None
        prepared = entry.splits["train"].tokens if entry and "train" in entry.splits else None
        disk = _disk(manifest, name) if entry else 0
        images = entry.splits["train"].images if prepared is not None else 0
        uses.append(SourceUse(name, source.category, source.max_epochs, taken, prepared, disk, images))
    return Overview(blend, tokens, phases, uses, state, problem)


def _phases(blend: Blend, tokens: int | None, tokens_per_step: int | None) -> list[PhaseShares]:
    bounds: list[Fraction | None] = [None] * (len(blend.phases) + 1)
    spans: list[PhaseSpan | None] = [None] * len(blend.phases)
    if tokens is not None:
        horizon = Horizon(tokens, tokens_per_step or 1)
        checked = phase_spans(blend.phases, horizon)
        bounds = [Fraction(0), *(phase_end(p.until, horizon) for p in blend.phases[:-1]), Fraction(tokens)]
        spans = checked if tokens_per_step else spans
    return [
        PhaseShares(
            p.name,
            bounds[n],
            bounds[n + 1],
            spans[n],
            p.category_shares(),
            blend.source_shares(n),
            p.weight_sum(),
            p.short,
        )
        for n, p in enumerate(blend.phases)
    ]


def _disk(manifest: Manifest, source: str) -> int:
    prefixes = [manifest.prefix(source, split) for split in manifest.sources[source].splits]
    files = [prefix + suffix for prefix in prefixes for suffix in (".bin", ".idx", *IMAGE_SUFFIXES)]
    return sum(os.path.getsize(file) for file in files if os.path.isfile(file))


def show(view: Overview, console: Console) -> None:
    """Print the tables of an overview, what was normalised, and warnings."""
    blend = view.blend
    length = "" if view.tokens is None else f", {view.tokens:,} tokens"
    console.print(Text.assemble((blend.name, "bold"), f"{length}. {blend.description}"), soft_wrap=True)
    console.print(_phase_table(view), markup=False)  # names may have brackets
    for phase in view.phases:
        if phase.normalised:
            line = f"{phase.name}: the weights sum to {phase.written_sum:.10g} as written; normalised to 100 %."
            console.print(line, markup=False)
    for phase in view.phases:
        if phase.short:
            line = (
                f"{phase.name}: {phase.short.share:.10g} of the rows are sequences of {phase.short.seq_length:,} tokens"
            )
            weights = ", ".join(f"{name} {100 * share:.4g}" for name, share in normalised(phase.short.weights).items())
            console.print(f"{line}{f', of which {weights} %' if weights else ''}.", markup=False, soft_wrap=True)
    console.print()
    console.print(_source_table(view), markup=False)
    console.print(f"Data {view.state}.", markup=False)
    total = sum(s.disk for s in view.sources)
    if total:
        images = sum(s.images for s in view.sources)
        files = ".bin, .idx and images" if images else ".bin and .idx"
        console.print(f"Disk: {filesize.decimal(total)} ({total:,} bytes of {files}).")
        if images:
            console.print(f"Images: {images:,} to train on. Their tokens depend on the model: none is counted above.")
    for line in [*view.warnings(), *([view.problem] if view.problem else [])]:
        console.print("[bold yellow]warning:[/bold yellow] ", end="")
        console.print(line, markup=False, soft_wrap=True)


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))


def _phase_table(view: Overview) -> Table:
    table = _table(
        "Percent of tokens (*: normalised)" if any(p.normalised for p in view.phases) else "Percent of tokens"
    )
    table.add_column("category", no_wrap=True)
    for phase in view.phases:
        table.add_column(phase.name + (" *" if phase.normalised else ""), justify="right", no_wrap=True)
    whole = view.tokens is not None
    if whole:
        table.add_column("whole run", justify="right", no_wrap=True)
    for category in view.categories:
        cells = [f"{100 * p.categories[category]:.2f}" if category in p.categories else "-" for p in view.phases]
        table.add_row(category, *cells, *([f"{100 * view.run_share(category):.2f}"] if whole else []))
    table.add_section()
    if not whole:
        table.add_row("ends", *(_written_end(p) for p in view.blend.phases))
        return table
    table.add_row("begins at token", *(short_count(p.begin) for p in view.phases), "0")
    table.add_row("tokens", *(short_count(p.tokens) for p in view.phases), short_count(view.tokens))
    if view.phases[0].span:
        spans = [p.span for p in view.phases]
        table.add_row("begins at step", *(f"{s.first_step:,}" for s in spans), "0")
        table.add_row("steps", *(f"{s.steps:,}" for s in spans), f"{spans[-1].end_step:,}")
    return table


def _written_end(phase: Phase) -> str:
    until = phase.until
    if until is None:
        return "the end"
    if until.fraction is not None:
        return f"{100 * until.fraction:g} %"
    return f"{until.tokens} tokens" if until.tokens is not None else f"last {until.last_tokens}"


def _source_table(view: Overview) -> Table:
    table = _table("Sources: tokens that the run takes, and what is prepared")
    for header in ("source", "category"):
        table.add_column(header, no_wrap=True)
    for header in ("tokens", "prepared", "epochs", "limit", "disk"):
        table.add_column(header, justify="right", no_wrap=True)
    for s in view.sources:
        epochs = "-" if s.epochs is None else f"{s.epochs:,.2f}"
        table.add_row(
            s.name,
            s.category,
            "-" if s.tokens is None else short_count(s.tokens),
            "not prepared" if s.prepared is None else short_count(s.prepared),
            Text(epochs, "bold yellow" if s.too_many else ""),
            f"{s.max_epochs:g}",
            filesize.decimal(s.disk) if s.disk else "-",
        )
    return table
