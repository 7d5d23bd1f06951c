"""Preparing conversations: tokens and masks on disk, bad records counted with their place, and what rebuilds."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from nemotron_h.core.errors import UserError
from nemotron_h.data.blend import load_blend
from nemotron_h.data.chat import FAMILY_SOURCE, ChatTemplate
from nemotron_h.data.indexed import read_lengths
from nemotron_h.data.manifest import check_manifest, load_manifest, probe
from nemotron_h.data.messages import read_conversation
from nemotron_h.data.prepare.pipeline import prepare
from nemotron_h.data.prepare.verify import verify
from nemotron_h.data.tokenizer import load_tokenizer

BLEND = """
name: talk
tokenizer: {kind: bpe, vocab_size: 270}
chat_template: nemotron_h
sources:
  a: {category: chat, format: jsonl, chat: messages, path: a.jsonl, licence: ours, validation: 0.2, deduplicate: true}
  b: {category: chat, format: json, chat: alpaca, path: b.json, licence: ours, validation: 0}
phases:
  - {name: all, weights: {chat: 100}}
"""


def messages(number: int) -> dict:
    turns = [
        ("user", f"What is {number}?"),
        ("assistant", f"It is {number}."),
        ("user", "Sure?"),
        ("assistant", "Yes."),
    ]
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def write(folder: Path, lines: list[str]) -> None:
    (folder / "a.jsonl").write_text("".join(line + "\n" for line in lines))


@pytest.fixture(scope="module")
def talk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `talk.yaml`, its files, and the prepared blend under `data`."""
    folder = tmp_path_factory.mktemp("talk")
    lines = [json.dumps(messages(number)) for number in [*range(200), 7]]
    write(folder, [*lines[:5], '{"messages": [{"role": "robot", "content": "x"}]}', *lines[5:]])
    alpaca = [{"instruction": "Count.", "input": str(n), "output": " ".join(map(str, range(n)))} for n in range(1, 40)]
    (folder / "b.json").write_text(json.dumps(alpaca))
    (folder / "talk.yaml").write_text(BLEND)
    prepare(load_blend(folder / "talk.yaml"), folder / "data", workers=1, console=Console(quiet=True))
    return folder


def test_tokens_and_masks_on_disk_are_the_template_s(talk: Path) -> None:
    blend = load_blend(talk / "talk.yaml")
    manifest = verify(blend, talk / "data", console=Console(quiet=True))
    template = ChatTemplate(FAMILY_SOURCE, load_tokenizer(manifest.tokenizer_path()))
    expected = [template.encode(read_conversation(messages(n), "messages")) for n in range(200)]
    found = []
    for split in ("train", "validation"):
        prefix = manifest.prefix("a", split)
        lengths = read_lengths(prefix + ".idx")
        ids = np.fromfile(prefix + ".bin", dtype=np.uint16)
        loss = np.fromfile(prefix + ".loss", dtype=np.uint8)
        ends = np.cumsum(lengths)[:-1]
        found += [
            (part.tolist(), learnt.astype(bool).tolist())
            for part, learnt in zip(np.split(ids, ends), np.split(loss, ends), strict=True)
        ]
    assert len(found) == 200  # the repeated one was dropped
    assert sorted(found) == sorted((e.ids, e.loss) for e in expected)
    assert (Path(manifest.folder) / "chat_template.jinja").read_text() == FAMILY_SOURCE


def test_bad_conversations_are_counted_with_file_and_line(talk: Path) -> None:
    manifest = check_manifest(talk / "data", load_blend(talk / "talk.yaml"))
    assert (manifest.sources["a"].quarantined, manifest.sources["a"].duplicates_dropped) == (1, 1)
    (line,) = (Path(manifest.folder) / "a" / "quarantine.jsonl").read_text().splitlines()
    record = json.loads(line)
    assert (Path(record["file"]).name, record["position"]) == ("a.jsonl", "line 6")
    assert "unknown role 'robot'" in record["reason"]


def test_a_mask_of_another_size_or_content_is_found(talk: Path) -> None:
    blend = load_blend(talk / "talk.yaml")
    file = talk / "data" / "talk" / "b" / "train.loss"
    content = file.read_bytes()
    try:
        file.write_bytes(content[:-1])
        with pytest.raises(UserError, match=r"train\.loss is missing or of another size"):
            check_manifest(talk / "data", blend)
        file.write_bytes(bytes([1 - content[0]]) + content[1:])
        with pytest.raises(UserError, match=r"b/train\.bin/\.idx/\.loss are not the files that were prepared"):
            check_manifest(talk / "data", blend)
        manifest = load_manifest(talk / "data", "talk")
        manifest.sources["b"].splits["train"].probe = probe(manifest.prefix("b", "train"))  # as it was written formerly
        manifest.save()
        with pytest.raises(UserError, match=r"train\.loss changed"):
            verify(blend, talk / "data", console=Console(quiet=True))
    finally:
        file.write_bytes(content)
    assert check_manifest(talk / "data", blend).sources["b"].splits["train"].probe


