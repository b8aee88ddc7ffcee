"""The whole preparation: idempotent, minimal after a change, the same bytes after being killed anywhere, one process at a time."""

import os
import shutil
import subprocess
import sys
import textwrap
import threading

import pytest

from data_prep.errors import DataError
from data_prep.files import exclusive_lock
from data_prep.indexed import Reader
from data_prep.manifest import HeldoutManifest, MixtureManifest, heldout_path, mixture_path
from data_prep.prepare import prepare
from data_prep.progress import Shown
from data_prep.tokenizer import load_tokenizer
from tests.data_prep import helpers, kills


def changed(before, after):
    return {name.split("/data/")[1] for name in before.keys() | after.keys() if before.get(name) != after.get(name)}


@pytest.fixture
def folder(prepared, tmp_path):
    """A private prepared folder; its paths differ, so it is prepared anew."""
    shutil.copytree(prepared / "raw", tmp_path / "raw")
    prepare(helpers.recipe(tmp_path))
    return tmp_path


def test_what_is_written(prepared):
    root = prepared / "data"
    recipe = helpers.recipe(prepared)
    for name, phase in recipe.phase.items():
        manifest = MixtureManifest.read(mixture_path(root, name))
        assert (manifest.phase, manifest.samples, manifest.tokens) == (name, phase.samples, phase.tokens)
        assert sum(s.weight for s in manifest.sources.values()) == pytest.approx(1)
        assert list(manifest.sources) == sorted(manifest.sources)
        for source, view in manifest.sources.items():
            assert view.tokens_available >= view.weight * phase.samples * phase.seq_length_tokens * 1.005
            assert os.readlink(root / f"{view.prefix}.bin") == f"../../tokenized/{source}.bin"
    heldout = HeldoutManifest.read(heldout_path(root))
    assert list(heldout.categories) == ["code", "math", "web"]
    assert all(entry.tokens >= 65 for entry in heldout.categories.values())
    assert not list(root.rglob("*.tmp"))


def test_no_held_out_document_is_in_a_view_and_none_is_in_two(prepared):
    root = prepared / "data"
    seen = {}
    for phase in ("first", "second", "third"):
        for source, view in MixtureManifest.read(mixture_path(root, phase)).sources.items():
            reader = Reader(root / view.prefix)
            for i in range(len(reader)):
                seen[reader[i].tobytes()] = (phase, source, i) if reader[i].tobytes() not in seen else pytest.fail("repeated")
    for category in ("code", "math", "web"):
        reader = Reader(root / "heldout" / category)
        for i in range(len(reader)):
            held = reader[i].tobytes()
            assert not any(text.startswith(held) for text in seen)


def test_a_second_run_writes_nothing(folder):
    before = helpers.times(folder / "data")
    prepare(helpers.recipe(folder))
    assert helpers.times(folder / "data") == before


def test_the_result_depends_on_content_alone(folder, prepared):
    # apart from the recorded paths of the raw files
    ours, theirs = helpers.tree(folder / "data"), helpers.tree(prepared / "data")
    assert {n: d for n, d in ours.items() if n.endswith((".bin", ".idx", ".model"))} == {
        n: d for n, d in theirs.items() if n.endswith((".bin", ".idx", ".model"))
    }


def test_one_changed_source_costs_that_source_and_its_views(folder):
    recipe = helpers.recipe(folder, tokenizer={**_tokenizer(folder), "path": str(_saved_tokenizer(folder))})
    prepare(recipe)
    before = helpers.times(folder / "data")
    helpers.write_source(folder / "raw" / "math_a.jsonl", 99)
    prepare(recipe)
    touched = changed(before, helpers.times(folder / "data"))
    assert {n for n in touched if n.startswith("tokenized/")} == {
        f"tokenized/math_a{s}" for s in (".idx", ".json", ".heldout.idx")
    }
    assert {n for n in touched if n.startswith("tokens/")} == {f"tokens/math_a{s}" for s in (".bin", ".idx", ".json")}
    # the second phase draws no math
    assert {n.split("/")[1] for n in touched if n.startswith("views/")} == {"first", "third"}


def _tokenizer(folder):
    return helpers.recipe(folder).data.tokenizer.model_dump()


def _saved_tokenizer(folder):
    return shutil.copy(folder / "data" / "tokenizer" / "tokenizer.model", folder / "kept.model")


def test_a_later_phase_changes_no_earlier_view(folder):
    before = helpers.times(folder / "data")
    phases = {name: helpers.phase(name, steps=20 if name == "third" else 10) for name in helpers.SHARES}
    prepare(helpers.recipe(folder, phases=phases))
    touched = changed(before, helpers.times(folder / "data"))
    assert touched == {"views/third/math_a.idx", "views/third/manifest.json", "plan.json"}


def test_a_source_that_is_no_longer_drawn_leaves_no_file_in_the_view(folder):
    prepare(helpers.recipe(folder, phases={"first": helpers.phase("first", shares={"web": 100.0})}, tokenizer=_given(folder)))
    assert sorted(p.name for p in (folder / "data/views/first").iterdir()) == [
        "manifest.json",
        "web_a.bin",
        "web_a.idx",
        "web_b.bin",
        "web_b.idx",
    ]


def _given(folder):
    return {**_tokenizer(folder), "path": str(_saved_tokenizer(folder))}


@pytest.mark.parametrize(
    "name", ["tokenized/web_a.bin", "views/first/web_a.idx", "tokenizer/tokenizer.model", "heldout/code.bin"]
)
def test_an_altered_file_is_made_again(folder, name):
    before = helpers.tree(folder / "data")
    path = folder / "data" / name
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    prepare(helpers.recipe(folder))
    assert helpers.tree(folder / "data") == before


