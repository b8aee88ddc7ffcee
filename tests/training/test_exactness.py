"""Exactness of the real training loop on real ranks: layouts, hand-offs, kills and resumes.

One base phase is trained once; every test continues from its hand-off in a run of its own. The second phase changes length, batch size,
RoPE base, mixture and schedule, so that each hand-off here is a full one.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import psutil
import pytest

from data_prep.index_caches import cache_path, verify_cache
from data_prep.manifest import MixtureManifest, mixture_path
from recipes.job_options import Precision
from tests.training import stage_server
from tests.training.factory import STEPS, make_data, make_recipe, read_checkpoint, start, start_stage
from training.handoff import latest_step
from training.stage import run_torchrun

pytestmark = pytest.mark.multirank

TOLERANCE_NATS = 2e-6
LAYOUTS = {
    "single": {"gpus": 1},
    "dp2": {"gpus": 2},
    "tp2_sp": {"gpus": 2, "tensor": 2, "sequence_parallel": True},
    "pp2": {"gpus": 2, "pipeline": 2},
    "cp2": {"gpus": 2, "context": 2, "context_communication": "a2a"},
    "tp2_cp2": {"gpus": 4, "tensor": 2, "context": 2, "sequence_parallel": True, "loss_chunk_tokens": 100},  # of 256 per rank
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A run whose first phase is finished, on one rank."""
    root = tmp_path_factory.mktemp("exact")
    make_data(root / "data")
    run = root / "base"
    make_recipe(root / "data", LAYOUTS["single"], "single").write(_made(run) / "recipe.json")
    assert start_stage(run, "first") == 0
    return root


def _made(folder):
    folder.mkdir(parents=True)
    return folder


def fork_run(base, name, layout, **changes):
    """A new run that has the base's first phase and `layout` for the second."""
    run = _made(base / name)
    shutil.copytree(base / "base" / "stages" / "first", run / "stages" / "first")
    make_recipe(base / "data", LAYOUTS[layout], layout, **changes).write(run / "recipe.json")
    return run


def metrics(run, stage="second"):
    return [json.loads(line) for line in (run / "stages" / stage / "metrics.jsonl").read_text().splitlines()]


def exact(rows):
    """What must be equal bit for bit: everything but the clock."""
    return [{k: v for k, v in row.items() if k not in ("seconds", "tokens_per_second", "time")} for row in rows]


def heldout(run, stage="second"):
    return (run / "stages" / stage / "heldout.jsonl").read_text()


@pytest.fixture(scope="module")
def undisturbed(base):
    """layout -> a run that trained the second phase without a disturbance; each made once."""
    runs = {}

    def get(layout):
        if layout not in runs:
            run = fork_run(base, f"undisturbed-{layout}", layout)
            assert start_stage(run, "second") == 0, (run / "log.txt").read_text()[-3000:]
            runs[layout] = run
        return runs[layout]

    return get


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "single"])
def test_every_layout_trains_the_same(undisturbed, layout):
    """The hand-off into another layout: the same first loss, the same 20 steps, the same held-out losses."""
    reference, other = metrics(undisturbed("single")), metrics(undisturbed(layout))
    assert len(reference) == len(other) == STEPS
    differences = [abs(a["loss"] - b["loss"]) for a, b in zip(reference, other, strict=True)]
    assert differences[0] <= TOLERANCE_NATS
    assert max(differences) <= TOLERANCE_NATS
    assert [a["lr"] for a in reference] == [b["lr"] for b in other]
    for a, b in zip(heldout(undisturbed("single")).splitlines(), heldout(undisturbed(layout)).splitlines(), strict=True):
        for category, loss in json.loads(a)["losses"].items():
            assert abs(loss - json.loads(b)["losses"][category]) <= TOLERANCE_NATS


def test_it_learns_and_the_position_starts_anew(undisturbed):
    rows = metrics(undisturbed("single"))
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.05
    assert rows[0]["step"] == 1
    handoff = json.loads((undisturbed("single") / "stages" / "first" / "handoff.json").read_text())
    assert rows[0]["total_tokens"] - rows[0]["stage_tokens"] == handoff["total_tokens"]
    # the loss goes on from the hand-off: far below that of a fresh model
    fresh = metrics(undisturbed("single"), "first")[0]["loss"]
    assert rows[0]["loss"] < fresh - 0.3


