"""Calls of functions that a text states, and whether they are the right ones: the rules of the AST check of BFCL v2,
the Berkeley Function Calling Leaderboard, single turn. Nothing is run.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from nemotron_h.evaluation.grading import foreign_calls

#: name of a function and its arguments
Call = tuple[str, dict[str, Any]]

#: of a schema -> of a value
_TYPES: dict[str, type] = {
    "string": str, "integer": int, "float": float, "boolean": bool, "array": list, "tuple": list, "dict": dict,
    "any": str,
}  # fmt: skip
_NESTED = ("array", "tuple")
#: in names of categories: of several calls, or of several functions to choose from
_SEVERAL = ("parallel", "multiple")
_NEGLIGIBLE = re.compile(r"[ ,./\-_*^]")
_OPERATORS: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.Pow: operator.pow,
}  # fmt: skip
#: ours: a power beyond this is no argument but work without end
_MOST_POWER = 1000


def right(text: str, record: Mapping[str, Any]) -> bool:
    """Return whether an answer calls what a record asks for; where no function fits, whether it calls none.

    Args:
        record: `category`, `function` (descriptions), `ground_truth` (of each call, its name -> argument -> values of
            which each is right).
    """
    category = record["category"]
    language = foreign_calls.LANGUAGES.get(category)
    try:
        calls = stated(text, language)
    except (ValueError, SyntaxError, RecursionError, MemoryError, ArithmeticError, TypeError):
        calls = []
    if "relevance" in category:
        return bool(calls) != ("irrelevance" in category)
    functions, answers = record["function"], record["ground_truth"]
    if len(calls) != len(answers):
        return False
    if not any(part in category for part in _SEVERAL):
        return _same(functions[0], calls[0], answers[0], language)
    left = list(calls)
    for answer in answers:
        described = [function for function in functions if function["name"] == next(iter(answer))]
        match = next((call for call in left if described and _same(described[0], call, answer, language)), None)
        if match is None:
            return False
        left.remove(match)
    return True


def check(record: Mapping[str, Any]) -> None:
    """Refuse a record that no answer could be judged by, before a model answers.

    Errors:
        ValueError, KeyError, TypeError: a description or a right answer has another form.
    """
    language = foreign_calls.LANGUAGES.get(record["category"])
    for answer in record["ground_truth"]:
        if not isinstance(answer, Mapping) or len(answer) != 1:
            raise ValueError("a right answer is not of one call")
        ((name, possible),) = answer.items()
        if lists := [key for key, values in possible.items() if not isinstance(values, list)]:
            raise ValueError(f"{name} has no list of values for {lists[0]}")
    for function in record["function"] if record["ground_truth"] else ():
        schema = function["parameters"]
        if function["name"] in (None, "") or not isinstance(schema["required"], list):
            raise ValueError("a description has no name, or no list of required parameters")
        for described in schema["properties"].values():
            _types(described, language)


def stated(text: str, language: str | None = None) -> list[Call]:
    """Return the calls that an answer states: `[name(argument=value, ...), ...]`, whose brackets may be left out.

    Args:
        language: `java` or `javascript`, of a single call; None: Python.
    Errors:
        ValueError, SyntaxError, ...: it states none.
    """
    text = text.strip("`\n ")
    text = text if text.startswith("[") else f"[{text}"
    text = text if text.endswith("]") else f"{text}]"
    if language:
        return [foreign_calls.call(text[1:-1], language)]
    body = ast.parse(text.strip("[]'"), mode="eval").body
    calls = body.elts if isinstance(body, ast.Tuple | ast.List | ast.Set) else [body]
    if not all(isinstance(call, ast.Call) for call in calls):
        raise ValueError("there is something else than calls")
    return [_call(call) for call in calls]


def _call(node: ast.Call) -> Call:
    """Return the name of a call and its named arguments; others are not counted."""
    parts, place = [], node.func
    while isinstance(place, ast.Attribute):
        parts.append(place.attr)
        place = place.value
    if isinstance(place, ast.Name):
        parts.append(place.id)
    return ".".join(reversed(parts)), {keyword.arg: _value(keyword.value) for keyword in node.keywords}


def _value(node: ast.expr) -> Any:
    """Return the value of an argument; names, and calls without named arguments, are their text."""
    if isinstance(node, ast.Constant):
        return "..." if node.value is Ellipsis else node.value
    if isinstance(node, ast.UnaryOp):
        return -node.operand.value if isinstance(node.operand, ast.Constant) else _refuse(node)
    if isinstance(node, ast.List):
        return [_value(each) for each in node.elts]
    if isinstance(node, ast.Tuple):
        return tuple(_value(each) for each in node.elts)
    if isinstance(node, ast.Dict):
        return {_value(key): _value(value) for key, value in zip(node.keys, node.values, strict=True)}
    if isinstance(node, ast.BinOp):
        return _arithmetic(node)
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Call):
        return dict([_call(node)]) if node.keywords else ast.unparse(node)
    if isinstance(node, ast.Subscript):
        return ast.unparse(node)
    return _refuse(node)


def _arithmetic(node: ast.expr) -> Any:
    """Return the value of arithmetic on constants."""
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float | str):
        return node.value
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_arithmetic(node.operand)
    if not isinstance(node, ast.BinOp) or type(node.op) not in _OPERATORS:
        return _refuse(node)
    first, second = _arithmetic(node.left), _arithmetic(node.right)
    if isinstance(node.op, ast.Pow) and abs(second) > _MOST_POWER:
        return _refuse(node)
    if not isinstance(node.op, ast.Add) and (isinstance(first, str) or isinstance(second, str)):
        return _refuse(node)  # of text, a sum alone is no work without end
    return _OPERATORS[type(node.op)](first, second)


def _refuse(node: ast.expr) -> Any:
    raise ValueError(f"{type(node).__name__} is no value of an argument")


def _same(function: Mapping[str, Any], call: Call, answer: Mapping[str, Any], language: str | None) -> bool:
    """Return whether a call is the right one: of the function's name, with all required parameters and no unknown one,
    each of a right type and value; parameters that are left out may be.
    """
    name, arguments = call
    possible = next(iter(answer.values()))
    schema = function["parameters"]
    if name != function["name"] or not {*schema["required"]} <= arguments.keys():
        return False
    if not arguments.keys() <= schema["properties"].keys() & possible.keys():
        return False
    if any(parameter not in arguments and "" not in values for parameter, values in possible.items()):
        return False
    return all(_fits(value, possible[key], schema["properties"][key], language) for key, value in arguments.items())


def _fits(value: Any, possible: Sequence[Any], described: Mapping[str, Any], language: str | None) -> bool:
    """Return whether an argument has a type and a value that are right."""
    expected, nested = _types(described, language)
    if language:
        value = foreign_calls.converted(value, described, language)
    elif described["type"] == "tuple" and isinstance(value, tuple):
        value = list(value)
    elif described["type"] == "float" and type(value) is int:
        value = float(value)
    typical = _type_of(possible)
    variable = typical not in (None, expected)
    if type(value) is not expected:
        if typical is not type(value):
            return False
        variable = True
    elif nested and not any(_all_of(nested, value, each) for each in possible):
        return False
    if variable:
        return value in possible
    if expected is dict:
        return any(_same_dict(value, each) for each in possible if each != "")
    if expected is list and nested is dict:
        return any(_same_dicts(value, each) for each in possible)
    if expected is str:
        return _plain(value) in [_plain(each) for each in possible if isinstance(each, str)]
    if expected is list:
        return [*map(_plain, value)] in [[*map(_plain, each)] for each in possible]
    return value in possible


def _types(described: Mapping[str, Any], language: str | None) -> tuple[type, type | None]:
    """Return the types of a parameter's value and of the elements of a list."""
    if language:
        return foreign_calls.types(described, language)
    kind = described["type"]
    return _TYPES[kind], _TYPES[described["items"]["type"]] if kind in _NESTED else None


def _type_of(possible: Sequence[Any]) -> type | None:
    """Return the type of the first value; the empty text says that a parameter may be left out."""
    return next((type(each) for each in possible if each != ""), None)


def _all_of(nested: type, value: Sequence[Any], possible: Any) -> bool:
    """Return whether all elements are of a type, or of that of a right list's elements; one level deep."""
    return not isinstance(possible, list) or all(type(each) in (nested, _type_of(possible)) for each in value)


def _plain(value: Any) -> Any:
    """Return a text without spaces and ,./-_*^, in small letters, with one kind of quotes; other values as they are."""
    return _NEGLIGIBLE.sub("", value).lower().replace("'", '"') if isinstance(value, str) else value


def _same_dict(value: Mapping[str, Any], possible: Mapping[str, Sequence[Any]]) -> bool:
    if any(key not in value and "" not in values for key, values in possible.items()):
        return False
    return all(key in possible and _plain(each) in [*map(_plain, possible[key])] for key, each in value.items())


def _same_dicts(value: Sequence[Mapping[str, Any]], possible: Sequence[Any]) -> bool:
    pairs = zip(value, possible, strict=False)
    return len(value) == len(possible) and all(each != "" and _same_dict(ours, each) for ours, each in pairs)
