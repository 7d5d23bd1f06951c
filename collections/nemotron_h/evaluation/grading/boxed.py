r"""Final answers of solutions: the last `\boxed{...}`, and the number after `####`, as in GSM8K's own solutions."""

from __future__ import annotations

import re

_BOX = re.compile(r"\\(?:boxed|fbox)(?![a-zA-Z])\s*")
_FINAL = re.compile(r"####\s*(.+)")
_MARKED = re.compile(r"#### (-?[0-9.,]+)")


def boxed(text: str) -> str | None:
    r"""Return the content of the last `\boxed` or `\fbox`, nested braces included; None without a whole one.

    `\boxed 5` holds what stands before the next `$` or space. A box that never closes is none: the box before it
    does not stand in for it.
    """
    boxes = list(_BOX.finditer(text))
    if not boxes:
        return None
    rest = text[boxes[-1].end() :]
    if not rest.startswith("{"):
        return (re.match(r"[^$\s]+", rest) or [None])[0]
    depth = place = 0
    while place < len(rest):
        if rest[place] == "\\":  # \{ and \} open and close no group
            place += 2
            continue
        depth += {"{": 1, "}": -1}.get(rest[place], 0)
        if not depth:
            return rest[1:place]
        place += 1
    return None


def final_number(solution: str) -> str | None:
    """Return the number after the last `####`, without commas that group digits; None without one."""
    found = _FINAL.findall(solution)
    return found[-1].strip().replace(",", "") if found else None


def marked_number(text: str) -> str:
    """Return the number after the first `####`, without commas and a dot at its end; empty without one."""
    found = _MARKED.search(text)
    return found[1].replace(",", "").removesuffix(".") if found else ""
