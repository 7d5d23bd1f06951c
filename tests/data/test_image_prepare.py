"""Preparing conversations with images: every shape of record, what is on disk, what is refused, what rebuilds."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import yaml
from odd_conversations import CONVERSATIONS
from odd_images import IMAGES, plain, saved
from rich.console import Console

from nemotron_h.core.errors import UserError
from nemotron_h.data.blend import load_blend
from nemotron_h.data.chat import FAMILY_SOURCE, ChatTemplate
from nemotron_h.data.images.records import PLACE, PROMPTS, Picture, among, beside, read_illustrated
from nemotron_h.data.images.store import Images
from nemotron_h.data.indexed import read_lengths
from nemotron_h.data.manifest import PLACES, check_manifest
from nemotron_h.data.messages import IMAGE, ChatError, Turn
from nemotron_h.data.prepare.pipeline import prepare
from nemotron_h.data.prepare.verify import verify
from nemotron_h.data.show import overview, show
from nemotron_h.data.tokenizer import load_tokenizer

SHADES = 40


def shade(number: int) -> bytes:
    """A grey PNG of a shade and size of its own."""
    return saved(plain("L", 6 * number, (8 + number, 8)))


def url(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


def ask(*content, answer: str = "Grey.") -> dict:
    return {"messages": [{"role": "user", "content": [*content]}, {"role": "assistant", "content": answer}]}


def text(words: str) -> dict:
    return {"type": "text", "text": words}


def llava(*images: str, asked: str = "<image>\nWhat?", answer: str = "Grey.", key: str = "images") -> dict:
    turns = [{"from": "human", "value": asked}, {"from": "gpt", "value": answer}]
    return {key: images[0] if key == "image" else list(images), "conversations": turns}


def test_records_of_every_shape_come_to_the_same_turns(tmp_path: Path) -> None:
    """Places in their order, names as written, and text alone where there is no image."""
    locate = beside(str(tmp_path / "talk.jsonl"), ".")
    part = {"type": "image", "image": "a.png"}
    parts = {"type": "image_url", "image_url": {"url": "b.png"}}
    row = {"images": [{"bytes": b"x", "path": None}], "prompt": "Is <image> a cat?", "response": "No"}
    cases = [
        ("messages", ask(part, text("What?")), PLACE + "\nWhat?", ["a.png"]),
        ("messages", ask(text("A "), part, text(" or "), parts), f"A {PLACE} or {PLACE}", ["a.png", "b.png"]),
        ("messages", {**ask({"type": "image"}, text("\nWhat?")), "images": ["a.png"]}, PLACE + "\nWhat?", ["a.png"]),
        ("messages", ask(text("Say <image>.")), "Say <image>.", []),
        ("messages", ask({"type": "image", "image": url(shade(0))}), PLACE, ["in the record"]),
        ("sharegpt", llava("a.png", key="image"), PLACE + "\nWhat?", ["a.png"]),
        ("sharegpt", llava("a.png", "b.png", asked="<image> or <image>?"), f"{PLACE} or {PLACE}?", ["a.png", "b.png"]),
        ("sharegpt", llava("a.png", "b.png", asked="Which?"), f"{PLACE}{PLACE}\nWhich?", ["a.png", "b.png"]),
        ("sharegpt", llava(asked="No <image> here"), "No <image> here", []),
        ("alpaca", {"image": "a.png", "instruction": "What?", "output": "Grey."}, PLACE + "\nWhat?", ["a.png"]),
        ("prompt_response", row, f"Is {PLACE} a cat?", ["in the record"]),
    ]
    for shape, record, content, names in cases:
        turns = read_illustrated(record, shape, locate)
        assert (turns[0].content, [picture.name for picture in turns[0].images]) == (content, names), record
        assert turns[1].images == ()
    turns = read_illustrated({"image": "a.png", "caption": "A cat."}, "caption", locate)
    assert turns[0].content.removeprefix(PLACE + "\n") in PROMPTS
    assert read_illustrated({"image": "a.png", "text": "A cat."}, "caption", locate, ["Read."])[1].content == "A cat."
    assert turns[0].images[0].path == str(tmp_path / "a.png")
    assert beside(str(tmp_path / "x/talk.jsonl"), "../train")("a/./b.png").path == str(tmp_path / "train/a/b.png")
    assert beside("x.jsonl", "/")("file:///a%20b.png").path == "/a b.png"
    one, two = Picture("1.png", data=b"1"), Picture("2.png", data=b"2")
    assert among({"a/1.png": one, "a/2.png": two})("elsewhere/2.png") is two
    assert among({"a/1.png": one})("coco/7.jpg") is one
    assert read_illustrated(llava(asked="<image>?"), "sharegpt", locate, own=[one])[0].images == (one,)
    explicit = read_illustrated(ask({"type": "image", "image": "2.png"}), "messages", among({"2.png": two}), own=[two])
    assert explicit[0].images == (two,)
    for members in ({"a/1.png": one, "a/2.png": two}, {}):
        with pytest.raises(ChatError, match=r"image 7\.jpg is none of the sample's"):
            among(members)("7.jpg")
    with pytest.raises(ChatError, match=r"image b\.jpg is none of the sample's"):
        read_illustrated(llava("a.jpg", "b.jpg"), "sharegpt", among({"a/1.png": one}))


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_an_odd_conversation_has_one_clear_outcome(name: str) -> None:
    shape, record, outcome = CONVERSATIONS[name]
    locate = beside("/data/talk.jsonl", ".")
    if isinstance(outcome, str):
        with pytest.raises(ChatError, match=outcome):
            read_illustrated(record, shape, locate)
        return
    turn = read_illustrated(record, shape, locate)[0]
    assert (turn.content, [picture.name for picture in turn.images]) == outcome
    assert len(CONVERSATIONS) >= 40


def sources(folder: Path) -> dict[str, dict]:
    """Write five sources: content parts, LLaVA's in a folder of their own, an archive, captions of one, and Parquet."""
    (folder / "train").mkdir()
    for number in range(SHADES):
        (folder / f"{number}.png").write_bytes(shade(number))
        (folder / "train" / f"{number}.png").write_bytes(shade(number))
    part = [{"type": "image", "image": f"{n}.png"} for n in range(SHADES)]
    talk = [ask(part[n], text(f"Is this {n}?"), answer="Yes.") for n in range(SHADES)]
    talk += [ask(part[n], text("or"), part[n - 1], text("?"), answer=f"{n}.") for n in range(1, 6)]
    talk += [ask(text("Hello?"), answer=f"{n}!") for n in range(5)] + [talk[3]]
    (folder / "talk.jsonl").write_text("".join(json.dumps(record) + "\n" for record in talk))
    seen = [json.dumps(llava(f"{n}.png", answer="Same.", key="image")) for n in range(SHADES)]
    (folder / "llava.jsonl").write_text("\n".join(seen))
    with tarfile.open(folder / "wds.tar", "w") as wds, tarfile.open(folder / "captions.tar.gz", "w:gz") as captions:
        for number in range(SHADES):
            record = json.dumps(llava(f"coco/{number}.png", key="image")).encode()
            members = {"json": record, "png": shade(number), "cls": b"7"}
            caption = {"txt": f"Shade {number}.\n".encode(), "png": shade(number)}
            for archive, content in ((wds, members), (captions, caption)):
                for suffix, data in content.items():
                    info = tarfile.TarInfo(f"./a/{number:03d}.{suffix}")
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))
    stored = [[{"bytes": shade(n), "path": "x.png"}] for n in range(9)]
    rows = [{"images": images, "prompt": "<image>?", "response": str(n)} for n, images in enumerate(stored)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "rows.parquet")
    form = {"category": "chat", "licence": "ours", "validation": 0.2}
    lines = {**form, "format": "jsonl"}
    return {
        "talk": {**lines, "chat": "messages", "images": ".", "deduplicate": True, "path": "talk.jsonl"},
        "llava": {**lines, "chat": "sharegpt", "images": "train", "path": "llava.jsonl"},
        "wds": {**form, "format": "webdataset", "chat": "sharegpt", "path": "wds.tar"},
        "captions": {**form, "format": "webdataset", "chat": "caption", "path": "captions.tar.gz"},
        "rows": {**form, "format": "parquet", "chat": "prompt_response", "images": ".", "path": "rows.parquet"},
    }


