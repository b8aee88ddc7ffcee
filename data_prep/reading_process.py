"""A BlockReader in a process of its own: it reads, checks and digests while this one loads the tokenizer, and no lock is shared.

Loading gigatoken's tokenizer holds Python's lock for a third of a second, and checking lines holds it for a good part of the rest. The
blocks lie in memory that both processes map; only where documents begin and what is unusual goes through a pipe.
"""

from __future__ import annotations

import contextlib
import marshal
import os
import struct
import subprocess
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, Self

from data_prep import blocks
from data_prep.blocks import Block, BlockReader, Buffer, Piece, Stopped
from data_prep.errors import DataError
from data_prep.text_files import Reason

FROM_BYTES = 32 << 20
"""Less input is read by a thread: the start of a process costs as much as it saves then."""
BLOCKS_AHEAD = 16
"""Buffers, 64 MB."""
BLOCKS_ONCE = 24
"""More of them while the tokenizer is loaded (a third of a second), which leaves all but one core idle; 96 MB that the words of the
blocks encoded take later."""
HEADER = struct.Struct("<Q")
# Without `site`, which takes as long as everything else of the start; the paths are the parent's.
PROGRAM = "import sys, marshal; spec = marshal.loads(sys.stdin.buffer.read()); sys.path[:] = spec['path']; " + (
    "from data_prep.reading_process import serve; serve(spec)"
)


class Reader(Protocol):
    """Blocks of a shard's pieces in order; Stopped after stop(). `digests` and `lines` of each piece are complete after the last one."""

    pieces: list[Piece]
    text_key: str
    as_text: bool
    digests: list[str]
    lines: list[int]

    def blocks(self) -> Iterator[Block]: ...

    def release(self, block: Block) -> None:
        """Give a block's buffer back; safe to call from any thread."""
        ...

    def stop(self) -> None:
        """Let a thread that waits in blocks() raise Stopped."""
        ...

    def close(self) -> None: ...


def reads_apart(pieces: list[Piece]) -> bool:
    """Whether there is so much to read that a process of its own is worth its start."""
    return sum(piece.end - piece.start for piece in pieces) >= FROM_BYTES


def open_reader(pieces: list[Piece], text_key: str, buffers: int, *, as_text: bool, once: int = 0) -> Reader:
    """A reader of the pieces with that many blocks in memory, in a process of its own (which reads `once` more before) for much."""
    if not reads_apart(pieces):
        return BlockReader(pieces, text_key, [Buffer(blocks.BLOCK_BYTES) for _ in range(buffers)], as_text=as_text)
    return ReadingProcess(pieces, text_key, buffers, as_text=as_text, once=once)


class Early:
    """A reader that was started before all was known of the job; a context manager that ends it unless it was taken."""

    def __init__(self, reader: Reader | None = None) -> None:
        self._reader = reader

    @classmethod
    def start(cls, paths: Sequence[Path], text_key: str, *, as_text: bool = False) -> Early:
        """Begin with the first shard of `paths`, where it is large. What is wrong with a file is found out later, and said then."""
        try:
            shards = blocks.plan_shards([(str(path), path.stat().st_size) for path in paths])
        except OSError:
            return cls()
        if not shards or not reads_apart(shards[0]):
            return cls()
        return cls(ReadingProcess(shards[0], text_key, BLOCKS_AHEAD, as_text=as_text, once=BLOCKS_ONCE))

    def take(self, pieces: list[Piece], text_key: str, *, as_text: bool) -> Reader | None:
        """The reader, when it reads just these pieces in this way; it is the caller's then."""
        reader = self._reader
        if reader is None or (reader.pieces, reader.text_key, reader.as_text) != (pieces, text_key, as_text):
            return None
        self._reader = None
        return reader

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._reader is not None:
            self._reader.close()


