"""Fine-tuning on real ranks: packed losses against Hugging Face's Granite, sample by sample; layouts; kill and resume; what is refused.

`warm` is trained once on one rank; every other run continues from its hand-off with other layouts.
"""

import json
import os
import re
import signal
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.sft import main as prepare_command
from data_prep.sft_manifest import PackedSequences, SampleStore, SftManifest, manifest_path
from tests.training import sft_factory
from tests.training.sft_factory import hugging_face_model, losses_alone, make_data, make_recipe
from training import cpu_backend
from training import stage as stage_command
from training.arguments import NOMINAL_LR

cpu_backend.install()

from training.scheduler import TokenScheduler  # noqa: E402
from training.sft_data import EpochDataset  # noqa: E402

pytestmark = pytest.mark.multirank

TOLERANCE_NATS = 2e-6
LAYOUTS = {
    "single": {"gpus": 1},
    "dp2": {"gpus": 2},
    "tp2_sp": {"gpus": 2, "tensor": 2, "sequence_parallel": True},
    "pp2": {"gpus": 2, "pipeline": 2},
    "cp2": {"gpus": 2, "context": 2},
}
CHATS = 100


def drive(*jobs):
    """Exit codes of the jobs, see sft_factory.drive, and everything that was printed."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "log.txt"
        sft_factory.drive(list(jobs), output)
        printed = output.read_text()
    return [int(code) for code in re.findall(r": exit code (\d+)\n", printed)], printed


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """{layout: finished run}, "base": `warm` only, "killed": killed at step 7 of `sft`, resumed, and started once more."""
    root = tmp_path_factory.mktemp("sft")
    make_data(root, CHATS)
    made = {"root": root}
    names = {"base": "single", "killed": "tp2_sp", "moments": "single", **{layout: layout for layout in LAYOUTS}}
    for name, layout in names.items():
        made[name] = root / name
        (root / name / "stages").mkdir(parents=True)
        if name != "base":
            os.symlink(root / "base" / "stages" / "warm", root / name / "stages" / "warm")
        make_recipe(root, LAYOUTS[layout], keep_moments=name == "moments").write(root / name / "recipe.json")
    killed = made["killed"]
    codes, printed = drive(
        f"{made['base']}:warm",
        f"{made['base']}:leaks",
        *(f"{made[layout]}:sft" for layout in LAYOUTS),
        f"{made['moments']}:sft",
        f"{killed}:sft:7",
        f"{killed}:sft",
        f"{killed}:sft",
    )
    assert codes == [0] * (3 + len(LAYOUTS)) + [128 + signal.SIGKILL, 0, 0], printed[-6000:]
    return made | {"printed": printed}


def rows(run, name="metrics.jsonl", stage="sft"):
    return [json.loads(line) for line in (run / "stages" / stage / name).read_text().splitlines()]


def exact(found):
    return [{k: v for k, v in row.items() if k not in ("seconds", "tokens_per_second", "time")} for row in found]


@pytest.fixture(scope="module")
def hugging_face(runs, tmp_path_factory):
    """f(stage, numbers of samples) -> (sum of the losses, number of loss tokens), each sample alone through transformers' Granite."""
    root, models = runs["root"], {}

    def load(stage):
        stage_dir = (runs["base"] if stage == "warm" else runs["single"]) / "stages" / stage
        return hugging_face_model(stage_dir, tmp_path_factory.mktemp(f"hf-{stage}") / "hf")

    store = SampleStore(SftManifest.read(manifest_path(root / "data", "sft")), root / "data")
    return lambda stage, numbers: losses_alone(models.get(stage) or models.setdefault(stage, load(stage)), store, numbers)


def heldout_numbers(root):
    manifest = SftManifest.read(manifest_path(root / "data", "sft"))
    return PackedSequences(manifest, root / "data", manifest.heldout["chat"]).samples


@pytest.mark.parametrize(("stage", "when"), [("warm", "start"), ("sft", "end")])
def test_held_out_loss_is_that_of_each_sample_alone_in_hugging_face(runs, hugging_face, stage, when):
    """Before training it is the loss of what `warm` handed off, at the end that of what is handed off."""
    total, count = hugging_face(stage, heldout_numbers(runs["root"]))
    for layout in LAYOUTS:
        (row,) = [row for row in rows(runs[layout], "heldout.jsonl") if row["when"] == when]
        assert row["answers"]["chat"] == pytest.approx(total / count, abs=1e-5), layout


