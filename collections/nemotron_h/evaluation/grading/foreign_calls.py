"""A call in Java's or JavaScript's notation, `name(argument=value, ...)`, whose values are converted by the types of a
schema, as BFCL's AST check does it: a value of another form stays text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

JAVA, JAVASCRIPT = "java", "javascript"
#: category of questions -> language
LANGUAGES = {JAVA: JAVA, JAVASCRIPT: JAVASCRIPT}
_TYPES: dict[str, dict[str, type]] = {
    JAVA: {
        "byte": int, "short": int, "integer": int, "long": int, "float": float, "double": float, "boolean": bool,
        "char": str, "String": str, "any": str, "Array": list, "ArrayList": list, "HashMap": dict,
    },
    JAVASCRIPT: {
        "String": str, "integer": int, "float": float, "Bigint": int, "Boolean": bool, "dict": dict, "array": list,
        "any": str,
    },
}  # fmt: skip
_LISTS = ("Array", "ArrayList", "array")
_NAME = re.compile(r"\s*([A-Za-z_$][\w$]*(?:\s*\.\s*[A-Za-z_$][\w$]*)*)\s*\(")
_ARGUMENT = re.compile(r"\s*([A-Za-z_$][\w$]*)\s*=(?![=>])\s*(.+)", re.DOTALL)
_LITERAL = re.compile(r"([\"'])(?:\\.|(?!\1)[^\\\n])*\1", re.DOTALL)
_IDENTIFIER = re.compile(r"\s*[A-Za-z_$][\w$]*\s*")
#: as BFCL's parser has it, `new HashMap<>() {{ put("a", 1); }}` is an empty map
_CLASS_BODY = re.compile(r"\)\s*\{.*$", re.DOTALL)
_CLOSING = {"(": ")", "[": "]", "{": "}"}
_INTEGER = r"-?\d+"
_REAL = r"-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?"
_JAVA_FORMS: dict[str, tuple[str, Callable[[str], Any]]] = {
    **dict.fromkeys(("byte", "short", "integer"), (_INTEGER, int)),
    "long": (rf"{_INTEGER}[lL]", lambda text: int(text[:-1])),
    "float": (rf"{_REAL}[fF]", lambda text: float(text[:-1])),
    "double": (_REAL, float),
    "boolean": ("true|false", lambda text: text == "true"),
}
_JS_FORMS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "integer": (_INTEGER, int),
    "float": (r"-?\d+(?:\.\d+)?", float),
    "Bigint": (rf"{_INTEGER}n", lambda text: int(text[:-1])),
    "Boolean": ("true|false", lambda text: text == "true"),
}


def call(text: str, language: str) -> tuple[str, dict[str | None, str]]:
    """Return the name of the one call of a text, and its arguments as text; a literal's is without its quotes.

    Errors:
        ValueError: it is no call, or an argument is named twice.
    """
    begin = _NAME.match(text)
    if not begin:
        raise ValueError("it begins with no call")
    parts = _split(text[begin.end() - 1 :], language)
    arguments: dict[str | None, str] = {}
    for part in parts:
        if match := _ARGUMENT.fullmatch(part):
            name, value = match[1], match[2].strip()
        elif _IDENTIFIER.fullmatch(part):
            if language == JAVA:
                raise ValueError("an argument has no name")
            name, value = None, part.strip()
        else:
            continue  # a value without a name
        if name in arguments:
            raise ValueError(f"{name} is there twice")
        if language == JAVA and value.startswith("new"):
            value = _CLASS_BODY.sub(")", value, count=1)
        arguments[name] = value[1:-1] if _LITERAL.fullmatch(value) else value
    return re.sub(r"\s", "", begin[1]), arguments


def _split(text: str, language: str) -> list[str]:
    """Return what commas separate between the outermost parentheses, with which the text ends."""
    parts, begin, place = [], 1, 0
    open_: list[str] = []
    while place < len(text):
        letter = text[place]
        if letter in "\"'":
            literal = _LITERAL.match(text, place)
            if not literal:
                raise ValueError("a literal has no end")
            place = literal.end()
            continue
        if letter in _CLOSING:
            open_.append(_CLOSING[letter])
        elif letter == "<" and language == JAVA and re.match(r"<[\w?>]", text[place:]):
            open_.append(">")
        elif open_ and letter == open_[-1]:
            open_.pop()
            if not open_:
                break
        elif letter in ")]}":
            raise ValueError("brackets do not match")
        elif letter == "," and len(open_) == 1:
            parts.append(text[begin:place])
            begin = place + 1
        place += 1
    if open_ or text[place + 1 :].strip(" \n;"):
        raise ValueError("there is more than a call")
    return [part for part in [*parts, text[begin:place]] if part.strip()]


def types(described: Mapping[str, Any], language: str) -> tuple[type, type | None]:
    """Return the types of a parameter's value and of the elements of a list."""
    known = _TYPES[language]
    kind = described["type"]
    return known[kind], known[described["items"]["type"]] if kind in _LISTS else None


