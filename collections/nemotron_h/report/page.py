"""Write the report of a run into its folder: one HTML page with its pictures inside, and the picture of its loss."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import NamedTuple

from nemotron_h.checkpoint.definition import read_definition
from nemotron_h.checkpoint.folders import RECORD
from nemotron_h.core.errors import UserError, naming
from nemotron_h.core.files import whole_file
from nemotron_h.core.page import render
from nemotron_h.core.plot import save
from nemotron_h.core.units import short_count
from nemotron_h.report import charts, figures, incidents, ranks, sections
from nemotron_h.report.run import PICTURE, REPORT, Run, read_run

_PAGE = """{% extends "page" %}{% from "parts" import facts, table, chart %}
{% block title %}{{ run.recipe.name }}: {{ state }}{% endblock %}
{% block head %}<h1>{{ run.recipe.name }}</h1>
<p><span class="state {{ state }}">{{ state }}{% if state != "finished" %} at step {{ "{:,}".format(run.last) }} of
{{ "{:,}".format(run.max_steps) }}{% endif %}</span></p>
<p class="note">{{ subtitle }}</p>{% if why %}<p>{{ why }}</p>{% endif %}
{% for line in notes %}<p class="note">{{ line }}</p>{% endfor %}
{% endblock %}
{% block main %}
{{ facts(numbers) }}
{% if hero %}<h2>Loss</h2>
<figure class="hero">{{ hero[0] }}{% if hero[1] %}<figcaption>{{ hero[1] }}</figcaption>{% endif %}</figure>
<div class="charts">{% for title, note, svg in charts %}
<section><h2>{{ title }}</h2>{{ chart(title, note, svg) }}</section>{% endfor %}</div>{% endif %}
{% for title, note, rows in gemms %}<h2>{{ title }}</h2><p class="note">{{ note }}</p>
{{ table([("layers", ""), ("type", ""), ("matmul", ""), ("tokens x inputs x outputs", "n"), ("precision", ""),
  ("reason" if rows | map("last") | join else "", "wide")], rows) }}
{% endfor %}
<h2>Go on, or repeat it</h2>
{% for title, command in commands %}<p class="note">{{ title }}</p><pre tabindex="0">{{ command }}</pre>{% endfor %}
{% if changes %}<h2>Settings that a resume changed</h2>
{{ table([("from step", "n"), ("setting", ""), ("before", ""), ("after", "")], changes) }}{% endif %}
{% if incidents %}<h2>Incidents</h2>
<p class="note">{% for name, value in goodput %}{{ name }}: {{ value }}. {% endfor %}</p>
{{ table([("when", ""), ("step", "n"), ("kind", ""), ("evidence", "wide"), ("time lost", "n")], incidents) }}{% endif %}
{% if ranks %}<h2>Ranks</h2>
<p class="note">A step of each rank before it waits for others, by step {{ "{:,}".format(ranks.step) }}; the slowest
first.</p>
{{ table([("rank", "n"), ("seconds", "n"), ("times the median", "n"), ("slow since", "")], rank_rows) }}{% endif %}
<h2>Where it ran</h2>
{{ table([("", ""), ("", "wide")], machine) }}
<h2>Data</h2>
<p class="note">{{ data_note }}</p>
{{ table([("source", ""), ("training tokens", "n"), ("their sha256", ""), ("validation tokens", "n"),
  ("their sha256", "")], sources) }}
{% endblock %}
{% block foot %}Drawn by <code>nemotron-h report {{ folder }}</code> from its files.{% endblock %}
"""


class Report(NamedTuple):
    """Files of a report, and what its reader has to know; a run without a step has no picture of its loss."""

    page: Path
    picture: Path | None
    notes: list[str]


def write(folder: Path, out: Path | None = None) -> Report:
    """Write the report of a run.

    Args:
        folder: of the run.
        out: folder of the report; that of the run by default.
    Errors:
        UserError: the folder holds no run, its record is not readable, or the report cannot be written.
    """
    run, out = read_run(folder), out or folder
    report = Report(out / REPORT, out / PICTURE if run.steps else None, list(sections.notes(run)))
    try:
        text = _html(run)
    except (AttributeError, KeyError, TypeError) as error:
        raise UserError(f"{folder / RECORD} is no whole record of a run: {type(error).__name__} {error}") from error
    with naming("report"):
        out.mkdir(parents=True, exist_ok=True)
        with whole_file(report.page) as temporary:
            temporary.write_text(text, encoding="utf-8")
        if report.picture:
            save_loss(run, report.picture)
    return report


def save_loss(run: Run, path: Path) -> None:
    """Write the picture of a run's loss, which stands alone; the suffix decides the format.

    Errors:
        UserError: it cannot be written.
    """
    tokens = short_count(run.last * run.tokens_per_step)
    title = f"{run.recipe['name']}: loss over {tokens} tokens"
    save(figures.loss(run, 860, 400, title), path, title)


def _html(run: Run) -> str:
    definition = read_definition(run.record, str(run.folder))
    state, why = run.state
    ran, times = incidents.processes(run.folder), ranks.read_ranks(run.folder)
    return render(
        _PAGE,
        run=run,
        folder=shlex.quote(str(run.folder)),
        state=state,
        why=why,
        subtitle=sections.subtitle(run, definition),
        notes=list(sections.notes(run)),
        numbers=list(sections.numbers(run, definition)),
        hero=charts.hero(run) if run.steps else None,
        charts=list(charts.charts(run)) if run.steps else [],
        gemms=list(sections.gemms(run, definition)),
        commands=list(sections.commands(run)),
        changes=list(sections.changes(run)),
        incidents=incidents.table(ran),
        goodput=incidents.words(incidents.summary(ran)),
        ranks=times,
        rank_rows=ranks.table(times) if times else [],
        machine=list(sections.machine(run)),
        data_note=sections.data_note(run),
        sources=list(sections.sources(run)),
    )
