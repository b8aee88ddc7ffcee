"""The loop on real ranks: it learns, layouts agree, kills leave no trace, the stop rule stops."""

import json
import os
import signal
import subprocess

import pytest

from tests.training.factory import read_checkpoint
from tests.training.rl.factory import exact, log, prepare, rows, run, sampler_state, start, wait_for_step
from training.rl.job import Job

pytestmark = pytest.mark.multirank

# Everything that carries state or changes the loss at once: a reference, two optimizer steps, rounds, punishment, filter, temperature.
EVERYTHING = {
    "steps": 4,
    "save_interval_steps": 2,
    "kl_coefficient": 0.05,
    "optimizer_steps_per_rollout": 2,
    "dynamic_sampling": True,
    "overlong_cache_tokens": 2,
    "overlong_filter": True,
    "warmup_steps": 3,
    "rollout": {"max_response_tokens": 4, "batch_samples": 32, "temperature": 0.8},
    "stop": {"max_mean_gap_nats": 1e-4},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A run on one rank that has learned a little, on-policy and without a reference."""
    folder = tmp_path_factory.mktemp("grpo") / "base"
    prepare(folder, "single", steps=30, samples_per_prompt=32, micro_batch_samples=160, learning_rate=5e-3)
    assert run(folder) == 0, log(folder)[-3000:]
    return folder


@pytest.fixture(scope="module")
def undisturbed(base):
    """layout -> a run with EVERYTHING from the base's checkpoint; each made once."""
    made = {}

    def get(layout):
        if layout not in made:
            folder = prepare(base.parent / f"undisturbed-{layout}", layout, initial=(base, 30), **EVERYTHING)
            assert run(folder) == 0, log(folder)[-3000:]
            made[layout] = folder
        return made[layout]

    return get


def test_it_learns(base):
    done = rows(base)
    assert [row["step"] for row in done] == list(range(1, 31))
    first, last = (sum(row["reward"] for row in part) / 5 for part in (done[:5], done[-5:]))
    assert first < 0.12  # chance is 1/12 a place, and a little for an early end
    assert last > first + 0.08
    assert max(row["max_gap_nats"] for row in done) < 1e-5
    # on-policy the ratio is 1: nothing is ever clipped
    assert all(row["clipped_low_share"] == row["clipped_high_share"] == 0 for row in done)
    assert set(done[0]["reward_per_domain"]) == {"even", "odd"}
    assert done[-1]["prompt_position"] == 300
    samples = [json.loads(line) for line in (base / "rollouts" / "step_0000030.jsonl").read_text().splitlines()]
    assert len(samples) == 4
    assert {"prompt", "completion", "reward", "advantage", "truncated"} <= set(samples[0])


def test_a_finished_stage_is_not_run_again(base):
    before = exact(base)
    assert run(base) == 0
    assert "finished (result.json is there)" in log(base)
    assert exact(base) == before


def test_the_reference_is_where_the_stage_began(undisturbed):
    """The policy moves away from the base's weights, where it began."""
    done = rows(undisturbed("single"))
    divergences = [row["divergence_nats"] for row in done]
    assert divergences == sorted(divergences)
    assert 0 < divergences[0] < 0.01  # the second of two optimizer steps has moved a little already
    assert done[0]["rollout_rounds"] >= 1
    assert [row["lr"] for row in done] == pytest.approx([2e-3 * s for s in (2 / 3, 1, 1, 1)])


@pytest.mark.parametrize("layout", ["tp2_sp", "pp2", "dp2"])
def test_every_layout_trains_the_same(undisturbed, layout):
    """The same samples (so the same rewards and lengths), and losses within what float32 leaves of a sum in another order."""
    reference, other = rows(undisturbed("single")), rows(undisturbed(layout))
    for a, b in zip(reference, other, strict=True):
        for key in ("reward", "response_tokens", "truncated_share", "no_signal_share", "prompt_position", "stage_tokens", "lr"):
            assert a[key] == pytest.approx(b[key], abs=1e-12), key
        assert abs(a["loss"] - b["loss"]) < 1e-5
        assert abs(a["entropy_nats"] - b["entropy_nats"]) < 1e-5
        assert abs(a["grad_norm"] - b["grad_norm"]) < 1e-4
        assert b["max_gap_nats"] < 1e-5


@pytest.mark.parametrize("layout", ["single", "pp2"])
def test_kill_and_the_same_command_again(base, undisturbed, layout):
    folder = prepare(base.parent / f"killed-{layout}", layout, initial=(base, 30), **EVERYTHING)
    process = start(folder)
    wait_for_step(folder, 3, process)
    (child, *_) = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True).stdout.split()
    os.kill(int(child), signal.SIGKILL)
    assert process.wait(timeout=60) in (0, 128 + signal.SIGKILL)  # on a fast machine it may have just finished
    (folder / "result.json").unlink(missing_ok=True)
    assert run(folder) == 0, log(folder)[-3000:]
    assert "resume from step" in log(folder)
    assert exact(folder) == exact(undisturbed(layout))
    assert sampler_state(folder, 4) == sampler_state(undisturbed(layout), 4)
    ours, theirs = read_checkpoint(folder), read_checkpoint(undisturbed(layout))
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert tensor.equal(ours[key]), key


