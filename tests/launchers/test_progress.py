"""Speed, utilisation and time left, as `quarry status` and the report show them."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from launchers import cli
from launchers.document_lengths import known_lengths
from launchers.journal import Journal
from launchers.processes import started_at
from launchers.progress import RunProgress
from launchers.runs import RunFolder
from launchers.view import plain_line
from recipes.estimates import estimates
from tests.launchers.posttrain_run import make_run
from tests.launchers.test_document_lengths import write_view


@pytest.fixture
def run(harness: Any) -> RunFolder:
    """Three steps of stage `a`, of 32 tokens and half a second each."""
    harness.run_dir.mkdir(parents=True)
    harness.recipe.write(harness.run_dir / "recipe.json")
    run = RunFolder(harness.run_dir)
    run.stage("a").mkdir(parents=True)
    rows = [{"step": i, "stage_tokens": 32 * i, "loss": 3.0, "tokens_per_second": 64.0, "seconds": 0.5} for i in (1, 2, 3)]
    (run.stage("a") / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run


def on_gpus(run: RunFolder) -> RunProgress:
    """The run as if its phases were on H100s: `a` on 4, `b` on 8 at four times the length."""
    recipe = RunProgress(run).recipe
    phases = {}
    for stage, gpus, factor in (("a", 4, 1), ("b", 8, 4)):
        phase = recipe.phase[stage]
        parallel = phase.parallel.model_copy(update={"gpus": gpus})
        longer = {"seq_length_tokens": factor * phase.seq_length_tokens, "tokens": factor * phase.tokens}
        phases[stage] = phase.model_copy(update={"parallel": parallel, **longer})
    cluster = recipe.cluster.model_copy(update={"gpu": "h100"})
    return RunProgress(run, recipe.model_copy(update={"phase": {**recipe.phase, **phases}, "cluster": cluster}))


def test_on_cpu_there_is_a_rate_per_rank_and_no_utilisation(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    stage = RunProgress(run).refresh()[0]
    assert stage.tokens_per_second_per_gpu == pytest.approx(64.0 / stage.gpus)
    assert stage.model_flops_utilisation is None
    assert cli.main(["status", str(run.path)]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"tokens/s +per rank +MFU +time +left", printed)
    assert re.search(r"^a .* 64 +\d+ +- ", printed, re.MULTILINE)
    assert cli.main(["report", str(run.path)]) == 0
    page = run.report.read_text()
    assert "tokens/s/rank" in page
    assert "MFU" in page


def test_utilisation_and_time_left_on_gpus_are_the_plans_flops(run: RunFolder) -> None:
    progress = on_gpus(run)
    a, b, *_ = progress.refresh()
    assert a.tokens_per_second_per_gpu == pytest.approx(64.0 / 4)
    # By hand: 6 FLOPs per token and weight that is multiplied, 12 per layer, position and channel of attention, of which causality halves.
    model, length = progress.recipe.model, progress.recipe.phase["a"].seq_length_tokens
    heads, groups = model.num_attention_heads * model.head_dim, model.num_query_groups * model.head_dim
    layer = 2 * model.hidden_size * (heads + groups) + 3 * model.hidden_size * model.ffn_hidden_size
    weights = model.num_layers * layer + model.vocab_size * model.hidden_size

    def flops(positions: int) -> float:
        return 6 * weights + 12 * model.num_layers * heads * positions / 2

    assert a.model_flops_utilisation == pytest.approx(16.0 * flops(length) / 989e12)
    # The waiting phase at the same utilisation: twice the GPUs, more FLOPs a token.
    rate = 64.0 * 2 * flops(length) / flops(4 * length)
    assert b.eta_seconds == pytest.approx(progress.recipe.phase["b"].tokens / rate, abs=0.01)
    assert progress.eta_seconds == pytest.approx(sum(s.eta_seconds or 0.0 for s in progress.stages))


def test_utilisation_counts_documents_that_stay_apart_by_their_own_lengths(run: RunFolder, tmp_path: Path) -> None:
    recipe = on_gpus(run).recipe
    apart = recipe.phase["a"].model_copy(update={"documents_apart": True})
    data = recipe.data.model_copy(update={"root": str(tmp_path / "data")})
    progress = RunProgress(run, recipe.model_copy(update={"phase": {**recipe.phase, "a": apart}, "data": data}))
    unknown, waiting, *_ = progress.refresh()
    assert unknown.model_flops_utilisation is None  # lengths are not known: no number that is too high
    # What is left is estimated as for whole samples.
    assert waiting.eta_seconds == on_gpus(run).refresh()[1].eta_seconds
    rng = np.random.default_rng(0)
    write_view(tmp_path / "data", progress.recipe, "a", {name: rng.integers(1, 40, 500) for name in ("books", "code")})
    found = progress.refresh()[0]
    (planned,) = [e for e in estimates(progress.recipe, lengths=known_lengths(progress.recipe, ["a"])) if e.stage == "a"]
    assert planned.attended_tokens is not None
    assert planned.attended_tokens < apart.seq_length_tokens
    assert found.model_flops_utilisation == pytest.approx(16.0 * planned.flops_per_token / 989e12)


def test_fine_tuning_and_reinforcement_learning(harness: Any, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(harness)
    journal = Journal(run.journal)
    journal.append("intent", stage="rl", attempt=1)
    journal.append(
        "started", stage="rl", attempt=1, pid=os.getpid(), process_started=started_at(os.getpid()), host=os.uname().nodename
    )
    progress = RunProgress(run)
    _, sft, rl, again, export = progress.refresh()
    assert (sft.state, sft.step, sft.steps, sft.loss) == ("finished", 5, 5, 2.25)
    assert sft.answers == ({"chat": 5.25}, {"chat": 1.75})
    assert (rl.step, rl.steps, rl.reward, rl.training_seconds) == (4, 8, 0.4, 8.0)
    assert rl.eta_seconds == pytest.approx(4 * 2.0)
    # Twice the samples a step, of the same length.
    assert again.eta_seconds == pytest.approx(4 * 2.0 * 2 + (export.eta_seconds or 0))
    assert progress.eta_seconds == pytest.approx(sum(s.eta_seconds or 0.0 for s in progress.stages))
    assert progress.not_estimated == []
    assert cli.main(["status", str(run.path)]) == 0
    printed = capsys.readouterr().out
    assert "reward 0.400" in printed
    assert "2.2500" in printed
    assert plain_line(rl).startswith("[rl] step 4/8  reward 0.400  ")


def test_what_nothing_tells_the_time_of_is_not_estimated(harness: Any, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(harness, steps=0)
    (run.stage("sft") / "handoff.json").unlink()
    (run.stage("sft") / "metrics.jsonl").unlink()
    progress = RunProgress(run)
    _, sft, rl, *_ = progress.refresh()
    assert rl.eta_seconds is None
    # At the speed of the phase: 5 steps of 2 sequences of 16 places, 64 a second, behind what a stage costs beside its steps.
    assert sft.eta_seconds == pytest.approx(160 / 64.0 + 10.0 - 2.0)
    assert progress.not_estimated == ["rl", "rl_again"]
    cli.main(["status", str(run.path)])
    assert "left without rl, rl_again (not known yet)" in capsys.readouterr().out