class ReadingProcess:
    """The parent's side."""

    def __init__(self, pieces: list[Piece], text_key: str, buffers: int, *, as_text: bool, once: int = 0) -> None:
        """`buffers` blocks are read ahead, and in the beginning `once` more, whose memory goes when they were used."""
        self.pieces, self.text_key, self.as_text = pieces, text_key, as_text
        self.digests: list[str] = []
        self.lines: list[int] = []
        self._stopped = False
        # Fresh buffers are taken from the end: those that are used once come first.
        self._buffers = [Buffer(blocks.BLOCK_BYTES) for _ in range(buffers + once)]
        self._kept = buffers
        self._numbers = {id(buffer): number for number, buffer in enumerate(self._buffers)}
        self._read_fd, write_fd = os.pipe()
        free_fd, self._free_fd = os.pipe()
        fds = [buffer.fd for buffer in self._buffers]
        spec = {
            "path": [*sys.path, str(Path(__file__).resolve().parent.parent)],
            "pieces": [(piece.path, piece.file, piece.start, piece.end) for piece in pieces],
            "text_key": text_key,
            "as_text": as_text,
            "buffers": fds,
            "write_fd": write_fd,
            "free_fd": free_fd,
            "parent": os.getpid(),
            "block_bytes": blocks.BLOCK_BYTES,
            "long_line_bytes": blocks.LONG_LINE_BYTES,
        }
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", PROGRAM], stdin=subprocess.PIPE, pass_fds=[*fds, write_fd, free_fd]
            )
        finally:
            os.close(write_fd)
            os.close(free_fd)
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError), self._process.stdin as stdin:  # it ended at once: blocks() says how
            stdin.write(marshal.dumps(spec))

    def blocks(self) -> Iterator[Block]:
        """DataError as the reading raises it; RuntimeError when the process ends before its work."""
        with open(self._read_fd, "rb", buffering=1 << 16, closefd=False) as pipe:
            while True:
                kind, *values = self._message(pipe)
                if kind == "refused":
                    raise DataError(*values)
                if kind == "failed":
                    raise RuntimeError(f"the process that reads the input failed:\n{values[0]}")
                if kind == "end":
                    self.digests, self.lines = values
                    return
                number, used, places, extra, bad, extra_bytes, read_bytes = values
                yield Block(
                    self._buffers[number],
                    used,
                    places,
                    extra,
                    [(place, Reason(*reason)) for place, reason in bad],
                    extra_bytes,
                    read_bytes,
                )

    def _message(self, pipe: Any) -> Any:
        header = pipe.read(HEADER.size)
        if len(header) == HEADER.size:
            (size,) = HEADER.unpack(header)
            content = pipe.read(size)
            if len(content) == size:
                return marshal.loads(content)
        code = self._process.wait()
        if self._stopped:
            raise Stopped
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        raise RuntimeError(f"the process that reads the input ended ({how}) before all was read; run the command again")

    def release(self, block: Block) -> None:
        if block.buffer is not None:
            number = self._numbers[id(block.buffer)]
            if number < self._kept:
                block.buffer.reopen()
                with contextlib.suppress(BrokenPipeError):  # it has read everything, or ended: blocks() says which
                    os.write(self._free_fd, bytes([number]))
            else:
                block.buffer.seal(0)  # its pages go, whoever maps them
            block.buffer = None

    def stop(self) -> None:
        self._stopped = True
        self._process.kill()  # it only reads

    def close(self) -> None:
        self.stop()
        self._process.wait()
        os.close(self._read_fd)
        os.close(self._free_fd)
        for buffer in self._buffers:
            buffer.close()


class _Given:
    """Buffers as the parent gives them back: the queue that a BlockReader takes free ones from."""

    def __init__(self, buffers: list[Buffer], fd: int) -> None:
        self._fresh, self._buffers, self._fd = list(buffers), buffers, fd

    def get(self) -> Buffer | None:
        if self._fresh:
            return self._fresh.pop()
        number = os.read(self._fd, 1)
        return self._buffers[number[0]] if number else None  # the parent has closed its end


def serve(spec: dict[str, Any]) -> None:
    """The child's side; returns when all is read, or when nobody wants more."""
    import ctypes
    import gc
    import signal

    gc.disable()  # nothing here makes cycles
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: does not outlive a killed parent
    if os.getppid() != spec["parent"]:
        return
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends it
    blocks.BLOCK_BYTES, blocks.LONG_LINE_BYTES = spec["block_bytes"], spec["long_line_bytes"]
    with open(spec["write_fd"], "wb", buffering=1 << 16) as pipe:

        def send(*message: Any) -> None:
            content = marshal.dumps(message)
            pipe.write(HEADER.pack(len(content)))
            pipe.write(content)
            pipe.flush()

        try:
            buffers = [Buffer(spec["block_bytes"], fd) for fd in spec["buffers"]]
            numbers = {id(buffer): number for number, buffer in enumerate(buffers)}
            pieces = [Piece(*piece) for piece in spec["pieces"]]
            reader = BlockReader(
                pieces, spec["text_key"], buffers, as_text=spec["as_text"], free=_Given(buffers, spec["free_fd"])
            )
            for block in reader.blocks():
                assert block.buffer is not None
                bad = [(place, (reason.kind, reason.detail, reason.text)) for place, reason in block.bad]
                send(
                    "block",
                    numbers[id(block.buffer)],
                    block.used,
                    block.places,
                    block.extra,
                    bad,
                    block.extra_bytes,
                    block.read_bytes,
                )
            send("end", reader.digests, reader.lines)
        except (Stopped, BrokenPipeError):
            os._exit(0)  # nobody listens; flushing the pipe would fail again
        except DataError as error:
            send("refused", str(error))
        except Exception:
            send("failed", traceback.format_exc())
