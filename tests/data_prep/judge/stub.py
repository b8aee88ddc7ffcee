"""An OpenAI-compatible judge over real sockets, in a thread, that does what a test tells it to, request by request."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections import Counter

GOOD = {"instruction_following": 5, "correctness": 5, "completeness": 4, "conciseness": 4, "naturalness": 4, "calibration": 5}
"""Weighted 4.65 by the general rubric."""
FLAGS = {"hallucination": False, "false_premise": False, "incorrect_computation": False}


def answer(verdict="accept", flags=None, **scores):
    return {"reason": "because", "scores": {**GOOD, **scores}, "flags": {**FLAGS, **(flags or {})}, "verdict": verdict}


def completion(content, finish="stop", **message):
    return {
        "id": "x",
        "model": "stub-1",
        "choices": [
            {"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": content, **message}},
        ],
        "usage": {"prompt_tokens": 300, "completion_tokens": 80},
    }


def says(value, finish="stop", **message):
    """200 with this judgement (a dict) or this text."""
    return 200, {}, json.dumps(completion(value if isinstance(value, str) else json.dumps(value), finish, **message)).encode()


def status(code, body=b"{}", **headers):
    return code, {name.replace("_", "-"): value for name, value in headers.items()}, body


HANG, CLOSE, HALF_BODY, DRIP = "hang", "close", "half body", "drip"


class Stub:
    """`behave(mark, attempt, request)` -> (status, headers, body) or one of the words above; `mark` is the number behind 'mark' in the
    prompt (-1 without one), `attempt` counts from 1 per mark."""

    def __init__(self, behave):
        self._behave = behave
        self.asked = Counter()
        """Mark -> requests."""
        self.requests = []
        """(mark, parsed body, headers) of each."""
        self.in_flight = self.peak = 0
        self.on_request = lambda: None

    def __enter__(self):
        ready = threading.Event()

        def serve():
            self._loop = asyncio.new_event_loop()
            self._loop.run_until_complete(self._start())
            ready.set()
            self._loop.run_forever()
            for task in asyncio.all_tasks(self._loop):
                task.cancel()
            self._loop.run_until_complete(asyncio.sleep(0))
            self._server.close()
            self._loop.close()

        self._thread = threading.Thread(target=serve, daemon=True)
        self._thread.start()
        assert ready.wait(10)
        return self

    def __exit__(self, *error):
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    async def _start(self):
        self._server = await asyncio.start_server(self._connection, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}/v1"

    async def _connection(self, reader, writer):
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                headers = dict(line.split(": ", 1) for line in head.decode().lower().split("\r\n")[1:] if ": " in line)
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                await self._one(head.decode().split(" ")[1], headers, json.loads(body), writer)
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass
        finally:
            writer.close()

    async def _one(self, path, headers, request, writer):
        assert path == "/v1/chat/completions"
        found = re.search(r"mark (\d+)", request["messages"][-1]["content"])
        mark = int(found[1]) if found else -1
        self.asked[mark] += 1
        self.requests.append((mark, request, headers))
        self.on_request()
        done = self._behave(mark, self.asked[mark], request)
        if done == HANG:
            await asyncio.sleep(3600)
        if done == CLOSE:
            raise ConnectionError
        if done == DRIP:
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
            while True:
                writer.write(b" ")
                await writer.drain()
                await asyncio.sleep(0.02)
        if done == HALF_BODY:
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n" + b'{"choices": [')
            raise ConnectionError
        # Not of requests that hang: nobody here sees when the client leaves them.
        self.in_flight += 1
        self.peak = max(self.peak, self.in_flight)
        await asyncio.sleep(0.001)
        self.in_flight -= 1
        code, more, body = done
        lines = [f"HTTP/1.1 {code} X", f"Content-Length: {len(body)}", *(f"{k}: {v}" for k, v in more.items())]
        writer.write("\r\n".join([*lines, "", ""]).encode() + body)
        await writer.drain()


def sample(mark, question="What is two and two?", said="It is four.", **more):
    return {
        "id": f"s{mark}",
        "messages": [{"role": "user", "content": f"mark {mark}: {question}"}, {"role": "assistant", "content": said}],
        **more,
    }


def write_samples(path, samples):
    path.write_text("".join(json.dumps(s, ensure_ascii=False) + "\n" for s in samples), encoding="utf-8")
    return path


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
