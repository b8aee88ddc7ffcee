"""One test per rule: break a good recipe in one place, and the refusal names the key, the value and a value that would pass."""

from __future__ import annotations

import pytest

from recipes.lint import check, lint
from recipes.schema import Recipe, RecipeError
from tests.recipes.conftest import Rule

F = "phase.foundation"

# (recipe, changed values, key of the problem, part of its value, part of its rule, part of its remedy)
RULES: dict[str, Rule] = {
    "no stages": ("five_phase", {"stages": []}, "stages", "[]", "nothing to do", "stages=[foundation,capability"),
    "first stage is no phase": (
        "five_phase",
        {"stages": ["merge_32k"]},
        "stages",
        "merge_32k",
        "no model to start from",
        "a phase first",
    ),
    "export is last": (
        "five_phase",
        {"stages": ["foundation", "export", "capability"]},
        "stages",
        "[foundation, export, capability]",
        "nothing can start from the export",
        "stages=[foundation,capability,export]",
    ),
    "tokens = steps x batch x length": (
        "five_phase",
        {f"{F}.steps": 1000},
        f"{F}.tokens",
        "10000000876544",
        "1000 steps x 1024 samples x 4096 tokens = 4194304000",
        f"{F}.tokens=4194304000",
    ),
    "tokens below one step": (
        "smoke",
        {f"{F}.tokens_requested": 5},
        f"{F}.tokens",
        "5",
        "less than one step of 2048 tokens",
        "at least 2048",
    ),
    "horizon is the phase's": (
        "five_phase",
        {"phase.annealing.schedule.horizon_tokens": 10**12},
        "phase.annealing.schedule.horizon_tokens",
        "1000000000000",
        "another number of tokens than the phase's 2000003530752",
        "null or to 2000003530752",
    ),
    "positions restart only where documents stay apart": (
        "five_phase",
        {f"{F}.restart_positions": True},
        f"{F}.restart_positions",
        "True",
        "one count of positions per sample",
        f"{F}.documents_apart=true",
    ),
    "warm-up longer than the phase": (
        "smoke",
        {f"{F}.schedule.warmup_tokens": 245760},
        f"{F}.schedule.warmup_tokens",
        "245760",
        "not over when the phase is",
        "at most 24576",
    ),
    "schedule lacks a value": (
        "smoke",
        {"phase.annealing.schedule.end_lr": None},
        "phase.annealing.schedule.end_lr",
        "None",
        "exponential schedule needs it",
        "give a number",
    ),
    "schedule has a value that it does not use": (
        "smoke",
        {f"{F}.schedule.start_lr": 0.5},
        f"{F}.schedule.start_lr",
        "0.5",
        "power schedule does not use it",
        f"{F}.schedule.start_lr=null",
    ),
    "rising power law": (
        "smoke",
        {f"{F}.schedule.power_exponent": 0.51},
        f"{F}.schedule.power_exponent",
        "0.51",
        "would not fall",
        "-0.51",
    ),
    "first phase has nothing to continue": (
        "smoke",
        {f"{F}.schedule": {"kind": "constant"}},
        f"{F}.schedule.start_lr",
        "None",
        "first phase continues no other",
        f"{F}.schedule.start_lr=3e-4",
    ),
    "zero learning rate": (
        "smoke",
        {"phase.long_512k.schedule.end_lr": 0.0},
        "phase.final_annealing.schedule.start_lr",
        "None",
        "zero over the whole phase",
        "phase.final_annealing.schedule.jump='REASON'",
    ),
    "unmarked jump": (
        "granite_4_1",
        {"phase.long_32k.schedule.jump": None},
        "phase.long_32k.schedule.start_lr",
        "0.0001",
        "jumps from 0 (end of final_annealing) to 0.0001",
        "phase.long_32k.schedule.jump='REASON'",
    ),
    "unmarked jump by a warm-up": (
        "five_phase",
        {"phase.long_32k.schedule.warmup_tokens": 10**9},
        "phase.long_32k.schedule.start_lr",
        "0 at the start of the warm-up",
        "jumps from 0.0001 (end of annealing) to 0 ",
        "warmup_tokens=0",
    ),
    "unmarked jump by a changed batch": (
        "five_phase",
        {"phase.capability.global_batch_samples": 2048, "phase.capability.steps": 238419},
        "phase.capability.schedule",
        "0.00192",
        "jumps from 0.0009602",
        "keep the tokens per step",
    ),
    "RoPE base falls while the length grows": (
        "five_phase",
        {"phase.long_128k.rope_base": 5e5},
        "phase.long_128k.rope_base",
        "500000",
        "falls from 1e+06 in long_32k while the length grows",
        "phase.long_128k.rope_base=1000000 or higher",
    ),
    "RoPE base falls after long context": (
        "five_phase",
        {"phase.final_annealing.rope_base": 1e4},
        "phase.final_annealing.rope_base",
        "10000",
        "falls from 5e+07 in long_512k: positions",
        "phase.final_annealing.rope_base=50000000",
    ),
    "RoPE base is whole": (
        "smoke",
        {f"{F}.rope_base": 10000.5},
        f"{F}.rope_base",
        "10000.5",
        "whole numbers",
        f"{F}.rope_base=10000",
    ),
    "shares sum to 100": (
        "five_phase",
        {f"{F}.mixture.shares_percent.code": 21},
        f"{F}.mixture.shares_percent",
        "101 in total",
        "mixture foundation must sum to 100",
        f"{F}.mixture.shares_percent.web=58",
    ),
    "published rounding is no excuse": (
        "five_phase",
        {f"phase.annealing.mixture.shares_percent.{c}": 16.67 for c in ("web_hq", "code", "math")},
        "phase.annealing.mixture.shares_percent",
        "100.01 in total",
        "must sum to 100",
        "=16.66",
    ),
    "category without a source": (
        "five_phase",
        {"data.sources.gneissweb.category": "web2"},
        f"{F}.mixture.shares_percent.web",
        "59",
        "no source of data 'granite_4_1' has the category",
        "another category: books, code",
    ),
    "share that rounds to no sample": (
        "smoke",
        {"phase.long_512k.steps": 2, "phase.long_512k.tokens": 4096, "phase.long_512k.tokens_requested": 4096},
        "phase.long_512k.mixture.shares_percent.repositories",
        "20",
        "gets 0.8 of 4 samples",
        "at least 3 steps",
    ),
    "merge weights sum to 1": (
        "five_phase",
        {"merge.merge_32k.inputs.annealing": 0.35},
        "merge.merge_32k.inputs",
        "1.2 in total",
        "must sum to 1",
        "annealing: 0.291667, long_32k: 0.708333",
    ),
    "merge input is an earlier stage": (
        "five_phase",
        {"merge.merge_32k.inputs": {"long_128k": 0.15, "long_32k": 0.85}},
        "merge.merge_32k.inputs.long_128k",
        "0.15",
        "must be an earlier phase or merge",
        "foundation, capability, annealing, long_32k",
    ),
    "merge of one": (
        "five_phase",
        {"merge.merge_32k.inputs": {"long_32k": 1.0}},
        "merge.merge_32k.inputs",
        "1.0",
        "two inputs",
        "add one",
    ),
    "merge takes moments from the newest": (
        "five_phase",
        {"merge.merge_32k.inputs": {"long_32k": 0.85, "annealing": 0.15}},
        "merge.merge_32k.inputs",
        "[long_32k, annealing]",
        "Adam's moments",
        "long_32k last",
    ),
    "tokenizer larger than the model": (
        "smoke",
        {"data.tokenizer.vocab_size": 2049},
        "data.tokenizer.vocab_size",
        "2049",
        "more entries than model tiny has embedding rows",
        "at most 2048",
    ),
    "tokenizer to train on nobody knows how much text": (
        "five_phase",
        {"data.tokenizer.path": None},
        "data.tokenizer.train_max_bytes",
        "None",
        "without a path a tokenizer is trained",
        "set data.tokenizer.path",
    ),
    "builtin source without a builder": (
        "smoke",
        {"data.sources.math_worked.builder": None},
        "data.sources.math_worked.builder",
        "None",
        "kind builtin needs it",
        "e.g.",
    ),
    "file source without paths": (
        "five_phase",
        {"data.sources.books.paths": []},
        "data.sources.books.paths",
        "[]",
        "kind files needs it",
        "e.g. [",
    ),
}