def test_sigterm_saves_and_another_layout_goes_on(base, undisturbed):
    folder = prepare(base.parent / "preempted", "single", initial=(base, 30), **EVERYTHING)
    process = start(folder)
    wait_for_step(folder, 1, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 75, log(folder)[-3000:]
    job = Job.read(folder / "job.json")
    job.model_copy(update={"parallel": Job.read(undisturbed("pp2") / "job.json").parallel}).write(folder / "job.json")
    assert run(folder) == 0, log(folder)[-3000:]
    for a, b in zip(rows(undisturbed("single")), rows(folder), strict=True):
        assert a["reward"] == pytest.approx(b["reward"], abs=1e-12)
        assert abs(a["loss"] - b["loss"]) < 1e-5


def test_the_stop_rule_ends_the_stage_before_it_saves(base):
    folder = prepare(
        base.parent / "stopped",
        "dp2",
        initial=(base, 30),
        steps=2,
        save_interval_steps=1,
        kl_coefficient=0.05,
        stop={"max_mean_gap_nats": 1e-12},
    )
    assert run(folder) == 17
    assert "step 1: rollout and training disagree: the mean gap of their log-probabilities is" in log(folder)
    (row,) = rows(folder)
    assert row["divergence_nats"] < 1e-12  # before the first update policy and reference are the same
    assert not (folder / "checkpoints").exists() or not list((folder / "checkpoints").glob("iter_*"))
    assert not (folder / "result.json").exists()


def refused(folder, capsys):
    """Decided in this process, before any rank is made."""
    from training.rl.demo import reward
    from training.rl.grpo import run_stage

    assert run_stage(folder, reward) == 78
    return capsys.readouterr().err


def test_a_resume_must_not_change_what_is_learned(undisturbed, tmp_path, capsys):
    import shutil

    folder = tmp_path / "changed"
    shutil.copytree(undisturbed("single"), folder)
    job = Job.read(folder / "job.json")
    job.model_copy(update={"grpo": job.grpo.model_copy(update={"learning_rate": 1.0})}).write(folder / "job.json")
    assert "a resume must not change what is learned" in refused(folder, capsys)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parallel": {"context": 2, "gpus": 2}}, "parallel.context is 2: inference keeps whole sequences; set it to 1"),
        ({"parallel": {"virtual_pipeline": 2}}, "parallel.virtual_pipeline is set"),
        ({"parallel": {"overlap_param_gather": True}}, "parallel.overlap_param_gather is on"),
        ({"parallel": {"gpus": 3}}, "grpo.prompts_per_step is 10, which 3 data-parallel ranks do not divide; 3 would pass"),
        ({"parallel": {"micro_batch_samples": 7}}, "80 samples per optimizer step are no multiple of parallel.micro_batch_samples 7"),
        ({"grpo": {"kl_coefficient": 0.1}}, "grpo.kl_coefficient is positive but there is no initial checkpoint"),
        ({"prompts": ["/nowhere.jsonl"]}, "prompts /nowhere.jsonl: No such file or directory"),
        ({"tokenizer": "/nowhere"}, "/nowhere"),
        ({"initial": {"checkpoints": "/nowhere", "step": 3}}, "initial checkpoint /nowhere/iter_0000003 does not exist"),
        ({"seed": "x"}, "job.json: seed: Input should be a valid integer"),
        ({"grpo": {"samples_per_prompt": 1}}, "job.json: grpo.samples_per_prompt: Input should be greater than or equal to 2"),
    ],
)  # fmt: skip
def test_what_cannot_be_trained_is_refused_before_any_rank_starts(tmp_path, capsys, changes, message):
    folder = prepare(tmp_path / "stage", "single")
    raw = json.loads((folder / "job.json").read_text())
    for key, value in changes.items():
        raw[key] = raw[key] | value if isinstance(raw[key], dict) else value
    (folder / "job.json").write_text(json.dumps(raw))
    assert message in refused(folder, capsys)
