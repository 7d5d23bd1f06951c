"""Odd and malformed conversations about images: shape and record of each, and what reading it has to come to."""

from __future__ import annotations

from typing import Any

from nemotron_h.data.images.records import PLACE
from nemotron_h.data.messages import IMAGE

A, B = {"type": "image", "image": "a.png"}, {"type": "image_url", "image_url": {"url": "b.png"}}
PART = {"type": "image"}


def text(words: Any) -> dict:
    return {"type": "text", "text": words}


def talk(*turns: tuple[str, Any], **more: Any) -> dict:
    return {"messages": [{"role": role, "content": content} for role, content in turns], **more}


def asked(content: Any, answer: Any = "Grey.", **more: Any) -> dict:
    return talk(("user", content), ("assistant", answer), **more)


def llava(value: Any, answer: Any = "Grey.", role: str = "human", **more: Any) -> dict:
    turns = [{"from": role, "value": value}, {"from": "gpt", "value": answer}]
    return {"conversations": turns, **more}


#: name -> shape, record, and words of the reason, or the first user turn's text and its images' names
CONVERSATIONS: dict[str, tuple[str, Any, str | tuple[str, list[str]]]] = {
    # roles and turns
    "an unknown role": ("messages", talk(("human being", "?"), ("assistant", "x")), "unknown role 'human being'"),
    "a role that is a number": ("messages", talk((7, "?"), ("assistant", "x")), "unknown role 7"),
    "no role": ("messages", {"messages": [{"content": "x"}]}, "unknown role None"),
    "an image in an answer": ("messages", asked("?", [A]), "a turn that is not the user's"),
    "an image in a system message": (
        "messages",
        talk(("system", [A]), ("user", "?"), ("assistant", "x")),
        "a turn that is not the user's",
    ),
    "the answer first": ("messages", talk(("assistant", "x"), ("user", [A])), "the user's belongs"),
    "two questions": ("messages", talk(("user", [A]), ("user", "?"), ("assistant", "x")), "they alternate"),
    "no answer": ("messages", talk(("user", [A, text("?")])), "no answer to learn"),
    "an answer left out": ("messages", asked([A, text("?")], None), r"turn 2 \(assistant\) is empty"),
    "an answer of spaces": ("messages", asked([A, text("?")], " \n"), r"turn 2 \(assistant\) is empty"),
    "an answer that is not learnt": (
        "messages",
        {"messages": [{"role": "user", "content": [A]}, {"role": "assistant", "content": "x", "weight": 0}]},
        "every assistant turn has weight 0",
    ),
    "no turns": ("messages", {"messages": []}, "there are no turns"),
    "turns that are no list": ("messages", {"messages": {"role": "user"}}, "is dict, not a list"),
    "a turn that is a text": ("messages", {"messages": ["What is it?"]}, "turn 1 is str, not an object"),
    "tools": ("messages", asked([A, text("?")], tools=[{"type": "function"}]), "offers tools"),
    # content parts
    "an image alone": ("messages", asked([A]), (PLACE, ["a.png"])),
    "two images": ("messages", asked([A, text("or"), B]), (f"{PLACE}\nor{PLACE}", ["a.png", "b.png"])),
    "a part of an unknown type": (
        "messages",
        asked([A, {"type": "video"}]),
        "neither text nor a list",
    ),
    "a part that is a text": ("messages", asked([A, "?"]), "neither text nor a list"),
    "a part without a type": ("messages", asked([{"image": "a.png"}]), "neither text nor a list"),
    "text that is a number": ("messages", asked([A, text(7)]), "neither text nor a list"),
    "content that is a number": ("messages", asked(7), "neither text nor a list"),
    "content that is an object": ("messages", asked(A), "neither text nor a list"),
    "an image without a path": ("messages", asked([PART, text("?")]), "0 images, and more places"),
    "a path that is empty": ("messages", asked([{**PART, "image": ""}, text("?")]), "0 images, and more places"),
    "a path that is a number": ("messages", asked([{**PART, "image": 7}, text("?")]), "an image is int"),
    "an address": ("messages", asked([{**PART, "url": "https://example.org/a.png"}]), "no file: download it"),
    "a path that leads out": ("messages", asked([{**PART, "path": "x/../../a.png"}]), "not below"),
    "an absolute path": ("messages", asked([{**PART, "path": "/etc/hostname"}]), "not below"),
    "data of another kind": ("messages", asked([{**PART, "url": "data:text/plain;base64,eA=="}]), "not data:image"),
    "data that are no base64": ("messages", asked([{**PART, "url": "data:image/png;base64,%%"}]), "no base64"),
    "more places than images": ("messages", asked([PART, PART, text("?")], images=["a.png"]), "1 images, and more"),
    "fewer places than images": ("messages", asked([PART, text("?")], images=["a.png", "b.png"]), "1 places for them"),
    "the reserved character": ("messages", asked([A, text(f"a {IMAGE}")]), r"U\+E0FB, which is reserved"),
    # tags
    "a tag without an image": ("sharegpt", llava("<image>\nWhat?"), ("<image>\nWhat?", [])),
    "a tag without an image, in a part": ("messages", asked([text("<image>?")]), ("<image>?", [])),
    "an image without a tag": ("sharegpt", llava("What?", image="a.png"), (PLACE + "\nWhat?", ["a.png"])),
    "more tags than images": ("sharegpt", llava("<image><image>?", image="a.png"), "1 images, and more places"),
    "fewer tags than images": ("sharegpt", llava("<image>?", images=["a.png", "b.png"]), "1 places for them"),
    "a tag in an answer": ("sharegpt", llava("Hm?", "<image>", image="a.png"), (PLACE + "\nHm?", ["a.png"])),
    "a tag of another case": ("sharegpt", llava("<Image>?", image="a.png"), (PLACE + "\n<Image>?", ["a.png"])),
    "images that are an object": ("sharegpt", llava("<image>?", images={"a": 1}), "an image is NoneType"),
    "an image that is false": ("sharegpt", llava("<image>?", image=False), "an image is bool"),
    "no image where one belongs": ("sharegpt", llava("<image>?", image=None), ("<image>?", [])),
    "bytes that are none": ("sharegpt", llava("<image>?", image={"bytes": None}), "an image is NoneType"),
    "the other shape's field": ("sharegpt", asked([A]), "no field 'conversations'"),
    "a record that is a list": ("sharegpt", [llava("?")], "the record is list"),
    "a caption without an image": ("caption", {"text": "A cat."}, "a caption without an image"),
    "a caption without a text": ("caption", {"image": "a.png"}, "no field 'caption' or 'text'"),
    "a caption that is empty": ("caption", {"image": "a.png", "text": " "}, r"turn 2 \(assistant\) is empty"),
}
