"""The record of consumed samples: what a kill repeats counts once, what is missing is an error, and ranks record what they train on."""

import json
import os
import signal
import subprocess
import time

import numpy as np
import pytest

from data_prep.manifest import MixtureManifest, mixture_path
from tests.training import recount
from tests.training.factory import SECOND, make_data, make_recipe, start, start_stage
from training.recorder import FOLDER, VARIABLE, read_consumed, sample_digest


def write(stage_dir, start_step, rank, steps, ranks=1, text=None):
    folder = stage_dir / FOLDER
    folder.mkdir(exist_ok=True)
    lines = [
        json.dumps({"step": step, "ranks": ranks, "skipped": False, "micro_batches": [[[0, f"{start_step}-{rank}-{step}"]]]})
        for step in steps
    ]
    (folder / f"from_{start_step:07d}_rank_{rank:05d}.jsonl").write_text("".join(line + "\n" for line in lines) + (text or ""))


def digests(stage_dir):
    return {step: [digest for _, digest in samples] for step, samples in read_consumed(stage_dir).items()}


def test_steps_that_a_kill_repeats_count_once(tmp_path):
    write(tmp_path, 0, 0, range(1, 6))
    write(tmp_path, 3, 0, range(4, 8))
    assert digests(tmp_path) == {1: ["0-0-1"], 2: ["0-0-2"], 3: ["0-0-3"], **{step: [f"3-0-{step}"] for step in range(4, 8)}}


def test_a_resume_in_another_layout(tmp_path):
    """Two ranks, killed after step 5 of which one rank wrote nothing any more; then one rank from step 3."""
    write(tmp_path, 0, 0, range(1, 6), ranks=2)
    write(tmp_path, 0, 1, range(1, 5), ranks=2, text='{"step": 5, "ra')
    write(tmp_path, 3, 0, range(4, 6))
    assert digests(tmp_path) == {
        **{step: [f"0-0-{step}", f"0-1-{step}"] for step in (1, 2, 3)},
        4: ["3-0-4"],
        5: ["3-0-5"],
    }


def test_a_rank_that_recorded_nothing_is_missed(tmp_path):
    write(tmp_path, 0, 0, range(1, 3), ranks=2)
    with pytest.raises(ValueError, match=r"step 1 was recorded by ranks \[0\] of 2"):
        read_consumed(tmp_path)


def test_micro_batches_are_dealt_to_the_ranks_in_turn(tmp_path):
    (tmp_path / FOLDER).mkdir()
    for rank in (0, 1):
        batches = [[[rank, f"{rank}{m}{i}"] for i in (0, 1)] for m in (0, 1)]
        line = json.dumps({"step": 1, "ranks": 2, "skipped": False, "micro_batches": batches})
        (tmp_path / FOLDER / f"from_0000000_rank_0000{rank}.jsonl").write_text(line + "\n")
    assert [digest for _, digest in read_consumed(tmp_path)[1]] == ["000", "001", "100", "101", "010", "011", "110", "111"]


def test_the_digest_is_of_values_not_of_their_type():
    tokens, labels = np.array([1, 2, 3]), np.array([2, 3, 4])
    assert sample_digest(tokens, labels) == sample_digest(tokens.astype(np.uint16), labels.astype(np.uint16))
    assert sample_digest(tokens, labels) != sample_digest(labels, tokens)


LAYOUTS = {  # tensor and context parallelism, too, are recounted in tests/test_smoke.py
    "dp2": {"gpus": 2},
    "pp2_vpp": {"gpus": 2, "pipeline": 2, "virtual_pipeline": 2},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Data and a run whose first phase is finished; that one was not recorded."""
    root = tmp_path_factory.mktemp("recorder")
    make_data(root / "data")
    (root / "base").mkdir()
    make_recipe(root / "data", {"gpus": 1}, "single").write(root / "base" / "recipe.json")
    assert start_stage(root / "base", "first") == 0
    assert not (root / "base" / "stages" / "first" / FOLDER).exists()
    return root


@pytest.mark.multirank
@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_ranks_record_what_they_train_on_across_a_kill(base, layout, monkeypatch):
    monkeypatch.setenv(VARIABLE, "1")
    run = base / layout
    (run / "stages").mkdir(parents=True)
    (run / "stages" / "first").symlink_to(base / "base" / "stages" / "first")
    make_recipe(base / "data", LAYOUTS[layout], layout).write(run / "recipe.json")
    process = start(run, "second")
    metrics = run / "stages" / "second" / "metrics.jsonl"
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < 10:  # beyond the checkpoint of step 7
        assert process.poll() is None, (run / "log.txt").read_text()[-3000:]
        time.sleep(0.01)
    done = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True, check=True)
    os.kill(int(done.stdout.split()[0]), signal.SIGKILL)
    assert process.wait(timeout=60) != 0
    assert start_stage(run, "second") == 0, (run / "log.txt").read_text()[-3000:]
    manifest = MixtureManifest.read(mixture_path(base / "data", "second"))
    stage_dir = run / "stages" / "second"
    assert {path.name[:12] for path in (stage_dir / FOLDER).iterdir()} > {"from_0000000"}
    ledger = json.loads((stage_dir / "handoff.json").read_text())["ledger"]["second"]
    assert recount.recounted(stage_dir, manifest) == ledger
    assert sum(values["samples"] for values in ledger.values()) == SECOND["steps"] * SECOND["global_batch_samples"]
    recount.check_samples(stage_dir, base / "data", manifest)
