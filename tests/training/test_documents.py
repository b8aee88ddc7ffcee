"""Documents that stay apart: what a sample says of them, how they are packed, and that no layout and no neighbour changes a document's loss.

The references are independent: the views' tokens by data_prep's own reader, Hugging Face's Granite on each document alone.
"""

import itertools
import json
import re
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.index_caches import RECORD_NAME, IndexCache, cache_path
from data_prep.indexed import Reader, Writer
from data_prep.manifest import MixtureManifest, mixture_path
from tests.model.conftest import FAMILIES, make_hf_model
from tests.training.recount import check_samples, recounted
from training import cpu_backend

cpu_backend.install()

from megatron.core.packed_seq_params import PackedSeqParams  # noqa: E402

from model import convert  # noqa: E402
from recipes.document_packing import DocumentLengths, grain_tokens, multiple_tokens  # noqa: E402
from recipes.job_options import Parallel, Precision  # noqa: E402
from tests.model.test_attention import attention  # noqa: E402
from training import blend, documents  # noqa: E402

pytestmark = pytest.mark.multirank

TOLERANCE = 2e-6
LENGTHS = (11, 1, 30, 7, 47)  # of the worker's sample


@pytest.fixture(scope="module")
def worked(tmp_path_factory):
    """The folder in which documents_worker has done everything; it holds a Hugging Face model `hf`."""
    folder = tmp_path_factory.mktemp("documents")
    torch.manual_seed(0)
    make_hf_model(folder / "hf", FAMILIES["3b"], layers=2)
    convert.import_hf(folder / "hf", folder / "imported")
    command = [sys.executable, "-W", "ignore", "-m", "tests.training.documents_worker", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-5000:]
    codes = [int(code) for code in re.findall(r": exit code (\d+)\n", done.stdout)]
    # three layouts of the numbers; single, tp2_cp2, killed, the same again, pp2_cp2
    assert codes == [0, 0, 0, 0, 0, 137, 0, 0], (codes, done.stderr[-5000:])
    return folder


def numbers(worked, ranks):
    return torch.load(worked / f"numbers.{ranks}.pt", weights_only=True)


@pytest.mark.parametrize("ranks", [2, 4])
def test_context_parallelism_changes_neither_losses_nor_gradients(worked, ranks):
    one, other = numbers(worked, 1), numbers(worked, ranks)
    assert one["losses"].shape == (sum(LENGTHS) - 1,)
    assert (one["losses"] - other["losses"]).abs().max() <= TOLERANCE
    assert one["gradients"].keys() == other["gradients"].keys()
    assert max(gradient.abs().max() for gradient in one["gradients"].values()) > 0.1
    for name, gradient in one["gradients"].items():
        assert (gradient - other["gradients"][name]).abs().max() <= TOLERANCE, name


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_document_does_not_feel_its_neighbours(worked, ranks):
    found = numbers(worked, ranks)
    own = found["losses"][12:42]
    assert own[:-1].min() > 0
    assert torch.equal(found["other neighbours"], own)
    assert (found["moved"] - own).abs().max() <= 1e-6


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_positions_that_count_on_give_the_same(worked, ranks):
    """RoPE depends on distances alone."""
    found = numbers(worked, ranks)
    assert (found["counted on"] - found["losses"]).abs().max() <= TOLERANCE
    if ranks == 1:
        assert not torch.equal(found["counted on"], found["losses"])  # the option does something


def test_losses_are_hugging_faces_for_each_document_alone(worked):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(worked / "hf", dtype=torch.float32).eval()
    losses = numbers(worked, 1)["losses"]
    start = 0
    for i, length in enumerate(LENGTHS):
        ids = torch.from_numpy(np.random.default_rng([1, i]).integers(0, 256, length))
        with torch.no_grad():
            logits = model(ids[None]).logits[0, :-1]
        nats = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")
        torch.testing.assert_close(losses[start : start + length - 1], nats, rtol=0, atol=1e-5)
        if i < len(LENGTHS) - 1:
            assert losses[start + length - 1] == 0  # nobody is asked for another document's first token
        start += length


