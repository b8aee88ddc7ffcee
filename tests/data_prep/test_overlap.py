"""Files that two sources share are found under whatever name, and all of them are said."""

import os
import shutil

import pytest

from data_prep.errors import DataError
from data_prep.files import record_file
from data_prep.overlap import overlaps, refuse_overlaps, refuse_same_content, same_content
from data_prep.records import InputFile
from tests.data_prep import helpers


@pytest.fixture
def paths(tmp_path):
    helpers.raw(tmp_path)
    return {name: [tmp_path / "raw" / f"{name}.jsonl"] for name in helpers.CATEGORY}


@pytest.fixture
def data(tmp_path):
    return helpers.recipe(tmp_path).data


def inputs(paths):
    return {
        name: [InputFile(path=str(path), mtime_ns=0, record=record_file(path)) for path in files]
        for name, files in paths.items()
    }


def test_separate_files_pass(data, paths):
    refuse_overlaps(data, paths)
    refuse_same_content(inputs(paths))


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_the_same_file_under_another_name_is_refused(data, paths, tmp_path, link):
    link(paths["web_a"][0], tmp_path / "other.jsonl")
    paths["math_a"].append(tmp_path / "other.jsonl")
    with pytest.raises(
        DataError, match=r"data.sources.web_a and data.sources.math_a share the file .*web_a.jsonl \(also .*other.jsonl\)"
    ):
        refuse_overlaps(data, paths)


def test_a_folder_that_is_a_link_hides_nothing(data, paths, tmp_path):
    (tmp_path / "again").symlink_to(tmp_path / "raw")
    paths["web_b"] = [tmp_path / "again" / "web_a.jsonl"]
    assert "data.sources.web_a and data.sources.web_b share" in overlaps(data, paths)[0]


def test_a_file_twice_in_one_source_is_refused(data, paths, tmp_path):
    (tmp_path / "b.jsonl").symlink_to(paths["web_a"][0])
    paths["web_a"].append(tmp_path / "b.jsonl")
    with pytest.raises(DataError, match=r"data.sources.web_a has the file .* twice; name it once in data.sources.web_a.paths"):
        refuse_overlaps(data, paths)


def test_many_shared_files_are_one_problem_per_pair_of_sources(data, paths, tmp_path):
    for n in range(5):
        shutil.copy(paths["code_a"][0], tmp_path / f"{n}.jsonl")
        paths["web_a"].append(tmp_path / f"{n}.jsonl")
    paths["web_b"] += paths["web_a"][1:]
    paths["math_a"] += paths["code_a"]
    first, second = sorted(overlaps(data, paths))
    assert first.startswith("data.sources.code_a and data.sources.math_a share the file")
    assert "0.jsonl and 4 more" in second


def test_a_copy_is_found_by_its_content(paths, tmp_path):
    shutil.copy(paths["code_a"][0], tmp_path / "copy.jsonl")
    paths["web_a"].append(tmp_path / "copy.jsonl")
    with pytest.raises(
        DataError, match=r"web_a and data.sources.code_a share the content of .*copy.jsonl \(also .*code_a.jsonl\)"
    ):
        refuse_same_content(inputs(paths))


def test_equal_indexes_empty_files_and_copies_within_a_source_are_not_shared_content(paths, tmp_path):
    for name in ("web_a", "code_a"):
        for suffix, text in ((".idx", "same lengths"), (".jsonl", "")):
            path = tmp_path / f"{name}{suffix}"
            path.write_text(text)
            paths[name].append(path)
    shutil.copy(paths["web_a"][0], tmp_path / "copy.jsonl")
    paths["web_a"].append(tmp_path / "copy.jsonl")  # its documents are duplicates, which deduplication removes
    assert same_content(inputs(paths)) == []


def test_a_builder_used_twice_is_refused(tmp_path):
    sources = {name: {"category": "web", "kind": "builtin", "builder": "books"} for name in ("a", "b")}
    data = helpers.recipe(tmp_path, sources=sources).data
    with pytest.raises(DataError, match=r"data.sources.a and data.sources.b share the builder 'books'"):
        refuse_overlaps(data, {})
