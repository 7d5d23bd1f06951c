"""A tokenizer as llama.cpp's byte-level BPE (its type `gpt2`)."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from nemotron_h.core.errors import UserError
from nemotron_h.core.files import read_json_object
from nemotron_h.data.tokenizer import PATTERN, Tokenizer
from nemotron_h.export import tokenizer as tokenizers
from nemotron_h.export.gguf_format import Value

#: llama.cpp's name of a pre-tokenizer -> its expression. It knows a fixed set and takes none from the file.
PRE_TOKENIZERS = {"tekken": PATTERN}
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5
_HINT = "export the weights alone with --no-tokenizer"

#: without a tokenizer: llama.cpp then takes and gives token ids
NONE: dict[str, Value] = {"tokenizer.ggml.model": "none"}


def values(tokenizer: Tokenizer, vocab_size: int) -> dict[str, Value]:
    """Return what the head of the file tells of the tokenizer and of conversations.

    Args:
        vocab_size: rows of the model's vocabulary; those beyond the tokenizer's tokens are named as unused.
    Errors:
        UserError: llama.cpp has no such tokenizer.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        has_turns = tokenizers.write(tokenizer, folder)
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise UserError(
                f"the tokenizer in {tokenizer.path} has no tokenizer.json, so no byte-level BPE", hint=_HINT
            )
        library = read_json_object(file)
        template = tokenizers.template_of(folder)
    model = library["model"]
    _check_model(model, library.get("normalizer"), tokenizer)
    names, types = _tokens(library, vocab_size)
    found: dict[str, Value] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": _pre_tokenizer(library.get("pre_tokenizer"), tokenizer),
        "tokenizer.ggml.tokens": names,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]],
        "tokenizer.ggml.bos_token_id": tokenizer.bos_id,
        "tokenizer.ggml.eos_token_id": tokenizer.eod_id,
        "tokenizer.ggml.padding_token_id": tokenizer.pad_id,
        # training puts no token before a text
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.ggml.add_space_prefix": False,
    }
    if has_turns:  # an answer ends where a turn begins, as generation_config.json says too
        found["tokenizer.ggml.eot_token_id"] = tokenizer.tokens_to_ids(tokenizers.TURN)
    if template is not None:
        found["tokenizer.chat_template"] = template
    return found


def _check_model(model: dict[str, Any], normalizer: Any, tokenizer: Tokenizer) -> None:
    if model.get("type") != "BPE" or model.get("byte_fallback") or normalizer:
        what = f"a model of type {model.get('type')}" if model.get("type") != "BPE" else "byte fallback"
        what = "a normalizer" if normalizer else what
        raise UserError(
            f"the tokenizer in {tokenizer.path} has {what}; GGUF export writes byte-level BPE without one", hint=_HINT
        )


def _pre_tokenizer(found: Any, tokenizer: Tokenizer) -> str:
    """Return llama.cpp's name for the rule that splits a text into words."""
    steps = (found or {}).get("pretokenizers", [found or {}])
    patterns = [step.get("pattern", {}).get("Regex") for step in steps if step.get("type") == "Split"]
    by_bytes = [step for step in steps if step.get("type") == "ByteLevel"]
    plain = len(by_bytes) == 1 and not by_bytes[0].get("use_regex") and not by_bytes[0].get("add_prefix_space")
    if len(patterns) == 1 and len(steps) == 2 and plain:
        for name, pattern in PRE_TOKENIZERS.items():
            if patterns[0] == pattern:
                return name
    raise UserError(
        f"the tokenizer in {tokenizer.path} splits words in a way of its own; llama.cpp has a fixed set of ways and "
        f"GGUF export knows the family's ({', '.join(PRE_TOKENIZERS)})",
        hint=_HINT,
    )


def _tokens(library: dict[str, Any], vocab_size: int) -> tuple[list[str], list[int]]:
    """Return name and type of every id."""
    names = [f"[PAD{i}]" for i in range(vocab_size)]
    types = [_UNUSED] * vocab_size
    for name, i in library["model"]["vocab"].items():
        names[i], types[i] = name, _NORMAL
    for token in library["added_tokens"]:
        i = token["id"]
        names[i], types[i] = token["content"], _CONTROL if token["special"] else _USER_DEFINED
    return names, types