def test_the_first_steps_loss_is_the_mean_over_the_loss_tokens_of_its_batch(runs, hugging_face):
    """Not a mean of means: sequences and samples have unequal numbers of loss tokens."""
    root = runs["root"]
    manifest = SftManifest.read(manifest_path(root / "data", "sft"))
    sequences = PackedSequences(manifest, root / "data", manifest.training)
    dataset = EpochDataset(sequences, seed=7, epochs=2, length=1000)
    batch = [dataset.number(index) for index in range(8)]
    per_sequence = [hugging_face("warm", sequences.numbers(number)) for number in batch]
    assert len({count for _, count in per_sequence}) > 1
    expected = sum(total for total, _ in per_sequence) / sum(count for _, count in per_sequence)
    assert abs(np.mean([total / count for total, count in per_sequence]) - expected) > 1e-4  # a wrong mean would show
    for layout in LAYOUTS:
        assert rows(runs[layout])[0]["loss"] == pytest.approx(expected, abs=1e-5), layout


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "single"])
def test_every_layout_trains_the_same(runs, layout):
    reference, other = rows(runs["single"]), rows(runs[layout])
    assert len(reference) == len(other)
    assert max(abs(a["loss"] - b["loss"]) for a, b in zip(reference, other, strict=True)) <= TOLERANCE_NATS
    assert max(abs(a["grad_norm"] / b["grad_norm"] - 1) for a, b in zip(reference, other, strict=True)) < 1e-4
    assert [a["lr"] for a in reference] == [b["lr"] for b in other]
    ours, theirs = (json.loads((runs[name] / "stages" / "sft" / "handoff.json").read_text()) for name in ("single", layout))
    assert ours["ledger"] == theirs["ledger"]


def test_it_learns_the_answers_at_the_recipes_rate(runs):
    run = runs["single"]
    before, after = (row["answers"]["chat"] for row in rows(run, "heldout.jsonl"))
    assert after < before - 0.1
    rates = [row["lr"] for row in rows(run)]
    assert rates[0] == 0
    assert max(rates) == pytest.approx(3e-3)
    assert rates[-1] < 3e-3 / len(rates) * 1.5  # one step before zero
    handoff = json.loads((run / "stages" / "sft" / "handoff.json").read_text())
    manifest = SftManifest.read(manifest_path(runs["root"] / "data", "sft"))
    drawn = handoff["ledger"]["sft"]["chat"]
    assert drawn == {"samples": 2 * manifest.training.samples, "tokens": 2 * manifest.training.tokens}
    assert handoff["heldout_answers"]["chat"] == after
    assert handoff["total_tokens"] == 0  # of pre-training, of which there was none


def test_adams_moments_come_along_only_when_asked_for(runs):
    """With zero moments the first steps are as long as Adam's can be; the moments of `warm` remember its gradients."""
    fresh, kept = rows(runs["single"]), rows(runs["moments"])
    assert fresh[0]["loss"] == kept[0]["loss"]
    assert fresh[0]["grad_norm"] == kept[0]["grad_norm"]
    assert fresh[1]["loss"] == kept[1]["loss"]  # the first rate is zero
    assert fresh[2]["loss"] != kept[2]["loss"]
    flags = {name: (runs[name] / "stages" / "sft" / "args.txt").read_text() for name in ("single", "moments", "killed")}
    assert "--finetune" in flags["single"]
    assert "--finetune" not in flags["moments"]
    assert "--finetune" not in flags["killed"]  # a resume takes the stage's own moments


@pytest.fixture(scope="module")
def leaks(runs):
    return torch.load(runs["base"] / "leaks.pt", weights_only=True)


def test_no_sample_sees_another(leaks):
    """Logits of a sample are bit for bit the same whatever the others say, and those that it has alone."""
    for number, (begin, end) in enumerate(zip(leaks["bounds"][:3], leaks["bounds"][1:4], strict=True)):
        assert torch.equal(leaks["logits"][begin:end], leaks["others"][number][begin:end])
        assert not torch.equal(leaks["logits"], leaks["others"][number])
        alone = leaks["alone"][number]
        torch.testing.assert_close(leaks["logits"][begin : begin + len(alone)], alone, rtol=0, atol=2e-6)


def test_masked_tokens_and_padding_have_no_gradient(leaks):
    reference = leaks["gradients"]
    assert all(gradient.abs().max() > 0 for gradient in reference.values())
    for name, gradient in reference.items():
        assert torch.equal(gradient, leaks["unlearned labels"][name]), name
        assert not leaks["nothing learned"][name].any(), name
        other = leaks["other padding"][name]
        if "word_embeddings" in name:  # rows of the padding itself aside: as inputs they are learned nothing through
            assert torch.equal(gradient[:256], other[:256])
        else:
            assert torch.equal(gradient, other), name