def write_blend(folder: Path, content: dict[str, dict], name: str = "seen", **tokenizer) -> Path:
    blend = {
        "name": name,
        "tokenizer": {"kind": "bpe", **(tokenizer or {"vocab_size": 280})},
        "chat_template": "nemotron_h",
        "sources": content,
        "phases": [{"name": "all", "weights": {"chat": 100}}],
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(blend))
    return folder / f"{name}.yaml"


def run(blend: Path, workers: int = 1) -> str:
    """Prepare a blend and return what was said."""
    said = io.StringIO()
    prepare(load_blend(blend), blend.parent / "data", workers=workers, console=Console(file=said, width=300))
    return said.getvalue()


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The blend's file, with all sources prepared under `data`, and what preparation said."""
    folder = tmp_path_factory.mktemp("seen")
    blend = write_blend(folder, sources(folder))
    return blend, run(blend, workers=2)


def documents(prefix: str, images: Images) -> list[tuple[list[int], list[int], list[tuple[int, int]]]]:
    """Tokens, places and sizes of images of every document of a split."""
    ids = np.split(np.fromfile(prefix + ".bin", np.uint16), np.cumsum(read_lengths(prefix + ".idx"))[:-1])
    found = []
    for number, tokens in enumerate(ids):
        rows = np.flatnonzero(images.places["document"] == number)
        sizes = [images.read(row).size for row in rows.tolist()]
        found.append((tokens.tolist(), images.places["token"][rows].tolist(), sizes))
    return found