# tp2_cp2 has what tensor and context parallelism do at a resume.
@pytest.mark.parametrize("layout", ["single", "dp2", "pp2", "tp2_cp2"])
def test_kill_and_the_same_command_again(base, undisturbed, layout):
    run = fork_run(base, f"killed-{layout}", layout)
    process = start(run, "second")
    wait_for_step(run, 11, process)
    os.kill(ranks_of(process)[-1], signal.SIGKILL)
    assert process.wait(timeout=60) == 128 + signal.SIGKILL
    assert not (run / "stages" / "second" / "handoff.json").exists()
    assert start_stage(run, "second") == 0
    assert "resume (own checkpoint of step" in (run / "log.txt").read_text()
    assert exact(metrics(run)) == exact(metrics(undisturbed(layout)))
    assert heldout(run) == heldout(undisturbed(layout))
    ours, theirs = (json.loads((r / "stages" / "second" / "handoff.json").read_text()) for r in (run, undisturbed(layout)))
    assert ours["ledger"] == theirs["ledger"]
    # a third start finds it finished and does nothing
    assert start_stage(run, "second") == 0
    assert exact(metrics(run)) == exact(metrics(undisturbed(layout)))


def test_torchrun_trains_the_same_as_forked_ranks(base, undisturbed):
    """The way that GPUs are started, down to the last bit."""
    run = fork_run(base, "torchrun", "dp2")
    program = "from tests.training.factory import start_with_torchrun; start_with_torchrun()"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program, str(run)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert exact(metrics(run)) == exact(metrics(undisturbed("dp2")))
    assert heldout(run) == heldout(undisturbed("dp2"))


def test_several_nodes_without_a_meeting_point_are_refused(base, monkeypatch, capsys):
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NNODES", "2")
    recipe = make_recipe(base / "data", LAYOUTS["dp2"], "dp2")
    assert run_torchrun(recipe, "second", base, None, "", program="training.pretrain") == 78
    assert "MASTER_ADDR and MASTER_PORT not set" in capsys.readouterr().err
    monkeypatch.setenv("NNODES", "3")
    assert run_torchrun(recipe, "second", base, None, "", program="training.pretrain") == 78
    assert "3 nodes (NNODES) do not divide" in capsys.readouterr().err


def test_kill_between_the_last_save_and_the_handoff(base, undisturbed):
    run = fork_run(base, "killed-late", "single")
    shutil.copytree(undisturbed("single") / "stages" / "second", run / "stages" / "second")
    (run / "stages" / "second" / "handoff.json").unlink()
    assert start_stage(run, "second") == 0
    before, after = (json.loads((r / "stages" / "second" / "handoff.json").read_text()) for r in (undisturbed("single"), run))
    for key in ("ledger", "final_loss", "heldout", "training_digest", "step"):
        assert before[key] == after[key], key


