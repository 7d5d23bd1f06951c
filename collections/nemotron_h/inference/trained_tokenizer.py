"""The tokenizer that a checkpoint was trained with: where it is, and whether another one gives tokens the same ids.

Records hold two hashes of it. Files differ between an imported model and a blend that was prepared with the same
tokenizer, and between a tokenizer and its copy with another chat template; what has to agree are the ids of tokens.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemotron_h.checkpoint.reader import read_record
from nemotron_h.checkpoint.writer import TOKENIZER
from nemotron_h.core.errors import UserError
from nemotron_h.data.tokenizer import MAX_PADDING, Tokenizer, fingerprint, load_tokenizer

if TYPE_CHECKING:
    from nemotron_h.data.manifest import Manifest

_FILES, _IDS = "tokenizer_sha256", "tokenizer_ids_sha256"
#: what a record's `data` says of the tokenizer; a checkpoint that is made of another one's weights keeps it
KEYS = ("tokenizer", _FILES, _IDS)


def identity(tokenizer: Tokenizer) -> dict[str, str]:
    """Return the hashes by which a record tells a tokenizer: of its files, and of its tokens in the order of ids."""
    return {_FILES: tokenizer.fingerprint(), _IDS: tokenizer.ids_sha256()}


def inherit_data(checkpoint: Path, record: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return what a child's record tells of its data: its parent's tokenizer, which is copied where the parent holds
    it, and sequence length.

    Args:
        checkpoint, record: the parent's.
        folder: the child's.
    """
    data = dict(record.get("data") or {})
    tokenizer = data.get("tokenizer")
    if tokenizer and not Path(tokenizer).is_absolute():  # an imported checkpoint holds its own
        shutil.copytree(checkpoint / tokenizer, folder / TOKENIZER)
    return {key: data.get(key) for key in (*KEYS, "seq_length")}


def tokenizer_for(record: dict[str, Any], checkpoint: Path, named: Path | None, vocab_size: int) -> Tokenizer:
    """Return the tokenizer that was named, else the one that the run record tells of.

    Args:
        vocab_size: rows of the model's vocabulary. The tokenizer may have fewer tokens: rows beyond them are padding.
    Errors:
        UserError: it is not there; it has more tokens than the model; its files have changed since the training; or
            the named one gives tokens other ids than the recorded one.
    """
    folder = named or _recorded_folder(record, checkpoint)
    tokenizer = load_tokenizer(folder)
    padding = vocab_size - tokenizer.vocab_size
    same = None if named is None else has_ids_of(record, checkpoint, tokenizer)
    if padding < 0 or (same is None and named is not None and padding > MAX_PADDING):
        raise UserError(
            f"the tokenizer in {folder} has {tokenizer.vocab_size:,} tokens, the model of {checkpoint} has a "
            f"vocabulary of {vocab_size:,}",
            hint="name the tokenizer that the model was trained with: --tokenizer DIR",
        )
    trained = _data(record).get(_FILES)
    if named is None and trained is not None and tokenizer.fingerprint() != trained:
        raise UserError(
            f"the files of {folder} have changed: they are not the tokenizer that {checkpoint} was trained with",
            hint="restore them; or, if its tokens still have the ids of the training, name it: --tokenizer DIR",
        )
    if same is False:
        raise UserError(
            f"the tokenizer in {named} gives tokens other ids than {_data(record).get('tokenizer') or 'the one'}, with "
            f"which {checkpoint} was trained",
            hint="leave --tokenizer out, or name a copy of that tokenizer",
        )
    return tokenizer


def check_data(checkpoint: Path, manifest: Manifest, key: str) -> str:
    """Refuse data that was prepared with another tokenizer than a checkpoint was trained with.

    Args:
        manifest: of the data.
        key: of the recipe, that names the checkpoint.
    Returns:
        a warning where nothing tells the checkpoint's tokenizer, else an empty string.
    Errors:
        UserError: the tokenizers give tokens other ids, or that they agree cannot be told any more.
    """
    record = read_record(checkpoint)
    trained = _data(record).get(_FILES)
    if trained == manifest.tokenizer.sha256:
        return ""
    same = has_ids_of(record, checkpoint, load_tokenizer(manifest.tokenizer_path()))
    if same is None and trained is None:
        return f"{key}: {checkpoint} tells no tokenizer; nothing checks that blend {manifest.blend} has its own"
    if not same:
        raise UserError(
            f"{key}: wrong tokenizer: blend {manifest.blend} was prepared with another one than {checkpoint} was "
            "trained with",
            hint="take the checkpoint's: write tokenizer: {blend: NAME} of its blend, or, if it was imported, "
            "tokenizer: {kind: huggingface, path: CHECKPOINT/tokenizer}; and prepare the data again",
        )
    return ""


def _data(record: dict[str, Any]) -> dict[str, Any]:
    return record.get("data") or {}


def has_ids_of(record: dict[str, Any], checkpoint: Path, tokenizer: Tokenizer) -> bool | None:
    """Return whether tokens have the ids of the training; None where neither the record nor a file tells them."""
    trained, ids = (_data(record).get(key) for key in (_FILES, _IDS))
    if trained is not None and trained == tokenizer.fingerprint():
        return True
    if ids is None:  # a record of before the hash of ids
        with contextlib.suppress(UserError):
            folder = _recorded_folder(record, checkpoint)
            if trained in (None, fingerprint(folder)):
                ids = load_tokenizer(folder).ids_sha256()
    return None if ids is None else ids == tokenizer.ids_sha256()


def _recorded_folder(record: dict[str, Any], checkpoint: Path) -> Path:
    from nemotron_h.data.blend import load_blend
    from nemotron_h.data.manifest import load_manifest

    hint = "name its folder: --tokenizer DIR"
    recorded = _data(record).get("tokenizer")
    if recorded:
        if not isinstance(recorded, str):
            raise UserError(f"{checkpoint}/run.json: data.tokenizer is {recorded!r}, not a folder", hint=hint)
        folder = checkpoint / recorded  # imported checkpoints hold theirs; an absolute path stays as it is
        if not folder.is_dir():
            raise UserError(f"the tokenizer of {checkpoint} is not at {recorded} any more", hint=hint)
        return folder
    try:
        data = record["recipe"]["data"]
        return Path(load_manifest(data["root"], load_blend(data["blend"]).name).tokenizer_path())
    except (KeyError, TypeError) as error:
        raise UserError(f"{checkpoint}/run.json does not tell the tokenizer ({error})", hint=hint) from error
    except UserError as error:
        raise UserError(f"the tokenizer of {checkpoint} is not found: {error.message}", hint=hint) from error