def converted(value: str, described: Mapping[str, Any], language: str) -> Any:
    """Return a value that has the form of its type; else its text."""
    kind = described["type"]
    elements = described["items"]["type"] if kind in _LISTS else None
    return _java(value, kind, elements) if language == JAVA else _javascript(value, kind, elements)


def _java(value: str, kind: str, elements: str | None) -> Any:
    if kind in _JAVA_FORMS:
        form, read = _JAVA_FORMS[kind]
        return read(value) if re.fullmatch(form, value) else value
    if kind == "Array" and (match := re.search(r"new\s+\w+\[\]\s*\{(.*?)\}", value)):
        return [_java(each.strip(), elements, None) for each in match[1].split(",") if each.strip()]
    if kind == "ArrayList" and (match := re.search(r"new\s+ArrayList<\w*>\(Arrays\.asList\((.+?)\)\)", value)):
        texts = [each.strip() for each in match[1].split(",")]
        return [text[1:-1] if elements in ("char", "String") else _java(text, elements, None) for text in texts]
    if kind == "ArrayList" and re.search(r"new\s+ArrayList<\w*>\(\)", value):
        return []
    return {} if kind == "HashMap" and re.search(r"new\s+HashMap<.*?>\s*\(\)", value) else value


def _javascript(value: str, kind: str, elements: str | None) -> Any:
    if kind in _JS_FORMS:
        form, read = _JS_FORMS[kind]
        return read(value) if re.fullmatch(form, value) else value
    if kind == "array":
        return _js_array(value.strip(), elements)
    if kind == "dict":
        return _js_dict(value.strip())
    return value[1:-1] if kind == "String" and _quoted(value) else value


def _quoted(text: str) -> bool:
    return len(text) > 1 and text[0] == text[-1] and text[0] in "\"'"


def _js_array(text: str, elements: str | None) -> Any:
    nested = r"\[.*?\]\s*(,\s*\[.*?\]\s*)*"
    if match := re.match(rf"\[\s*{nested}\]|\bnew\s+Array\(\s*{nested}\)", text):
        rows = re.findall(r"\[(.*?)\]", match[0])
        return [[_js_value(each) for each in row.strip().removeprefix("[").split(",")] for row in rows]
    match = re.match(r"\[(.*?)\]|\bnew\s+Array\((.*?)\)", text)
    if not match:
        return text
    content = (match[1] if match[1] is not None else match[2]).strip()
    texts = [each.strip() for each in content.split(",")] if content else []
    return [_javascript(each, elements, None) if elements else _js_value(each) for each in texts]


def _js_dict(text: str) -> Any:
    if text == "{}":
        return {}
    match = re.match(r"\{(.*?)\}", text)
    if not match:
        return text
    values: dict[str, Any] = {}
    for key, value in re.findall(r"([^:]+):\s*(.*?)(?:,\s*(?=[^,]+:)|$)", match[1]):
        value = value.strip()
        if value.startswith("[") and value.endswith("]"):
            read = _js_array(value, None)
        elif value.startswith("{") and value.endswith("}"):
            read = _js_dict(value)
        else:
            read = _js_value(value.strip("'\""))
        values[key.strip().strip("'\"")] = read
    return values


def _js_value(text: str) -> Any:
    text = text.strip()
    if text in ("true", "false"):
        return text == "true"
    if _quoted(text):
        return text[1:-1]
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    return text