def test_sigterm_saves_and_asks_to_be_resumed(base, undisturbed):
    run = fork_run(base, "preempted", "dp2")
    process = start(run, "second")
    step = wait_for_step(run, 9, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 75
    saved = int((run / "stages" / "second" / "checkpoints" / "latest_checkpointed_iteration.txt").read_text())
    assert saved >= step
    assert start_stage(run, "second") == 0
    assert exact(metrics(run)) == exact(metrics(undisturbed("dp2")))


def test_kill_inside_an_asynchronous_save(base, undisturbed):
    """Steps go on while step 14 is being written; a rank that is killed then takes its writer along, and step 7 is resumed from."""
    run = fork_run(base, "async", "dp2", async_saves=True)
    unfinished = run / "stages" / "second" / "checkpoints" / "iter_0000014"
    unfinished.mkdir(parents=True)
    os.mkfifo(unfinished / "__1_0.distcp")  # whoever writes here waits for a reader
    process = start(run, "second")
    wait_for_step(run, 16, process)
    assert latest_step(unfinished.parent) == 7
    family = psutil.Process(process.pid).children(recursive=True)
    assert len(family) > 2, "no writers beside the ranks"
    os.kill(ranks_of(process)[-1], signal.SIGKILL)
    assert process.wait(timeout=60) == 128 + signal.SIGKILL
    _, alive = psutil.wait_procs(family, timeout=20)
    assert not alive
    (unfinished / "__1_0.distcp").unlink()
    assert start_stage(run, "second") == 0, (run / "log.txt").read_text()[-3000:]
    assert "resume (own checkpoint of step 7" in (run / "log.txt").read_text()
    assert exact(metrics(run)) == exact(metrics(undisturbed("dp2")))
    assert heldout(run) == heldout(undisturbed("dp2"))
    found, expected = (read_checkpoint(r / "stages" / "second") for r in (run, undisturbed("dp2")))
    assert found.keys() == expected.keys()
    assert all(tensor.equal(found[key]) for key, tensor in expected.items())


def test_handoff_keeps_weights_and_moments_bit_for_bit(base):
    """Load the hand-off into another layout, save before the first step, and compare all tensors of both checkpoints."""
    run = fork_run(base, "moments", "tp2_sp")
    program = "tests.training.factory:save_before_the_first_step"
    assert stage_server.start([str(run)], run / "log.txt", program=program).wait(timeout=300) == 0, (
        run / "log.txt"
    ).read_text()
    before = read_checkpoint(run / "stages" / "first")
    after = read_checkpoint(run / "stages" / "second")
    moments = [key for key in before if "exp_avg" in key]
    assert moments
    assert any("exp_avg_sq" in key for key in moments)
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert tensor.equal(after[key]), key
        if key in moments:
            assert tensor.abs().max() > 0, f"{key} is zero: this proves nothing"


def test_gradients_in_bf16_are_reduced_and_leave_no_trace_in_what_is_handed_on(base):
    """Two data-parallel ranks over gloo, bf16 throughout, beside one rank in fp32. (That the buffers are in bf16:
    tests/recipes/test_against_megatron.py.)"""
    run = _made(base / "bf16-gradients")
    recipe = make_recipe(base / "data", LAYOUTS["dp2"], "dp2")
    first = {
        "parallel": recipe.phase["second"].parallel,
        "precision": Precision(name="bf16", dtype="bf16", gradients_dtype="bf16"),
    }
    phases = recipe.phase | {"first": recipe.phase["first"].model_copy(update=first)}
    recipe.model_copy(update={"phase": phases}).write(run / "recipe.json")
    assert start_stage(run, "first") == 0, (run / "log.txt").read_text()[-3000:]
    bf16, fp32 = metrics(run, "first"), metrics(base / "base", "first")
    for ours, theirs in zip(bf16, fp32, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=2e-3)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=0.02)
    bf16, fp32 = (read_checkpoint(folder / "stages" / "first") for folder in (run, base / "base"))
    state = {key: (tensor.shape, tensor.dtype) for key, tensor in bf16.items() if key.startswith("optimizer.")}
    assert state == {key: (tensor.shape, tensor.dtype) for key, tensor in fp32.items() if key.startswith("optimizer.")}


@pytest.mark.parametrize("victim", ["code.bin", "web.idx"])
def test_altered_data_is_refused(base, victim, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(base / "data", data)
    run = _made(tmp_path / "run")
    shutil.copytree(base / "base" / "stages" / "first", run / "stages" / "first")
    make_recipe(data, LAYOUTS["single"], "single").write(run / "recipe.json")
    path = data / "views" / "second" / victim
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert start_stage(run, "second") == 78
    log = (run / "log.txt").read_text()
    assert victim in log
    assert "the content was altered or swapped; prepare it again with `quarry prep`" in log


def test_the_gate_notices_a_model_that_is_not_the_one_handed_off(base):
    run = fork_run(base, "gate", "single")
    path = run / "stages" / "first" / "handoff.json"
    handoff = json.loads(path.read_text())
    handoff["heldout"]["code"] += 0.01
    path.write_text(json.dumps(handoff))
    assert start_stage(run, "second") == 78
    assert "the held-out loss is not the one that 'first' handed off" in (run / "log.txt").read_text()
    assert not (run / "stages" / "second" / "metrics.jsonl").exists()


def test_no_layout_built_an_index(base, undisturbed):
    """The caches that were built ahead served them all: not one file came, went or changed."""
    for layout in LAYOUTS:
        undisturbed(layout)
        assert "index cache: 11 files, 0.0 MB, verified, none built" in (base / f"undisturbed-{layout}" / "log.txt").read_text()
    for phase in ("first", "second"):
        manifest = MixtureManifest.read(mixture_path(base / "data", phase))
        record = verify_cache(base / "data", manifest, full=True)
        assert [path.name for path in (base / "data" / "cache" / phase).iterdir()] == [manifest.digest[:16]]
        assert {path.name for path in cache_path(base / "data", manifest).iterdir()} == {*record.files, "record.json"}


def wait_for_step(run, step, process):
    """Until `step` is logged; returns the last logged step."""
    path = run / "stages" / "second" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert process.poll() is None, f"ended early: {(run / 'log.txt').read_text()[-3000:]}"
        lines = path.read_text().splitlines() if path.exists() else []
        if len(lines) >= step:
            return len(lines)
        time.sleep(0.01)
    raise AssertionError(f"step {step} not reached in 120 s")


def ranks_of(process):
    """Process ids of the forked ranks."""
    done = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True, check=True)
    return [int(line) for line in done.stdout.split()]
