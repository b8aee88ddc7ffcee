"""The whole smoke curriculum through `quarry launch`, as `make run` does it, with a rank killed on the way: raw text to a tuned model that
Hugging Face loads. One run; the tests look at what it left."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from data_prep.indexed import Reader
from data_prep.manifest import MixtureManifest, mixture_path
from data_prep.verify import verify
from recipes.schema import Recipe
from tests.training import recount
from training import recorder

pytestmark = pytest.mark.multirank

QUARRY = Path(sys.executable).with_name("quarry")
VICTIM = "annealing"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("smoke")


def launch(home):
    overrides = ["curriculum=smoke", "cluster=local", f"cluster.runs_root={home / 'runs'}", f"data.root={home / 'data'}"]
    log = open(home / "launch.log", "a")  # noqa: SIM115 (the process keeps it)
    return subprocess.Popen(
        [str(QUARRY), "launch", *overrides, "--run", "smoke"],
        stdout=log,
        stderr=subprocess.STDOUT,
        cwd=home,
        env={**os.environ, recorder.VARIABLE: "1"},
    )


@pytest.fixture(scope="module")
def run(home):
    """A finished run; in the middle of VICTIM the last rank was killed with -9 and the same command given again."""
    stages = home / "runs" / "smoke" / "stages"
    first = launch(home)
    wait_for(lambda: count_lines(stages / VICTIM / "metrics.jsonl") >= 45, first, home)
    ranks = subprocess.run(["pgrep", "-f", f"training.stage .*--stage {VICTIM}"], capture_output=True, text=True, check=True)
    os.kill(int(ranks.stdout.split()[-1]), signal.SIGKILL)
    assert first.wait(timeout=120) != 0, "the chain must stop when a rank is killed"
    assert not (stages / VICTIM / "handoff.json").exists()
    assert not (stages / "long_32k").exists(), "nothing starts after a failed stage"
    assert launch(home).wait(timeout=900) == 0, (home / "launch.log").read_text()[-5000:]
    return home / "runs" / "smoke"


def wait_for(condition, process, home, seconds=600):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, (home / "launch.log").read_text()[-5000:]
        assert time.monotonic() < deadline, "too slow"
        time.sleep(0.05)


def count_lines(path):
    return len(path.read_bytes().splitlines()) if path.exists() else 0


def rows(run, stage, name="metrics.jsonl"):
    return [json.loads(line) for line in (run / "stages" / stage / name).read_text().splitlines()]


def handoff(run, stage):
    return json.loads((run / "stages" / stage / "handoff.json").read_text())


@pytest.fixture(scope="module")
def recipe(run):
    return Recipe.read(run / "recipe.json")


def test_every_stage_is_finished_and_every_step_is_there_once(run, recipe):
    for stage in recipe.stages:
        assert handoff(run, stage)["stage"] == stage
    total = 0
    for stage in (*recipe.sft, *recipe.grpo):
        steps = [m["step"] for m in rows(run, stage)]
        assert steps == list(range(1, handoff(run, stage)["step"] + 1))
    for stage, phase in recipe.phase.items():
        metrics = rows(run, stage)
        assert [m["step"] for m in metrics] == list(range(1, phase.steps + 1))
        assert metrics[0]["total_tokens"] - phase.tokens_per_step == total
        total = metrics[-1]["total_tokens"]
    assert total == recipe.total_tokens


def test_each_handoff_changes_the_layout(run, recipe):
    trained = [stage for stage in recipe.stages if recipe.stage_kind(stage) in ("phase", "sft", "grpo")]
    layouts = [json.dumps(handoff(run, stage)["layout"], sort_keys=True) for stage in trained]
    assert all(a != b for a, b in itertools.pairwise(layouts))
    worlds = {handoff(run, stage)["layout"]["gpus"] for stage in recipe.phase}
    assert worlds == {1, 2, 4}


def test_every_phase_learns_what_its_mixture_holds(run, recipe):
    """Held-out loss weighted by the phase's own mixture falls in every phase; other categories may be forgotten by design."""
    for stage, phase in recipe.phase.items():
        start, end = (row["losses"] for row in rows(run, stage, "heldout.jsonl"))
        shares = phase.mixture.shares_percent
        before, after = (sum(shares[c] / 100 * losses[c] for c in shares) for losses in (start, end))
        assert after < before, f"{stage}: {before} -> {after}"


def test_the_final_model_knows_more_code_and_math_than_after_phase_1(run):
    first, last = (handoff(run, stage)["heldout"] for stage in ("foundation", "final_annealing"))
    for category in ("code", "math"):
        assert last[category] < first[category] - 0.2, (category, first[category], last[category])


def test_the_ledger_equals_a_recount_of_the_samples_that_were_trained_on(run, recipe):
    """From what the ranks recorded of their batches, across the kill and the resume; tokens by digest from the views themselves."""
    ledger = handoff(run, "export")["ledger"]
    root = Path(recipe.data.root)
    assert ledger.keys() == {*recipe.phase, *recipe.sft, *recipe.grpo}
    for stage, phase in recipe.phase.items():
        manifest = MixtureManifest.read(mixture_path(root, stage))
        assert recount.recounted(run / "stages" / stage, manifest) == ledger[stage]
        assert sum(values["tokens"] for values in ledger[stage].values()) == phase.tokens
        recount.check_samples(run / "stages" / stage, root, manifest)
    attempts = {path.name.split("_")[1] for path in (run / "stages" / VICTIM / recorder.FOLDER).iterdir()}
    assert len(attempts) == 2, "the kill and the resume are part of what was recounted"