def test_what_is_on_disk_is_the_template_s_tokens_and_the_images_themselves(seen) -> None:
    blend, said = seen
    manifest = verify(load_blend(blend), blend.parent / "data", console=Console(quiet=True))
    template = ChatTemplate(FAMILY_SOURCE, load_tokenizer(manifest.tokenizer_path()))
    pad = template.tokenizer.pad_id
    for source, record_of in {
        "llava": lambda n: llava("x", answer="Same."),
        "wds": lambda n: llava("x"),
        "rows": lambda n: llava("x", asked="<image>?", answer=str(n)),
    }.items():
        count, found = 9 if source == "rows" else SHADES, []
        for split, entry in manifest.sources[source].splits.items():
            images = Images(manifest.prefix(source, split))
            assert entry.images == len(images.places) == entry.documents
            found += documents(manifest.prefix(source, split), images)
        turns = [read_illustrated(record_of(n), "sharegpt", beside("x", ".")) for n in range(count)]
        expected = [(e.ids, e.images, [(8 + n, 8)]) for n, e in enumerate(map(template.encode, turns))]
        assert sorted(found, key=lambda d: d[2]) == expected
        assert all(ids[place] == pad for ids, places, _ in found for place in places)
    talk = manifest.sources["talk"]
    assert (talk.duplicates_dropped, sum(s.documents for s in talk.splits.values())) == (1, SHADES + 10)
    assert sum(s.images for s in talk.splits.values()) == SHADES + 10
    assert sum(s.image_bytes for s in talk.splits.values()) == sum(len(shade(n)) for n in range(SHADES)) + sum(
        len(shade(n)) for n in shared_between(manifest)
    )
    assert "wds: fields of messages that are not read: .cls (40 messages)" in said
    assert "llava: " in said
    assert "40 images" in said
    held_out = {*Images(manifest.prefix("llava", "validation")).places["width"].tolist()}
    assert held_out == {*Images(manifest.prefix("captions", "validation")).places["width"].tolist()}  # by image alone
    assert 0 < len(held_out) < SHADES
    shown = io.StringIO()
    show(overview(load_blend(blend), blend.parent / "data"), Console(file=shown, width=200))
    assert "bytes of .bin, .idx and images" in shown.getvalue()
    assert "to train on. Their tokens depend on the model" in shown.getvalue()


def shared_between(manifest) -> list[int]:
    """Shades that both splits of `talk` have: second images of conversations whose first is on the other side."""
    widths = [{*Images(manifest.prefix("talk", split)).places["width"].tolist()} for split in ("train", "validation")]
    return [width - 8 for width in widths[0] & widths[1]]


