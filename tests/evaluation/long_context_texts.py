"""Small texts of a user's own for long-context tasks, in whose documents an answer can be looked up."""

from __future__ import annotations

import itertools
import json
from pathlib import Path


def write_texts(folder: Path) -> Path:
    """Write all files that `Texts` reads."""
    syllables = [a + b for a, b in itertools.product("bdfgklmnprst", "aeiou")]
    words = [a + b for a, b in itertools.product(syllables[:45], syllables[15:50])]
    for name, part in (("adjectives", words[:300]), ("nouns", words[300:900]), ("verbs", words[900:])):
        (folder / f"{name}.txt").write_text("\n".join(part))
    sentences = [f"{' '.join(words[place : place + 9])}." for place in range(0, 900, 9)]
    (folder / "essays.txt").write_text(" ".join(sentences))

    def document(kind: str, number: int) -> str:
        name = f"{kind}{number}"
        return f"{name} is in the land of {words[number % 100]} and the capital of {name} is {words[number]}."

    articles = [
        {
            "paragraphs": [
                {
                    "context": document("PLACE", number),
                    "qas": [
                        {
                            "question": f"What is the capital of PLACE{number}?",
                            "answers": [{"text": words[number]}] * 2,
                        },
                        {"question": "What is not told?", "answers": [], "is_impossible": True},
                    ],
                }
                for number in range(first, first + 5)
            ]
        }
        for first in range(0, 200, 5)
    ]
    (folder / "squad.json").write_text(json.dumps({"data": articles}))
    entries = [
        {
            "question": f"Which is the capital of PERSON{number}?",
            "answer": words[number],
            "context": [[f"Title {other}", [document("PERSON", other)]] for other in (number, number + 1)],
        }
        for number in range(200)
    ]
    (folder / "hotpotqa.json").write_text(json.dumps(entries))
    return folder
