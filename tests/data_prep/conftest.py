"""A trained tokenizer and a prepared data root, made once per process."""

import shutil

import pytest

from data_prep.cache_job import build_caches
from data_prep.corpus import build
from data_prep.prepare import prepare
from data_prep.progress import Silent
from data_prep.tokenizer import load_tokenizer
from data_prep.tokenizer_training import train
from tests.data_prep import helpers


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """What is found out about tokenizers is kept beside the tests' other files, not in the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A SentencePiece model of 1,200 pieces on code and translated text."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    texts = [d.text for builder in ("package_code", "message_catalogues") for d in build(builder, 300_000)]
    train(texts, "sentencepiece", 1200, path)
    return load_tokenizer(path)


@pytest.fixture(scope="session")
def byte_level(tmp_path_factory):
    """A byte-level BPE of 9,000 entries, with all of Granite's named tokens, on code and translated text."""
    folder = tmp_path_factory.mktemp("byte_level")
    train(
        (d.text for builder in ("package_code", "message_catalogues") for d in build(builder, 500_000)),
        "huggingface",
        9000,
        folder,
    )
    return load_tokenizer(folder)


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    """A folder with raw/ and data/ prepared by helpers.recipe; read only."""
    folder = tmp_path_factory.mktemp("prepared")
    helpers.raw(folder)
    prepare(helpers.recipe(folder))
    return folder


@pytest.fixture
def copy(prepared, tmp_path):
    """A copy of the prepared root that a test may break."""
    shutil.copytree(prepared / "data", tmp_path / "data", symlinks=True)
    return tmp_path / "data"


@pytest.fixture(scope="session")
def clean(prepared, tmp_path_factory):
    """A prepared data root with index caches; read only."""
    folder = tmp_path_factory.mktemp("verify")
    shutil.copytree(prepared / "data", folder / "data", symlinks=True)
    build_caches(helpers.recipe(folder), progress=Silent())
    return folder / "data"


@pytest.fixture
def root(clean, tmp_path):
    """A copy in another place, to be broken."""
    shutil.copytree(clean, tmp_path / "data", symlinks=True)
    return tmp_path / "data"
