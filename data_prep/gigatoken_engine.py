"""gigatoken in bounded memory: blocks of JSON lines or lists of texts in, one flat array of token ids out.

What it gets wrong is other modules' business: `blocks` (bad lines), `encoders` (documents that it encodes differently).
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
import threading
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

import numpy as np

from data_prep.blocks import Buffer
from data_prep.optional import need

PAGE_BYTES = 4096

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
        """ValueError when gigatoken cannot load this tokenizer.json."""
        self._native = need("gigatoken.gigatoken_rs")
        self._json = tokenizer_json
        self._memory_bytes = memory_bytes
        self._lock = threading.Lock()
        self._tokenizer = self._native.load_hf_json(tokenizer_json)
        self.renewals = 0

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
        with _flat_results():
            ids, counts = self._current().encode_files(source, parallel=True)
        return ids, counts

    def encode_texts(self, texts: Sequence[str]) -> Ids:
        if not texts:
            return np.zeros(0, np.uint32), np.zeros(0, np.int64)
        with _flat_results():
            ids, counts = self._current().encode_batch(list(texts), parallel=True)
        return ids, counts

    def _current(self) -> Any:
        if rss_bytes() > self._memory_bytes:
            with self._lock:
                if rss_bytes() > self._memory_bytes:
                    self._tokenizer = None  # its memory goes first, then the new one's comes
                    _trim()
                    self._tokenizer = self._native.load_hf_json(self._json)
                    self.renewals += 1
                return self._tokenizer
        with self._lock:
            return self._tokenizer


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