def test_a_change_of_an_image_file_rebuilds_its_source_alone_and_sources_may_move(seen, tmp_path: Path) -> None:
    content = {name: yaml.safe_load(seen[0].read_text())["sources"][name] for name in ("talk", "llava")}
    shutil.copytree(seen[0].parent, tmp_path, dirs_exist_ok=True)
    blend = write_blend(tmp_path, content, "two", path="data/seen/tokenizer/tokenizer.json")
    data, file = tmp_path / "data", tmp_path / "3.png"
    run(blend)
    file.touch()
    assert "up to date" in run(blend), "the same content at another time"
    first = check_manifest(data, load_blend(blend)).sources["talk"].splits
    file.write_bytes(saved(plain("L", 99, (8 + 3, 8))).ljust(file.stat().st_size, b"\0"))
    assert "two: built talk; 1 up to date" in run(blend)
    assert check_manifest(data, load_blend(blend)).sources["talk"].splits != first
    file.unlink()
    with pytest.raises(UserError, match=r"4 of 51 records cannot be read .*\n.*image 3.png: there is no such file"):
        run(blend)
    file.write_bytes(shade(3))
    assert "built talk" in run(blend)
    assert check_manifest(data, load_blend(blend)).sources["talk"].splits == first
    (data / "two/llava/image_files.jsonl").write_text('["lost"')
    assert "built llava; 1 up to date" in run(blend)
    for path in tmp_path.iterdir():
        if path not in (data, blend):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    verify(load_blend(blend), data, console=Console(quiet=True))


def test_odd_images_are_converted_or_quarantined_with_file_and_line(tmp_path: Path, seen) -> None:
    names = list(IMAGES)
    for number, name in enumerate(names):
        (tmp_path / f"{number}.img").write_bytes(IMAGES[name][0]())
    lines = [json.dumps(llava(f"{number}.img")) for number in range(len(names))] + [json.dumps(llava("gone.img"))]
    (tmp_path / "odd.jsonl").write_text("\n".join(lines))
    form = {"category": "chat", "format": "jsonl", "chat": "sharegpt", "images": ".", "validation": 0, "max_bad": 1}
    shutil.copytree(seen[0].parent / "data/seen/tokenizer", tmp_path / "tokenizer")
    content = {"odd": {**form, "path": "odd.jsonl"}}
    (tmp_path / "a.png").write_bytes(shade(1))
    talk = [(record, said) for shape, record, said in CONVERSATIONS.values() if shape == "messages"]
    talk.append((ask({"type": "image", "image": "gone.png"}, text("?")), "image gone.png: there is no such file"))
    (tmp_path / "talk.jsonl").write_text("\n".join(json.dumps(record) for record, _ in talk))
    content["talk"] = {**form, "chat": "messages", "path": "talk.jsonl"}
    run(write_blend(tmp_path, content, "odd", path="tokenizer/tokenizer.json"))
    told = map(json.loads, (tmp_path / "data/odd/talk/quarantine.jsonl").read_text().splitlines())
    reasons = {int(record["position"].split()[1]) - 1: record["reason"] for record in told}
    images = {number for number, (_, said) in enumerate(talk) if isinstance(said, tuple) and "b.png" in said[1]}
    assert reasons.keys() - images == {number for number, (_, said) in enumerate(talk) if isinstance(said, str)}
    assert all(re.search(talk[number][1], reasons[number]) for number in reasons.keys() - images)
    assert all("b.png: there is no such file" in reasons[number] for number in images)
    quarantine = (tmp_path / "data/odd/odd/quarantine.jsonl").read_text().splitlines()
    refused = {number for number, name in enumerate(names) if isinstance(IMAGES[name][1], str)} | {len(names)}
    bad = {int(record["position"].split()[1]) - 1: record for record in map(json.loads, quarantine)}
    assert bad.keys() == refused
    for number, record in bad.items():
        file = "gone.img" if number == len(names) else f"{number}.img"
        assert record["reason"].startswith(f"image {file}: ")
        assert record["file"].endswith("odd.jsonl")
    assert Images(str(tmp_path / "data/odd/odd/train")).places.shape == (len(names) + 1 - len(refused),)


