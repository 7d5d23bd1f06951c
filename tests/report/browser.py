"""A headless Chromium, told what to do over its debugging pipe: pages at a width and in a colour scheme."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PROGRAM = next((p for p in map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome")) if p), None)


@dataclass
class Look:
    """What a browser shows of a page.

    Attributes:
        width: of the page's content, in CSS pixels; more than the window's where it overflows.
        messages: errors and warnings of the console, and what the page asked of a network.
        values: what the expressions gave.
    """

    width: int
    messages: list[str] = field(default_factory=list)
    values: list[Any] = field(default_factory=list)


class Browser:
    """A process of Chromium with one tab, until `close`."""

    def __init__(self) -> None:
        self.folder = tempfile.TemporaryDirectory()
        (its_in, self.write), (self.read, its_out) = os.pipe(), os.pipe()

        def connect() -> None:  # the pipe's ends are descriptors 3 and 4 of the browser
            a, b = os.dup(its_in), os.dup(its_out)
            os.dup2(a, 3)
            os.dup2(b, 4)

        options = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-pipe")
        self.process = subprocess.Popen(
            [PROGRAM, *options, f"--user-data-dir={self.folder.name}", "--disable-background-networking"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, preexec_fn=connect, close_fds=False,
        )  # fmt: skip
        os.close(its_in)
        os.close(its_out)
        self.data, self.number, self.events = b"", 0, []
        self.session: str | None = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method of the DevTools protocol and return its result; events that come meanwhile are noted."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self.number:
                assert "error" not in answer, answer
                return answer["result"]

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self.data:
            data = os.read(self.read, 1 << 20)
            assert data, "the browser has ended"
            self.data += data
        message, _, self.data = self.data.partition(b"\0")
        answer = json.loads(message)
        if "method" in answer:
            self.events.append(answer)
        return answer

    def look(self, page: Path, width: int, scheme: str = "light", *expressions: str, media: str = "") -> Look:
        """Show a page in a window of a width, `light` or `dark`, on a screen or as `print` has it."""
        self.events.clear()
        screen = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", **screen)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", media=media, features=features)
        self.call("Page.navigate", url=page.resolve().as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self._next()
        values = [self._value(expression) for expression in ("document.documentElement.scrollWidth", *expressions)]
        return Look(values[0], list(self._messages()), values[1:])

    def png(self) -> bytes:
        """Return a picture of the whole page that is shown."""
        shot = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        return base64.b64decode(shot["data"])

    def _value(self, expression: str) -> Any:
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def _messages(self):
        for event in self.events:
            values = event["params"]
            if event["method"] == "Runtime.exceptionThrown":
                yield values["exceptionDetails"]["text"]
            elif event["method"] == "Runtime.consoleAPICalled" and values["type"] in ("error", "warning"):
                yield str(values["args"])
            elif event["method"] == "Log.entryAdded" and values["entry"]["level"] in ("error", "warning"):
                yield values["entry"]["text"]
            elif event["method"] == "Network.requestWillBeSent":
                url = values["request"]["url"]
                if not url.startswith(("file:", "data:")):
                    yield f"asks for {url}"

    def close(self) -> None:
        """End it."""
        with contextlib.suppress(AssertionError, OSError):
            self.session = None
            self.call("Browser.close")
        self.process.wait(20)
        os.close(self.write)
        os.close(self.read)
        self.folder.cleanup()
