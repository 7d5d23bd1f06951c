"""A tokenizer's files as Hugging Face's libraries read them, and the family's chat template."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

from nemotron_h.data.chat import FAMILY_SOURCE
from nemotron_h.data.tokenizer import (
    CHAT_TOKENS,
    BPETokenizer,
    HuggingFaceTokenizer,
    TiktokenTokenizer,
    Tokenizer,
    write_meta,
)
from nemotron_h.errors import UserError

#: begins a turn, and ends an answer
TURN = CHAT_TOKENS[1]
TEMPLATE_FILE = "chat_template.jinja"

#: as the conversations were written in training, without the tags for its loss mask, which some readers do not know
CHAT_TEMPLATE = re.sub(r"\{%\s*(end)?generation\s*%\}", "", FAMILY_SOURCE)

#: what a Hugging Face folder may hold of a tokenizer; weights and code stay where they are
FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    TEMPLATE_FILE,
)


def check_exportable(tokenizer: Tokenizer) -> None:
    """Before any work.

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
                shutil.copyfile(file, folder / name)
    template = template_of(folder)
    if template is None and set(CHAT_TOKENS[:2]) <= set(tokenizer.vocab):
        template = CHAT_TEMPLATE
        (folder / TEMPLATE_FILE).write_text(template, encoding="utf-8")
    return template is not None and TURN in template


def _write_tiktoken(tokenizer: TiktokenTokenizer, folder: Path) -> None:
    tokenizer.write_library(folder / "tokenizer.json")
    unknown, begin, end = tokenizer.ids_to_tokens([0, tokenizer.bos_id, tokenizer.eod_id])
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    config |= {"unk_token": unknown, "bos_token": begin, "eos_token": end, "pad_token": end}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def template_of(folder: Path) -> str | None:
    file, config = folder / TEMPLATE_FILE, folder / "tokenizer_config.json"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    found = json.loads(config.read_text(encoding="utf-8")).get("chat_template") if config.is_file() else None
    return found if found is None else str(found)  # several, by name, are a list


def read(folder: Path, out: Path) -> bool:
    """Copy the tokenizer of a Hugging Face folder to a folder that `load_tokenizer` reads.

    Returns:
        whether there was one.
    """
    found = [folder / name for name in FILES if (folder / name).is_file()]
    if not any(file.name in ("tokenizer.json", "tokenizer.model") for file in found):
        return False
    out.mkdir()
    for file in found:
        shutil.copyfile(file, out / file.name)
    config = out / "tokenizer_config.json"
    if config.is_file():  # transformers 5's name of the class, which 4 does not know
        text = config.read_text(encoding="utf-8")
        config.write_text(text.replace('"TokenizersBackend"', '"PreTrainedTokenizerFast"'), encoding="utf-8")
    write_meta(out, HuggingFaceTokenizer.kind)
    return True


def token_ids(tokenizer: Tokenizer | None) -> dict[str, int | None]:
    """The ids that `config.json` names; without a tokenizer none, so that readers do not assume their defaults."""
    if tokenizer is None:
        return dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    return {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eod_id,
        "pad_token_id": tokenizer.pad_id,
    }


def generation_config(tokenizer: Tokenizer | None, chat: bool, use_cache: bool) -> dict[str, object]:
    """The content of `generation_config.json`: where a text ends. A chat's answer also ends where a turn begins."""
    ids: dict[str, object] = dict(token_ids(tokenizer))
    if tokenizer is not None and chat:
        ids["eos_token_id"] = [tokenizer.eod_id, tokenizer.tokens_to_ids(TURN)]
    return {"use_cache": use_cache, **ids}
