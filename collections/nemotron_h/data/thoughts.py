"""Thoughts before answers: their markers in text, what asks for one in a conversation, and what follows one.

The markers are those of the family since Nemotron Nano 2 (2508.14444). NVIDIA's Nemotron models are asked for a thought
by a line of the system message, `detailed thinking on` or `off` (documentation of NIM for LLMs, "Reasoning Models");
Nano 2's template reads `/think` and `/no_think` there, Nemotron 3's has the variable `enable_thinking`.
"""

from __future__ import annotations

from nemotron_h.core.strict import check_one_of

BEGIN, END = "<think>", "</think>"
ON, OFF = SWITCH = ("on", "off")
#: switches that a template may have of its own
_VARIABLE, _WORD = "enable_thinking", "/no_think"


def switched(thinking: str | None, template: str, system: str = "") -> tuple[str, str]:
    """Return the template and the system message that ask for a thought or for none.

    Args:
        thinking: `ON` or `OFF`; None asks for neither.
        template: Jinja text, which gets the variable set where it has one.
        system: what else the message says, below the switch's line.
    Errors:
        UserError: `thinking` is unknown.
    """
    if thinking is None:
        return template, system
    check_one_of("--thinking", thinking, SWITCH)
    if _VARIABLE in template:
        return f"{{% set {_VARIABLE} = {str(thinking == ON).lower()} %}}{template}", system
    line = f"detailed thinking {thinking}"
    if _WORD in template:
        line = "/think" if thinking == ON else _WORD
    return template, "\n".join(part for part in (line, system.strip()) if part)


def has_switch(template: str) -> bool:
    """Return True if a template has a switch of its own for thoughts."""
    return _VARIABLE in template or _WORD in template


def with_thought(thought: str, answer: str) -> str:
    """Return an answer behind its thought; without one behind an empty thought, as Nano 2's are."""
    return f"{BEGIN}\n{thought}\n{END}\n{answer}" if thought else f"{BEGIN}{END}\n{answer}"


def after_thought(text: str) -> str:
    """Return what follows the last thought of a text: all where there is none, nothing where one has not ended."""
    return "" if in_thought(text) else text.rpartition(END)[2]


def in_thought(text: str) -> bool:
    """Return True if a text ends inside of a thought."""
    return BEGIN in text.rpartition(END)[2]