def test_the_data_are_as_prepared_after_all_that(recipe):
    assert verify(Path(recipe.data.root)) == []


def test_no_index_was_built_by_a_training_start(run, recipe):
    for stage in recipe.phase:
        log = (run / "stages" / stage / "log.txt").read_text()
        assert log.count("index cache: ") == log.count("verified, none built") == (2 if stage == VICTIM else 1)


def test_no_document_is_in_two_phases_before_its_source_is_used_up(run, recipe):
    root = Path(recipe.data.root)
    seen: dict[str, set[int]] = {}
    for stage in recipe.phase:
        manifest = MixtureManifest.read(mixture_path(root, stage))
        for source, view in manifest.sources.items():
            offsets = Reader(root / view.prefix).index.offsets.tolist()
            if view.epochs <= 1:
                assert len(set(offsets)) == len(offsets)
                assert not seen.setdefault(source, set()) & set(offsets)
            seen.setdefault(source, set()).update(offsets)


def test_transformers_loads_and_generates(run, recipe):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = run / "stages" / "export" / "hf"
    config = json.loads((folder / "config.json").read_text())
    assert config["max_position_embeddings"] == max(p.seq_length_tokens for p in recipe.phase.values())
    assert config["rope_theta"] == recipe.phase["final_annealing"].rope_base
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("def main(", return_tensors="pt")
    out = model.generate(**ids, max_new_tokens=8, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    assert out.shape[1] > ids["input_ids"].shape[1]
    assert all(sample["completion"] for sample in json.loads((run / "stages" / "export" / "sample.json").read_text()))


def test_hugging_face_measures_the_held_out_losses_that_were_handed_off(run, recipe):
    """The exported model in transformers, over the same sequences: evaluation, hand-off and export all agree."""
    import torch
    from transformers import AutoModelForCausalLM

    root = Path(recipe.data.root)
    model = AutoModelForCausalLM.from_pretrained(run / "stages" / "export" / "hf", dtype=torch.float32)
    length = recipe.data.heldout_seq_length_tokens
    recorded = handoff(run, "math")["heldout"]
    for category in ("code", "math", "multilingual"):
        reader = Reader(root / "heldout" / category)
        stream = np.concatenate([reader[i] for i in range(len(reader))]).astype(np.int64)
        count = min(recipe.data.heldout_batch_samples, (len(stream) - 1) // length)
        rows = torch.from_numpy(np.stack([stream[i * length : (i + 1) * length + 1] for i in range(count)]))
        with torch.no_grad():
            logits = model(rows[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
        assert abs(loss.item() - recorded[category]) < 1e-5, category


def test_the_judge_was_asked_and_says_what_it_proves(run, recipe):
    folder = Path(recipe.data.root) / "sft" / "sft" / "judged" / "judged"
    record = json.loads((folder / "record.json").read_text())
    assert record["samples"] == recipe.sft["sft"].sources["judged"].max_samples
    assert record["outcomes"]["unjudged"] == 0
    assert record["judge"]["proves"].startswith("protocol, not judgement")
    assert sum(record["judge"]["answered_as"].values()) > 0
    manifest = json.loads((Path(recipe.data.root) / "sft" / "sft" / "manifest.json").read_text())
    assert sum(file["read"] for file in manifest["sources"].get("judged", [])) == record["outcomes"]["accepted"]


def test_fine_tuning_lowers_the_loss_on_answers_that_were_held_out(run):
    before, after = (row["answers"]["questions"] for row in rows(run, "sft", "heldout.jsonl"))
    assert after < before - 1.0, (before, after)


def test_reinforcement_learning_raises_the_reward_of_the_model_that_sampled(run, recipe):
    metrics = rows(run, "math")
    first, last = (
        metrics[0]["reward"],
        sum(m["reward"] for m in metrics[-3:]) / 3,
    )  # the form of the answer is learned in a step or two
    assert last > first + 0.2, (first, last)
    assert max(m["max_gap_nats"] for m in metrics) < 1e-4
    assert all(m["failed_reward_share"] == 0 for m in metrics)


def test_the_report_and_the_status_tell_it(run):
    assert (run / "report.html").stat().st_size > 20_000
    assert "protocol, not judgement" in (run / "report.html").read_text(encoding="utf-8")
    status = subprocess.run([str(QUARRY), "status", str(run)], capture_output=True, text=True, check=True)
    assert "final_annealing" in status.stdout
    assert "math" in status.stdout


def test_the_same_command_again_trains_nothing(run, home):
    def times():
        return {path.parent.name: path.stat().st_mtime_ns for path in run.glob("stages/*/handoff.json")}

    before = times()
    assert launch(home).wait(timeout=120) == 0
    assert times() == before


def test_tensorboard_shows_the_logged_losses_of_every_phase_once(run):
    """Also of the phase in whose middle a rank was killed."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    recipe = Recipe.read(run / "recipe.json")
    for stage in (stage for stage in recipe.stages if stage in recipe.phase):
        reader = EventAccumulator(str(run / "stages" / stage / "tensorboard"), size_guidance={"scalars": 0}).Reload()
        for key in ("loss", "lr", "grad_norm", "tokens_per_second"):
            shown = [(event.step, event.value) for event in reader.Scalars(key)]
            assert shown == [(row["step"], pytest.approx(row[key], rel=1e-6)) for row in rows(run, stage)], (stage, key)