def test_too_many_bad_conversations_stop_with_the_first(tmp_path: Path, talk: Path) -> None:
    write(tmp_path, [json.dumps(messages(1)), '{"messages": []}', "{", *[json.dumps(messages(2))] * 5])
    text = BLEND.replace("a.jsonl", str(tmp_path / "a.jsonl")).replace("b.json,", f"{talk}/b.json,")
    template = "chat_template: nemotron_h\n"
    tokenizer = "tokenizer: {kind: bpe, blend: talk}"
    text = text.replace("name: talk", "name: other").replace("tokenizer: {kind: bpe, vocab_size: 270}", tokenizer)
    blend = tmp_path / "other.yaml"
    blend.write_text(text)
    with pytest.raises(UserError) as caught:
        prepare(load_blend(blend), talk / "data", workers=1, console=Console(quiet=True))
    assert "2 of 8 records cannot be read" in caught.value.message
    assert "line 2: there are no turns" in caught.value.message
    # the template refuses what the reader takes
    write(tmp_path, [json.dumps(messages(1))] * 5)
    (tmp_path / "no.jinja").write_text("{{ raise_exception('not me') }}")
    blend.write_text(text.replace(template, "chat_template: no.jinja\n"))
    with pytest.raises(UserError, match=r"(line 1|record 0): the template: not me"):
        prepare(load_blend(blend), talk / "data", workers=1, console=Console(quiet=True))


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ("chat: alpaca", "chat: alpacca", "sources.b.chat: 'alpacca' is none of messages, sharegpt"),
        ("chat: alpaca, ", "", "sources.b.chat: '' is none of"),
        ("chat_template: nemotron_h\n", "", "chat_template: missing"),
        ("format: json, ", "format: text, ", "conversations are records"),
        ("{kind: bpe, vocab_size: 270}", "{kind: bpe, blend: x, path: y}", "one of path, fetch and blend"),
    ],
)
def test_mistakes_in_a_blend_of_conversations(tmp_path: Path, before: str, after: str, expected: str) -> None:
    assert before in BLEND
    (tmp_path / "talk.yaml").write_text(BLEND.replace(before, after))
    with pytest.raises(UserError) as caught:
        load_blend(tmp_path / "talk.yaml")
    assert expected in str(caught.value)


def test_the_tokenizer_s_own_template_is_taken_and_unread_fields_are_said(talk: Path, tmp_path: Path) -> None:
    own = (
        "{% for m in messages %}{{ m.role }}: {% if m.role == 'assistant' %}{% generation %}{{ m.content + eos_token }}"
        "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    folder = tmp_path / "hf"
    shutil.copytree(talk / "data/talk/tokenizer", folder)
    record = messages(1)
    record["messages"][1] |= {"name": "Ada", "citations": ["x"], "weight": 1}
    write(tmp_path, [json.dumps(record)] * 3)
    blend = tmp_path / "talk.yaml"
    text = BLEND.replace("chat_template: nemotron_h", "chat_template: tokenizer").replace(", validation: 0.2", "")
    text = text.replace("{kind: bpe, vocab_size: 270}", "{kind: bpe, path: hf}").replace("b.json", "a.jsonl")
    blend.write_text(text.replace("format: json, chat: alpaca", "format: jsonl, chat: messages"))
    with pytest.raises(UserError, match="the blend's tokenizer has no chat template"):
        prepare(load_blend(blend), tmp_path / "data", workers=1, console=Console(quiet=True))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": own}))
    said = io.StringIO()
    prepare(load_blend(blend), tmp_path / "data", workers=1, console=Console(file=said, width=200))
    prepared = tmp_path / "data/talk"
    assert (prepared / "chat_template.jinja").read_text() == own
    ids = np.fromfile(prepared / "b/train.bin", dtype=np.uint16)
    begin = load_tokenizer(prepared / "tokenizer").ids_to_text(ids)
    assert begin.startswith("user: What is 1?assistant: It is 1.<|endoftext|>user: Sure?")
    assert "b: fields of messages that are not read: name (3 messages), citations (3 messages)" in said.getvalue()