def test_what_verify_and_readers_find(seen, tmp_path: Path) -> None:
    blend = load_blend(seen[0])
    root = tmp_path / "data"
    shutil.copytree(seen[0].parent / "data", root)
    prefix = root / "seen/llava/train"
    content = prefix.with_suffix(".images").read_bytes()
    prefix.with_suffix(".images").write_bytes(content[:-1])
    with pytest.raises(UserError, match=r"train\.images is missing or of another size"):
        check_manifest(root, blend)
    prefix.with_suffix(".images").write_bytes(content[:40] + b"\xff" + content[41:])
    with pytest.raises(UserError, match=r"train\.images: image 1 of conversation 0, from byte 0 on: its bytes are not"):
        Images(str(prefix)).read(0)
    with pytest.raises(UserError, match=r"llava, train: the content of train\.images changed|not the files that were"):
        verify(blend, root, console=Console(quiet=True))
    prefix.with_suffix(".images").write_bytes(content)
    places = np.fromfile(prefix.with_suffix(".places"), PLACES)
    from nemotron_h.data.prepare.verify import _image_problems  # the hashes above hide what it finds

    manifest = check_manifest(root, blend)
    tokenizer = load_tokenizer(manifest.tokenizer_path())
    lengths = read_lengths(str(prefix) + ".idx").astype(np.int64)
    tokens = np.fromfile(str(prefix) + ".bin", np.uint16)

    def problems(change) -> list[str]:
        changed = places.copy()
        change(changed)
        changed.tofile(prefix.with_suffix(".places"))
        return _image_problems(str(prefix), tokens, np.cumsum(lengths) - lengths, lengths, tokenizer)

    assert problems(lambda p: None) == []
    assert "not in the order" in problems(lambda p: p["document"].__setitem__(0, len(lengths)))[0]
    assert "not in the order" in problems(lambda p: p["document"].__setitem__(1, 0))[0]
    assert "a token stands" in problems(lambda p: p["token"].__setitem__(0, 0))[0]
    assert "bytes are not those" in problems(lambda p: p["size"].__setitem__(0, 9))[0]


@pytest.mark.parametrize(
    ("source", "change", "expected"),
    [
        ("wds", {"images": "."}, "sources.wds.images: the archives of a webdataset hold their images"),
        ("llava", {"chat": "preference"}, "sources.llava.images: only for conversations: chat is preference"),
        ("wds", {"chat": ""}, "sources.wds.images: only for conversations: chat is missing"),
        ("llava", {"extend": {"tokens": 100}}, "sources.llava.extend: not with images"),
        ("rows", {"path": None, "fetch": {"package": "x==1", "sha256": "0" * 64, "members": ["*"]}}, "not with fetch"),
        ("llava", {"prompts": ["?"]}, "sources.llava.prompts: only for chat: caption"),
        ("llava", {"chat": "caption", "images": ""}, "sources.llava.images: missing"),
        ("llava", {"format": "webdatasets"}, "is none of jsonl, json, parquet, webdataset"),
    ],
)
def test_mistakes_in_a_blend(seen, tmp_path: Path, source: str, change: dict, expected: str) -> None:
    content = yaml.safe_load(seen[0].read_text())["sources"]
    content[source] |= change
    with pytest.raises(UserError) as caught:
        load_blend(write_blend(tmp_path, content))
    assert expected in str(caught.value)


def test_archives_and_templates_that_cannot_be_used(seen, tmp_path: Path) -> None:
    data = (seen[0].parent / "wds.tar").read_bytes()
    form = {"category": "chat", "format": "webdataset", "chat": "sharegpt", "validation": 0}
    tokenizer = {"path": str(seen[0].parent / "data/seen/tokenizer/tokenizer.json")}
    for content, reason in ((data[:5000], "damaged after a/00"), (b"no archive" * 200, "no tar archive")):
        (tmp_path / "x.tar").write_bytes(content)
        with pytest.raises(UserError, match=reason):
            run(write_blend(tmp_path, {"x": {**form, "path": "x.tar"}}, **tokenizer))
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for name, data in {"1.png": shade(1), "2.json": b"{", "2.png": shade(2), "3.txt": b"x"}.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    with pytest.raises(UserError, match=r"3 of 3 records cannot be read .*\n.*x\.tar, sample 1: no \.json"):
        run(write_blend(tmp_path, {"x": {**form, "path": "x.tar"}}, **tokenizer))
    template = ChatTemplate(FAMILY_SOURCE, load_tokenizer(seen[0].parent / "data/seen/tokenizer"))
    turns = read_illustrated(llava("a.png"), "sharegpt", beside("x", "."))
    begun = template.begun(turns[:1])
    whole = template.encode(turns)
    assert begun.ids == whole.ids[: len(begun.ids)]
    assert begun.images == whole.images
    deaf = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
        "{% else %}Q{% endif %}{% endfor %}"
    )
    with pytest.raises(ChatError, match="the template writes 0 of 1 images"):
        ChatTemplate(deaf, template.tokenizer).encode(turns)
    plain_turns = (Turn("user", IMAGE), Turn("assistant", "x"))
    assert template.encode(plain_turns).images == [], "in texts it is a letter as others"
