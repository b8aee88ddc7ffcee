"""The packed data set on disk: every sample exactly once, refusals counted, damage found, nothing made twice."""

import gzip
import json
import multiprocessing
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep import sft_files
from data_prep.errors import DataError
from data_prep.manifest import TokenizerRecord
from data_prep.progress import Silent
from data_prep.sft import prepare_sft
from data_prep.sft_manifest import PackedSequences, SampleStore, SftManifest, lay_out, manifest_path, packs_prefix
from data_prep.sft_render import Renderer
from data_prep.sft_samples import check
from data_prep.tokenizer import write_hf_tokenizer
from data_prep.verify import verify
from recipes.sft_options import Sft

LENGTH = 128
SFT = {
    "title": "t",
    "epochs": 2,
    "seq_length_tokens": LENGTH,
    "global_batch_sequences": 4,
    "peak_lr": 1e-3,
    "heldout_percent": 10.0,
    "heldout_max_samples": 5,
    "max_refused_percent": 30.0,
    "parallel": {"name": "single", "gpus": 1},
    "precision": {"name": "fp32", "dtype": "fp32"},
    "save_interval_steps": 10,
}


def question(number):
    return {
        "messages": [
            {"role": "user", "content": f"What is {number} plus {number * 7 % 90}?"},
            {
                "role": "assistant",
                "content": "The answer is " + " ".join(str(number + number * 7 % 90) for _ in range(number % 9 + 1)),
            },
        ],
        "id": number,
    }


BAD = [{"messages": []}, {"messages": [{"role": "user", "content": "no answer"}]}]
LONG = {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "a long answer " * 40}]}


class Said(Silent):
    """Progress that keeps its messages."""

    def __init__(self, lines):
        self.message = lines.append


def sft(root, **changes):
    values = {
        **SFT,
        "sources": {"sums": {"paths": [str(root / "raw" / "sums*")]}, "more": {"paths": [str(root / "raw" / "more.jsonl")]}},
    }
    return Sft.model_validate({**values, **changes})


@pytest.fixture(scope="module")
def home(trained, tmp_path_factory):
    """(root with raw files and the tokenizer below data/, the tokenizer's record)"""
    root = tmp_path_factory.mktemp("sft")
    (root / "raw").mkdir()
    (root / "data" / "tokenizer").mkdir(parents=True)
    (root / "data" / "tokenizer" / "tokenizer.model").write_bytes(trained.path.read_bytes())
    record = TokenizerRecord(
        kind="sentencepiece",
        path="tokenizer/tokenizer.model",
        sha256=trained.digest,
        vocab_size=trained.vocab_size,
        eod_id=trained.eod_id,
    )

    def lines(values):
        return b"".join(json.dumps(value).encode() + b"\n" for value in values)

    (root / "raw" / "sums_a.jsonl").write_bytes(lines([*map(question, range(60)), *BAD, LONG]) + b"{not json\n\n")
    (root / "raw" / "sums_b.jsonl.gz").write_bytes(gzip.compress(lines(map(question, range(60, 100)))))
    (root / "raw" / "more.jsonl").write_bytes(lines(map(question, range(90, 130))))  # some of them equal to those of sums
    return root, record


@pytest.fixture(scope="module")
def made(home):
    root, record = home
    said = []
    return prepare_sft(sft(root), "sft", root / "data", record, progress=Said(said)), said


def test_every_sample_is_in_one_place_and_what_it_says_is_what_was_rendered(home, made, trained, tmp_path):
    root, _ = home
    manifest, said = made
    store = SampleStore(manifest, root / "data")
    sets = [manifest.training, *manifest.heldout.values()]
    numbers = [
        PackedSequences(manifest, root / "data", packs, store).numbers(p).tolist()
        for packs in sets
        for p in range(packs.sequences)
    ]
    flat = sorted(number for group in numbers for number in group)
    too_long = np.flatnonzero(store.lengths > LENGTH).tolist()
    assert len(set(flat)) == len(flat)
    missing = sorted(set(range(len(store))) - {*flat, *too_long})
    assert len(missing) == manifest.heldout_copies
    assert all(store.sample(n)[0].tolist() in [store.sample(m)[0].tolist() for m in flat] for n in missing)
    assert len(store) == 60 + 1 + 40 + 40
    assert len(too_long) == 1 == manifest.too_long_samples["sums"]
    write_hf_tokenizer(trained, tmp_path / "hf")
    renderer = Renderer(tmp_path / "hf")
    order = [*range(90, 130), *range(60), None, *range(60, 100)]  # of the sources' names, then of the files'
    for number, asked in enumerate(order):
        if asked is not None:
            (expected,) = renderer.render([question(asked)])
            tokens, learned = store.sample(number)
            assert tokens.tolist() == expected.tokens.tolist()
            assert learned.tolist() == expected.learned.tolist()
    assert manifest.training.tokens == sum(
        len(store.sample(n)[0]) for group in numbers[: manifest.training.sequences] for n in group
    )
    assert manifest.training.utilisation_percent > 90
    assert any(f"{manifest.training.utilisation_percent:.2f}% used" in line for line in said)


