"""Code of a completion: the part that can be run, without what its entry point does not reach. After EvalPlus."""

from __future__ import annotations

import ast
import warnings
from collections.abc import Iterator

_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
_ERRORS = (SyntaxError, ValueError, MemoryError, RecursionError)


def sanitised(text: str, entry_point: str) -> str:
    """Return the code of a text that defines a function.

    Of the longest range of lines that parses: imports, and the functions, classes and assignments that the entry point
    reaches; functions without `return` are left out, and of several definitions of a name the first stays. Without a
    definition of the entry point, the whole range.
    """
    extracted = parsable(text)
    tree = _parsed(extracted)
    definitions: dict[str, ast.stmt] = {}
    for statement in tree.body if tree else ():
        for name in _defined(statement):
            definitions.setdefault(name, statement)
    if entry_point not in definitions:
        return extracted
    reached, waiting = set(), [entry_point]
    while waiting:
        name = waiting.pop()
        if name in definitions and name not in reached:
            reached.add(name)
            waiting += [node.id for node in ast.walk(definitions[name]) if isinstance(node, ast.Name)]
    wanted = {id(definitions[name]) for name in reached}
    imports = [each for each in tree.body if isinstance(each, ast.Import | ast.ImportFrom)]
    others = [each for each in tree.body if id(each) in wanted]
    try:
        return "\n".join(map(ast.unparse, [*imports, *others])) + "\n"
    except RecursionError:
        return extracted


def parsable(text: str) -> str:
    """Return the range of lines with the most lines that are not empty that parses as Python; the first of several."""
    lines = text.replace("\r\n", "\n").replace("\t", "    ").split("\n")
    full = [0]  # lines that are not empty, before each
    for line in lines:
        full.append(full[-1] + bool(line.strip()))
    ranges = [(begin, end) for begin in range(len(lines)) for end in range(begin + 1, len(lines) + 1)]
    ranges = [(b, e) for b, e in ranges if lines[b].strip() and lines[e - 1].strip()]
    for begin, end in sorted(ranges, key=lambda ends: (full[ends[0]] - full[ends[1]], ends)):
        if _parsed(code := "\n".join(lines[begin:end])) is not None:
            return code
    return ""


def entry_point_of(test: str) -> str:
    """Return the name of the function that an assertion calls first; empty without one.

    MBPP names its functions in its tests alone: `assert set(similar((3, 4))) == ...` is of `similar`.
    """
    tree = _parsed(test)
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)] if tree else []
    names = [call.func.id for call in calls if isinstance(call.func, ast.Name)]
    builtins = __builtins__ if isinstance(__builtins__, dict) else vars(__builtins__)
    return next((name for name in names if name not in builtins), "")


def _parsed(code: str) -> ast.Module | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of escapes in what a model wrote
        try:
            return ast.parse(code)
        except _ERRORS:
            return None


def _defined(statement: ast.stmt) -> Iterator[str]:
    """Yield the names that a statement of a module defines, as far as they are kept."""
    if isinstance(statement, ast.ClassDef):
        yield statement.name
    elif isinstance(statement, _FUNCTIONS):
        if any(isinstance(node, ast.Return) for node in ast.walk(statement)):
            yield statement.name
    elif isinstance(statement, ast.Assign | ast.AnnAssign | ast.AugAssign):
        targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
        for target in targets:
            yield from (node.id for node in ast.walk(target) if isinstance(node, ast.Name))
