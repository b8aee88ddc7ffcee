"""Held-out loss of a finished checkpoint: Megatron and transformers agree, and both with a sum done by hand."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from data_prep.errors import DataError
from data_prep.indexed import Reader
from data_prep.manifest import HeldoutManifest, heldout_path
from tests.training.evaluation.conftest import HELDOUT_TOKENS, World
from training.evaluation import heldout, scoring, source
from training.evaluation.errors import EvaluationError

SAMPLES = 3


@pytest.fixture(scope="module")
def found(world: World, tmp_path_factory: pytest.TempPathFactory) -> source.Source:
    return source.find(world.megatron, tmp_path_factory.mktemp("out"))


def test_megatron_and_transformers_have_the_same_loss(world: World, found: source.Source) -> None:
    root, manifest = heldout.manifest_for(found, world.data)
    megatron = heldout.from_megatron(found, root, SAMPLES, "cpu", "float32")
    network = scoring.load(found.hf, "cpu", "float32")
    told: list[int] = []
    ours = heldout.from_transformers(network, root, manifest, SAMPLES, told.append)
    check = heldout.compare(megatron, ours, "float32")
    assert check["agrees"]
    assert check["difference_nats"] < 1e-4
    assert sum(told) == 2 * SAMPLES * HELDOUT_TOKENS
    # By hand, token by token, from the documents laid end to end.
    stream = np.concatenate([Reader(root / "heldout" / "web")[d] for d in range(9)])[: SAMPLES * HELDOUT_TOKENS + 1]
    losses = []
    for n in range(SAMPLES):
        row = torch.tensor(stream[n * HELDOUT_TOKENS : (n + 1) * HELDOUT_TOKENS + 1].astype(np.int64))
        with torch.no_grad():
            logprobs = network(row[None, :-1]).logits[0].double().log_softmax(-1)
        losses += [-logprobs[i, row[i + 1]].item() for i in range(HELDOUT_TOKENS)]
    assert ours["web"] == pytest.approx(np.mean(losses), abs=1e-5)


def test_a_difference_is_seen(world: World) -> None:
    assert not heldout.compare({"a": 1.0, "b": 2.0}, {"a": 1.0, "b": 2.0002}, "float32")["agrees"]
    assert heldout.compare({"a": 1.0}, {"a": 1.01}, "bfloat16")["agrees"]
    assert not heldout.compare({"a": 1.0}, {"a": float("nan")}, "float32")["agrees"]
    with pytest.raises(ValueError, match="categories differ"):
        heldout.compare({"a": 1.0}, {"b": 1.0}, "float32")


def test_batches_do_not_change_the_loss(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = HeldoutManifest.read(heldout_path(world.data))
    network = scoring.load(world.hf, "cpu", "float32")
    whole = heldout.from_transformers(network, world.data, manifest, SAMPLES)
    monkeypatch.setattr(heldout, "MAX_LOGITS", 1)
    assert heldout.from_transformers(network, world.data, manifest, SAMPLES) == pytest.approx(whole, abs=1e-6)


def test_data_of_another_model_is_refused(world: World, found: source.Source, tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="--heldout-data"):
        heldout.manifest_for(found, None)
    with pytest.raises(DataError):
        heldout.manifest_for(found, tmp_path)
    with pytest.raises(DataError, match="name the data root that belongs to the model"):
        heldout.manifest_for(dataclasses.replace(found, tokenizer_sha256="0" * 64), world.data)
    with pytest.raises(DataError, match="the vocabulary of .* has 100 entries"):
        heldout.manifest_for(dataclasses.replace(found, config={"vocab_size": 100}), world.data)
    with pytest.raises(DataError, match="less than one sequence"):
        heldout.sequences(world.data / "heldout" / "web", 1, 10**6)
    with pytest.raises(EvaluationError, match="no Megatron checkpoint"):
        heldout.from_megatron(dataclasses.replace(found, checkpoint=None), world.data, 1, "cpu", "float32")


def test_what_megatron_says_is_passed_on(world: World, found: source.Source, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heldout.sys, "executable", "/bin/false")
    with pytest.raises(EvaluationError, match="Megatron could not measure .*iter_0000000"):
        heldout.from_megatron(found, world.data, 1, "cpu", "float32")


def test_the_cached_scores_are_those_of_whole_sequences(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    network = scoring.load(world.hf, "cpu", "float32")
    rng = np.random.default_rng(0)
    prompt, candidates = rng.integers(1, 300, 70), rng.integers(1, 300, (4, 3))
    monkeypatch.setattr(scoring, "PREFILL_TOKENS", 16)
    sums, greedy = scoring.score(network, prompt, candidates)
    ids = torch.from_numpy(prompt)[None]
    with torch.no_grad():
        for candidate, total in zip(candidates, sums, strict=True):
            whole = torch.cat([ids, torch.from_numpy(candidate)[None]], dim=1)
            logprobs = network(whole, use_cache=False).logits[0].double().log_softmax(-1)
            assert total == pytest.approx(sum(logprobs[69 + i, candidate[i]].item() for i in range(3)), abs=1e-4)
        for token in greedy:
            assert network(ids, use_cache=False).logits[0, -1].argmax().item() == token
            ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
