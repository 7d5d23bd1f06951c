"""Write what questions about images came to: CSV, JSON, a page, a figure, and the table of a terminal."""

from __future__ import annotations

import base64
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.table import Table

from nemotron_h.core import plot
from nemotron_h.core.files import whole_file, write_csv, write_json
from nemotron_h.core.page import render
from nemotron_h.data.images.read import read_image
from nemotron_h.evaluation.pictures.measure import Judged
from nemotron_h.evaluation.pictures.questions import OWN

#: ours: pictures of each test on the page
_SHOWN = 24
#: ours: pictures of the figure, which are the first of its tests, and those of a row
_FIGURE, _ROW = 12, 6
_HEADINGS = ("run", "test", "asked with", "questions", "exact match, %", "ANLS, %")
_PAGE = """{% extends "page" %}{% from "parts" import table %}
{% block title %}images: {{ runs | join(", ") }}{% endblock %}
{% block head %}<h1>Questions about images</h1><p class="note">{{ runs | join(", ") }}</p>{% endblock %}
{% block main %}{{ table(columns, rows) }}
{% for name, items in tests %}<h2>{{ name }}</h2><div class="charts">
{% for item in items %}<figure>{% for image in item.images %}
<img src="{{ image }}" alt="" style="max-width:100%;min-width:84px;image-rendering:pixelated">{% endfor %}
<figcaption>{{ item.question }}<br>right: {{ item.right }}
{% for run, answer, exact in item.answers %}<br>{{ run }}: {{ answer }} {{ "✓" if exact else "✗" }}{% endfor %}
</figcaption></figure>{% endfor %}</div>{% endfor %}{% endblock %}
{% block foot %}Drawn by <code>nemotron-h vqa</code> from its answers.{% endblock %}
"""


def cells(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Return the lines of the table."""
    return [
        [
            *(str(row[key]) for key in ("run", "test", "asked with")),
            f"{row['questions']:,}",
            *(f"{row[key]:.1f} ± {row[f'{key}_error']:.1f}" for key in ("exact", "anls")),
        ]
        for row in rows
    ]


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """Return the table of a terminal."""
    grid = Table(box=None, padding=(0, 2, 0, 0))
    for number, heading in enumerate(_HEADINGS):
        grid.add_column(heading, justify="left" if number < 3 else "right", no_wrap=True)
    for line in cells(rows):
        grid.add_row(*line)
    return grid


def write(rows: Sequence[dict[str, Any]], judged: Sequence[Judged], folder: Path) -> list[Path]:
    """Write `vqa.csv`, `vqa.json`, `report.html` and `questions.svg`."""
    files = [folder / name for name in ("vqa.csv", "vqa.json", "report.html", "questions.svg")]
    write_csv(rows, files[0])
    write_json(files[1], list(rows))
    with whole_file(files[2]) as temporary:
        temporary.write_text(_html(rows, judged), encoding="utf-8")
    shown, words = _figure(judged)
    plot.save(shown, files[3], words)
    return files


def _figure(judged: Sequence[Judged]) -> tuple[Figure, str]:
    """Return the first questions of every test, as many of each, with the last run's answers; and that as text."""
    tests: dict[str, list[Judged]] = {}
    for each in judged:
        if each.run == judged[-1].run and each.control == OWN:
            tests.setdefault(each.question.test, []).append(each)
    first = [each for test in tests.values() for each in test[: max(_FIGURE // len(tests), 1)]]
    rows = -(-len(first) // _ROW)
    figure, axes = plot.canvas(120 * _ROW, 160 * rows, rows, _ROW, squeeze=False)
    for each, at in itertools.zip_longest(first, axes.flat):
        at.axis("off")
        if each is None:
            continue
        at.imshow(read_image(each.question.pictures[0].read()), interpolation="nearest")
        at.set_title(each.question.test, fontsize=9, color=plot.MUTED, fontweight="normal", loc="center")
        colour = plot.SERIES[2] if each.exact else plot.SERIES[1]
        text = each.answer if each.exact else f"{each.answer or '(nothing)'}, not {each.question.answer}"
        at.text(0.5, -0.06, text, transform=at.transAxes, ha="center", va="top", fontsize=9, color=colour)
    said = "; ".join(f"{each.question.test}: {each.answer}, right is {each.question.answer}" for each in first)
    return figure, f"Questions about images and the answers of {judged[-1].run}. {said}"


def _html(rows: Sequence[dict[str, Any]], judged: Sequence[Judged]) -> str:
    columns = [(heading, "" if number < 3 else "n") for number, heading in enumerate(_HEADINGS)]
    runs = list(dict.fromkeys(row["run"] for row in rows))
    items: dict[str, dict[int, dict[str, Any]]] = {}
    for each in judged:
        question = each.question
        if each.control != OWN or question.number >= _SHOWN:
            continue
        shown = items.setdefault(question.test, {}).setdefault(
            question.number,
            {
                "images": [_source(picture.read()) for picture in question.pictures],
                "question": question.text,
                "right": question.answer,
                "answers": [],
            },
        )
        shown["answers"].append((each.run, each.answer, each.exact))
    tests = [(name, list(shown.values())) for name, shown in items.items()]
    return render(_PAGE, runs=runs, columns=columns, rows=cells(rows), tests=tests)


def _source(image: bytes) -> str:
    """Return an encoded image as the source of a page's; browsers find its format by themselves."""
    return f"data:image/*;base64,{base64.b64encode(image).decode()}"
