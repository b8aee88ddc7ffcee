"""TensorBoard's event files, written without a thread and without importing what TensorBoard needs to read them.

    stages/<stage>/tensorboard/events.out.tfevents.<seconds>.<number>.<host>.<process>     one per attempt

`tensorboard --logdir runs/x/stages` shows every stage as a run.

A file is a row of records (length as uint64, its checksum, bytes, their checksum; all little-endian), each a serialised Event:
tensorflow/core/lib/io/record_writer.h. A record is flushed whole; one that a crash cuts is left out by readers. On an idle core this module
takes 0.03 s to import, torch.utils.tensorboard 0.2 s.
"""

from __future__ import annotations

import os
import socket
import struct
import time
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary

FOLDER = "tensorboard"


class EventFile:
    """The scalars of one attempt at a stage."""

    def __init__(self, folder: Path, first_step: int) -> None:
        """Begin a file in `folder`. Points of earlier files from `first_step` on are void: those steps are taken again."""
        folder.mkdir(parents=True, exist_ok=True)
        now = time.time()
        # Readers take the files of a folder by name, so the seconds have ten digits, and a second attempt within one comes later.
        number = len(list(folder.glob("events.out.tfevents.*")))
        self.path = folder / f"events.out.tfevents.{int(now):010d}.{number:06d}.{socket.gethostname()}.{os.getpid()}"
        self._file = open(self.path, "xb")  # noqa: SIM115 closed by `close`, or with the process
        self._write(Event(wall_time=now, step=first_step, file_version="brain.Event:2"))
        self._write(Event(wall_time=now, step=first_step, session_log=SessionLog(status=SessionLog.START)))

    def add(self, step: int, values: dict[str, float]) -> None:
        """One point per tag, stored as float32."""
        summary = Summary()
        for tag, number in values.items():
            summary.value.add(tag=tag, simple_value=number)
        if summary.value:
            self._write(Event(wall_time=time.time(), step=step, summary=summary))

    def close(self) -> None:
        self._file.close()

    def _write(self, event: Event) -> None:
        data = event.SerializeToString()
        length = struct.pack("<Q", len(data))
        record = length + struct.pack("<I", masked_crc32c(length)) + data + struct.pack("<I", masked_crc32c(data))
        self._file.write(record)
        self._file.flush()


def _crc32c_table() -> list[int]:
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = (byte >> 1) ^ (0x82F63B78 if byte & 1 else 0)  # Castagnoli's polynomial, reversed
        table.append(byte)
    return table


_TABLE = _crc32c_table()


def masked_crc32c(data: bytes) -> int:
    """CRC-32C, rotated and offset as TensorFlow stores it, so that a checksum of checksums is not degenerate."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _TABLE[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    crc ^= 0xFFFFFFFF
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF
