"""Hugging Face tokenizer folders, read without running or asking for any of their code."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemotron_h.core.errors import UserError
from nemotron_h.core.files import read_json_object, read_text
from nemotron_h.data.tokenizer_base import Tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Library

LIBRARY_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
TEMPLATE_FILE = "chat_template.jinja"
# in the order in which transformers gives ids to those that the vocabulary lacks
_SINGLE = tuple(f"{role}_token" for role in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
_SEVERAL = ("additional_special_tokens", "extra_special_tokens")  # transformers 4's and 5's key


class HuggingFaceTokenizer(Tokenizer):
    """A Hugging Face folder: `tokenizer.json`, and the names of special tokens beside it.

    No class of transformers is looked up, so it does not matter which release wrote the folder. A folder of an older
    form, without `tokenizer.json`, is converted by transformers.

    Attributes:
        roles: `eos_token`, `bos_token` and so on -> the name of the token.
    """

    kind = "huggingface"

    def __init__(self, path: str | Path) -> None:
        super().__init__(path)
        folder = Path(path)
        if (folder / LIBRARY_FILE).is_file():
            self._library, self.roles, named = _read(folder)
        else:
            self._library, self.roles, named = _convert(folder)
        roles = self.roles
        if "eos_token" not in roles:
            raise UserError(
                f"{path}: the tokenizer names no eos_token, which ends documents", f"Set it in {CONFIG_FILE}."
            )
        self._library.no_padding()
        self._library.no_truncation()
        self._library.encode_special_tokens = True
        ids = self._library.get_vocab(with_added_tokens=True)
        self.vocab_size = max(ids.values()) + 1
        self.eod_id = ids[roles["eos_token"]]
        self.pad_id = ids[roles.get("pad_token", roles["eos_token"])]
        self.bos_id = ids[roles.get("bos_token", roles["eos_token"])]
        added = self._library.get_added_tokens_decoder().values()
        self._special = {name: ids[name] for name in (*(t.content for t in added if t.special), *named)}

    def text_to_ids(self, text: str) -> list[int]:
        return self._library.encode(text, add_special_tokens=False).ids

    @property
    def special_tokens(self) -> dict[str, int]:
        return dict(sorted(self._special.items(), key=lambda item: item[1]))

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [e.ids for e in self._library.encode_batch_fast(texts, add_special_tokens=False)]

    def ids_to_text(self, ids: Sequence[int], remove_special_tokens: bool = False) -> str:
        return self._library.decode([int(i) for i in ids], skip_special_tokens=remove_special_tokens)

    def ids_to_tokens(self, ids: Sequence[int]) -> list[str]:
        return [self._library.id_to_token(int(i)) or f"<unused_{i}>" for i in ids]


def _read(folder: Path) -> tuple[Library, dict[str, str], list[str]]:
    """Return the tokenizer of `tokenizer.json`, the names of eos, bos and so on, and all names beside the file.

    Tokens that only the files beside it name get the next ids, as transformers gives them.
    """
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as Library

    library = Library.from_str(read_text(folder / LIBRARY_FILE))
    config = settings_of(folder)
    added = config.get("added_tokens_decoder") or {}
    for number in sorted(added, key=int):
        options = {k: v for k, v in added[number].items() if k != "__type"}
        if library.token_to_id(options["content"]) is None:
            library.add_tokens([AddedToken(**options)])
    roles = {key: _name(config[key], key, folder) for key in _SINGLE if config.get(key) is not None}
    if "eos_token" not in roles:  # the oldest folders have ids alone
        by_id = {key: _name_by_id(folder, library, key) for key in ("bos_token", "eos_token", "pad_token")}
        roles = {key: name for key, name in by_id.items() if name is not None} | roles
    named = [*roles.values(), *_several(config, folder)]
    library.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in named])
    return library, roles, named


def settings_of(folder: Path) -> dict[str, Any]:
    """Return what the small files beside `tokenizer.json` say; the newer one has the last word."""
    settings: dict[str, Any] = {}
    for name in ("special_tokens_map.json", CONFIG_FILE):
        if (folder / name).is_file():
            settings |= read_json_object(folder / name)
    return settings


def _name(value: Any, key: str, folder: Path) -> str:
    """Return a token's name, which stands alone or with its options."""
    name = value.get("content") if isinstance(value, dict) else value
    if not isinstance(name, str):
        raise UserError(f"{folder}: {key} is {value!r}; the name of a token is needed", f"Mend it in {CONFIG_FILE}.")
    return name


def _several(config: dict[str, Any], folder: Path) -> Iterator[str]:
    for key in _SEVERAL:
        tokens = config.get(key) or []
        if not isinstance(tokens, list | dict):
            raise UserError(f"{folder / CONFIG_FILE}: {key} is {tokens!r}; a list of tokens is needed")
        for token in tokens.values() if isinstance(tokens, dict) else tokens:
            yield _name(token, key, folder)


def _name_by_id(folder: Path, library: Library, key: str) -> str | None:
    """Return the token whose id the model's `config.json` gives."""
    if not (folder / "config.json").is_file():
        return None
    number = read_json_object(folder / "config.json").get(f"{key}_id")
    number = number[0] if isinstance(number, list) and number else number
    return library.id_to_token(number) if isinstance(number, int) else None


def _convert(folder: Path) -> tuple[Library, dict[str, str], list[str]]:
    """Return what `_read` does, for a folder of vocabulary files that transformers knows how to convert."""
    from transformers import AutoTokenizer

    error: Exception | None = None
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        library = getattr(tokenizer, "backend_tokenizer", None)
    except Exception as raised:  # of any kind: missing files, packages, classes, code that is not run
        error, library = raised, None
    if library is None:
        told = isinstance(error, ValueError | ImportError) and str(error).strip()
        reason = f": {told.splitlines()[0][:200]}" if told else ""
        raise UserError(
            f"{folder} has no {LIBRARY_FILE}, and transformers cannot make one of its files{reason}",
            "Save it anew where transformers reads it: AutoTokenizer.from_pretrained(DIR).save_pretrained(OUT).",
        ) from error
    roles = {key: str(getattr(tokenizer, key)) for key in _SINGLE if getattr(tokenizer, key) is not None}
    return library, roles, list(map(str, tokenizer.all_special_tokens))


def template_of(folder: Path) -> str | None:
    """Return the chat template of a tokenizer's folder: its file's, else the (default) one in `tokenizer_config.json`.

    Errors:
        UserError: a file is unreadable, or the template is no text.
    """
    if (folder / TEMPLATE_FILE).is_file():
        return read_text(folder / TEMPLATE_FILE)
    template = read_json_object(folder / CONFIG_FILE).get("chat_template") if (folder / CONFIG_FILE).is_file() else None
    if isinstance(template, list):  # several, by name
        by_name = {each.get("name"): each.get("template") for each in template if isinstance(each, dict)}
        template = by_name.get("default") or next(iter(by_name.values()), None) or template
    if template is not None and not isinstance(template, str):
        raise UserError(f"{folder / CONFIG_FILE}: chat_template is {template!r:.60}, not text")
    return template