def test_a_given_hugging_face_tokenizer(folder):
    from data_prep.tokenizer import write_hf_tokenizer

    write_hf_tokenizer(load_tokenizer(_saved_tokenizer(folder)), folder / "hf")
    before = helpers.tree(folder / "data")
    prepare(helpers.recipe(folder, tokenizer={"kind": "huggingface", "path": str(folder / "hf"), "vocab_size": 400}))
    after = helpers.tree(folder / "data")
    # the same pieces, so the same tokens, whichever library made them
    assert {n: d for n, d in after.items() if n.startswith("tokenized/") and n.endswith((".bin", ".idx"))} == {
        n: d for n, d in before.items() if n.startswith("tokenized/") and n.endswith((".bin", ".idx"))
    }
    manifest = MixtureManifest.read(mixture_path(folder / "data", "first"))
    assert (manifest.tokenizer.kind, manifest.tokenizer.path) == ("huggingface", "tokenizer")
    manifest.verify(folder / "data")


PREPARE = """
from pathlib import Path
from data_prep.prepare import prepare
from recipes.schema import Recipe
prepare(Recipe.read(Path(sys.argv[2])))
"""


def test_killed_anywhere_the_next_run_gives_the_same_bytes(prepared, tmp_path):
    sources = {name: s.model_dump(mode="json") for name, s in helpers.recipe(prepared).data.sources.items()}
    recipe = helpers.recipe(tmp_path, sources=sources)
    recipe.write(tmp_path / "recipe.json")

    steps = kills.steps_of(PREPARE, tmp_path / "recipe.json")
    expected = helpers.tree(tmp_path / "data")
    for limit in sorted({1, 2, steps // 5, steps // 3, steps // 2, steps * 2 // 3, steps - 5, steps - 3}):
        shutil.rmtree(tmp_path / "data")
        assert kills.killed(kills.run(PREPARE, limit, tmp_path / "recipe.json"))
        assert helpers.tree(tmp_path / "data") != expected
        prepare(recipe)
        assert helpers.tree(tmp_path / "data") == expected, f"killed at step {limit} of {steps}"


def test_two_preparations_of_one_root_wait_for_each_other(folder):
    messages = []
    waited = threading.Event()

    class Told(Shown):
        def message(self, text):
            messages.append(text)
            waited.set()

    with exclusive_lock(folder / "data" / ".lock"):
        other = threading.Thread(target=prepare, args=(helpers.recipe(folder),), kwargs={"progress": Told()})
        other.start()
        assert waited.wait(20)
        assert other.is_alive()
    other.join(60)
    assert not other.is_alive()
    assert f"waiting for process {os.getpid()}" in messages[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"paths": ["/nowhere/*.jsonl"]}, r"data.sources.web_a.paths: nothing matches '/nowhere/\*.jsonl'"),
        ({"paths": ["/tmp"]}, "data.sources.web_a.paths: nothing matches '/tmp' .*it is a folder"),
        ({"paths": []}, "data.sources.web_a.paths is empty"),
        ({"kind": "builtin", "builder": "poems"}, r"data.sources.web_a.builder is 'poems'; the builders are books,"),
        ({"kind": "indexed", "paths": ["/nowhere/a"]}, "data.sources.web_a is already tokenized|/nowhere/a.bin does not exist"),
    ],
)
def test_refusals_of_sources(folder, change, message):
    recipe = helpers.recipe(folder)
    sources = {name: s.model_dump(mode="json") for name, s in recipe.data.sources.items()}
    sources["web_a"] |= change
    with pytest.raises(DataError, match=message):
        prepare(helpers.recipe(folder, sources=sources))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"heldout_batch_samples": 500},
            r"category 'code': \d+ held-out tokens .* an evaluation reads 8001 .* raise data.heldout_percent",
        ),
        ({"max_epochs": 0.01}, "data.max_epochs is 0.01"),
        ({"heldout_percent": 100.0}, "data.heldout_percent is 100: nothing would be left to train on"),
        ({"tokenizer": {"kind": "sentencepiece", "path": None, "vocab_size": 400}}, "train_max_bytes is null"),
        (
            {"tokenizer": {"kind": "sentencepiece", "path": None, "vocab_size": 4000, "train_max_bytes": 10}},
            "vocab_size is 4000",
        ),
    ],
)
def test_refusals_of_settings(folder, changes, message):
    with pytest.raises(DataError, match=message):
        prepare(helpers.recipe(folder, **changes))


def test_a_tokenizer_larger_than_its_setting_is_refused(folder):
    given = {"kind": "sentencepiece", "path": str(_saved_tokenizer(folder)), "vocab_size": 399}
    with pytest.raises(DataError, match="400 entries, data.tokenizer.vocab_size is 399; set it to 400"):
        prepare(helpers.recipe(folder, tokenizer=given))


def test_the_command_says_what_it_did_and_refuses_with_78(folder):
    recipe = folder / "recipe.json"
    helpers.recipe(folder, phases={"first": helpers.phase("first", steps=11)}).write(recipe)
    command = [sys.executable, "-m", "data_prep", "--recipe", str(recipe)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "views of 1 phases" in done.stdout
    helpers.recipe(folder, max_epochs=0.01).write(recipe)
    refused = subprocess.run(command, capture_output=True, text=True, check=False)
    assert refused.returncode == 78
    assert refused.stderr.startswith("refused: phase 'first'")


def test_importing_the_package_needs_no_torch_and_manifests_no_numpy():
    code = textwrap.dedent("""
        import sys
        import data_prep.manifest, data_prep.errors
        assert "numpy" not in sys.modules
        import data_prep.prepare, data_prep.preview
        assert not {"torch", "transformers", "megatron"} & set(sys.modules)
    """)
    subprocess.run([sys.executable, "-c", code], check=True)