def metrics(worked, run):
    lines = (worked / "runs" / run / "stages" / "second" / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in ("seconds", "tokens_per_second", "time")} for line in lines]


@pytest.mark.parametrize("layout", ["tp2_cp2", "pp2_cp2"])
def test_a_phase_trains_the_same_in_every_layout(worked, layout):
    """The second layout resumes what one rank has begun, as each may."""
    for ours, theirs in zip(metrics(worked, layout), metrics(worked, "single"), strict=True):
        assert abs(ours["loss"] - theirs["loss"]) <= TOLERANCE
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], abs=TOLERANCE)


def test_kill_and_resume_is_not_stopping_bit_for_bit(worked):
    assert metrics(worked, "killed") == metrics(worked, "tp2_cp2")
    ours, theirs = (
        (worked / "runs" / run / "stages" / "second" / "heldout.jsonl").read_text() for run in ("killed", "tp2_cp2")
    )
    assert ours == theirs


@pytest.mark.parametrize("run", ["single", "tp2_cp2", "killed", "pp2_cp2"])
def test_the_ledger_is_what_was_consumed(worked, run):
    manifest = MixtureManifest.read(mixture_path(worked / "data", "second"))
    stage_dir = worked / "runs" / run / "stages" / "second"
    ledger = json.loads((stage_dir / "handoff.json").read_text())["ledger"]["second"]
    assert ledger == recounted(stage_dir, manifest)
    check_samples(stage_dir, worked / "data", manifest)


