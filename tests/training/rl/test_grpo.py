"""The loop on real ranks: it learns, layouts agree, kills leave no trace, the stop rule stops."""

import json
import shutil
import signal

import pytest

from tests.training.factory import read_checkpoint
from tests.training.rl.factory import drive, exact, prepare, rows
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


LAYOUTS = ("single", "tp2_sp", "pp2", "dp2")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """All runs of this file, made by one process: a base that learns a little, on-policy and without a reference, and what starts from it."""
    home = tmp_path_factory.mktemp("grpo")
    base = prepare(home / "base", "single", steps=30, samples_per_prompt=32, micro_batch_samples=160, learning_rate=5e-3)
    begin = (base, 30)
    for layout in LAYOUTS:
        prepare(home / layout, layout, initial=begin, **EVERYTHING)
    for layout in ("single", "pp2"):
        prepare(home / f"killed-{layout}", layout, initial=begin, **EVERYTHING)
    preempted = prepare(home / "preempted", "single", initial=begin, **EVERYTHING)
    shutil.copy(home / "pp2" / "job.json", preempted / "other.json")
    stopped = {"steps": 2, "save_interval_steps": 1, "kl_coefficient": 0.05, "stop": {"max_mean_gap_nats": 1e-12}}
    prepare(home / "stopped", "dp2", initial=begin, **stopped)
    runs = {
        "base": 0,
        **dict.fromkeys(LAYOUTS, 0),
        "killed-single:kill=3": 128 + signal.SIGKILL,
        "killed-single": 0,
        "killed-pp2:kill=3": 128 + signal.SIGKILL,
        "killed-pp2": 0,
        "preempted:stop=1": 75,
        "preempted:job=other.json": 0,
        "stopped": 17,
    }
    codes = dict(zip(runs, drive(home / "log.txt", *(home / run for run in runs)), strict=True))
    # A last step may be over before a kill comes.
    assert all(code == runs[run] or (":kill" in run and code == 0) for run, code in codes.items()), codes
    return home


@pytest.fixture
def base(home):
    return home / "base"


def log(home):
    return (home / "log.txt").read_text()


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


def test_a_finished_stage_is_not_run_again(base, capsys):
    from training.rl.demo import reward
    from training.rl.grpo import run_stage

    before = exact(base)
    assert run_stage(base, reward) == 0
    assert "finished (result.json is there)" in capsys.readouterr().out
    assert exact(base) == before


def test_the_reference_is_where_the_stage_began(home):
    """The policy moves away from the base's weights, where it began."""
    done = rows(home / "single")
    divergences = [row["divergence_nats"] for row in done]
    assert divergences == sorted(divergences)
    assert 0 < divergences[0] < 0.01  # the second of two optimizer steps has moved a little already
    assert done[0]["rollout_rounds"] >= 1
    assert [row["lr"] for row in done] == pytest.approx([2e-3 * s for s in (2 / 3, 1, 1, 1)])


@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_every_layout_trains_the_same(home, layout):
    """The same samples (so the same rewards and lengths), and losses within what float32 leaves of a sum in another order."""
    reference, other = rows(home / "single"), rows(home / layout)
    for a, b in zip(reference, other, strict=True):
        for key in ("reward", "response_tokens", "truncated_share", "no_signal_share", "prompt_position", "stage_tokens", "lr"):
            assert a[key] == pytest.approx(b[key], abs=1e-12), key
        assert abs(a["loss"] - b["loss"]) < 1e-5
        assert abs(a["entropy_nats"] - b["entropy_nats"]) < 1e-5
        assert abs(a["grad_norm"] - b["grad_norm"]) < 1e-4
        assert b["max_gap_nats"] < 1e-5


@pytest.mark.parametrize("layout", ["single", "pp2"])
def test_kill_and_the_same_command_again(home, layout):
    ours, theirs = home / f"killed-{layout}", home / layout
    assert f"killed-{layout}: resume from step 2" in log(home)
    assert exact(ours) == exact(theirs)
    state = "sampler/step_0000004.json"
    assert (ours / state).read_text() == (theirs / state).read_text()
    found, expected = read_checkpoint(ours), read_checkpoint(theirs)
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert tensor.equal(found[key]), key


def test_sigterm_saves_and_another_layout_goes_on(home):
    assert "preempted: resume from step" in log(home)
    for a, b in zip(rows(home / "single"), rows(home / "preempted"), strict=True):
        assert a["reward"] == pytest.approx(b["reward"], abs=1e-12)
        assert abs(a["loss"] - b["loss"]) < 1e-5


def test_the_stop_rule_ends_the_stage_before_it_saves(home):
    folder = home / "stopped"
    assert "step 1: rollout and training disagree: the mean gap of their log-probabilities is" in log(home)
    (row,) = rows(folder)
    assert row["divergence_nats"] < 1e-12  # before the first update policy and reference are the same
    assert not list(folder.glob("checkpoints/iter_*"))
    assert not (folder / "result.json").exists()


def refused(folder, capsys):
    """Decided in this process, before any rank is made."""
    from training.rl.demo import reward
    from training.rl.grpo import run_stage

    assert run_stage(folder, reward) == 78
    return capsys.readouterr().err


def test_a_resume_must_not_change_what_is_learned(home, tmp_path, capsys):
    folder = tmp_path / "changed"
    shutil.copytree(home / "single", folder)
    job = Job.read(folder / "job.json")
    job.model_copy(update={"grpo": job.grpo.model_copy(update={"learning_rate": 1.0})}).write(folder / "job.json")
    assert "a resume must not change what is learned" in refused(folder, capsys)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parallel": {"context": 2, "gpus": 2}}, "parallel.context = 2: inference keeps whole sequences; 1, with more tensor parallelism"),
        ({"parallel": {"virtual_pipeline": 2}}, "parallel.virtual_pipeline = 2: inference knows no interleaved schedule; null"),
        ({"parallel": {"overlap_param_gather": True}}, "parallel.overlap_param_gather = True: rollouts would read weights"),
        ({"parallel": {"loss_chunk_tokens": 64}}, "parallel.loss_chunk_tokens = 64: the loss is computed from the logits"),
        ({"parallel": {"gpus": 3}}, "grpo.prompts_per_step = 10: 3 data-parallel ranks, which answer a share each, do not divide it; e.g. 9"),
        (
            {"parallel": {"micro_batch_samples": 7}},
            "parallel.micro_batch_samples = 7: x 1 data-parallel ranks does not divide the 80 samples of an optimizer step; e.g. 1",
        ),
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
