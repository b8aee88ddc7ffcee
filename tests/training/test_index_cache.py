"""Index caches are built ahead, whole, once; a training start finds every file, builds none, and refuses what does not fit."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from data_prep.errors import DataError
from data_prep.index_caches import IndexCache, cache_path, verify_cache
from data_prep.indexed import Reader
from data_prep.manifest import MixtureManifest, mixture_path
from tests.training import stage_server
from tests.training.factory import FIRST, SECOND, make_data, make_recipe, start_stage

PHASES = ("first", "second")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A data root with caches; read only."""
    root = tmp_path_factory.mktemp("caches") / "data"
    make_data(root)
    return root


@pytest.fixture
def root(made, tmp_path):
    """A copy in another place, which needs no new caches."""
    shutil.copytree(made, tmp_path / "moved")
    make_recipe(tmp_path / "moved", {"gpus": 1}, "single").write(tmp_path / "moved" / "recipe.json")
    return tmp_path / "moved"


def manifest(root, phase="second"):
    return MixtureManifest.read(mixture_path(root, phase))


def folder(root, phase="second"):
    return cache_path(root, manifest(root, phase))


def build(root, *options):
    """Exit code and output of the command; as a process of its own `test_two_builders_take_turns` starts it."""
    output = root.parent / "build.txt"
    output.unlink(missing_ok=True)
    building = stage_server.start(
        ["--recipe", str(root / "recipe.json"), *options], output, program="training.index_cache:main"
    )
    return SimpleNamespace(returncode=building.wait(timeout=300), output=output.read_text())


def tree(root):
    return {
        str(path.relative_to(root)): (path.stat().st_mtime_ns, path.stat().st_ino, path.stat().st_size)
        for path in sorted((root / "cache").rglob("*"))
        if path.name != ".lock"
    }


def flip(path, position=-1):
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(bytes(content))


def test_the_record_names_every_file_with_its_digest(made):
    for phase, numbers in zip(PHASES, (FIRST, SECOND), strict=True):
        record = verify_cache(made, manifest(made, phase), full=True)
        assert {*record.files, "record.json"} == {path.name for path in folder(made, phase).iterdir()}
        # two sources, each with a description and three indices, and the blend with a description and two
        assert len(record.files) == 2 * 4 + 3
        assert (record.samples, record.seed) == (numbers["steps"] * numbers["global_batch_samples"], 7)
        # Megatron rounds the number of each source up
        assert record.samples <= record.blend.samples < record.samples + len(record.sources)
        assert record.megatron_version == "0.19.2"


def test_the_indices_cut_the_views_into_samples(made):
    """Read without Megatron: sample k of a source is tokens k*length to (k+1)*length of its documents laid end to end."""
    cache, length = folder(made), SECOND["seq_length_tokens"]
    record = IndexCache.read(cache / "record.json")
    for name, source in record.sources.items():
        lengths = Reader(made / "views" / "second" / name).index.lengths
        documents, samples, shuffle = (
            np.load(cache / file, allow_pickle=False)
            for file in (source.document_index, source.sample_index, source.shuffle_index)
        )
        starts = np.concatenate([[0], np.cumsum(lengths[documents])])
        assert (starts[samples[:, 0]] + samples[:, 1] == np.arange(source.samples + 1) * length).all()
        assert (np.sort(shuffle) == np.arange(source.samples)).all()


