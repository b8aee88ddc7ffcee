"""Rollouts by a vLLM server, whose weights are renewed before each round: for scale, where generation wants its own GPUs.

Started like this, on the same folder that the trainer writes:

    VLLM_SERVER_DEV_MODE=1 vllm serve WEIGHTS_FOLDER --served-model-name policy --logprobs-mode processed_logprobs

The development mode opens /collective_rpc to anyone who reaches the port: keep it inside the job's network. `processed_logprobs` are those of
the tempered distribution; vLLM's default leaves the temperature out, which the gap of log-probabilities shows at once.

Used of the server: /v1/completions with token ids in and out (`return_token_ids`), /collective_rpc with `reload_weights`, /reset_prefix_cache.
Tested against a server of ours that speaks this protocol and samples from the folder; not yet against vLLM itself.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from recipes.posttrain import Rollout
from training.rl.engine import Completion, Request
from training.rl.sampling import request_seed

RETRIED = {408, 409, 425, 429}
FIRST_PAUSE_SECONDS = 0.5
LONGEST_PAUSE_SECONDS = 30.0


class ServerError(RuntimeError):
    """The server cannot be used, or answered with something that cannot be trained on; the message names address and remedy."""


class VllmClient:
    """The three calls, with retries. Used by one rank of each replica."""

    def __init__(self, settings: Rollout, *, seed: int, end_id: int) -> None:
        import httpx

        assert settings.server is not None, "checked by recipes.posttrain"
        self._settings, self._server = settings, settings.server
        self._seed, self._end_id = seed, end_id
        self._http = httpx.Client(
            base_url=self._server.url.rstrip("/"),
            timeout=self._server.timeout_seconds,
            limits=httpx.Limits(max_connections=self._server.concurrent_requests),
            trust_env=False,  # a proxy has no business between two nodes of a job
        )

    def renew(self) -> None:
        """Make the server read its folder again, and forget the keys and values of the old weights."""
        self._post("/collective_rpc", {"method": "reload_weights", "timeout": self._server.timeout_seconds})
        self._post("/reset_prefix_cache", {})

    def complete(self, requests: Sequence[Request]) -> list[Completion]:
        """One completion per request, in order; ServerError for the first that does not come right."""
        with ThreadPoolExecutor(self._server.concurrent_requests) as pool:
            return list(pool.map(self._one, requests))

    def _one(self, request: Request) -> Completion:
        answer = self._post(
            "/v1/completions",
            {
                "model": self._server.model,
                "prompt": list(request.prompt_ids),
                "max_tokens": self._settings.max_response_tokens,
                "temperature": self._settings.temperature,
                # Said explicitly, because the model folder's generation_config.json would fill in what is left out.
                "top_p": 1.0,
                "top_k": -1,
                "min_p": 0.0,
                "repetition_penalty": 1.0,
                "n": 1,
                "seed": request_seed(self._seed, request.position, request.number),
                "logprobs": 1,
                "return_token_ids": True,
                "stop_token_ids": [self._end_id],
            },
        )
        return self._read(answer, request)

    def _read(self, answer: Any, request: Request) -> Completion:
        """Check an answer for everything that training relies on."""
        where = f"{self._server.url}/v1/completions"
        try:
            (choice,) = answer["choices"]
            ids, logprobs, reason = choice["token_ids"], choice["logprobs"]["token_logprobs"], choice["finish_reason"]
            echoed = choice.get("prompt_token_ids", answer.get("prompt_token_ids"))
        except (KeyError, TypeError, ValueError) as error:
            raise ServerError(
                f"{where}: the answer lacks {error}; token ids and their log-probabilities are needed (vLLM 0.10.2 or newer)"
            ) from None
        limit = self._settings.max_response_tokens
        problems = []
        if not isinstance(ids, list) or not all(type(i) is int and i >= 0 for i in ids) or not 1 <= len(ids) <= limit:
            problems.append(f"token_ids must be 1 to {limit} token ids")
        elif not isinstance(logprobs, list) or len(logprobs) != len(ids):
            problems.append(f"there must be {len(ids)} token_logprobs, one a token")
        elif not all(isinstance(x, int | float) and math.isfinite(x) and x <= 1e-6 for x in logprobs):
            problems.append("token_logprobs must be finite and not positive")
        elif reason not in ("stop", "length"):
            problems.append(f"finish_reason is {reason!r}")
        elif (reason == "stop") != (ids[-1] == self._end_id) or self._end_id in ids[:-1]:
            problems.append(
                f"finish_reason is {reason!r}, the last token {ids[-1]}, the end of text {self._end_id}: these contradict"
            )
        elif reason == "length" and len(ids) != limit:
            problems.append(f"it was cut at {len(ids)} tokens, not at {limit}: raise the server's --max-model-len")
        if echoed is not None and echoed != list(request.prompt_ids):
            problems.append("prompt_token_ids are not those that were sent")
        if problems:
            raise ServerError(f"{where}: unusable answer: {problems[0]}")
        return Completion(np.array(ids, np.int32), np.array(logprobs, np.float32), reason == "length")

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        """POST with retries where trying again can help; the parsed answer, or None where it has no JSON body."""
        import httpx

        trouble = ""
        for attempt in range(self._server.attempts):
            if attempt:
                time.sleep(min(FIRST_PAUSE_SECONDS * 2 ** (attempt - 1), LONGEST_PAUSE_SECONDS))
            try:
                response = self._http.post(path, json=body)
            except httpx.TransportError as error:
                trouble = f"{type(error).__name__}: {error}"
                continue
            if response.status_code in RETRIED or response.status_code >= 500:
                trouble = f"HTTP {response.status_code}: {response.text[:200]}"
                continue
            if response.status_code == 404 and path == "/collective_rpc":
                raise ServerError(
                    f"{self._server.url}{path}: HTTP 404; start vLLM with VLLM_SERVER_DEV_MODE=1 so that weights can be renewed"
                )
            if response.status_code >= 400:
                raise ServerError(f"{self._server.url}{path}: HTTP {response.status_code}: {response.text[:500]}")
            if not response.content:
                return None
            try:
                return response.json()
            except ValueError:
                trouble = f"no JSON: {response.text[:200]!r}"
        raise ServerError(
            f"{self._server.url}{path}: {self._server.attempts} attempts failed, the last with {trouble}; is the server up and reachable?"
        )

    def close(self) -> None:
        self._http.close()


class VllmEngine:
    """The engine over a client: weights go out from all ranks, requests from one rank of each replica."""

    def __init__(self, client: VllmClient | None, write_weights: Callable[[int], None]) -> None:
        """`client` is given on the first rank of each replica; `write_weights(step)` is collective and fills the server's folder."""
        self._client = client
        self._write_weights = write_weights

    def update_weights(self, step: int) -> None:
        self._write_weights(step)
        if torch.distributed.get_rank() == 0:
            assert self._client is not None
            self._client.renew()
        torch.distributed.barrier()

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        from megatron.core import parallel_state as mpu

        completions: list[Any] = [self._client.complete(requests) if self._client is not None else None]
        group = mpu.get_model_parallel_group()
        if group.size() > 1:
            torch.distributed.broadcast_object_list(completions, mpu.get_model_parallel_src_rank(), group=group)
        return completions[0]