def test_equal_samples_are_held_out_together(home, made):
    root, _ = home
    manifest, _ = made
    table = SampleStore(manifest, root / "data").table()
    held = {
        int(n)
        for packs in manifest.heldout.values()
        for p in range(packs.sequences)
        for n in PackedSequences(manifest, root / "data", packs).numbers(p)
    }
    assert held
    hashes = {int(table["hash"][n]) for n in held}
    training = PackedSequences(manifest, root / "data", manifest.training)
    trained_on = [int(n) for p in range(len(training)) for n in training.numbers(p)]
    assert not hashes & {int(table["hash"][n]) for n in trained_on}
    assert all(packs.samples <= 5 for packs in manifest.heldout.values())


def test_what_is_refused_is_counted_and_kept_with_its_line(home, made):
    root, _ = home
    manifest, said = made
    file = manifest.sources["sums"][0]
    assert file.refused == {"no messages": 1, "not JSON": 1, "nothing learned": 1}
    rows = [json.loads(line) for line in (root / "data" / f"{file.prefix}.refused.jsonl").read_text().splitlines()]
    assert [(row["line"], row["reason"]) for row in rows] == [(61, "no messages"), (62, "nothing learned"), (64, "not JSON")]
    assert file.read == 64
    assert "no messages 1" in said[1]


def test_too_many_refused_stop_it(home):
    root, record = home
    with pytest.raises(DataError, match=r"3 of 104 samples are refused .* more than max_refused_percent = 1"):
        prepare_sft(sft(root, max_refused_percent=1.0), "strict", root / "data", record)
    with pytest.raises(DataError, match="nothing matches"):
        prepare_sft(sft(root, sources={"x": {"paths": ["nowhere/*.jsonl"]}}), "none", root / "data", record)
    with pytest.raises(DataError, match="no sample is left to train on"):
        prepare_sft(sft(root, seq_length_tokens=4), "short", root / "data", record)


def test_a_long_sample_is_cut_when_asked_for(home):
    root, record = home
    manifest = prepare_sft(sft(root, too_long="cut"), "cut", root / "data", record)
    assert manifest.training.cut_samples + sum(p.cut_samples for p in manifest.heldout.values()) == 1
    store = SampleStore(manifest, root / "data")
    (long,) = np.flatnonzero(store.lengths > LENGTH)
    assert len(store.sample(int(long))[0]) == LENGTH


def test_again_makes_nothing_and_another_length_only_packs(home, made, monkeypatch):
    root, record = home
    manifest, _ = made
    monkeypatch.setattr(Renderer, "render", lambda *_: pytest.fail("rendered again"))
    said = []
    assert prepare_sft(sft(root), "sft", root / "data", record, progress=Said(said)) == manifest
    assert "nothing to do" in said[-1]
    other = prepare_sft(sft(root, pack_multiple_tokens=8), "sft", root / "data", record, progress=Said(said))
    assert other.digest != manifest.digest
    assert other.training.samples == manifest.training.samples
    assert other.training.sequences >= manifest.training.sequences
    assert prepare_sft(sft(root), "sft", root / "data", record, progress=Said(said)) == manifest  # and back, byte for byte


def test_a_killed_preparation_leaves_no_manifest_and_goes_on(home, made, monkeypatch, tmp_path):
    root, record = home
    manifest, _ = made
    rendered = []
    real = sft_files.render_file

    def killed(path, *arguments):
        if len(rendered) == 2:
            raise KeyboardInterrupt
        rendered.append(path)
        return real(path, *arguments)

    monkeypatch.setattr("data_prep.sft.render_file", killed)
    with pytest.raises(KeyboardInterrupt):
        prepare_sft(sft(root), "again", root / "data", record)
    assert not manifest_path(root / "data", "again").exists()
    monkeypatch.setattr("data_prep.sft.render_file", real)
    calls = []
    rendering = Renderer.render
    monkeypatch.setattr(Renderer, "render", lambda self, samples: calls.append(len(samples)) or rendering(self, samples))
    again = prepare_sft(sft(root), "again", root / "data", record)
    assert calls == [40]  # only the third file
    assert again.training.files == manifest.training.files


def test_worker_processes_make_the_same_and_few_samples_need_none(home, made, monkeypatch):
    root, record = home
    manifest, _ = made
    monkeypatch.setattr("data_prep.sft.BYTES_PER_WORKER", 1)
    monkeypatch.setattr("data_prep.sft._render_one", _in_a_worker)
    parallel = prepare_sft(sft(root), "parallel", root / "data", record, workers=2)
    assert parallel.training.files == manifest.training.files
    monkeypatch.undo()
    monkeypatch.setattr("data_prep.sft.ProcessPoolExecutor", lambda *_, **__: pytest.fail("a process for 10 kB"))
    assert prepare_sft(sft(root), "few", root / "data", record, workers=2).training.files == manifest.training.files


