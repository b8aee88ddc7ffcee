"""`quarry tokenize`, and what is shown while it runs."""

import argparse
import json
import subprocess
import sys

import pytest

from data_prep import progress
from data_prep.errors import DataError
from data_prep.progress import Shown
from launchers import tokenize_command
from tests.data_prep import tokenizing


def run(*arguments):
    parser = argparse.ArgumentParser()
    tokenize_command.add_parser(parser.add_subparsers())
    return tokenize_command.run(parser.parse_args(["tokenize", *map(str, arguments)]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizing.byte_level(folder, 1100)
    return folder


def test_the_command_says_what_it_did(tmp_path, folder, capsys):
    tokenizing.jsonl(tmp_path / "in" / "a.jsonl", ["one", f"two{tokenizing.EOD}", ""])
    tokenizing.jsonl(tmp_path / "in" / "b.jsonl", ["three"])
    arguments = (
        "--input",
        tmp_path / "in" / "*.jsonl",
        "--tokenizer",
        folder,
        "--output",
        tmp_path / "out" / "x",
        "--append-eod",
    )
    assert run(*arguments, "--workers", 2) == 0
    out = capsys.readouterr().out
    assert f"{tmp_path}/out/x.bin/.idx: 3 documents, " in out
    assert "left out: 1 empty document; see " in out
    assert "1 control tokens were spelled in texts and became ids" in out
    record = json.loads((tmp_path / "out" / "x.json").read_text())
    assert [file["path"] for file in record["files"]] == [str(tmp_path / "in" / f"{name}.jsonl") for name in "ab"]
    assert record["eod_id"] is not None
    run(*arguments, "--control-tokens", "as_text")
    assert "control tokens were" not in capsys.readouterr().out
    for wrong, message in (
        (("--workers", 0), "--workers is 0"),
        (("--memory-mb", 5), "5 MB"),
        (("--input", "no*"), "nothing matches"),
        (("--output", ""), "no name to which .bin and .idx could be added; use e.g. tokens"),
        (("--max-bad-percent", "nan"), "--max-bad-percent is nan; use a number from 0 to 100"),
        (("--max-bad-percent", "-1"), "--max-bad-percent is -1"),
    ):
        with pytest.raises(DataError, match=message):
            run(*arguments, *wrong)


def test_it_starts_without_the_heavy_packages():
    """They take longer to import than 300 MB take to tokenize."""
    code = (
        "import sys; from data_prep import encoder_choice, tokenize_files, tokenizer_facts, split; import launchers.tokenize_command; "
        "print([m for m in ('torch', 'megatron', 'transformers', 'tokenizers', 'awkward', 'gigatoken', 'pyarrow', 'rich') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_without_a_terminal_there_is_a_line_from_time_to_time(capsys, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    shown = Shown(line_seconds=10)
    with shown.step("tokens of x", 4_000_000) as done:
        for _ in range(4):
            now[0] += 5
            done(1_000_000, 50, 250_000)
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == [
        "tokens of x:  50.0 %  10.0 documents/s  50.00k tokens/s  0.2 MB/s  0:00:10 left",
        "tokens of x: 100.0 %  10.0 documents/s  50.00k tokens/s  0.2 MB/s  0:00:00 left",
    ]
    assert lines[2].endswith("20.0 s  4.0 MB  200 documents  1,000,000 tokens  10.0 documents/s  50.00k tokens/s  0.2 MB/s")


def test_on_a_terminal_there_is_a_bar(monkeypatch):
    import io

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    shown = Shown()
    with shown.step("tokens of x", 4_000_000) as done:
        done(1_000_000, 50, 250_000)
    shown.message("a [message] of any text")
    assert "tokens/s" in terminal.getvalue()
    assert "a [message] of any text" in terminal.getvalue()
