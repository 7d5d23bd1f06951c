"""Tokenizers: nothing is lost, both engines agree, training is deterministic, NeMo takes them."""

from __future__ import annotations

import base64
import codecs
import json
import pickle
import random
import shutil
import sys
import unicodedata
from pathlib import Path

import pytest
from local_corpus import sentences

from nemotron_h.core.errors import UserError
from nemotron_h.data import tokenizer as tok

TEXTS = [
    *tok.PROBES,
    "",
    "a",
    "\n",
    "e\u0301 vs \u00e9",
    "x" * 3000,
    "<|endoftext|> and <SPECIAL_10> are text here",
    "\x00\x01\x7f",
]


def random_unicode(seed: int, length: int) -> str:
    rng = random.Random(seed)
    points = (
        chr(rng.choice((rng.randrange(0x80), rng.randrange(0x3000), rng.randrange(0x11_0000)))) for _ in range(length)
    )
    return "".join(c for c in points if unicodedata.category(c) != "Cs")


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    path = tmp_path_factory.mktemp("bpe")
    return tok.train_bpe([*sentences(5, 2000), *tok.PROBES], 600, path)


@pytest.fixture(scope="module")
def huggingface(bpe, tmp_path_factory):
    path = tmp_path_factory.mktemp("hf")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(f"{bpe.path}/{name}", path)
    tok.write_meta(path, "huggingface")
    return tok.load_tokenizer(path)


@pytest.fixture(scope="module")
def tiktoken(bpe, tmp_path_factory):
    """A vocabulary in Tekken's format, made of our BPE's ranks."""
    path = tmp_path_factory.mktemp("tekken")
    ranked = [bytes([byte]) for byte in range(256)] + bpe._ranked[256:]
    vocab = [{"rank": r, "token_bytes": base64.b64encode(t).decode(), "token_str": None} for r, t in enumerate(ranked)]
    config = {"pattern": tok.PATTERN, "default_vocab_size": len(vocab) + 20 - 5, "default_num_special_tokens": 20}
    (path / "tekken.json").write_text(json.dumps({"config": config, "vocab": vocab}), encoding="utf-8")
    tok.write_meta(path, "tiktoken", file="tekken.json", num_special_tokens=20, pattern="")
    return tok.load_tokenizer(path)


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory):
    import sentencepiece

    path = tmp_path_factory.mktemp("spm")
    with open(path / "m.model", "wb") as model:
        options = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "add_dummy_prefix": False}
        options |= {"vocab_size": 500, "model_type": "bpe", "byte_fallback": True, "minloglevel": 2}
        texts = iter(sentences(6, 2000))
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=texts, model_writer=model, **options)
    tok.write_meta(path, "sentencepiece", file="m.model")
    return tok.load_tokenizer(path)


KINDS = ("bpe", "huggingface", "tiktoken", "sentencepiece")


@pytest.mark.parametrize("kind", KINDS)
def test_round_trip(kind, request):
    tokenizer = request.getfixturevalue(kind)
    assert tokenizer.is_lossless()
    for text in [*TEXTS, *(random_unicode(seed, 300) for seed in range(20))]:
        if kind == "sentencepiece":
            text = text.replace("\u2581", "").replace("\x00", "")  # its own mark for a space, and the end of a C string
        ids = tokenizer.text_to_ids(text)
        assert tokenizer.ids_to_text(ids) == text
        assert all(0 <= i < tokenizer.vocab_size for i in ids)
        assert tokenizer.eod_id not in ids
    assert tokenizer.encode_batch(TEXTS) == [tokenizer.text_to_ids(text) for text in TEXTS]


def test_both_engines_give_the_same_tokens(bpe, huggingface):
    for text in [*TEXTS, *sentences(7, 500), *(random_unicode(seed, 500) for seed in range(100, 150))]:
        assert bpe.text_to_ids(text) == huggingface.text_to_ids(text)


def test_long_texts_are_cut_without_changing_tokens(bpe, huggingface):
    text = "\n".join(sentences(8, 2000))
    assert len(text) > 2 * tok._SEGMENT_CHARACTERS
    assert bpe.text_to_ids(text) == huggingface.text_to_ids(text)
    for run in (" " * 1_100_000, "日" * 250_000, "\t \n" * 400_000):  # tiktoken alone overflows on the first
        assert bpe.ids_to_text(bpe.text_to_ids(run)) == run


