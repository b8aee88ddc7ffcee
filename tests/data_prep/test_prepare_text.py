"""The steps of a preparation that act on text: found, cleaned, joined by repository, tokenized, one after the other."""

import json
import shutil

import pytest

from data_prep.errors import DataError
from data_prep.indexed import Reader
from data_prep.manifest import MixtureManifest, mixture_path
from data_prep.prepare import prepare
from data_prep.tokenizer import load_tokenizer
from recipes.compose import compose
from tests.data_prep import helpers


def sources(folder, **more):
    given = {
        name: {"category": category, "kind": "files", "paths": [str(folder / "raw" / f"{name}.jsonl")]}
        for name, category in helpers.CATEGORY.items()
    }
    return given | more


def write_repositories(path, repositories=40):
    """Two files each; main imports the other, and comes before it in the input."""
    lines = []
    for n in range(repositories):
        for name, text in (("main.py", f"import part\n\nprint(part.value + {n})\n"), ("part.py", f"value = {n * 7919}\n" * 9)):
            lines.append(json.dumps({"repo_name": f"team/repo{n}", "path": name, "content": text}))
    path.write_text("\n".join(lines[::2] + lines[1::2]) + "\n")


REPOSITORIES = {"category": "code", "kind": "files", "text_key": "content", "concatenate": "repositories"}


@pytest.mark.parametrize("cleaned", [False, True])
def test_repositories_become_documents(tmp_path, cleaned):
    helpers.raw(tmp_path)
    write_repositories(tmp_path / "raw" / "repos.jsonl")
    given = sources(tmp_path, repos={**REPOSITORIES, "paths": [str(tmp_path / "raw" / "repos.jsonl")]})
    cleaning = only_duplicates() if cleaned else None
    recipe = helpers.recipe(tmp_path, sources=given, cleaning=cleaning)
    prepare(recipe)
    tokenizer = load_tokenizer(tmp_path / "data" / "tokenizer" / "tokenizer.model")
    reader = Reader(tmp_path / "data" / "tokens" / "repos")
    texts = [tokenizer.decode(reader[i][:-1]) for i in range(len(reader))]
    assert len(texts) == 40
    assert all(text.index("part.py") < text.index("main.py") for text in texts)  # what is imported stands first
    assert sum("value + 17)" in text for text in texts) == 1


def only_duplicates():
    """The cleaning of the smoke recipe with duplicates only."""
    base = compose(["curriculum=smoke"]).data.cleaning.model_dump(mode="json")
    categories = sorted(set(helpers.CATEGORY.values()))
    return {
        **base,
        "priority": categories,
        "filters": {name: {} for name in categories},
        "decontamination": None,
        "masking": None,
        "near_duplicates": None,
    }


def test_a_document_of_two_sources_stays_in_one(tmp_path):
    helpers.raw(tmp_path)
    web_a, web_b = (tmp_path / "raw" / f"{name}.jsonl" for name in ("web_a", "web_b"))
    shared = web_a.read_text().splitlines()[:10]
    web_b.write_text("\n".join([*shared, *web_b.read_text().splitlines()]) + "\n")
    prepare(helpers.recipe(tmp_path, cleaning=only_duplicates()))
    documents = {name: len(Reader(tmp_path / "data" / "tokens" / name)) for name in ("web_a", "web_b")}
    assert documents == {"web_a": 120, "web_b": 120}
    prepare(helpers.recipe(tmp_path))  # without cleaning they come back
    assert len(Reader(tmp_path / "data" / "tokens" / "web_b")) == 130


def test_cleaning_is_done_once(tmp_path):
    helpers.raw(tmp_path)
    recipe = helpers.recipe(tmp_path, cleaning=only_duplicates())
    prepare(recipe)
    before = helpers.times(tmp_path / "data")
    prepare(recipe)
    assert helpers.times(tmp_path / "data") == before


@pytest.mark.parametrize("how", ["link", "copy", "same"])
def test_sources_that_share_a_file_are_refused(tmp_path, how):
    helpers.raw(tmp_path)
    given = sources(tmp_path)
    again = tmp_path / "raw" / "again.jsonl"
    match how:
        case "link":
            again.symlink_to(tmp_path / "raw" / "web_a.jsonl")
        case "copy":
            shutil.copy(tmp_path / "raw" / "web_a.jsonl", again)
        case "same":
            again = tmp_path / "raw" / "web_a.jsonl"
    given["other"] = {"category": "code", "kind": "files", "paths": [str(again)]}
    with pytest.raises(DataError, match=r"data.sources.web_a and data.sources.other share the (file|content of) "):
        prepare(helpers.recipe(tmp_path, sources=given))
    assert not (tmp_path / "data" / "tokens").exists()


def test_only_files_have_repositories(tmp_path):
    given = sources(tmp_path, x={"category": "code", "kind": "builtin", "builder": "licences", "concatenate": "repositories"})
    with pytest.raises(DataError, match=r"data.sources.x.concatenate is repositories, the kind builtin"):
        prepare(helpers.recipe(tmp_path, sources=given))


def test_views_hold_what_was_joined(tmp_path):
    helpers.raw(tmp_path)
    write_repositories(tmp_path / "raw" / "repos.jsonl")
    given = sources(tmp_path, repos={**REPOSITORIES, "paths": [str(tmp_path / "raw" / "repos.jsonl")]})
    prepare(helpers.recipe(tmp_path, sources=given))
    view = MixtureManifest.read(mixture_path(tmp_path / "data", "second")).sources["repos"]
    assert view.category == "code"
    assert view.documents > 0
