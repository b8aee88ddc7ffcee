"""One request to an OpenAI-compatible endpoint, and what its answer is: a judgement, or a failure that says whether to try again."""

from __future__ import annotations

import asyncio
import email.utils
import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from data_prep.errors import DataError
from data_prep.judge.config import Rubric
from data_prep.judge.prompt import answer_schema
from data_prep.judge.verdict import Answer, BadAnswer, parse_answer
from data_prep.optional import need
from data_prep.plain_files import canonical_json

if TYPE_CHECKING:
    import httpx

MAX_RESPONSE_BYTES = 4 << 20
"""An answer has some kilobytes; what goes on for ever is cut off here."""
DETAIL_CHARACTERS = 200
RETRIED_STATUS = frozenset({408, 409, 425, 429})
"""And all of 500 and above."""
LOOPBACK = frozenset({"127.0.0.1", "::1", "localhost"})
FATAL_STATUS = frozenset({401, 403, 404, 405})
"""With redirects: a wrong key, address or model, which every further request would meet too."""


@dataclass(frozen=True)
class Endpoint:
    """Where the judge is; `url` as given, without a slash at its end."""

    url: str
    model: str
    key: str | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Sampling:
    """Parameters of the judge's answer; part of the cache's key."""

    temperature: float = 0.0
    max_tokens: int = 1024
    seed: int | None = 0

    def plain(self) -> dict[str, Any]:
        return {"temperature": self.temperature, "max_tokens": self.max_tokens, "seed": self.seed}


@dataclass(frozen=True)
class Reply:
    """An answer and what it took."""

    answer: Answer
    content: str
    """The answer's text, as the cache keeps it."""
    model: str
    """What the endpoint says it is."""
    prompt_tokens: int | None
    """None: the endpoint did not say."""
    answer_tokens: int | None
    seconds: float


class Failed(Exception):
    """An attempt that brought no judgement. `kind` is what counts are kept by."""

    def __init__(self, kind: str, detail: str, *, again: bool = True, fatal: bool = False, wait_seconds: float | None = None):
        super().__init__(f"{kind}: {detail}")
        self.kind, self.detail = kind, detail
        self.again = again
        """Whether another attempt at the same sample can succeed."""
        self.fatal = fatal
        """Whether the endpoint would refuse every sample."""
        self.wait_seconds = wait_seconds
        """What the endpoint asks for (Retry-After)."""
        self.prompt_tokens: int | None = None
        self.answer_tokens: int | None = None
        """Of an answer that came and was no judgement."""


def endpoint(url: str, model: str, key_variable: str) -> Endpoint:
    """Check address, model and key; DataError, which never shows the key."""
    parts = urlsplit(url)
    try:
        port_is_wrong = parts.port == 0
    except ValueError:
        port_is_wrong = True
    problem = None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        problem = "it must be http://HOST[:PORT]/v1 or https://..."
    elif parts.username is not None or parts.password is not None:
        raise DataError(f"--endpoint: an address with a user or password in it; give the key in the variable {key_variable}")
    elif parts.query or parts.fragment or any(c.isspace() or ord(c) < 32 for c in url):
        problem = "it must have no query, fragment or white space"
    elif port_is_wrong:
        problem = "its port is none"
    elif parts.path.rstrip("/").endswith("/chat/completions"):
        problem = "leave out /chat/completions"
    if problem:
        raise DataError(f"--endpoint {url}: {problem}")
    if not model.strip():
        raise DataError("--model: is empty; `curl ENDPOINT/models` lists what the server has")
    key = os.environ.get(key_variable)
    if key is not None and (not key or not key.isascii() or any(ord(c) <= 32 for c in key)):
        raise DataError(
            f"{key_variable}: is empty or holds white space or other characters than ASCII; export the key alone, or unset it"
        )
    return Endpoint(url.rstrip("/"), model, key)


