"""The cost of saves is told from a stage's log; a log that cannot tell it is refused."""

import json

import pytest

from benchmarks.checkpoint import cost, main, table


@pytest.fixture
def stage(tmp_path):
    """Ten steps of 1 s, a save every 4 of which each costs the step behind it 3 s; the first step took 9 s."""
    (tmp_path / "checkpoints" / "iter_0000008").mkdir(parents=True)
    (tmp_path / "checkpoints" / "iter_0000008" / "__0_0.distcp").write_bytes(bytes(2_000_000))
    (tmp_path / "args.txt").write_text("--save-interval\n4\n--async-save\n")
    rows = [{"step": step, "seconds": {1: 9.0, 5: 4.0, 9: 4.0}.get(step, 1.0)} for step in range(1, 11)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = [f"    save-checkpoint ......: ({ms - 1}.00, {ms}.50)\n" for ms in (2900, 3100, 2950)]
    (tmp_path / "log.txt").write_text("".join(lines))
    return tmp_path


def test_what_steps_took_beyond_the_median_is_spread_over_the_saves(stage):
    found = cost(stage)
    assert (found.steps, found.saves, found.asynchronous, found.checkpoint_bytes) == (10, 2, True, 2_000_000)
    assert found.step_seconds == 1.0
    assert found.seconds_per_save == pytest.approx(3.0)
    assert found.blocked_seconds == pytest.approx(2.9505)
    assert "| 2 asynchronous | 2 MB | 10 | 1.000 s | 2.95 s | 3.00 s |" in table([found])


def test_a_log_that_cannot_tell_is_refused(stage, capsys):
    rows = (stage / "metrics.jsonl").read_text().splitlines(keepends=True)
    (stage / "metrics.jsonl").write_text("".join(rows[::2]))
    assert main([str(stage)]) == 2
    assert "set log_interval_steps=1" in capsys.readouterr().err
    (stage / "metrics.jsonl").write_text("".join(rows[:4]))
    assert main([str(stage)]) == 2
    assert "no step comes after a save" in capsys.readouterr().err