@pytest.mark.parametrize("name", RULES)
def test_rule(name: str, refused) -> None:
    refused(RULES[name])


def test_check_reports_all_problems_and_passes_a_good_recipe(five_phase: Recipe, changed) -> None:
    check(five_phase)
    bad = changed(five_phase, **{f"{F}.steps": 3, "merge.merge_32k.inputs.annealing": 0.5, "data.tokenizer.vocab_size": 100353})
    with pytest.raises(RecipeError, match="recipe 'five_phase' is refused, 3 problems:") as caught:
        check(bad)
    assert len(str(caught.value).splitlines()) == 4


def test_only_what_stages_names_is_looked_at(smoke: Recipe, changed) -> None:
    broken = {"phase.long_512k.steps": 1, "merge.merge_512k.inputs.long_512k": 0.5}
    assert lint(changed(smoke, **broken)) != []
    assert lint(changed(smoke, stages=["foundation", "capability", "export"], **broken)) == []


def test_what_is_no_rule(smoke: Recipe, changed) -> None:
    assert lint(changed(smoke, **{"model.head_dim": 64})) == []  # hidden_size need not be heads x head_dim
    assert lint(changed(smoke, **{"phase.long_32k.parallel.gpus": 4})) == []  # data parallelism takes the rest
    assert (
        lint(changed(smoke, **{"phase.long_512k.rope_base": 40e3, "phase.final_annealing.rope_base": 40e3})) == []
    )  # equal, not falling


def test_an_older_fault_of_a_schedule_is_reported_once(smoke: Recipe, changed) -> None:
    keys = [p.key for p in lint(changed(smoke, **{"phase.annealing.schedule.end_lr": None}))]
    assert keys == ["phase.annealing.schedule.end_lr"]
