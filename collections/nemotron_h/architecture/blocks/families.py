"""Families of patterns, each with its rules."""

from __future__ import annotations

from nemotron_h.architecture.blocks.attention import Attention
from nemotron_h.architecture.blocks.experts import Experts
from nemotron_h.architecture.blocks.ffn import FFN
from nemotron_h.architecture.blocks.mamba import Mamba
from nemotron_h.architecture.blocks.parallel import Parallel
from nemotron_h.architecture.blocks.registry import KINDS
from nemotron_h.architecture.blocks.swiglu import SwiGLU
from nemotron_h.core.errors import UserError

#: any order, as removing layers leaves it
PRUNED = "pruned"
#: what has rules, the narrowest first
_RULED = ("mamba2", "transformer", "llama", "falcon_h1", "nemotron_h")
FAMILIES = ("nemotron_h", "transformer", "mamba2", "llama", "falcon_h1", PRUNED)
#: families without position embeddings (paper 2.1)
WITHOUT_POSITIONS = ("nemotron_h",)

_M, _A, _F = Mamba.letter, Attention.letter, FFN.letter
#: an FFN, or experts in its place (Nemotron 3)
_FFNS = (_F, Experts.letter)
#: family -> the letters that its pattern repeats
_PAIRS = {
    "transformer": _A + _F,
    "llama": _A + SwiGLU.letter,
    "falcon_h1": Parallel.letter + SwiGLU.letter,
}


def check_pattern(pattern: str, family: str, origin: str) -> None:
    """Check a pattern's letters and the rules of its family.

    Errors:
        UserError: names the layer, and the nearest pattern where there is one.
    """
    unknown = sorted(set(pattern) - set(KINDS))
    if not pattern or unknown:
        letters = [f"{letter} ({kind.title})" for letter, kind in KINDS.items()]
        raise UserError(
            f"{origin}: model.pattern has {('unknown letters ' + ' '.join(unknown)) if unknown else 'no layers'}",
            hint=f"use {', '.join(letters[:-1])} and {letters[-1]}, one letter per layer",
        )
    if family == "mamba2":
        other = next((index for index, letter in enumerate(pattern) if letter != _M), None)
        if other is not None:
            raise UserError(
                f"{origin}: model.pattern has {pattern[other]} at layer {other}; family mamba2 has M alone",
                hint=f"nearest: {_M * len(pattern)}; or set model.family to nemotron_h",
            )
    elif family in _PAIRS:
        pairs = _PAIRS[family] * max(1, len(pattern) // 2)
        if pattern != pairs:
            raise UserError(
                f"{origin}: model.pattern = {pattern} is not {_PAIRS[family]} over and over, as family {family} has it",
                hint=f"nearest: {pairs}; or set model.family to {'nemotron_h' if family == 'transformer' else PRUNED}",
            )
    elif family == "nemotron_h":
        _check_hybrid(pattern, origin)


def _check_hybrid(pattern: str, origin: str) -> None:
    if others := sorted(set(pattern) - {_M, _A, *_FFNS}):
        raise UserError(
            f"{origin}: model.pattern has {' '.join(others)}; family nemotron_h has M, * and - (paper 2.1), "
            "or E in place of - (Nemotron 3)",
            hint=f"set model.family to {PRUNED}, which takes any order of all kinds",
        )
    if pattern[0] != _M:
        raise UserError(f"{origin}: model.pattern starts with {pattern[0]}; the first layer is M (paper 2.1)")
    if pattern[-1] not in _FFNS:
        raise UserError(f"{origin}: model.pattern ends with {pattern[-1]}; the last layer is - (paper 2.1) or E")
    for index, letter in enumerate(pattern):
        if letter == _A and pattern[index + 1] not in _FFNS:
            raise UserError(
                f"{origin}: model.pattern has attention at layer {index} that is not followed by an FFN",
                hint="attention always directly precedes an FFN (paper 2.1): write *-, or *E with experts",
            )


def family_of(pattern: str, positions: bool = False) -> str:
    """Return the family whose rules a pattern follows; `pruned` where it follows those of none.

    Args:
        positions: the model has position embeddings.
    """
    for family in _RULED:
        if positions and family in WITHOUT_POSITIONS:
            continue
        try:
            check_pattern(pattern, family, "")
        except UserError:
            continue
        return family
    return PRUNED


def hybrid_pattern(mamba: int, attention: int, ffn: int) -> str:
    """Return a pattern of family nemotron_h with so many layers of each kind, evenly spread.

    Args:
        mamba, ffn: 1 or more.
        attention: at most `ffn`; each is directly before an FFN.
    """
    before_ffn = {int((number + 0.5) * ffn / attention) for number in range(attention)}
    others = [0, *(group for group in range(1, ffn) if group not in before_ffn)]
    groups = others if mamba <= len(others) else list(range(ffn))
    counts = dict.fromkeys(range(ffn), 0)
    for number in range(mamba):
        counts[groups[number * len(groups) // mamba]] += 1
    return "".join(_M * counts[group] + _A * (group in before_ffn) + _F for group in range(ffn))
