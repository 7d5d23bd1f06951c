"""Words of the library and its documents: verbs open docstrings, terms are those of the field, lines are short."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import house

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
#: no docstring opens so, and none of a function with the words of the second line (ruff's D401 lets some of both pass)
OPENINGS = {"As", "How", "Of", "One", "What", "Where", "Whether", "Which"}
NO_VERBS = {"A", "All", "An", "Each", "Every", "Its", "The", "Their", "This", "When", "Why"}
#: what nobody in the field says -> what they say
TERMS = {
    r"matrix products?|(FP8|float32|bfloat16|widened) products?": "matmul",
    r"parted": "split",
    r"(draw|drawn|drew)s? (a|the) (curve|chart|figure)s?": "plot",
    r"(answer|conversation|prompt|sequence|text)s? (is|are) cut": "truncated",
}

Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def _docstrings() -> Iterator[tuple[str, Documented, str]]:
    """Yield place, node and docstring of all that has one."""
    for module, file in house.modules().items():
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, Documented) and (text := ast.get_docstring(node)):
                yield f"{module}:{getattr(node, 'lineno', 1)}", node, text


def test_docstrings_open_with_a_verb() -> None:
    wrong = []
    for place, node, text in _docstrings():
        opening = re.match(r"[\w`]*", text)[0]
        if opening in OPENINGS or (opening in NO_VERBS and isinstance(node, ast.FunctionDef)):
            wrong.append(f"{place}: {text.splitlines()[0]}")
    assert not wrong


def test_terms_are_those_of_the_field() -> None:
    texts = [(place, text) for place, _, text in _docstrings()]
    for module in sorted({place.split(":")[0] for place, _ in texts}):
        tokens = tokenize.generate_tokens(io.StringIO(house.modules()[module].read_text()).readline)
        texts += [(f"{module}:{t.start[0]}", t.string) for t in tokens if t.type == tokenize.COMMENT]
    wrong = []
    for place, text in texts:
        for banned, term in TERMS.items():
            if match := re.search(rf"\b({banned})\b", " ".join(text.split())):
                wrong.append(f"{place}: {match[0]}; say {term}")
    assert not wrong


def test_lines_of_documents_are_short() -> None:
    """A diff then shows the sentence that changed; a row of a table is one line, however long."""
    wrong = []
    for file in DOCUMENTS:
        lines = enumerate(file.read_text().splitlines(), 1)
        wrong += [f"{file.name}:{n}" for n, line in lines if len(line) > 120 and not line.lstrip().startswith("|")]
    assert not wrong


def test_documents_name_files_that_exist() -> None:
    wrong = []
    for file in DOCUMENTS:
        text = file.read_text()
        links = (link for link in re.findall(r"\]\(([^)#\s]+)", text) if ":" not in link)
        wrong += [f"{file.name}: {link}" for link in links if not (file.parent / link).exists()]
        modules = re.findall(r"`([a-z0-9_]+(?:/[a-z0-9_]+)*/[a-z0-9_]+\.py)", text)
        wrong += [
            f"{file.name}: {module}"
            for module in modules
            if not (ROOT / module).exists() and not (house.LIBRARY / module).exists()
        ]
    assert not wrong
