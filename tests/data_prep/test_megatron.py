"""Against Megatron itself: the same bytes as its builder, and its blend over our views is served without a second epoch."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.indexed import Reader, Writer, optimal_dtype
from data_prep.manifest import MixtureManifest, mixture_path
from data_prep.plan import SURPLUS, samples_asked
from training import cpu_backend

cpu_backend.install()  # before Megatron is imported: test files share a process

import megatron.core.datasets.indexed_dataset as megatron  # noqa: E402
import torch  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@settings(deadline=None, max_examples=60)
@given(
    documents=st.lists(st.lists(st.integers(0, 999), min_size=1, max_size=30), max_size=30),
    vocab=st.sampled_from([1000, 65_499, 65_500, 100_352]),
)
def test_the_same_bytes_as_megatrons_builder(tmp_path_factory, documents, vocab):
    folder = tmp_path_factory.mktemp("bytes")
    with Writer(folder / "ours", vocab) as writer:
        for tokens in documents:
            writer.add(np.array(tokens))
    dtype = megatron.DType.optimal_dtype(vocab)
    assert np.dtype(dtype) == optimal_dtype(vocab)
    builder = megatron.IndexedDatasetBuilder(str(folder / "theirs.bin"), dtype=dtype)
    for tokens in documents:
        builder.add_document(torch.tensor(tokens), [len(tokens)])
    builder.finalize(str(folder / "theirs.idx"))
    for suffix in (".bin", ".idx"):
        assert (folder / f"ours{suffix}").read_bytes() == (folder / f"theirs{suffix}").read_bytes()


def test_megatron_reads_a_view(prepared):
    root = prepared / "data"
    for source in MixtureManifest.read(mixture_path(root, "first")).sources.values():
        ours, theirs = Reader(root / source.prefix), megatron.IndexedDataset(str(root / source.prefix))
        assert len(ours) == len(theirs) == source.documents
        assert all((ours[i] == theirs[i]).all() for i in range(len(ours)))


@settings(deadline=None, max_examples=200)
@given(samples=st.integers(1, 10**6), parts=st.lists(st.floats(0.01, 100), min_size=1, max_size=40), surplus=st.just(SURPLUS))
def test_the_planner_asks_for_what_megatrons_blend_asks_for(samples, parts, surplus):
    from megatron.core.datasets.blended_megatron_dataset_builder import _get_size_per_split_per_dataset
    from megatron.core.datasets.utils import normalize

    weights = [part / sum(parts) for part in parts]
    theirs = [split[0] for split in _get_size_per_split_per_dataset(normalize(weights), [samples], surplus=surplus)]
    assert [samples_asked(samples, weight, float(np.array(weights).sum())) for weight in weights] == theirs


class Tokenizer:
    """What GPTDatasetConfig asks of a tokenizer."""

    unique_identifiers = {"class": "test"}  # noqa: RUF012
    eod, pad, vocab_size = 2, 3, None


@pytest.mark.parametrize("phase", ["first", "second", "third"])
def test_the_blend_has_its_samples_and_begins_no_second_epoch(prepared, tmp_path, monkeypatch, phase):
    from megatron.core.datasets import utils
    from megatron.core.datasets.blended_dataset import BlendedDataset
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    # The wheel has no Makefile; its compiled helper is there and works.
    monkeypatch.setattr(utils, "compile_helpers", lambda: None)
    root = prepared / "data"
    manifest = MixtureManifest.read(mixture_path(root, phase))
    epochs = []
    asked = GPTDataset._get_num_epochs

    def counted(self, tokens_per_epoch):
        epochs.append(asked(self, tokens_per_epoch))
        return epochs[-1]

    monkeypatch.setattr(GPTDataset, "_get_num_epochs", counted)
    sources = manifest.sources.values()
    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=manifest.seq_length_tokens,
        blend_per_split=[([str(root / s.prefix) for s in sources], [s.weight for s in sources]), None, None],
        path_to_cache=str(tmp_path),
        tokenizer=Tokenizer(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    train, _, _ = BlendedMegatronDatasetBuilder(GPTDataset, [manifest.samples, 0, 0], lambda: True, config).build()
    assert config.mid_level_dataset_surplus == SURPLUS
    assert epochs == [1] * len(manifest.sources)
    if len(manifest.sources) > 1:
        assert isinstance(train, BlendedDataset)
        assert len(train) == manifest.samples
        drawn = np.bincount(train.dataset_index, minlength=len(sources))
        assert np.abs(drawn - [s.weight * manifest.samples for s in sources]).max() <= 1
    assert len(train) >= manifest.samples
    assert len(train[manifest.samples - 1]["tokens"]) == manifest.seq_length_tokens