def test_a_second_build_does_nothing_and_imports_no_torch(root):
    before = tree(root)
    program = (
        "import sys\nfrom training.index_cache import main\ncode = main(['--recipe', sys.argv[1]])\n"
        "sys.exit('imported torch' if 'torch' in sys.modules or 'megatron' in sys.modules else code)"
    )
    done = subprocess.run([sys.executable, "-c", program, str(root / "recipe.json")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "index caches of 2 phases: 0 built; 22 files" in done.stdout
    assert tree(root) == before


def test_the_same_views_give_the_same_caches_anywhere(root, made):
    """Moved to another folder the caches fit; built there anew they are the same files under the same names."""
    before = {path.name: path.read_bytes() for path in folder(root).iterdir()}
    assert verify_cache(root, manifest(root)) == verify_cache(made, manifest(made))
    shutil.rmtree(root / "cache")
    done = build(root, "--workers", "1")
    assert done.returncode == 0, done.output
    assert "2 built" in done.output
    assert {path.name: path.read_bytes() for path in folder(root).iterdir()} == before


def changed(root, **values):
    """The views of `second` prepared with other numbers: another digest, so another cache."""
    old = manifest(root)
    new = {name: getattr(old, name) for name in type(old).model_fields if name not in ("format", "digest")}
    MixtureManifest.make(**{**new, **values}).write(mixture_path(root, "second"))


def test_a_cache_of_earlier_views_goes_when_the_new_one_is_there(root):
    old, first = folder(root), tree(root)
    changed(root, inputs="1" * 64)
    with pytest.raises(
        DataError, match=f"phase 'second' has no index cache .*there is one for other views.*{old.name}.*quarry prep"
    ):
        verify_cache(root, manifest(root))
    done = build(root, "--phase", "second")
    assert done.returncode == 0, done.output
    assert "index caches of 1 phases: 1 built" in done.output
    assert not old.exists()
    assert verify_cache(root, manifest(root))
    unchanged = {name: entry for name, entry in first.items() if name.startswith("cache/first")}
    assert unchanged.items() <= tree(root).items()


@pytest.mark.parametrize("damage", ["flip", "remove", "truncate", "record", "version"])
def test_a_cache_that_does_not_fit_is_named_and_built_again(root, damage):
    good = tree(root)
    victim = folder(root) / IndexCache.read(folder(root) / "record.json").sources["web"].shuffle_index
    expected = {
        "flip": f"{victim.name}: SHA-256 .* altered",
        "remove": f"{victim.name}: no such file",
        "truncate": f"{victim.name}: .* bytes, the record says",
        "record": "record.json: no manifest|no manifest at .*record.json",
        "version": "built for Megatron version 0.1, needed is",
    }[damage]
    if damage == "flip":
        flip(victim)
    elif damage == "remove":
        victim.unlink()
    elif damage == "truncate":
        victim.write_bytes(victim.read_bytes()[:-4])
    elif damage == "record":
        (folder(root) / "record.json").unlink()
    else:
        record = IndexCache.read(folder(root) / "record.json")
        values = {name: getattr(record, name) for name in type(record).model_fields if name not in ("format", "digest")}
        IndexCache.make(**{**values, "megatron_version": "0.1"}).write(folder(root) / "record.json")
    with pytest.raises(DataError, match=expected):
        verify_cache(root, manifest(root))
    assert build(root).returncode == 0
    assert verify_cache(root, manifest(root), full=True)
    assert tree(root).keys() == good.keys()


def test_an_index_that_is_not_the_recorded_one_gets_no_cache(root):
    shutil.rmtree(root / "cache")
    flip(root / "views" / "second" / "web.idx")
    done = build(root)
    assert done.returncode == 78
    assert "refused: " in done.output
    assert "web.idx: SHA-256" in done.output
    assert not list((root / "cache").glob("*/*"))


def test_no_views_and_unknown_phases_are_refused(root):
    done = build(root, "--phase", "third")
    assert done.returncode == 78
    assert "--phase third: no such phase among the stages; phases: first, second" in done.output
    mixture_path(root, "first").unlink()
    done = build(root)
    assert done.returncode == 78
    assert "no manifest at" in done.output


def test_a_killed_build_leaves_no_cache_and_the_next_one_cleans_up(root):
    """Killed with -9 when the first files are there, before the record and the rename."""
    shutil.rmtree(root / "cache")
    program = (
        "import os, signal, sys\nimport training.index_cache as builder\n"
        "builder.record_file = lambda path: os.kill(os.getpid(), signal.SIGKILL)\n"
        "builder.main(['--recipe', sys.argv[1], '--workers', '1'])"
    )
    done = subprocess.run([sys.executable, "-c", program, str(root / "recipe.json")], capture_output=True)
    assert done.returncode == -signal.SIGKILL
    left = [path for path in (root / "cache").glob("*/*") if path.name.startswith(".building-")]
    assert len(left) == 1
    assert any(left[0].iterdir())
    assert not folder(root).exists()
    assert build(root).returncode == 0
    assert not left[0].exists()
    for phase in PHASES:
        assert [path.name for path in (root / "cache" / phase).iterdir()] == [folder(root, phase).name]


def test_two_builders_take_turns(root):
    shutil.rmtree(root / "cache")
    command = [sys.executable, "-m", "training.index_cache", "--recipe", str(root / "recipe.json")]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate(timeout=120)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sum("2 built" in output for output in outputs) == 1, outputs
    assert sum("0 built" in output for output in outputs) == 1, outputs


def test_no_more_phases_at_once_than_fit_into_memory(monkeypatch):
    import psutil

    from training import index_cache

    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=200))
    assert index_cache._workers_that_fit([40, 30, 20, 10]) == 4
    assert index_cache._workers_that_fit([60, 50, 30]) == 1
    assert index_cache._workers_that_fit([60, 40, 30]) == 2
    assert index_cache._workers_that_fit([1000]) == 1
    assert index_cache._workers_that_fit([1] * 20) == 8


