"""JSON requests with a limit on everything: attempts, requests in flight, bytes, and seconds in all."""

from __future__ import annotations

import random
import threading
import time
from typing import Any

from training.rewards.base import need, shorten
from training.rewards.structured_output import strict_json

RETRIED = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
MAX_WAIT_SECONDS = 60.0


class ServiceError(RuntimeError):
    """A request that brought no usable answer; the message says what happened and how often it was tried."""


class Client:
    """Posts JSON; safe to use from several threads."""

    def __init__(
        self,
        *,
        request_seconds: float,
        total_seconds: float,
        retries: int,
        backoff_seconds: float,
        concurrency: int,
        max_response_bytes: int,
        api_key: str | None = None,
    ) -> None:
        httpx = need("httpx", "judge")
        self._httpx = httpx
        self._request_seconds = request_seconds
        self._total_seconds = total_seconds
        self._retries = retries
        self._backoff_seconds = backoff_seconds
        self._max_response_bytes = max_response_bytes
        self._slots = threading.BoundedSemaphore(concurrency)
        self._http = httpx.Client(
            headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
            limits=httpx.Limits(max_connections=concurrency, max_keepalive_connections=concurrency),
            follow_redirects=False,
        )
        self._random = random.Random()  # jitter only: no value depends on it

    def close(self) -> None:
        self._http.close()

    def post(self, url: str, body: dict[str, Any]) -> Any:
        """The answer's JSON; ServiceError when there is none within the limits. Waiting for a free slot costs none of the time."""
        with self._slots:
            deadline = time.monotonic() + self._total_seconds
            problem = "no time for a request"
            attempt = 0
            while True:
                left = deadline - time.monotonic()
                if left <= 0:
                    break
                answer, problem, retry_after = self._once(url, body, min(left, self._request_seconds))
                if retry_after is None:
                    if problem:
                        break
                    return answer
                if attempt == self._retries:
                    break
                wait = self._backoff_seconds * 2**attempt * (0.5 + self._random.random())
                wait = min(max(wait, retry_after), MAX_WAIT_SECONDS)
                if time.monotonic() + wait >= deadline:
                    problem += f"; no time left for another attempt within {self._total_seconds:g} s"
                    break
                time.sleep(wait)
                attempt += 1
        raise ServiceError(f"{url}: {problem} ({attempt + 1} attempt{'s' if attempt else ''})")

    def _once(self, url: str, body: dict[str, Any], seconds: float) -> tuple[Any, str, float | None]:
        """(answer, problem or '', seconds that the service asks to wait where the request may be tried again, else None)."""
        httpx = self._httpx
        deadline = time.monotonic() + seconds
        content = bytearray()
        try:
            with self._http.stream("POST", url, json=body, timeout=httpx.Timeout(seconds)) as response:
                # httpx limits the wait for each chunk, not for all of them: a service that drips bytes would never end.
                for chunk in response.iter_bytes():
                    content += chunk
                    if len(content) > self._max_response_bytes:
                        return None, f"more than {self._max_response_bytes} bytes", None
                    if time.monotonic() > deadline:
                        return None, f"time-out after {seconds:.3g} s", 0.0
        except httpx.TimeoutException as error:
            return None, f"time-out after {seconds:.3g} s ({type(error).__name__})", 0.0
        except httpx.TransportError as error:
            return None, f"{type(error).__name__}: {error}", 0.0
        except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
            return None, f"{type(error).__name__}: {error}", None
        if response.status_code != 200:
            said = shorten(content.decode(errors="replace").strip(), 160)
            again = _retry_after(response.headers.get("retry-after")) if response.status_code in RETRIED else None
            return None, f"HTTP {response.status_code}: {said}", again
        try:
            return strict_json(content.decode("utf-8")), "", None
        except (ValueError, RecursionError) as error:
            return None, f"HTTP 200 whose body is not JSON: {error}", 0.0


def _retry_after(value: str | None) -> float:
    """Seconds of a Retry-After header; 0 where it is absent or a date (the back-off is enough then)."""
    try:
        return max(0.0, float(value)) if value else 0.0
    except ValueError:
        return 0.0
