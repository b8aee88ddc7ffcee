"""What a plan learns of documents from prepared views, and why it learns nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from data_prep.files import FileRecord
from data_prep.indexed import idx_path, index_writer
from data_prep.manifest import MixtureManifest, TokenizerRecord, ViewSource, mixture_path
from data_prep.sft_manifest import Packs, SampleFile, SftManifest
from launchers import document_lengths
from launchers.document_lengths import known_lengths, phase_lengths, sft_packing
from recipes.compose import compose
from recipes.document_packing import squares_of_parts
from recipes.estimates import estimate, estimates
from recipes.flops import attention_flops_per_token_squared, matrix_flops_per_token
from recipes.memory import rank_memory
from recipes.plan import notes
from recipes.schema import Recipe
from recipes.search import search, with_stage

WEIGHTS = {"books": 0.75, "code": 0.25}
NOWHERE = FileRecord(bytes=0, sha256="0" * 64)


def write_view(root: Path, of: Recipe, stage: str, lengths: dict[str, np.ndarray], **values) -> None:
    """Indexes and manifest of a phase, as far as a plan looks at them."""
    phase, sources = of.phase[stage], {}
    for name, each in lengths.items():
        prefix = f"views/{stage}/{name}"
        (root / prefix).parent.mkdir(parents=True, exist_ok=True)
        with index_writer(idx_path(root / prefix), np.dtype(np.uint16), len(each)) as writer:
            writer.put(0, each, np.zeros(len(each)))
        tokens = int(each.sum())
        sources[name] = ViewSource(
            prefix=prefix,
            documents=len(each),
            max_token_id=9,
            dtype="uint16",
            bin=NOWHERE,
            idx=NOWHERE,
            category=name,
            share_percent=100 * WEIGHTS[name],
            weight=WEIGHTS[name],
            tokens_available=tokens,
            tokens_planned=tokens,
            epochs=1.0,
        )
    made_with = {
        "mixture": phase.mixture.model_dump(mode="json"),
        "min_document_tokens": phase.min_document_tokens,
        "require_long_in": phase.require_long_in,
    }
    tokenizer = TokenizerRecord(kind="sentencepiece", path="x", sha256="0" * 64, vocab_size=10, eod_id=1)
    numbers = {"seq_length_tokens": phase.seq_length_tokens, "samples": phase.samples, "tokens": phase.tokens}
    fixed = {"phase": stage, "seed": 1, "inputs": "0" * 64, "tokenizer": tokenizer, "sources": sources}
    MixtureManifest.make(**{**fixed, **numbers, "recipe": made_with, **values}).write(mixture_path(root, stage))


@pytest.fixture(scope="module")
def lengths() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    return {
        "books": np.maximum(1, rng.lognormal(np.log(30_000), 1.2, 3000)).astype(np.int64),
        "code": np.maximum(1, rng.lognormal(np.log(800), 1.0, 20_000)).astype(np.int64),
    }


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, lengths: dict[str, np.ndarray]) -> Recipe:
    root = tmp_path_factory.mktemp("data")
    made = compose([f"data.root={root}"])
    write_view(root, made, "long_32k", lengths)
    return made


def test_memory_is_that_of_the_padded_sample(tmp_path: Path) -> None:
    made = compose([f"data.root={tmp_path}", "phase.long_32k.parallel.context=4"])
    phase = made.phase["long_32k"]
    assert phase.parallel.context == 4
    write_view(tmp_path, made, "long_32k", {name: np.full(9000, 33) for name in WEIGHTS})
    padded, whole = (estimate(made, "long_32k", lengths=known_lengths(made, stages)) for stages in (["long_32k"], []))
    # Of 33 tokens each document becomes 40, one that a sample cuts more.
    assert 7 / 33 < padded.padding_share < 9 / 33
    length = phase.seq_length_tokens * (1 + padded.padding_share)
    planned = [
        rank_memory(
            made.model, phase.parallel, phase.precision, made.optimizer, seq_length_tokens=tokens, micro_batches=whole_batches
        )
        for tokens in (phase.seq_length_tokens, int(length) // 64 * 64, int(length) // 64 * 64 + 64)
        for whole_batches in [phase.global_batch_samples // (phase.parallel.data * phase.parallel.micro_batch_samples)]
    ]
    assert whole.memory_bytes == planned[0].total_bytes
    assert planned[1].total_bytes <= padded.memory_bytes <= planned[2].total_bytes
    assert padded.memory_bytes > whole.memory_bytes


def test_flops_are_those_of_the_documents_one_by_one(recipe: Recipe, lengths: dict[str, np.ndarray]) -> None:
    known = known_lengths(recipe, recipe.stages)
    every = {e.stage: e for e in estimates(recipe, lengths=known)}
    squares = sum(
        weight * sum(squares_of_parts(int(n), 32768) for n in lengths[name]) / lengths[name].sum()
        for name, weight in WEIGHTS.items()
    )
    found = every["long_32k"]
    assert found.attended_tokens == pytest.approx(squares, rel=1e-3)
    model = recipe.model
    assert found.flops_per_token == pytest.approx(
        matrix_flops_per_token(model) + attention_flops_per_token_squared(model) * squares, rel=1e-3
    )
    assert 0 < found.padding_share < 0.01
    whole = {e.stage: e for e in estimates(recipe)}
    assert found.hours < 0.9 * whole["long_32k"].hours
    assert every["long_128k"].hours == whole["long_128k"].hours
    assert every["long_128k"].lengths_unknown == "data not prepared"
    assert every["foundation"].attended_tokens is None
    text = " ".join(notes(recipe, list(every.values())))
    assert "counted by their own lengths; mean length around a token: long_32k " in text
    assert "documents stay apart in annealing, long_128k, long_512k, final_annealing, sft, attention is counted over" in text


def test_of_many_documents_a_part_is_read(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = phase_lengths(recipe, "long_32k")
    monkeypatch.setattr(document_lengths, "SAMPLED_DOCUMENTS", 4096)
    monkeypatch.setattr(document_lengths, "BLOCK_DOCUMENTS", 256)
    part = phase_lengths(recipe, "long_32k")
    assert (whole.counted, whole.documents, part.counted, part.documents) == (23_000, 23_000, 7096, 23_000)
    phase = recipe.phase["long_32k"]
    sizes = [each.packing(32768, phase.parallel, phase.precision).attended_tokens for each in (whole, part)]
    assert sizes[1] == pytest.approx(sizes[0], rel=0.02)
    assert len(whole.documents_per_token) < 1500


def test_a_search_counts_them_too(recipe: Recipe) -> None:
    on_few = with_stage(recipe, "long_32k", gpus=8)
    found = search(on_few, "long_32k", lengths=phase_lengths(recipe, "long_32k"))
    whole = search(on_few, "long_32k", lengths="data not prepared")
    assert found.ranked[0].speed > 1.05 * whole.ranked[0].speed
    assert (found.lengths_unknown, whole.lengths_unknown) == (None, "data not prepared")


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"seq_length_tokens": 4096}, "another seq_length_tokens"),
        ({"recipe": {}}, "another mixture"),
    ],
)
def test_data_of_another_recipe_say_nothing(
    recipe: Recipe, lengths: dict[str, np.ndarray], tmp_path: Path, values, why
) -> None:
    elsewhere = recipe.model_copy(update={"data": recipe.data.model_copy(update={"root": str(tmp_path)})})
    write_view(tmp_path, recipe, "long_32k", {"books": lengths["books"][:5]}, **values)
    assert why in phase_lengths(elsewhere, "long_32k")


def test_a_damaged_index_is_named(recipe: Recipe, lengths: dict[str, np.ndarray], tmp_path: Path) -> None:
    elsewhere = recipe.model_copy(update={"data": recipe.data.model_copy(update={"root": str(tmp_path)})})
    write_view(tmp_path, recipe, "long_32k", {"books": lengths["books"][:5]})
    idx = idx_path(tmp_path / "views" / "long_32k" / "books")
    idx.write_bytes(idx.read_bytes()[:-3])
    assert "books.idx" in phase_lengths(elsewhere, "long_32k")
    assert "truncated" in phase_lengths(elsewhere, "long_32k")


def test_fine_tuning_counts_its_packed_samples(recipe: Recipe, tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    length = recipe.sft["sft"].seq_length_tokens
    sizes = rng.integers(100, 3000, 50)
    packed = rng.permutation(50)[:40]  # the others are held out
    elsewhere = recipe.model_copy(update={"data": recipe.data.model_copy(update={"root": str(tmp_path)})})
    assert sft_packing(elsewhere, "sft") == "data not prepared"
    folder = tmp_path / "sft" / "sft"
    (folder / "packs").mkdir(parents=True)
    np.save(folder / "packs" / "training.samples.npy", packed)
    with index_writer(idx_path(folder / "00000"), np.dtype(np.uint16), 50) as writer:
        writer.put(0, sizes, np.zeros(50))
    counts = {"read": 50, "samples": 50, "tokens": int(sizes.sum()), "learned_tokens": 1, "max_token_id": 9, "refused": {}}
    file = SampleFile(input="x", input_sha256="0" * 64, prefix="sft/sft/00000", inputs="0" * 64, files={}, **counts)
    packs = Packs(
        name="training", sequences=5, samples=40, tokens=1, learned_tokens=1, utilisation_percent=1.0, cut_samples=0, files={}
    )
    tokenizer = TokenizerRecord(kind="sentencepiece", path="x", sha256="0" * 64, vocab_size=10, eod_id=1)
    values = {"multiple_tokens": 1, "too_long": "cut", "tokenizer": tokenizer, "pad_id": 0, "too_long_samples": {}}
    fixed = {
        "stage": "sft",
        "sources": {"x": [file]},
        "heldout_copies": 0,
        "training": packs,
        "heldout": {},
        "inputs": "0" * 64,
    }
    SftManifest.make(seq_length_tokens=length, **values, **fixed).write(folder / "manifest.json")
    found = sft_packing(elsewhere, "sft")
    assert found.attended_tokens == pytest.approx((sizes[packed] ** 2).sum() / (5 * length))
    known = known_lengths(elsewhere, ["sft"])
    told, untold = (estimate(elsewhere, "sft", lengths=each) for each in (known, {"sft": "data not prepared"}))
    assert told.tokens_per_second_per_gpu > 1.05 * untold.tokens_per_second_per_gpu
    assert told.flops_per_token < untold.flops_per_token
    assert (told.lengths_unknown, untold.lengths_unknown) == (None, "data not prepared")
    SftManifest.make(seq_length_tokens=64, **values, **fixed).write(folder / "manifest.json")
    assert sft_packing(elsewhere, "sft") == "data prepared with another seq_length_tokens"