# --- training starts ---------------------------------------------------------------------------------------------------------------


def run_folder(root, recipe=None):
    run = root.parent / "run"
    run.mkdir()
    (recipe or make_recipe(root, {"gpus": 1}, "single")).write(run / "recipe.json")
    return run


BUILDERS_FORBIDDEN = """
import sys
from recipes.schema import Recipe
from training import stage
from training.one_rank import import_megatron
from pathlib import Path

import_megatron(Recipe.read(Path(sys.argv[1]) / "recipe.json"))
import megatron.core.datasets.blended_dataset as blended
import megatron.core.datasets.gpt_dataset as gpt
from megatron.core.datasets import helpers

def forbidden(*args, **kwargs):
    raise AssertionError("an index is being built")

gpt._build_document_index = gpt._build_shuffle_index = forbidden
helpers.build_sample_idx = helpers.build_blending_indices = forbidden
gpt.numpy.save = forbidden
sys.exit(stage.main(["--run-dir", sys.argv[1], "--stage", "first"]))
"""


@pytest.mark.multirank
def test_a_training_start_builds_nothing_and_says_so(root):
    run, before = run_folder(root), tree(root)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", BUILDERS_FORBIDDEN, str(run)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "index cache: 11 files, 0.0 MB, verified, none built" in done.stdout
    assert (run / "stages" / "first" / "handoff.json").exists()
    assert tree(root) == before


def test_a_training_start_without_cache_refuses_at_once(root):
    shutil.rmtree(folder(root, "first"))
    run, before = run_folder(root), tree(root)
    assert start_stage(run, "first") == 78
    assert "phase 'first' has no index cache" in (log := (run / "log.txt").read_text())
    assert "build the index caches with `quarry prep`, which needs no GPU" in log
    assert tree(root) == before


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_a_replaced_data_file_is_noticed_at_the_start(root, suffix):
    """Another file of the same size and with the old time stamp, in place of what the cache was built for."""
    victim = root / "views" / "first" / f"web{suffix}"
    stat = victim.stat()
    other = bytearray(victim.read_bytes())
    other[100:104] = other[104:108]
    replacement = Path(f"{victim}.new")
    replacement.write_bytes(bytes(other))
    os.utime(replacement, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    os.replace(replacement, victim)
    run = run_folder(root)
    assert start_stage(run, "first") == 78
    assert f"web{suffix}: SHA-256" in (run / "log.txt").read_text()


def test_a_cache_of_other_data_is_refused(root):
    """A whole, intact cache of other views under the name that training looks for."""
    changed(root, inputs="1" * 64)
    old = next((root / "cache" / "second").glob("[!.]*"))
    old.rename(folder(root))
    with pytest.raises(DataError, match="built for manifest digest .*, needed is .*quarry prep"):
        verify_cache(root, manifest(root))


def test_a_missing_file_stops_megatron_itself(root):
    """Behind the verification stands Megatron's own switch: without a file it ends, it does not build."""
    program = (
        "import sys\nfrom pathlib import Path\nfrom training.blend import blended\n"
        "from data_prep.index_caches import cache_path\nfrom data_prep.manifest import MixtureManifest, mixture_path\n"
        "root = Path(sys.argv[1])\nmanifest = MixtureManifest.read(mixture_path(root, 'second'))\n"
        "blended(manifest, root, cache_path(root, manifest), build=False)\nprint('whole', flush=True)\nPath(sys.argv[2]).unlink()\n"
        "blended(manifest, root, cache_path(root, manifest), build=False)"
    )
    victim = folder(root) / IndexCache.read(folder(root) / "record.json").blend.dataset_index
    command = [sys.executable, "-W", "ignore", "-c", program, str(root), str(victim)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert "whole" in done.stdout, done.stderr
    assert done.returncode == 1
    assert "FileNotFoundError" in done.stderr
    assert not victim.exists()
