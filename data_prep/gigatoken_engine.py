"""gigatoken in bounded memory: blocks of JSON lines or lists of texts in, one flat array of token ids out.

What it gets wrong is other modules' business: `blocks` (bad lines), `encoders` (documents that it encodes differently).
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

import numpy as np

from data_prep.blocks import Buffer
from data_prep.optional import need

PAGE_BYTES = 4096
MIN_GROWTH_BYTES = 150 << 20
"""A tokenizer is used until its words took this much: loading the next takes 0.3 s, in which 30 MB of text could be encoded."""

Ids = tuple[np.ndarray, np.ndarray]
"""(token ids of all documents, uint32 [tokens]; tokens of each document, int64 [documents])"""


def rss_bytes() -> int:
    """Memory of this process that lies in RAM."""
    with open("/proc/self/statm", "rb") as f:
        return int(f.read().split()[1]) * PAGE_BYTES


class Engine:
    """A gigatoken tokenizer that is loaded anew when the process outgrows `memory_bytes`: its cache of words has no bound of its own.

    Safe to use from several threads at once; the work of each call runs on gigatoken's threads (RAYON_NUM_THREADS).
    """

    def __init__(self, tokenizer_json: bytes, memory_bytes: int) -> None:
        """ValueError or RuntimeError when gigatoken cannot load this tokenizer.json."""
        self._native = need("gigatoken.gigatoken_rs")
        self._json = tokenizer_json
        self._memory_bytes = memory_bytes
        self._change = threading.Condition()
        self._calls = 0
        self._renewing = False
        self._tokenizer = self._native.load_hf_json(tokenizer_json)
        self._fresh_bytes = rss_bytes()
        self.renewals = 0
        """Times that a new tokenizer was loaded."""

    @property
    def backend(self) -> Any:
        return self._tokenizer

    @property
    def vocab(self) -> dict[int, bytes]:
        """Token id -> bytes that it stands for, added tokens too."""
        return self._tokenizer.vocab

    def encode_lines(self, buffer: Buffer, text_key: str) -> Ids:
        """Ids of the JSON lines in a sealed buffer."""
        source = self._native.JsonlFileSource([buffer.path], field=text_key)
        return self._call(lambda tokenizer: tokenizer.encode_files(source, parallel=True))

    def encode_texts(self, texts: Sequence[str]) -> Ids:
        if not texts:
            return np.zeros(0, np.uint32), np.zeros(0, np.int64)
        return self._call(lambda tokenizer: tokenizer.encode_batch(list(texts), parallel=True))

    def _call(self, work: Callable[[Any], Ids]) -> Ids:
        """`work` with the tokenizer; when memory is used up, the last call under way ends first and a new one is loaded.

        Nothing but `work`'s own frame may refer to the tokenizer: a reference that outlives the call, even by a moment, would keep the
        old one in memory beside the new.
        """
        with self._change:
            self._change.wait_for(lambda: not self._renewing)
            # A process that is large for other reasons (torch is loaded) must not load the tokenizer for every call.
            if rss_bytes() > max(self._memory_bytes, self._fresh_bytes + MIN_GROWTH_BYTES):
                self._renewing = True
                self._change.wait_for(lambda: self._calls == 0)
                try:
                    self._tokenizer = None  # its memory goes first, then the new one's comes
                    _trim()
                    self._tokenizer = self._native.load_hf_json(self._json)
                finally:
                    self._renewing = False
                    self._change.notify_all()
                self._fresh_bytes = rss_bytes()
                self.renewals += 1
            self._calls += 1
        try:
            with _flat_results():
                return work(self._tokenizer)
        finally:
            with self._change:
                self._calls -= 1
                self._change.notify_all()


def _trim() -> None:
    """Give freed memory back to the system; glibc keeps it otherwise, and the next measurement would count it."""
    ctypes.CDLL(None).malloc_trim(0)


# --- results without awkward -----------------------------------------------------------------------------------------------------


_FLAT = ModuleType("awkward")
_FLAT.unflatten = lambda ids, counts: (ids, counts)  # type: ignore[attr-defined]
_FLAT.Array = type("Array", (), {})  # type: ignore[attr-defined]  # an argument is compared with it
_flat_lock = threading.Lock()
_flat_users = 0
_real_awkward: ModuleType | None = None


@contextlib.contextmanager
def _flat_results() -> Iterator[None]:
    """While it lasts gigatoken's calls return (ids, counts): it hands both to awkward.unflatten, and this awkward keeps them as they are.

    Saves the import of awkward (0.2 s of a start) and taking its arrays apart again.
    """
    global _flat_users, _real_awkward
    with _flat_lock:
        if _flat_users == 0:
            _real_awkward = sys.modules.get("awkward")
            sys.modules["awkward"] = _FLAT
        _flat_users += 1
    try:
        yield
    finally:
        with _flat_lock:
            _flat_users -= 1
            if _flat_users == 0:
                if _real_awkward is None:
                    del sys.modules["awkward"]
                else:
                    sys.modules["awkward"] = _real_awkward