def test_training_is_deterministic(bpe, tmp_path):
    again = tok.train_bpe([*sentences(5, 2000), *tok.PROBES], 600, tmp_path)
    assert again.fingerprint() == bpe.fingerprint()


def test_special_tokens_are_reserved(bpe):
    assert bpe.ids_to_tokens(range(5)) == list(tok.SPECIAL_TOKENS)
    assert bpe.tokens_to_ids("<SPECIAL_11>") == 3
    assert bpe.ids_to_text([2, *bpe.text_to_ids("hi"), 0]) == "<SPECIAL_10>hi<|endoftext|>"
    assert bpe.ids_to_text([2, *bpe.text_to_ids("hi"), 0], remove_special_tokens=True) == "hi"


def test_too_little_text_for_the_size(tmp_path):
    with pytest.raises(UserError, match=r"gives only .* of 5000 tokens"):
        tok.train_bpe(["a few words"], 5000, tmp_path)


def test_fingerprint_follows_the_files(bpe, tmp_path):
    shutil.copytree(bpe.path, tmp_path / "copy")
    assert tok.fingerprint(tmp_path / "copy") == bpe.fingerprint()
    with open(tmp_path / "copy" / "tokenizer.json", "a", encoding="utf-8") as file:
        file.write(" ")
    assert tok.fingerprint(tmp_path / "copy") != bpe.fingerprint()


def test_folder_without_a_tokenizer(tmp_path):
    with pytest.raises(UserError, match="no prepared tokenizer"):
        tok.load_tokenizer(tmp_path)
    for meta, words in (
        ("[]", "names no kind"),
        ('{"kind": 3}', "names no kind"),
        ("[" * 100_000, "nested too deep"),
        ('{"kind": "wordpiece"}', "kind wordpiece is unknown"),
        ('{"kind": "tiktoken"}', "cannot load the tiktoken tokenizer: KeyError"),
        ('{"kind": "sentencepiece", "file": "../m.model"}', "is not a name in this folder"),
    ):
        (tmp_path / tok.META_FILE).write_text(meta)
        with pytest.raises(UserError, match=words):
            tok.load_tokenizer(tmp_path)


def test_damaged_vocabularies(bpe, huggingface, tiktoken, tmp_path):
    """The libraries raise errors of many kinds, or panic at a text: each is one error of ours, at the load."""

    own = json.loads(Path(bpe.path, "tokenizer.json").read_text(encoding="utf-8"))
    own["model"]["vocab"] = {name: i for i, name in enumerate(own["model"]["vocab"]) if i < 100}
    ranks = json.loads(Path(tiktoken.path, "tekken.json").read_text(encoding="utf-8"))
    few = {**ranks, "vocab": ranks["vocab"][:90]}
    twice = {**ranks, "vocab": [*ranks["vocab"][:300], *ranks["vocab"][:300]]}
    small = {**ranks, "config": {**ranks["config"], "default_vocab_size": 20}}
    for source, file, content, words in (
        (bpe, "tokenizer.json", own, r"lacks \d+ of the 256 bytes"),
        (bpe, "tokenizer.json", [], "cannot load the bpe tokenizer: TypeError"),
        (huggingface, "tokenizer.json", '{"version": "1.0", "mod', "cannot load the huggingface tokenizer"),
        (huggingface, "tokenizer.json", {"model": {"type": "BPE", "vocab": {}, "merges": []}}, "no tokens for text"),
        (tiktoken, "tekken.json", few, r"lacks \d+ of the 256 bytes"),
        (tiktoken, "tekken.json", twice, "tokens of the vocabulary are there twice"),
        (tiktoken, "tekken.json", small, "20 tokens with 20 special ones"),
        (tiktoken, "tekken.json", '[{"rank":0,"', "tekken.json.* not JSON"),
    ):
        shutil.rmtree(tmp_path / "damaged", ignore_errors=True)
        path = Path(shutil.copytree(source.path, tmp_path / "damaged"))
        (path / file).write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        with pytest.raises(UserError, match=words):
            tok.load_tokenizer(path)


