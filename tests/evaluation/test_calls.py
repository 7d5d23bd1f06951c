"""BFCL's calls: read of text, judged by each rule of its check, added up as it adds up, and as the package does it."""

from __future__ import annotations

import json
import random
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from nemotron_h.core.errors import UserError
from nemotron_h.evaluation.grading import foreign_calls
from nemotron_h.evaluation.grading.calls import check, right, stated
from nemotron_h.evaluation.tables import calls
from nemotron_h.evaluation.tables.task import load


def test_stated() -> None:
    """Brackets and fences may be missing or there; values are literals, names and texts; nothing is run."""
    assert stated("f(a=1)") == stated("[f(a=1)]") == stated("```\n[f(a=1)\n```") == [("f", {"a": 1})]
    assert stated("[m.sub.f(a='x', b=[1, -2.5]), g()]") == [("m.sub.f", {"a": "x", "b": [1, -2.5]}), ("g", {})]
    assert stated("f(a=(1, 2), b={'k': True}, c=None, d=name, e=2**3*4 - 1, f=g(x=1), h=now(), i=t[0], j=...)") == [
        ("f", {"a": (1, 2), "b": {"k": True}, "c": None, "d": "name", "e": 31, "f": {"g": {"x": 1}}, "h": "now()",
               "i": "t[0]", "j": "..."})
    ]  # fmt: skip
    assert stated("f(5, a=1)") == [("f", {"a": 1})]
    for text in ("", "I cannot.", "f(a=1), 2", "f(a=", "f(a=lambda: 1)", "f(a=9**9**9)", "f(a='x' * 9)", "f(a=f'{b}')"):
        with pytest.raises((ValueError, SyntaxError)):
            stated(text)


def test_other_languages() -> None:
    def read(text: str, language: str = foreign_calls.JAVA) -> Any:
        return stated(text, language)

    text = (
        '[A.f(a="x, (y", b=new HashMap<String, Object>() {{ put("k", 1); }}, c=new int[]{1, 2}, d = 5L, e=o.m(1, 2))]'
    )
    arguments = {
        "a": "x, (y",
        "b": "new HashMap<String, Object>()",
        "c": "new int[]{1, 2}",
        "d": "5L",
        "e": "o.m(1, 2)",
    }
    assert read(text) == [("A.f", arguments)]
    assert read("f(a=x => x + 1, b={k: [1, 2]}, c)", "javascript") == [
        ("f", {"a": "x => x + 1", "b": "{k: [1, 2]}", None: "c"})
    ]
    for wrong in ("f(a=1), g(b=2)", "f(a=1, a=2)", "f(a=(1)", "none", 'f(a="x)', "f(a=1])"):
        with pytest.raises(ValueError, match=r"."):
            read(wrong)

    def value(text: str, kind: str, element: str | None = None, language: str = foreign_calls.JAVA) -> Any:
        return foreign_calls.converted(
            text, {"type": kind, **({"items": {"type": element}} if element else {})}, language
        )

    assert [
        value("5", "integer"),
        value("5L", "long"),
        value("5", "long"),
        value("2.5f", "float"),
        value("2.5", "double"),
    ] == [5, 5, "5", 2.5, 2.5]
    assert [value("true", "boolean"), value("True", "boolean"), value("x", "any")] == [True, "True", "x"]
    assert value('new ArrayList<>(Arrays.asList("a", "b"))', "ArrayList", "String") == ["a", "b"]
    assert [value("new int[]{1, 2}", "Array", "integer"), value("new ArrayList<>()", "ArrayList", "any")] == [
        [1, 2],
        [],
    ]
    assert [value("new HashMap<>()", "HashMap"), value("map", "HashMap")] == [{}, "map"]

    def js(text: str, kind: str, element: str | None = None) -> Any:
        return value(text, kind, element, foreign_calls.JAVASCRIPT)

    assert [js("5", "float"), js("10n", "Bigint"), js("true", "Boolean"), js("'x'", "String")] == [5.0, 10, True, "x"]
    assert [
        js("['a', \"b\"]", "array", "String"),
        js("[[1, 2], [3, 4]]", "array", "float"),
        js("list", "array", "String"),
    ] == [["a", "b"], [[1, 2], [3, 4]], "list"]
    assert js("{a: 1, 'b': [2, 'c'], d: true}", "dict") == {"a": 1, "b": [2, "c"], "d": True}
    assert [js("{}", "dict"), js("props", "dict")] == [{}, "props"]


