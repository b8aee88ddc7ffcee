"""Index caches that do not fit their views are found, whatever their digests say."""

from pathlib import Path

import numpy as np
import pytest

from data_prep.files import record_file
from data_prep.index_caches import cache_path
from data_prep.manifest import mixture_path
from data_prep.verify import verify
from tests.data_prep.verifying import cache, finding, manifest, sign_again


def test_a_cache_of_earlier_views(root):
    sign_again(mixture_path(root, "first"), lambda m: m.update(inputs="1" * 64))
    found = verify(root)
    folder = f"cache/first/{manifest(root).digest[:16]}"
    assert finding(found, folder, "index cache of these views").found == "no such folder"
    (old,) = (root / "cache" / "first").iterdir()
    assert finding(found, f"cache/first/{old.name}").found == "of other views"
    wrong = finding(verify(old), f"cache/first/{old.name}", "views that it was built for")
    assert "quarry prep" in wrong.remedy


def test_a_cache_under_the_name_of_another(root):
    old, _ = cache(root)
    sign_again(mixture_path(root, "first"), lambda m: m.update(inputs="1" * 64))
    old.rename(cache_path(root, manifest(root)))
    assert any("built for manifest digest" in f.found for f in verify(root))


CHANGES = {
    "document twice": ("document_index", lambda a: a.__setitem__(0, a[1]), "documents per epoch"),
    "document beyond": ("document_index", lambda a: a.__setitem__(1, 10**6), "entry 1"),
    "sample shifted": ("sample_index", lambda a: a.__setitem__((7, 1), a[7, 1] + 1), "begin of sample 7"),
    "sample beyond": ("sample_index", lambda a: a.__setitem__((2, 0), 10**6), "begin of sample 2"),
    "sample negative": ("sample_index", lambda a: a.__setitem__((2, 0), -1), "begin of sample 2"),
    "shuffle twice": ("shuffle_index", lambda a: a.__setitem__(0, a[1]), "samples"),
    "shuffle beyond": ("shuffle_index", lambda a: a.__setitem__(1, 10**6), "entry 1"),
    "blend source": ("dataset_index", lambda a: a.__setitem__(4, 99), "entry 4"),
    "blend negative": ("dataset_index", lambda a: a.__setitem__(4, -1), "entry 4"),
    "blend place": ("dataset_sample_index", lambda a: a.__setitem__(9, a[9] + 1), "entry 9"),
}


def replace_array(root, which, array):
    """Another array in a cache file of phase `first`, with a record that fits it; the file's path relative to the root."""
    folder, record = cache(root)
    name = getattr(record.sources["web_a"] if hasattr(record.sources["web_a"], which) else record.blend, which)
    np.save(folder / name, array, allow_pickle=True)
    sign_again(folder / "record.json", lambda r: r["files"].update({name: record_file(folder / name).model_dump()}))
    return str((folder / name).relative_to(root))


@pytest.mark.parametrize("case", list(CHANGES))
def test_indices_that_lie(root, case):
    which, change, what = CHANGES[case]
    folder, record = cache(root)
    array = np.load(folder / getattr(record.sources["web_a"] if "dataset" not in which else record.blend, which))
    change(array)
    name = replace_array(root, which, array)
    assert finding(verify(root), name, what)


def test_an_array_of_another_type_or_shape(root):
    name = replace_array(root, "shuffle_index", np.zeros(3, np.float64))
    assert finding(verify(root), name, "type and shape").found == "float64 [3]"


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_no_pickle_is_loaded(root, tmp_path):
    array = np.array([Bomb(tmp_path / "exploded")], dtype=object)
    name = replace_array(root, "shuffle_index", array)
    wrong = finding(verify(root), name, "content")
    assert "Python objects in dtype" in wrong.found
    assert not (tmp_path / "exploded").exists()
    np.load(root / name, allow_pickle=True)
    assert (tmp_path / "exploded").exists(), "the file would have been dangerous"


def test_the_caches_of_a_moved_root_fit(root):
    """Their names do not hold the path: `root` is a copy in another place, and passes."""
    assert verify(root) == []
