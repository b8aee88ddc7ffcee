import json

from training.metrics import MetricsLog


def steps(path):
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_a_resume_drops_exactly_the_steps_that_it_trains_again(tmp_path):
    log = MetricsLog(tmp_path)
    for step in range(1, 6):
        log.append_step(step=step, loss=1.0 / step)
    log.append_heldout(when="start", step=0, losses={})
    MetricsLog(tmp_path).start(3)
    assert steps(tmp_path / "metrics.jsonl") == [1, 2, 3]
    assert steps(tmp_path / "heldout.jsonl") == [0]
    log.append_step(step=4, loss=0.25)
    assert steps(tmp_path / "metrics.jsonl") == [1, 2, 3, 4]


def test_a_new_first_start_drops_everything(tmp_path):
    log = MetricsLog(tmp_path)
    log.append_step(step=1, loss=1.0)
    log.append_heldout(when="start", step=0, losses={})
    log.start(0)
    assert steps(tmp_path / "metrics.jsonl") == []
    assert steps(tmp_path / "heldout.jsonl") == []


def test_a_line_cut_by_a_kill_is_mended(tmp_path):
    log = MetricsLog(tmp_path)
    log.append_step(step=1, loss=1.0)
    with open(tmp_path / "metrics.jsonl", "a") as f:
        f.write('{"step": 2, "lo')
    log.start(2)
    log.append_step(step=2, loss=0.5)
    assert steps(tmp_path / "metrics.jsonl") == [1, 2]


def test_floats_survive_exactly(tmp_path):
    log = MetricsLog(tmp_path)
    value = 0.1 + 0.2
    log.append_step(step=1, loss=value)
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["loss"] == value