PROPERTIES = {
    "city": {"type": "string"},
    "days": {"type": "integer"},
    "limit": {"type": "float"},
    "wet": {"type": "boolean"},
    "tags": {"type": "array", "items": {"type": "string"}},
    "point": {"type": "tuple", "items": {"type": "float"}},
    "range": {"type": "dict"},
    "rows": {"type": "array", "items": {"type": "dict"}},
}
FUNCTION = {"name": "sky.weather", "parameters": {"type": "dict", "properties": PROPERTIES, "required": ["city"]}}
ANSWER = {
    "city": ["San Francisco, CA", "SF"], "days": [3, ""], "limit": [2.0, ""], "wet": [True, ""],
    "tags": [["a.b", "c"], ""], "point": [[1.5, 2.0], ""], "range": [{"min": [1], "max": [2, ""]}, ""],
    "rows": [[{"x": ["O'Hare"]}, {"x": [2]}], ""],
}  # fmt: skip


def _record(category: str, *answers: dict[str, Any], functions: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    truth = [{"sky.weather": {**ANSWER, **answer}} for answer in answers]
    return {"category": category, "function": functions or [FUNCTION], "ground_truth": truth}


def judged(arguments: str, name: str = "sky.weather", **answer: Any) -> bool:
    return right(f"[{name}({arguments})]", _record("simple", answer))


def test_names_and_parameters() -> None:
    assert judged("city='SF'")
    assert not judged("city='SF'", "sky_weather")  # of calls in text, dots stay dots
    assert not judged("city='SF'", "weather")
    assert not judged("days=3")  # a required one is missing
    assert not judged("city='SF', country='US'")  # of no description
    assert not judged("city='SF'", days=[3])  # an answer without "" has to be given
    assert judged("city='SF', days=3", days=[3])
    assert not judged("city='SF', days=4")
    assert not right("[sky.weather(city='SF'), sky.weather(city='SF')]", _record("simple", {}))  # exactly one
    assert not right("I do not know.", _record("simple", {}))


def test_types() -> None:
    assert judged("city='SF', limit=2")  # whole numbers are floats too
    assert not judged("city='SF', days=3.0")
    assert not judged("city='SF', days='3'")
    assert not judged("city='SF', wet='true'")
    assert judged("city='SF', wet=True")
    assert judged("city='SF', days=today", days=["today"])  # a variable: of the type of the answer
    assert not judged("city='SF', days=Today", days=["today"])  # whose text is compared as it is
    assert not judged("city='SF', tags=['c', 1]")  # elements, one level deep
    assert not judged("city='SF', tags=('a.b', 'c')")
    assert judged("city='SF', point=(1.5, 2.0)")
    assert judged("city='SF', tags=[1]", tags=[[1]])  # elements of the answer's own type


def test_values() -> None:
    for city in ("san francisco ca", "San-Francisco, C.A", "SAN_FRANCISCO*^/CA", "sf"):
        assert judged(f"city={city!r}")
    assert not judged("city='San Jose'")
    assert judged("city='SF', tags=['AB', 'C']")
    assert not judged("city='SF', tags=['c', 'a.b']")  # ordered
    assert judged("city='SF', range={'min': 1}")
    assert judged("city='SF', range={'max': 2, 'min': 1}")
    for wrong in ({"max": 2}, {"min": 2}, {"min": 1, "step": 1}, {"min": 1, "max": 3}):
        assert not judged(f"city='SF', range={wrong}")
    assert judged("city='SF', rows=[{'x': 'o\"hare'}, {'x': 2}]")
    assert not judged("city='SF', rows=[{'x': 2}, {'x': 'OHare'}]")  # ordered
    assert not judged("city='SF', rows=[{'x': 'O\\'Hare'}]")


def test_several_calls() -> None:
    other = {"name": "other", "parameters": {"type": "dict", "properties": {}, "required": []}}
    first, second = "sky.weather(city='SF', days=3)", "sky.weather(city='Rome')"
    record = _record("parallel", {"days": [3]}, {"city": ["Rome"]})
    assert right(f"[{first}, {second}]", record)
    assert right(f"[{second}, {first}]", record)  # in any order
    assert not right(f"[{first}]", record)
    assert not right(f"[{first}, {first}]", record)  # each answers one
    assert not right(f"[{first}, {second}, {second}]", record)
    record = _record("live_multiple", {}, functions=[other, FUNCTION])  # the description of the answer's name
    assert right("sky.weather(city='SF')", record)
    assert not right("other()", record)
    assert not right("[sky.weather(city='SF'), other()]", record)
    for category, calls_one, calls_none in (("irrelevance", False, True), ("live_relevance", True, False)):
        assert right("[f(a=1)]", _record(category)) == calls_one
        for text in ("None of them fits.", "[]", "", "f(a="):
            assert right(text, _record(category)) == calls_none


def test_records_that_cannot_be_judged() -> None:
    check(_record("simple", {}))
    check({"category": "irrelevance", "function": [{"name": "any"}], "ground_truth": []})
    for properties in ({"a": {"type": "text"}}, {"a": {"type": "array"}}, {"a": {}}):
        function = {"name": "f", "parameters": {"properties": properties, "required": []}}
        with pytest.raises(KeyError):
            check(_record("simple", {}, functions=[function]))
    for truth in ([{"f": {"a": 1}}], [{"f": {}, "g": {}}], ["f()"]):
        with pytest.raises(ValueError, match=r"values for a|of one call"):
            check({"category": "simple", "function": [FUNCTION], "ground_truth": truth})


PARTS = load("bfcl_v2").parts


def test_rows() -> None:
    """The scores of the leaderboard, by hand: nine parts; live by questions; a category without verdicts is 0."""
    of = {"simple": 0.9, "java": 0.6, "javascript": 0.3, "multiple": 0.8, "parallel": 0.7, "parallel_multiple": 0.5,
          "irrelevance": 0.4, "live_simple": 0.9, "live_multiple": 0.6, "live_parallel": 0.5, "live_irrelevance": 0.7,
          "live_relevance": 1.0}  # fmt: skip
    verdicts = [(name, number < 10 * share) for name, share in of.items() for number in range(10)]

    def score(name: str) -> float:
        return calls.row(name, PARTS, verdicts)[0]

    assert sum(PARTS.values()) == 3951
    assert score("non_live") == pytest.approx(((0.9 + 0.6 + 0.3) / 3 + 0.8 + 0.7 + 0.5 + 0.4) / 9)
    live = (10 * (0.9 + 0.6 + 0.5 + 0.7 + 1.0) + 24 * 0) / (50 + 24)  # 24 of live_parallel_multiple
    assert score("live") == pytest.approx(live)
    assert score("single_turn") == pytest.approx((live + score("non_live")) / 2)
    assert score("not_run") == pytest.approx((live + score("non_live") * 9 / 5) / 2)
    (mean, error) = calls.row("live", {"live_simple": 258}, [("live_simple", number < 5) for number in range(10)])
    assert (mean, error) == pytest.approx((0.5, 0.5 / 3))


def _write(folder: Path, category: str, records: list[dict], answers: list[dict]) -> None:
    (folder / "possible_answer").mkdir(parents=True, exist_ok=True)
    for file, lines in ((folder, records), (folder / "possible_answer", answers)):
        (file / f"BFCL_v3_{category}.json").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_files(tmp_path: Path) -> None:
    assert "no " in calls.lacking(tmp_path, PARTS)[0]
    function = {"name": "f", "description": "Does.", "parameters": {"properties": {
        "a": {"type": "Array", "items": {"type": "String"}, "description": "A."},
        "b": {"type": "any", "description": "B."}
    }, "required": []}}  # fmt: skip
    record = {"id": "java_0", "question": [[{"role": "user", "content": "Do."}]], "function": [function]}
    _write(tmp_path, "java", [record], [{"id": "java_0", "ground_truth": [{"f": {"b": ["x"]}}]}])
    assert calls.lacking(tmp_path, PARTS) == []
    ((origin, read),), remarks = calls.records(tmp_path, PARTS, None)
    assert origin.endswith("BFCL_v3_java.json, record 1")
    assert (read["category"], read["ground_truth"]) == ("java", [{"f": {"b": ["x"]}}])
    (shown,) = read["functions"]
    assert shown["description"] == "Does. Note that the provided function is in Java 8 SDK syntax."
    assert shown["parameters"]["properties"]["a"] == {"type": "string", "description": "A. This is Java Array type "
        "parameter in string representation. The list elements are of type String; they are not in string "
        "representation."}  # fmt: skip
    assert shown["parameters"]["properties"]["b"]["description"].endswith(
        "any type of Java object in string representation."
    )
    assert read["function"] == [function]
    assert remarks[0] == "java: 1 of 100 questions"
    assert remarks[1].startswith("no files of simple, multiple, ")
    assert "exec_simple, exec_multiple" in remarks[2]
    _write(tmp_path, "java", [record], [])
    with pytest.raises(UserError, match=r"record 1: possible_answer/BFCL_v3_java\.json has no java_0"):
        calls.records(tmp_path, PARTS, None)
    (tmp_path / "possible_answer" / "BFCL_v3_java.json").unlink()
    with pytest.raises(UserError, match="there is no "):
        calls.records(tmp_path, PARTS, None)
    _write(tmp_path, "java", [{**record, "function": [{"name": "f"}]}], [{"id": "java_0", "ground_truth": []}])
    with pytest.raises(UserError, match="record 1: its functions are not described"):
        calls.records(tmp_path, PARTS, None)
    _write(tmp_path, "java", [{"id": "java_0"}], [])
    with pytest.raises(UserError, match="record 1 lacks question"):
        calls.records(tmp_path, PARTS, None)


def _spoken(value: Any, kind: str, language: str | None) -> str:
    """Return an argument as a model might write it."""
    if language is None or kind in ("any", "String"):
        return repr(value) if language is None else f'"{value}"'
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        body = ", ".join(f'"{each}"' if isinstance(each, str) else str(each) for each in value)
        return f"[{body}]" if language == "javascript" else f"new ArrayList<>(Arrays.asList({body}))"
    if isinstance(value, dict):
        return json.dumps({key: values[0] if isinstance(values, list) else values for key, values in value.items()})
    return f"{value}L" if kind == "long" else str(value)


def _entries(possible: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    return {key: rng.choice(each) if isinstance(each, list) and each else each for key, each in possible.items()}


def _answers(record: dict[str, Any], category: str, rng: random.Random) -> str:
    """Return a right answer, or one with a mistake."""
    said = []
    language = foreign_calls.LANGUAGES.get(category)
    for call in record["ground_truth"]:
        ((name, possible),) = call.items()
        schema = next((each for each in record["function"] if each["name"] == name), record["function"][0])[
            "parameters"
        ]["properties"]
        arguments = {}
        for key, values in possible.items():
            chosen = rng.choice(values or [""])
            if chosen == "" or rng.random() < 0.03:
                continue
            if rng.random() < 0.08:
                chosen = rng.choice(
                    [1, 2.0, "x", True, ["x"], [1], {"x": 1}, {}, [{}], chosen, [chosen], str(chosen).upper()]
                )
            if isinstance(chosen, dict) and language is None and rng.random() < 0.9:
                chosen = _entries(chosen, rng)
            if isinstance(chosen, list) and language is None:
                chosen = [_entries(each, rng) if isinstance(each, dict) else each for each in chosen]
                chosen = tuple(chosen) if rng.random() < 0.1 else chosen
            arguments[key] = _spoken(chosen, schema.get(key, {}).get("type", "any"), language)
        if rng.random() < 0.03:
            arguments["unknown"] = "1"
        said.append(f"{name if rng.random() > 0.03 else 'f'}({', '.join(f'{k}={v}' for k, v in arguments.items())})")
    rng.shuffle(said)
    return f"[{', '.join(said)}]" if rng.random() > 0.05 else rng.choice(["", "No.", said[0] + ", 3"])


def test_as_the_package() -> None:
    """Verdicts on right and wrong calls are those of the package's own check, for its own questions."""
    utils = pytest.importorskip("bfcl.model_handler.utils", reason="nvidia-bfcl is not installed")
    checker = pytest.importorskip("bfcl.eval_checker.ast_eval.ast_checker").ast_checker
    formed = pytest.importorskip("bfcl.utils").is_function_calling_format_output
    asked = {name: count for name, count in PARTS.items() if name not in calls.EXECUTED}
    records, remarks = calls.records(Path(str(files("bfcl"))) / "data", asked, None)
    assert remarks == []
    rng, verdicts, differing = random.Random(0), [], []
    for origin, record in records:
        category = record["category"]
        if "relevance" in category:
            continue
        spelled = {"java": "Java", "javascript": "JavaScript"}.get(category, "Python")
        text = _answers(record, category, rng)
        try:
            decoded = utils.default_decode_ast_prompting(text, spelled)
            theirs = (
                formed(decoded)
                and checker(record["function"], decoded, record["ground_truth"], spelled, category, "none")["valid"]
            )
        except Exception:  # of what it cannot read, or a question of a form that it does not expect
            theirs = False
        verdicts.append(theirs)
        if right(text, record) != theirs:
            differing.append((origin, text))
    assert differing == []
    assert 0.2 < sum(verdicts) / len(verdicts) < 0.95