def test_kill_in_the_middle_of_an_epoch_and_the_same_command_again(runs):
    """The second command goes on from step 5, the third finds it finished; the numbers are those of the run that was not killed."""
    assert "resume (own checkpoint of step 5)" in runs["printed"]
    assert "finished (handoff.json is there)" in runs["printed"]
    assert len(rows(runs["killed"])) > 7
    assert exact(rows(runs["killed"])) == exact(rows(runs["tp2_sp"]))
    assert rows(runs["killed"], "heldout.jsonl") == rows(runs["tp2_sp"], "heldout.jsonl")


def test_without_mup_scaling_every_group_has_the_recipes_rate():
    optimizer = SimpleNamespace(param_groups=[{"max_lr": NOMINAL_LR}, {"max_lr": NOMINAL_LR / 16}])
    scheduler = TokenScheduler(optimizer, lambda tokens: 5e-6, seq_length_tokens=4, weight_decay=0.1)
    assert [group["lr"] for group in optimizer.param_groups] == [5e-6, 5e-6 / 16]
    scheduler.mup_scaling = False
    scheduler.step(0)
    assert [group["lr"] for group in optimizer.param_groups] == [5e-6, 5e-6]


@settings(deadline=None, max_examples=50)
@given(sequences=st.integers(1, 20), epochs=st.integers(1, 4), batch=st.integers(1, 7), seed=st.integers(0, 99))
def test_every_sequence_comes_once_per_epoch_and_the_rest_is_empty(sequences, epochs, batch, seed):
    steps = -(-epochs * sequences // batch)
    dataset = EpochDataset(range(sequences), seed=seed, epochs=epochs, length=steps * batch)
    numbers = [dataset.number(index) for index in range(len(dataset))]
    for epoch in range(epochs):
        assert sorted(numbers[epoch * sequences : (epoch + 1) * sequences]) == list(range(sequences))
    assert numbers[epochs * sequences :] == [None] * (steps * batch - epochs * sequences)
    # the position says all: any one asked alone is the same
    again = EpochDataset(range(sequences), seed=seed, epochs=epochs, length=steps * batch)
    assert [again.number(index) for index in reversed(range(len(again)))] == numbers[::-1]


@pytest.mark.parametrize(("changes", "message"), [
    ({"seq_length_tokens": 256}, "prepared with seq_length_tokens 128, the recipe says 256"),
    ({"too_long": "cut"}, "prepared with too_long refuse, the recipe says cut"),
    ({"sources": {"other": {"paths": ["chat.jsonl"]}}}, r"prepared with sources \['chat'\], the recipe says \['other'\]"),
    ({"parallel": {"name": "x", "gpus": 4, "context": 4}}, "multiples of 4 tokens, context parallelism of 4 cuts each into 8 pieces"),
    ({"rope_base": 9e3}, "RoPE base falls from 10000"),
    ({"peak_lr": 1e-5}, "but was trained with another recipe"),
])  # fmt: skip
def test_other_data_and_another_recipe_are_refused(runs, tmp_path, capsys, changes, message):
    (tmp_path / "stages").mkdir()
    os.symlink(runs["base"] / "stages" / "warm", tmp_path / "stages" / "warm")
    if "peak_lr" in changes:
        os.symlink(runs["single"] / "stages" / "sft", tmp_path / "stages" / "sft")
    make_recipe(runs["root"], LAYOUTS["single"], **changes).write(tmp_path / "recipe.json")
    assert stage_command.main(["--run-dir", str(tmp_path), "--stage", "sft"]) == 78
    assert re.search(message, capsys.readouterr().err)


def test_damaged_samples_are_refused_before_any_rank_starts(runs, tmp_path, capsys):
    (tmp_path / "stages").mkdir()
    os.symlink(runs["base"] / "stages" / "warm", tmp_path / "stages" / "warm")
    make_recipe(runs["root"], LAYOUTS["single"]).write(tmp_path / "recipe.json")
    path = next((runs["root"] / "data" / "sft" / "sft" / "samples").rglob("*.mask"))
    whole = path.read_bytes()
    path.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    try:
        assert stage_command.main(["--run-dir", str(tmp_path), "--stage", "sft"]) == 78
    finally:
        path.write_bytes(whole)
    assert f"{path}: SHA-256" in capsys.readouterr().err


def test_the_command_that_prepares_the_samples(runs, capsys):
    recipe = str(runs["single"] / "recipe.json")
    assert prepare_command(["--recipe", recipe, "--stage", "sft"]) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert prepare_command(["--recipe", recipe, "--stage", "unknown"]) == 78
    assert "no stage 'unknown'" in capsys.readouterr().err
