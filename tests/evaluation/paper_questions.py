"""Records of our own in the form of each data set of the paper's tables, by task and split."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_SUMS = [(f"How much is {n} and {n}?", str(2 * n)) for n in range(1, 11)]
_DOUBLE = {
    "prompt": 'def double(x):\n    """Twice x."""\n',
    "entry_point": "double",
    "test": "def check(candidate):\n    assert candidate(2) == 4\n    assert candidate(-1) == -2\n",
}
_MBPP = {
    "prompt": "Write a function to add one.",
    "code": "def add_one(x):\n    return x + 1",
    "test_imports": ["import math"],
    "test_list": ["assert add_one(1) == 2", "assert add_one(math.floor(2.5)) == 3"],
}


def _thought(answer: str) -> str:
    solution = rf"It is $\boxed{{{answer}}}$."
    return f"<|begin_of_thought|>\nHm.\n<|end_of_thought|>\n<|begin_of_solution|>\n{solution}\n<|end_of_solution|>"


def _mmlu(number: int, subject: str) -> dict[str, Any]:
    choices = [str(number + 1), str(number + 2), str(number + 3), str(2 * number)]
    return {"question": f"How much is {number} and 1?", "subject": subject, "choices": choices, "answer": 0}


def _mmlu_pro(number: int) -> dict[str, Any]:
    return {
        "question": f"What comes after {number}?",
        "options": [str(number), str(number + 1), str(number + 2)],
        "answer": "B",
        "category": "math",
        "cot_content": f"A: Let's think step by step. One more than {number}. The answer is (B).",
    }


def _arc(number: int, labels: str) -> dict[str, Any]:
    texts = [f"{number + place} apples" for place in range(len(labels))]
    return {"question": "How many?", "choices": {"text": texts, "label": [*labels]}, "answerKey": labels[1]}


def _endings(number: int) -> dict[str, Any]:
    return {
        "activity_label": "Baking",
        "ctx_a": f"[header] Bake {number} loaves [title] Mix.",
        "ctx_b": "the baker",
        "endings": ["waits.", "sings [step] a song.", "sleeps.", "eats the oven."],
        "label": str(number % 4),
    }


def _names(number: int) -> dict[str, Any]:
    sentence = f"Ann gave {number} books to Bea because _ wanted to read."
    return {"sentence": sentence, "option1": "Ann", "option2": "Bea", "answer": str(1 + number % 2)}


RECORDS: dict[str, dict[str, list[dict[str, Any]]]] = {
    "mmlu": {
        "test": [_mmlu(7, "college_physics"), _mmlu(8, "world_religions"), _mmlu(9, "college_physics")],
        "dev": [_mmlu(n, subject) for n in range(6) for subject in ("college_physics", "world_religions")],
    },
    "mmlu_pro": {"test": [_mmlu_pro(20), _mmlu_pro(21)], "validation": [_mmlu_pro(n) for n in range(5)]},
    "gsm8k": {
        "test": [
            {"question": q, "answer": f"So <<1+1=2>>it is {a}.\n#### {a}"} for q, a in (*_SUMS[-1:], ("All?", "1,234"))
        ],
        "train": [{"question": q, "answer": f"So <<1+1=2>>it is {a}.\n#### {a}"} for q, a in _SUMS[:8]],
    },
    "math": {
        "test": [
            {"problem": "Add a half and a half.", "level": "Level 1", "solution": r"It is $\boxed{1}$."},
            {"problem": "Halve $x$.", "level": "Level 5", "solution": r"Thus $\boxed{\frac{x}{2}}$."},
        ],
        "exemplars": [{"problem": q, "level": "Level 1", "solution": rf"It is $\boxed{{{a}}}$."} for q, a in _SUMS[:4]],
        "exemplars_r1": [{"problem": q, "level": "Level 1", "solution": _thought(a)} for q, a in _SUMS[:4]],
    },
    "math_500": {"test": [{"problem": "Halve $x$.", "solution": r"Thus $\boxed{\frac{x}{2}}$."}]},
    "ifeval": {
        "train": [
            {
                "prompt": "Name two fruits in quotes, without a comma.",
                "instruction_id_list": ["startend:quotation", "punctuation:no_comma"],
                "kwargs": [{"relation": None}, {"relation": None}],
            },
            {
                "prompt": "Say pear twice.",
                "instruction_id_list": ["keywords:frequency"],
                "kwargs": [{"keyword": "pear", "relation": "at least", "frequency": 2}],
            },
        ]
    },
    "humaneval": {"test": [_DOUBLE]},
    "humaneval_plus": {"test": [_DOUBLE]},
    "mbpp": {"test": [_MBPP], "prompt": [_MBPP] * 3},
    "mbpp_plus": {"test": [{**_MBPP, "test": "assert all(add_one(x) == x + 1 for x in range(9))"}]},
    "arc_challenge": {
        "test": [_arc(3, "ABCD"), _arc(4, "12345"), _arc(5, "ABC")],
        "train": [_arc(n, "ABCD") for n in range(10, 40)],
    },
    "hellaswag": {"validation": [_endings(2), _endings(3)], "train": [_endings(n) for n in range(10, 25)]},
    "winogrande": {"validation": [_names(2), _names(3)], "train": [_names(n) for n in range(10, 18)]},
    "piqa": {"validation": [{"goal": "Boil water", "sol1": "Heat it.", "sol2": "Freeze it in a box.", "label": 0}] * 2},
    "openbookqa": {
        "test": [
            {
                "question_stem": "The sun is",
                "choices": {"text": ["cold", "hot", "wet", "small"], "label": [*"ABCD"]},
                "answerKey": "B",
            }
        ]
    },
}


_SQUARE = {
    "name": "square",
    "description": "The square of a number.",
    "parameters": {
        "type": "dict",
        "properties": {"x": {"type": "integer", "description": "The number."}},
        "required": ["x"],
    },
}


def _asked(number: int, category: str) -> dict[str, Any]:
    turns = [{"role": "system", "content": "Be quick."}] if category.startswith("live") else []
    turns.append({"role": "user", "content": f"{'Sing' if category == 'irrelevance' else 'Square'} {number}."})
    return {"id": f"{category}_{number}", "question": [turns], "function": [_SQUARE]}


#: of BFCL, by category
CALLS = {name: [_asked(number, name) for number in range(2)] for name in ("simple", "live_simple", "irrelevance")}


def write_calls(folder: Path) -> Path:
    """Write files as BFCL's package has them and return their folder."""
    (folder / "possible_answer").mkdir(parents=True)
    for category, records in CALLS.items():
        truth = [{"id": each["id"], "ground_truth": [{"square": {"x": [n]}}]} for n, each in enumerate(records)]
        for place, lines in (("", records), ("possible_answer", truth)):
            text = "".join(json.dumps(line) + "\n" for line in lines)
            (folder / place / f"BFCL_v3_{category}.json").write_text(text)
    return folder


def write(folder: Path, names: tuple[str, ...] = tuple(RECORDS)) -> Path:
    """Write the files of tasks and return their folder."""
    for name in names:
        (folder / name).mkdir(parents=True)
        for split, records in RECORDS[name].items():
            text = "".join(json.dumps(record) + "\n" for record in records)
            (folder / name / f"{split}.jsonl").write_text(text)
    return folder
