"""A tokenizer's files as Hugging Face's libraries read them, and the family's chat template."""

from __future__ import annotations

import codecs
import json
import re
import shutil
from pathlib import Path

from nemotron_h.core.errors import UserError
from nemotron_h.core.files import read_json_object
from nemotron_h.data.chat import FAMILY_SOURCE
from nemotron_h.data.hf_tokenizer import CONFIG_FILE, LIBRARY_FILE, TEMPLATE_FILE, settings_of, template_of
from nemotron_h.data.tokenizer import (
    CHAT_TOKENS,
    BPETokenizer,
    HuggingFaceTokenizer,
    TiktokenTokenizer,
    Tokenizer,
    load_tokenizer,
    write_meta,
)

#: begins a turn, and ends an answer
TURN = CHAT_TOKENS[1]

#: as the conversations were written in training, without the tags for its loss mask, which some readers do not know
CHAT_TEMPLATE = re.sub(r"\{%\s*(end)?generation\s*%\}", "", FAMILY_SOURCE)

#: what a Hugging Face folder may hold of a tokenizer; weights and code stay where they are
FILES = (
    LIBRARY_FILE,
    "tokenizer.model",
    CONFIG_FILE,
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    TEMPLATE_FILE,
)


def check_exportable(tokenizer: Tokenizer) -> None:
    """Check the tokenizer before any work.

    Errors:
        UserError: the kind has no form that Hugging Face's libraries read.
    """
    if not isinstance(tokenizer, BPETokenizer | HuggingFaceTokenizer | TiktokenTokenizer):
        raise UserError(
            f"the tokenizer in {tokenizer.path} is of kind {tokenizer.kind}, which cannot be written as tokenizer.json",
            hint="export the weights alone with --no-tokenizer, and add the tokenizer's Hugging Face files yourself",
        )


def write(tokenizer: Tokenizer, folder: Path) -> bool:
    """Copy a tokenizer's files, and add the chat template where it has the template's tokens and none of its own.

    Returns:
        whether the template has the family's turns.
    """
    check_exportable(tokenizer)
    if isinstance(tokenizer, TiktokenTokenizer):
        _write_tiktoken(tokenizer, folder)
    else:
        for name in FILES:
            if (file := Path(tokenizer.path) / name).is_file():
                # not every reader takes a byte order mark
                (folder / name).write_bytes(file.read_bytes().removeprefix(codecs.BOM_UTF8))
    template = template_of(folder)
    if template is None and set(CHAT_TOKENS[:2]) <= set(tokenizer.vocab):
        template = CHAT_TEMPLATE
        (folder / TEMPLATE_FILE).write_text(template, encoding="utf-8")
    return template is not None and TURN in template


def _write_tiktoken(tokenizer: TiktokenTokenizer, folder: Path) -> None:
    tokenizer.write_library(folder / LIBRARY_FILE)
    unknown, begin, end = tokenizer.ids_to_tokens([0, tokenizer.bos_id, tokenizer.eod_id])
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    config |= {"unk_token": unknown, "bos_token": begin, "eos_token": end, "pad_token": end}
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def find(folder: Path) -> HuggingFaceTokenizer | None:
    """Return the tokenizer of a Hugging Face model's folder, or None where it has none.

    Errors:
        UserError: it or its chat template cannot be read.
    """
    if not any((folder / name).is_file() for name in (LIBRARY_FILE, "tokenizer.model", "vocab.json")):
        return None
    template_of(folder)
    return load_tokenizer(folder, HuggingFaceTokenizer.kind)  # type: ignore[return-value]


def copy(tokenizer: HuggingFaceTokenizer, out: Path) -> Tokenizer:
    """Copy the tokenizer that `find` found to a folder of its own, and return the copy."""
    out.mkdir()
    for name in FILES:
        if (file := Path(tokenizer.path) / name).is_file():
            shutil.copyfile(file, out / name)
    settings = settings_of(out)
    if lacking := {role: name for role, name in tokenizer.roles.items() if settings.get(role) is None}:
        # the model's config.json alone told them, which stays behind
        config = read_json_object(out / CONFIG_FILE) if (out / CONFIG_FILE).is_file() else {}
        (out / CONFIG_FILE).write_text(json.dumps(config | lacking, indent=1) + "\n", encoding="utf-8")
    write_meta(out, HuggingFaceTokenizer.kind)
    return load_tokenizer(out)


def token_ids(tokenizer: Tokenizer | None) -> dict[str, int | None]:
    """Return the ids that `config.json` names; none without a tokenizer, so that readers assume no defaults."""
    if tokenizer is None:
        return dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    return {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eod_id,
        "pad_token_id": tokenizer.pad_id,
    }


def generation_config(tokenizer: Tokenizer | None, chat: bool, use_cache: bool, vocab_size: int) -> dict[str, object]:
    """Return the content of `generation_config.json`: where a text ends, and which ids are padding and never written.

    A chat's answer also ends where a turn begins.
    """
    ids: dict[str, object] = dict(token_ids(tokenizer))
    if tokenizer is not None and chat:
        ids["eos_token_id"] = [tokenizer.eod_id, tokenizer.tokens_to_ids(TURN)]
    if tokenizer is not None and tokenizer.vocab_size < vocab_size:
        ids["suppress_tokens"] = list(range(tokenizer.vocab_size, vocab_size))
    return {"use_cache": use_cache, **ids}
