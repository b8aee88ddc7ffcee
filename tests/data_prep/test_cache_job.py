"""The job that builds index caches is started for what is missing, for nothing else, and its failure is an error."""

import sys

import pytest

from data_prep import index_caches
from data_prep.cache_job import build_caches
from data_prep.errors import DataError
from data_prep.prepare import prepare
from data_prep.progress import Silent
from tests.data_prep import helpers

FAKE = """
import sys
from pathlib import Path
Path(sys.argv[0]).with_suffix(".called").write_text("\\n".join(sys.argv[1:]))
sys.exit({code})
"""


def fake(folder, code):
    path = folder / "job.py"
    path.write_text(FAKE.format(code=code))
    return (sys.executable, str(path)), path.with_suffix(".called")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("caches")
    helpers.raw(folder)
    recipe = helpers.recipe(folder)
    prepare(recipe)
    return folder, recipe


def test_a_failed_job_is_an_error(prepared):
    folder, recipe = prepared
    command, called = fake(folder, 3)
    with pytest.raises(DataError, match=r"index caches of first, second, third ended with exit code 3"):
        build_caches(recipe, progress=Silent(), command=command)
    words = called.read_text().split("\n")
    assert [words[i + 1] for i, word in enumerate(words) if word == "--phase"] == ["first", "second", "third"]


def test_the_real_job_builds_and_is_not_started_again(prepared):
    folder, recipe = prepared
    build_caches(recipe, progress=Silent())
    root = folder / "data"
    manifests = {p: index_caches.MixtureManifest.read(root / "views" / p / "manifest.json") for p in recipe.stages}
    assert index_caches.to_build(root, manifests) == {}
    command, called = fake(folder, 3)
    called.unlink(missing_ok=True)
    build_caches(recipe, progress=Silent(), command=command)
    assert not called.exists()
    # one damaged cache: only its phase is built again
    file = next(index_caches.cache_path(root, manifests["second"]).glob("*document_index.npy"))
    file.write_bytes(file.read_bytes()[:-1] + b"\xff")
    with pytest.raises(DataError, match="of second ended"):
        build_caches(recipe, progress=Silent(), command=command)
    assert called.read_text().split("\n")[-2:] == ["--phase", "second"]