def _in_a_worker(arguments):
    from data_prep.sft import _render_one

    assert multiprocessing.parent_process() is not None
    return _render_one(arguments)


@pytest.mark.parametrize("which", [".bin", ".mask", ".table.npy", "packs"])
def test_damage_is_found(home, made, which):
    root, _ = home
    manifest, _ = made
    prefix = root / "data" / manifest.sources["more"][0].prefix
    path = (
        packs_prefix(root / "data", "sft", "train", ".samples.npy")
        if which == "packs"
        else prefix.with_name(prefix.name + which)
    )
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(DataError, match=rf"{os.path.basename(path)}: SHA-256"):
        manifest.verify(root / "data")
    path.write_bytes(whole)
    manifest.verify(root / "data")
    assert SftManifest.read(manifest_path(root / "data", "sft")) == manifest


def test_quarry_verify_reads_it_and_names_what_does_not_fit(home, made):
    root, _ = home
    manifest, _ = made
    folder = root / "data" / "sft" / "sft"
    assert verify(folder) == []
    path = packs_prefix(root / "data", "sft", "train", ".samples.npy")
    whole = path.read_bytes()
    samples = np.load(path)
    samples[0] = samples[1]
    np.save(path, samples)
    try:
        found = {finding.what: str(finding) for finding in verify(folder)}
        assert "others are in two" in found["samples in one place each"]
        assert any("SHA-256" in what for what in found)
    finally:
        path.write_bytes(whole)
    mask = root / "data" / (manifest.files[0].prefix + ".mask")
    mask.rename(mask.with_suffix(".away"))
    try:
        assert any(
            f"{mask.name}" in str(finding) and "no such file" in str(finding) for finding in verify(folder / "manifest.json")
        )
    finally:
        mask.with_suffix(".away").rename(mask)
    assert verify(folder) == []


SAMPLES = st.lists(
    st.lists(st.tuples(st.integers(5, 99), st.integers(0, 1)), min_size=1, max_size=6).map(
        lambda pairs: (np.array([t for t, _ in pairs], np.int32), np.array([m for _, m in pairs], np.uint8))
    ),
    max_size=4,
)


@settings(deadline=None, max_examples=100)
@given(samples=SAMPLES, multiple=st.sampled_from([1, 2, 4]))
def test_a_sequence_holds_its_samples_and_nothing_crosses_their_bounds(samples, multiple):
    laid = lay_out(samples, 32, multiple, pad_id=3)
    bounds = laid["bounds"].tolist()
    assert bounds[0] == 0
    assert bounds[-1] == 32
    assert all(b % multiple == 0 for b in bounds)
    for (tokens, learned), start, end in zip(samples, bounds, bounds[1:], strict=False):
        n = len(tokens)
        assert laid["tokens"][start:end].tolist() == [*tokens, *[3] * (end - start - n)]
        assert laid["position_ids"][start:end].tolist() == list(range(end - start))
        pairs = [(int(a), int(b)) for a, b in zip(laid["tokens"][start:end], laid["labels"][start:end], strict=True)]
        given = laid["loss_mask"][start:end] == 1
        assert [pair for pair, on in zip(pairs, given, strict=True) if on] == [
            (int(a), int(b)) for a, b, on in zip(tokens, tokens[1:], learned[1:], strict=False) if on
        ]
    used = bounds[len(samples)]
    assert not laid["loss_mask"][used:].any()
    with pytest.raises(DataError, match="was given samples of"):
        lay_out([(np.zeros(33, np.int32), np.zeros(33, np.uint8))], 32, 1, 0)


def test_parquet_rows_and_json_lines_are_the_same_samples(tmp_path):
    """Arrow gives every key of a struct to every row, and some files hold messages as JSON text."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    samples = [question(number) for number in range(3)]
    samples[0]["messages"][1]["tool_calls"] = [{"function": {"name": "add", "arguments": "{}"}}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    parquet.write_table(pyarrow.Table.from_pylist(samples), tmp_path / "a.parquet")
    as_text = [{"messages": json.dumps(sample["messages"]), "id": sample["id"]} for sample in samples]
    parquet.write_table(pyarrow.Table.from_pylist(as_text), tmp_path / "b.parquet")
    lines = [value for _, value in sft_files.read_records(tmp_path / "a.jsonl")]
    assert lines == samples
    checked = [str(check(sample, None)) for sample in lines]
    for name in ("a.parquet", "b.parquet"):
        rows = list(sft_files.read_records(tmp_path / name))
        assert [number for number, _ in rows] == [1, 2, 3]
        assert [str(check(sample, None)) for _, sample in rows] == checked
    (tmp_path / "broken.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-9])
    ((number, reason),) = sft_files.read_records(tmp_path / "broken.parquet")
    assert (number, reason.kind) == (1, "damaged file")