def test_samples_know_their_documents(worked):
    """Against the views' own documents: tokens as without the option, no loss where a label is another document's first token."""
    data = worked / "data"
    manifest = MixtureManifest.read(mixture_path(data, "second"))
    cache = cache_path(data, manifest)
    plain, apart = (blend.blended(manifest, data, cache, build=False, documents_apart=on) for on in (False, True))
    record = IndexCache.read(cache / RECORD_NAME)
    length, seen = manifest.seq_length_tokens, 0
    for (name, files), without, member in zip(record.sources.items(), blend.members(plain), blend.members(apart), strict=True):
        reader = Reader(data / manifest.sources[name].prefix)
        lengths = [len(reader[i]) for i in np.load(cache / files.document_index, allow_pickle=False)]
        begins = set(np.cumsum([0, *lengths]).tolist())
        for index, sample in enumerate(np.load(cache / files.shuffle_index, allow_pickle=False).tolist()):
            found, stock = member[index], without[index]
            assert torch.equal(found["tokens"], stock["tokens"])
            assert torch.equal(found["labels"], stock["labels"])
            first = sample * length
            positions = found[documents.POSITIONS_KEY].tolist()
            assert [first + i for i, place in enumerate(positions) if place == 0] == sorted(
                {first} | begins & set(range(first, first + length))
            )
            assert all(b in (0, a + 1) for a, b in itertools.pairwise(positions))
            assert [i for i, kept in enumerate(found["loss_mask"].tolist()) if not kept] == [
                i for i in range(length) if first + i + 1 in begins
            ]
            seen += first + length in begins
    assert seen, "no sample ends with a document: the label of its last token was not tried"


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=8), min_size=1, max_size=3),
    context=st.sampled_from([1, 2, 4]),
    grains=st.integers(1, 4),
)
def test_packing_keeps_every_token_and_its_document(rows, context, grains):
    size = max(sum(row) for row in rows) + 2
    multiple = multiple_tokens(context)
    parts = [[*row, size - sum(row)] for row in rows]
    made = [documents.positions_and_loss_mask(np.array(row)) for row in parts]
    text = torch.arange(1, len(rows) * size + 1).view(len(rows), size)
    sample = {
        "tokens": text[:, :-1],
        "labels": text[:, 1:],
        "loss_mask": torch.from_numpy(np.stack([mask for _, mask in made])),
        documents.POSITIONS_KEY: torch.from_numpy(np.stack([positions for positions, _ in made])),
    }
    packed, bounds = documents.pack(sample, multiple, grains * multiple)
    cuts = bounds.tolist()
    total = cuts[-1]
    assert total % (grains * multiple) == 0
    assert all(value.shape == (1, total) for value in packed.values())
    assert all((end - start) % multiple == 0 for start, end in itertools.pairwise(cuts))
    expected = []
    for row, tokens in zip(parts, sample["tokens"], strict=True):
        kept = [n for n in row if n]
        kept[-1] -= 1  # the last label
        expected += [piece.tolist() for piece in tokens.split([n for n in kept if n])]
    found = [packed["tokens"][0, start:end] for start, end in itertools.pairwise(cuts)]
    assert [piece[piece > 0].tolist() for piece in found][: len(expected)] == expected
    assert len(found) - len(expected) in (0, 1)
    assert [len(piece) for piece in found[: len(expected)]] == [-(-len(e) // multiple) * multiple for e in expected]
    learned = packed["loss_mask"][0] == 1
    assert torch.equal(packed["tokens"][0, learned] + 1, packed["labels"][0, learned])
    # one token of every document has no loss, but for those that go on in the next sample
    assert int(learned.sum()) == sum(int(mask.sum()) for _, mask in made)
    places = [i for start, end in itertools.pairwise(cuts) for i in range(end - start)]
    assert packed["position_ids"][0].tolist() == places


@pytest.mark.parametrize(
    ("mean", "length", "context", "samples"), [(300, 4096, 1, 2), (700, 8192, 4, 1), (20, 2048, 8, 1), (30_000, 16384, 8, 2)]
)
def test_the_plan_counts_what_packing_makes(mean, length, context, samples):
    """recipes/document_packing.py against packed samples of random documents: what attention spans, and the padding."""
    rng = np.random.default_rng(mean)
    made = np.maximum(1, rng.lognormal(np.log(mean), 1.0, 400 * length // mean + 40)).astype(np.int64)
    values, counts = np.unique(made, return_counts=True)
    per_token = tuple((float(n), count / made.sum()) for n, count in zip(values, counts, strict=True))
    layout = Parallel(name="x", gpus=8, tensor=2, sequence_parallel=True, context=context, micro_batch_samples=samples)
    precision = Precision(name="bf16", dtype="bf16")
    planned = DocumentLengths(per_token, len(made), len(made)).packing(length, layout, precision)
    starts = np.concatenate([[0], np.cumsum(made)])
    places = np.arange(starts[-1], dtype=np.int64) - np.repeat(starts[:-1], made)
    rows = len(places) // (samples * length)
    squares = tokens = computed = 0
    grain = grain_tokens(length, context=context, sequence_parallel=2, fp8=None)
    for row in places[: rows * samples * length].reshape(rows, samples, length):
        positions = row.copy()
        for sample in positions:  # a part that goes on from the sample before counts from 0 again
            first = np.flatnonzero(sample == 0)
            sample[: first[0] if len(first) else length] -= sample[0]
        each = {key: torch.zeros(samples, length) for key in ("tokens", "labels", "loss_mask")}
        each[documents.POSITIONS_KEY] = torch.from_numpy(positions.astype(np.int32))
        _, bounds = documents.pack(each, multiple_tokens(context), grain)
        cut = np.diff(np.flatnonzero(positions.reshape(-1) == 0), append=samples * length)
        squares, tokens, computed = squares + int((cut**2).sum()), tokens + samples * length, computed + int(bounds[-1])
    assert rows > 50
    assert planned.attended_tokens == pytest.approx(squares / tokens, rel=0.02)
    assert planned.padding_share == pytest.approx(computed / tokens - 1, rel=0.05, abs=3e-4)
    assert (planned.padding_share == 0) == (context == 1)


def test_lengths_fit_layout_and_precision():
    def grain(**changes):
        values = {"context_parallel_size": 1, "tensor_model_parallel_size": 1, "sequence_parallel": False, "fp8": None}
        values |= {"fp8_recipe": "tensorwise", "seq_length": 524288}
        return documents.grain_tokens(type("Args", (), values | changes))

    assert grain() == 1
    assert grain(tensor_model_parallel_size=4, sequence_parallel=True) == 4
    assert grain(context_parallel_size=32, tensor_model_parallel_size=4, sequence_parallel=True, fp8="hybrid") == 2048
    assert grain(context_parallel_size=32, tensor_model_parallel_size=4, sequence_parallel=True) == 512
    assert grain(context_parallel_size=2, seq_length=64) == 4
    assert grain(context_parallel_size=2, seq_length=64, fp8="e4m3", fp8_recipe="mxfp8") == 64


def test_a_sample_of_512k_takes_little_memory(worked, tmp_path, monkeypatch):
    """Everything that a sample and its packed sequence need, in proportion to its tokens; a mask of 512K x 512K would be 256 GiB."""
    length, count = 524288, 7
    lengths = [70000, 300000, 1, 154286, 200000, 0, 400000][:count]
    data = tmp_path / "data"
    data.mkdir()
    rng = np.random.default_rng(5)
    with Writer(data / "long", 256) as writer:
        for n in lengths:
            writer.add(rng.integers(0, 256, n).astype(np.uint16))
    small = MixtureManifest.read(mixture_path(worked / "data", "second"))
    source = next(iter(small.sources.values())).model_copy(update={"prefix": "long", "weight": 1.0})
    manifest = small.model_copy(update={"seq_length_tokens": length, "samples": 2, "sources": {"long": source}})
    (tmp_path / "cache").mkdir()
    dataset = blend.blended(manifest, data, tmp_path / "cache", build=True, documents_apart=True)
    assert dataset is not None
    before = peak_resident_bytes()
    tracemalloc.start()
    sample = {key: value[None] for key, value in dataset[0].items()}
    packed, bounds = documents.pack(sample, 64, 2048)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    grown = peak_resident_bytes() - before
    print(f"numpy {peak / length:.1f}, resident {grown / length:.1f} bytes per token")
    assert packed["tokens"].numel() == int(bounds[-1]) >= length
    assert peak < 64 * length  # bytes per token: numpy's part
    assert grown < 160 * length  # numpy's and torch's, from the file to the packed sequence


def test_attention_under_context_parallelism_makes_no_mask_of_the_whole(monkeypatch):
    """No tensor is larger than 256 rows of it.

    A rank's two pieces of one document of 16K tokens on 4 ranks, forward and backward. The whole would take 32 MiB as bool and 128 MiB as
    SDPA wants it, scores of all tokens 1 GiB.
    """
    import model.attention as module
    from tests.model.test_chunked_loss import Largest

    tokens, ranks = 16384, 4
    query = torch.randn(tokens // ranks, 1, 8, requires_grad=True)
    key, value = (torch.randn(tokens // ranks, 1, 8, requires_grad=True) for _ in range(2))
    bounds = torch.tensor([0, tokens], dtype=torch.int32)
    packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds)
    monkeypatch.setattr(module, "get_pg_size", lambda group: ranks)
    monkeypatch.setattr(module, "get_pg_rank", lambda group: 1)

    class Gathered:
        @staticmethod
        def apply(shard, places, group):
            return shard.repeat(ranks, *[1] * (shard.dim() - 1))

    monkeypatch.setattr(module, "_GatherPacked", Gathered)
    core = attention()
    with Largest() as seen:
        core(query, key, value, None, packed_seq_params=packed).sum().backward()
    assert tokens <= seen.elements <= 256 * tokens


def test_blocks_of_queries_are_the_whole(monkeypatch):
    import model.attention as module

    query, key, value = (torch.randn(n, 2, heads, 8, requires_grad=True) for n, heads in ((50, 4), (70, 2), (70, 2)))

    def outcome():
        out = module.causal_attention(query, key, value, 0.5)
        return out, *torch.autograd.grad(out.square().sum(), (query, key, value))

    whole = outcome()
    monkeypatch.setattr(module, "BLOCK_QUERIES", 16)
    monkeypatch.setattr(module, "KEPT_MASK_BYTES", 0)
    for blocks, expected in zip(outcome(), whole, strict=True):
        torch.testing.assert_close(blocks, expected, rtol=1e-5, atol=1e-5)


def peak_resident_bytes():
    """The most memory that this process has held since the last call, which begins anew from what it holds now."""
    status = Path("/proc/self/status").read_text()
    peak = int(re.search(r"VmHWM:\s+(\d+) kB", status)[1])
    Path("/proc/self/clear_refs").write_text("5")
    return peak * 1024
