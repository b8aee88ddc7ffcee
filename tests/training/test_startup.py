"""Marks follow each other without a gap, from a process to its ranks, and are written once."""

import json
import time

import pytest

from training import startup


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setattr(startup, "_marks", [])
    monkeypatch.setattr(startup, "_reported", False)


def test_parts_add_up_to_the_time_since_the_process_began(tmp_path, capsys):
    startup.begin({})
    startup.mark("interpreter")
    time.sleep(0.02)
    startup.mark("imports")
    startup.mark("imports")
    startup.report(tmp_path, 4)
    (row,) = [json.loads(line) for line in (tmp_path / startup.FILE_NAME).read_text().splitlines()]
    assert list(row["parts"]) == ["interpreter", "imports"]
    assert row["step"] == 4
    assert 0.02 <= row["parts"]["imports"] < 0.5
    assert row["parts"]["interpreter"] > 0.05  # pytest had begun before
    assert row["seconds"] == pytest.approx(sum(row["parts"].values()), abs=0.01)
    assert capsys.readouterr().out.startswith(f"start-up {row['seconds']:.2f} s: interpreter ")


def test_ranks_of_their_own_go_on_where_the_stage_was(tmp_path):
    startup.begin({})
    startup.mark("verification")
    handed = startup.environment()
    expected = startup.seconds_of_parts()
    startup.begin(handed)
    assert startup.seconds_of_parts() == expected
    startup.mark("ranks")
    assert list(startup.seconds_of_parts()) == ["verification", "ranks"]


def test_only_the_first_step_of_a_start_is_reported(tmp_path):
    startup.begin({})
    startup.mark("imports")
    for step in (1, 2):
        startup.mark("first step")
        startup.report(tmp_path, step)
    assert len((tmp_path / startup.FILE_NAME).read_text().splitlines()) == 1


def test_a_process_that_never_began_writes_nothing(tmp_path):
    startup.mark("imports")
    startup.report(tmp_path, 1)
    assert startup.environment() == {}
    assert not list(tmp_path.iterdir())