def test_a_folder_of_any_release_of_transformers(huggingface, tmp_path, monkeypatch):
    """tokenizer.json and the name of the end are enough; nothing of the folder is asked for or run."""
    shutil.copy(f"{huggingface.path}/tokenizer.json", tmp_path)
    monkeypatch.setitem(sys.modules, "transformers", None)  # an import of it fails
    newest = {"tokenizer_class": "TokenizersBackend", "eos_token": tok.END_OF_TEXT, "extra_special_tokens": ["<new>"]}
    token = {"content": tok.PAD, "special": True, "lstrip": False, "__type": "AddedToken"}
    code = {"auto_map": {"AutoConfig": "code.X"}, "eos_token_id": [0, 3]}
    (tmp_path / "code.py").write_text("raise SystemExit('the code of the folder was run')")
    for files, special in (
        ({"tokenizer_config.json": newest}, "<new>"),
        ({"tokenizer_config.json": {"eos_token": tok.END_OF_TEXT, "pad_token": token}}, None),
        ({"tokenizer_config.json": {}, "special_tokens_map.json": {"eos_token": {"content": tok.END_OF_TEXT}}}, None),
        ({"tokenizer_config.json": {}, "special_tokens_map.json": {}, "config.json": code}, None),
    ):
        for name, content in files.items():
            (tmp_path / name).write_bytes(codecs.BOM_UTF8 + json.dumps(content).encode())
        read = tok.load_tokenizer(tmp_path, "huggingface")
        assert read.eod_id == huggingface.eod_id
        assert read.text_to_ids(tok.PROBES[0]) == huggingface.text_to_ids(tok.PROBES[0])
        assert read.vocab_size == huggingface.vocab_size + (special is not None)
        assert read.special_tokens == huggingface.special_tokens | ({special: 600} if special else {})
    assert read.pad_id == read.eod_id
    (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match="names no eos_token"):
        tok.load_tokenizer(tmp_path, "huggingface")


def test_older_folders_are_converted_and_run_no_code(bpe, tmp_path):
    """Those of vocab.json and merges.txt; other files that ask for code of the folder are refused."""
    model = json.loads(Path(bpe.path, "tokenizer.json").read_text(encoding="utf-8"))["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]), encoding="utf-8")
    (tmp_path / "merges.txt").write_text("\n".join(map(" ".join, model["merges"])), encoding="utf-8")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    old = tok.load_tokenizer(tmp_path, "huggingface")
    assert (old.eod_id, old.ids_to_text(old.text_to_ids(tok.PROBES[0]))) == (0, tok.PROBES[0])
    code = {"auto_map": {"AutoTokenizer": ["code.X", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(code))
    (tmp_path / "code.py").write_text("raise SystemExit('the code of the folder was run')")
    with pytest.raises(UserError, match=r"has no tokenizer\.json, and transformers cannot make one"):
        tok.load_tokenizer(tmp_path, "huggingface")


@pytest.mark.parametrize("kind", KINDS)
def test_survives_pickling(kind, request):
    tokenizer = request.getfixturevalue(kind)
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.text_to_ids(tok.PROBES[0]) == tokenizer.text_to_ids(tok.PROBES[0])


def test_nemo_and_its_tiktoken_agree(tiktoken, tmp_path):
    """Tekken's layout read by NeMo's own class gives the same ids."""
    from nemo.collections.common.tokenizers.tiktoken_tokenizer import TiktokenTokenizer
    from nemo.collections.common.tokenizers.tokenizer_spec import TokenizerSpec

    assert isinstance(tok.nemo_tokenizer(tiktoken.path), TokenizerSpec)
    vocab = json.loads(Path(tiktoken.path, "tekken.json").read_text(encoding="utf-8"))["vocab"]
    for entry in vocab:
        entry["token_str"] = ""
    (tmp_path / "bare.json").write_text(json.dumps(vocab), encoding="utf-8")
    nemo = TiktokenTokenizer(str(tmp_path / "bare.json"), vocab_size=tiktoken.vocab_size, num_special_tokens=20)
    for text in tok.PROBES:
        assert tiktoken.text_to_ids(text) == nemo.text_to_ids(text)
    assert (nemo.bos_id, nemo.eos_id) == (tiktoken.bos_id, tiktoken.eod_id)