class Client:
    """Asks; keeps no state but the connections. Use as an async context manager.

    Each request under way has a connection of its own, which is thrown away when the request is cut off: httpcore 1.0.9 loses a place of
    a shared pool with some of the requests that are cancelled, until none is left.
    """

    def __init__(self, endpoint: Endpoint, sampling: Sampling, *, timeout_seconds: float):
        httpx = need("httpx")
        self.endpoint, self.sampling, self.timeout_seconds = endpoint, sampling, timeout_seconds
        # Read once for all connections: loading the authorities' certificates takes a fifth of a second.
        self._verify = httpx.create_ssl_context() if endpoint.url.startswith("https:") else False
        self._idle: list[httpx.AsyncClient] = []

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *error: Any) -> None:
        while self._idle:
            await self._idle.pop().aclose()

    def _connection(self) -> httpx.AsyncClient:
        import httpx

        headers = {"Content-Type": "application/json"}
        if self.endpoint.key is not None:
            headers["Authorization"] = f"Bearer {self.endpoint.key}"
        return httpx.AsyncClient(
            headers=headers,
            timeout=httpx.Timeout(self.timeout_seconds),
            verify=self._verify,
            follow_redirects=False,  # the key must not go elsewhere
            trust_env=urlsplit(self.endpoint.url).hostname not in LOOPBACK,  # no proxy leads to this machine
        )

    async def ask(self, messages: list[dict[str, str]], rubric: Rubric) -> Reply:
        """One attempt; raises Failed."""
        import httpx

        started = time.monotonic()
        try:
            # httpx limits each wait for bytes; a server that drips them would hold the request for ever.
            async with asyncio.timeout(self.timeout_seconds):
                status, headers, body = await self._post(self._body(messages, rubric))
        except (TimeoutError, httpx.TimeoutException):
            raise Failed("time-out", f"no answer within {self.timeout_seconds:g} s") from None
        except httpx.HTTPError as error:
            raise Failed("connection", self._shown(f"{type(error).__name__}: {error}")) from None
        if status != 200:
            raise self._refused(status, headers, body)
        try:
            value = json.loads(body)
            usage = value.get("usage")
        except (ValueError, AttributeError, RecursionError) as error:
            raise Failed("no completion", self._shown(f"{type(error).__name__}: {error}")) from None
        prompt_tokens, answer_tokens = _count(usage, "prompt_tokens"), _count(usage, "completion_tokens")
        try:
            answer = self._answer(value, rubric)
        except Failed as failure:
            failure.prompt_tokens, failure.answer_tokens = prompt_tokens, answer_tokens
            raise
        model = value.get("model")
        return Reply(
            answer,
            canonical_json(answer.plain()).decode(),
            self._shown(model) if isinstance(model, str) else "",
            prompt_tokens,
            answer_tokens,
            time.monotonic() - started,
        )

    def _body(self, messages: list[dict[str, str]], rubric: Rubric) -> bytes:
        schema = {"name": "judgement", "strict": True, "schema": answer_schema(rubric)}
        sampling = {name: value for name, value in self.sampling.plain().items() if value is not None}
        request = {
            "model": self.endpoint.model,
            "messages": messages,
            **sampling,
            "response_format": {"type": "json_schema", "json_schema": schema},
        }
        # Not sorted: servers write an object's keys in the order of the schema, and the reason must come before the scores.
        return json.dumps(request, ensure_ascii=False, allow_nan=False).encode()

    async def _post(self, body: bytes) -> tuple[int, Mapping[str, str], bytes]:
        connection = self._idle.pop() if self._idle else self._connection()
        whole = False
        try:
            async with connection.stream("POST", f"{self.endpoint.url}/chat/completions", content=body) as response:
                received = bytearray()
                async for piece in response.aiter_bytes():
                    received += piece
                    if len(received) > MAX_RESPONSE_BYTES:
                        raise Failed("endless answer", f"more than {MAX_RESPONSE_BYTES} bytes")
            whole = True
            return response.status_code, response.headers, bytes(received)
        finally:
            if whole:
                self._idle.append(connection)
            else:
                await connection.aclose()

    def _refused(self, status: int, headers: Mapping[str, str], body: bytes) -> Failed:
        text = self._shown(body.decode("utf-8", "replace"))
        wait = retry_after(headers.get("retry-after"))
        if status in RETRIED_STATUS or status >= 500:
            return Failed(f"HTTP {status}", text, wait_seconds=wait)
        fatal = status in FATAL_STATUS or 300 <= status < 400
        return Failed(f"HTTP {status}", text, again=fatal, fatal=fatal)

    def _answer(self, value: dict[str, Any], rubric: Rubric) -> Answer:
        try:
            (choice,) = value["choices"]
            message, finish = choice["message"], choice.get("finish_reason")
            content, refusal = message.get("content"), message.get("refusal")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise Failed("no completion", self._shown(f"{type(error).__name__}: {error}")) from None
        if refusal:
            raise Failed("refusal", self._shown(str(refusal)))
        if finish != "stop":
            raise Failed("cut off" if finish == "length" else "not finished", f"finish_reason is {str(finish)[:40]!r}")
        try:
            return parse_answer(content, rubric)
        except BadAnswer as error:
            raise Failed(error.kind, self._shown(error.detail)) from None

    def _shown(self, text: str) -> str:
        """What may be recorded of a server's words: short, and never with the key that it may repeat."""
        if self.endpoint.key is not None:
            text = text.replace(self.endpoint.key, "***")
        text = " ".join(text[: 4 * DETAIL_CHARACTERS].encode("utf-8", "replace").decode().split())
        return text if len(text) <= DETAIL_CHARACTERS else text[: DETAIL_CHARACTERS - 1] + "…"


def _count(usage: Any, key: str) -> int | None:
    value = usage.get(key) if isinstance(usage, dict) else None
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 40 else None


def retry_after(value: str | None, now_seconds: float | None = None) -> float | None:
    """Seconds to wait by a Retry-After header, given as seconds or as an HTTP date (RFC 9110, 10.2.3); None for anything else."""
    if not value:
        return None
    value = value.strip()
    if value.isascii() and value.replace(".", "", 1).isdigit():
        return float(value)
    try:
        moment = email.utils.parsedate_to_datetime(value).timestamp()
    except (TypeError, ValueError, OverflowError):
        return None
    return max(0.0, moment - (time.time() if now_seconds is None else now_seconds))
