"""A model behind an OpenAI-compatible endpoint, such as vLLM's and llama.cpp's: greedy continuations of token ids.

Prompts are sent as the ids of the tokenizer here, to `/completions`: the server adds no token and reads none otherwise.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import httpx

from nemotron_h.core.errors import UserError
from nemotron_h.data.tokenizer import Tokenizer
from nemotron_h.evaluation.continuing import Answer, Ask, Watch
from nemotron_h.evaluation.subject import Subject
from nemotron_h.inference.pool import END, LENGTH

#: variable with the key that the server asks for, if any
KEY = "OPENAI_API_KEY"
#: ours: seconds before each further try of a request, unless the server says how long
_WAITS = (1, 2, 4, 8, 16)
#: ours: seconds that a connection may take, and an answer of the longest prompts
_CONNECT, _ANSWER = 10, 3600
#: busy, or broken for now
_AGAIN = {408, 409, 429, 500, 502, 503, 504}
_TOO_LONG = re.compile(r"context|too long|maximum.{0,40}length|exceed", re.IGNORECASE)
#: ours: characters of what a server says that an error repeats
_SAID = 400


class _Passing(Exception):
    """Failure of a request that another try may not have; says how many seconds to wait, or 0."""

    def __init__(self, reason: str, seconds: float = 0) -> None:
        super().__init__(reason)
        self.seconds = seconds


@dataclass(frozen=True)
class Endpoint:
    """A served model.

    Attributes:
        url: up to `/v1`.
        model: its name there.
        at_once: requests at a time.
    """

    url: str
    model: str
    at_once: int

    @cached_property
    def _client(self) -> httpx.Client:
        key = os.environ.get(KEY, "")
        return httpx.Client(
            timeout=httpx.Timeout(_ANSWER, connect=_CONNECT),
            limits=httpx.Limits(max_connections=self.at_once),
            headers={"Authorization": f"Bearer {key}"} if key else {},
        )

    @property
    def name(self) -> str:
        """Return the model's name, as a file may have it."""
        return re.sub(r"[^\w.-]+", "_", self.model)

    @property
    def told(self) -> dict[str, Any]:
        """Return address and model."""
        return {"endpoint": self.url, "model": self.model}

    def settings(self, subject: Subject) -> dict[str, Any]:
        """Return what all answers depend on, for `Records.check`."""
        return {"endpoint_model": self.model, "tokenizer": subject.tokenizer.ids_sha256()}

    def check(self) -> None:
        """Ask the server which models it has.

        Errors:
            UserError: it is not reached, refuses, or has no model of that name.
        """
        try:
            content = self._once("GET", "/models")
        except _Passing as error:
            raise UserError(
                f"--endpoint {self.url}: {error}", hint="start the server, or name where it is: http://HOST:PORT/v1"
            ) from error
        known = [each.get("id") for each in content.get("data") or [] if isinstance(each, dict)]
        if known and self.model not in known:
            raise UserError(
                f"--model {self.model}: {self.url} has no such model", hint=f"it has {', '.join(map(str, known))}"
            )

    def open(self, subject: Subject) -> Ask:
        """Return what continues prompts, in the order in which the server answers."""

        def ask(
            prompts: Sequence[tuple[str, Sequence[int]]],
            *,
            max_tokens: int,
            stop_ids: Collection[int],
            watch: Watch | None = None,
            stop: Sequence[str] = (),
        ) -> Iterator[tuple[int, Answer]]:
            names = [*stop, *subject.tokenizer.ids_to_tokens(sorted(stop_ids))]
            body = {"max_tokens": max_tokens, "stop": names, "stop_token_ids": sorted(stop_ids)}
            left, running = list(range(len(prompts)))[::-1], {}
            with ThreadPoolExecutor(self.at_once) as pool:
                try:
                    while left or running:
                        while left and len(running) < self.at_once:
                            number = left.pop()
                            running[pool.submit(self._continued, subject.tokenizer, *prompts[number], body)] = number
                        done: set[Future[Answer]] = wait(running, return_when=FIRST_COMPLETED).done
                        answers = [(running.pop(each), each) for each in done]
                        yield from [(number, each.result()) for number, each in answers if not each.exception()]
                        for _, each in answers:
                            each.result()  # raises what a request did
                finally:
                    for each in running:
                        each.cancel()

        return ask

    def _continued(self, tokenizer: Tokenizer, key: str, ids: Sequence[int], body: dict[str, Any]) -> Answer:
        """Return the answer to a prompt, up to the first text that ends it.

        Errors:
            UserError: the server refuses it, reads other tokens than were sent, or does not answer.
        """
        began = time.monotonic()
        prompt = list(ids)
        content = self._request("/completions", {"model": self.model, "prompt": prompt, "temperature": 0, **body})
        try:
            choice, usage = content["choices"][0], content.get("usage") or {}
            text, reason = choice["text"], choice.get("finish_reason")
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise UserError(
                f"--endpoint {self.url}: its answer has no choices[0].text: {str(content)[:_SAID]}",
                hint="an OpenAI-compatible server has /completions",
            ) from error
        if (read := usage.get("prompt_tokens")) is not None and read != len(ids):
            raise UserError(
                f"--endpoint {self.url} read {read:,} tokens of a prompt of {len(ids):,}",
                hint="it truncates prompts, or serves a model of another tokenizer: every prompt is to be read whole",
            )
        for name in body["stop"]:
            text = text.partition(name)[0]
        tokens = usage.get("completion_tokens") or len(tokenizer.text_to_ids(text))
        return Answer(key, text, tokens, time.monotonic() - began, LENGTH if reason == "length" else END)

    def _request(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """Return what the server answers, asked again where it fails for now.

        Errors:
            UserError: it refuses, or fails again and again.
        """
        for seconds in (*_WAITS, None):
            try:
                return self._once("POST", path, body)
            except _Passing as error:
                if seconds is None:
                    raise UserError(
                        f"--endpoint {self.url}: {error}, {len(_WAITS) + 1} times",
                        hint="the answers so far are kept: the same command continues once it answers again",
                    ) from error
                time.sleep(error.seconds or seconds)
        raise AssertionError

    def _once(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        try:
            response = self._client.request(method, self.url.rstrip("/") + path, json=body)
        except httpx.InvalidURL as error:
            raise UserError(f"--endpoint {self.url} is no address: {error}", hint="http://HOST:PORT/v1") from error
        except httpx.UnsupportedProtocol as error:
            raise UserError(f"--endpoint {self.url} is no address", hint="http://HOST:PORT/v1") from error
        except httpx.TimeoutException as error:
            raise _Passing(f"no answer in time ({type(error).__name__})") from error
        except httpx.TransportError as error:
            raise _Passing(f"not reached, or broken off: {error or type(error).__name__}") from error
        said = response.text[:_SAID].strip()
        if response.status_code in _AGAIN:
            after = response.headers.get("retry-after", "")
            raise _Passing(f"HTTP {response.status_code}: {said}", float(after) if after.isdecimal() else 0)
        if response.is_error:
            refusal = f"--endpoint {self.url}{path}: HTTP {response.status_code}: {said}"
            raise UserError(refusal, hint=self._fix(response))
        try:
            content = response.json()
        except ValueError as error:
            raise _Passing(f"an answer that ends in the middle, or is no JSON: {said}") from error
        if not isinstance(content, dict):
            raise UserError(f"--endpoint {self.url}{path} answers no object: {said}", hint="http://HOST:PORT/v1")
        return content

    def _fix(self, response: httpx.Response) -> str:
        """Return what may help against a refusal."""
        if response.status_code in (401, 403):
            return f"set {KEY} to the server's key"
        if response.status_code == 404:
            return f"the address ends with /v1, and the model is {self.model!r} there"
        if _TOO_LONG.search(response.text):
            return (
                "prompt and answer do not fit into the context that it serves: raise that (vLLM: --max-model-len, "
                "llama.cpp: -c, which its slots share), or leave the longest items out; answers so far are kept"
            )
        return "answers so far are kept"
