"""Samples of a source on their way through the judge into an SFT stage: only what it accepts, asked once, made again when anything changed."""

from __future__ import annotations

import json

import pytest

from data_prep.errors import DataError
from data_prep.progress import Silent
from data_prep.sft_judged import judged_paths
from recipes.sft_options import SftJudge
from tests.data_prep.judge.stub import Stub, answer, read, sample, says, status, write_samples


def behave(mark, attempt, request):
    """Even marks are good answers, odd ones make things up."""
    return says(answer(flags={"hallucination": mark % 2 == 1}))


class Said(Silent):
    def __init__(self):
        self.lines = []
        self.message = self.lines.append


def judged(folder, url, path, progress=None, **changes):
    judge = SftJudge.model_validate({"endpoint": url, "model": "stub", "rubric": "general", **changes})
    return judged_paths([path], judge, folder / "judged", "sft.sft.sources.chat", progress or Silent())


def test_what_the_judge_refuses_is_not_trained_on_and_nothing_is_asked_twice(tmp_path):
    path = write_samples(tmp_path / "chat.jsonl", [sample(mark) for mark in range(10)])
    said = Said()
    with Stub(behave) as stub:
        (accepted,) = judged(tmp_path, stub.url, path)
        assert [line["id"] for line in read(accepted)] == [f"s{mark}" for mark in range(0, 10, 2)]
        assert sum(stub.asked.values()) == 10
        before = accepted.stat().st_mtime_ns
        assert judged(tmp_path, stub.url, path, said) == [accepted]
        assert said.lines == ["sft.sft.sources.chat: judged before, nothing to do"]
        assert accepted.stat().st_mtime_ns == before
        write_samples(path, [sample(mark) for mark in range(12)])
        judged(tmp_path, stub.url, path)
        assert sum(stub.asked.values()) == 12, "only the two new ones"
        assert len(read(accepted)) == 6


def test_damaged_files_and_other_settings_are_noticed(tmp_path):
    path = write_samples(tmp_path / "chat.jsonl", [sample(mark) for mark in range(4)])
    with Stub(behave) as stub:
        (accepted,) = judged(tmp_path, stub.url, path)
        whole = accepted.read_bytes()
        accepted.write_bytes(whole[:-10])
        judged(tmp_path, stub.url, path)
        assert accepted.read_bytes() == whole
        (tmp_path / "judged" / "made_from.json").write_text("{")
        judged(tmp_path, stub.url, path)
        assert sum(stub.asked.values()) == 4, "the cache has all of them"
        judged(tmp_path, stub.url, path, model="another")
        assert sum(stub.asked.values()) == 8, "another judge is asked anew"


def test_borderline_samples_are_taken_where_the_recipe_says_so(tmp_path):
    path = write_samples(tmp_path / "chat.jsonl", [sample(1), sample(2)])
    middling = {
        name: 3
        for name in ("instruction_following", "correctness", "completeness", "conciseness", "naturalness", "calibration")
    }
    with Stub(lambda mark, *_: says(answer(**middling) if mark == 1 else answer())) as stub:
        paths = judged(tmp_path, stub.url, path, take=["accepted", "borderline"])
    assert [[line["id"] for line in read(p)] for p in paths] == [["s2"], ["s1"]]


def test_samples_without_a_judgement_stop_the_preparation_until_they_have_one(tmp_path):
    path = write_samples(tmp_path / "chat.jsonl", [sample(mark) for mark in range(4)])
    broken = True
    with Stub(lambda mark, *_: status(400) if broken and mark == 3 else says(answer())) as stub:
        with pytest.raises(DataError, match=r"chat\.judge: 1 of 4 samples have no judgement.*HTTP 400|chat\.judge: 1 of 4"):
            judged(tmp_path, stub.url, path)
        assert not (tmp_path / "judged" / "made_from.json").exists()
        assert len(judged(tmp_path, stub.url, path, max_unjudged_percent=25)) == 1
        (tmp_path / "judged" / "made_from.json").unlink()
        broken = False
        (accepted,) = judged(tmp_path, stub.url, path)
        assert len(read(accepted)) == 4


def test_a_judge_that_lets_nothing_through_stops_the_preparation_unless_that_is_allowed(tmp_path):
    path = write_samples(tmp_path / "chat.jsonl", [sample(mark) for mark in (1, 3)])
    with Stub(behave) as stub:
        with pytest.raises(DataError, match=r"chat\.judge: 0 of 2 samples are accepted, fewer than min_taken_percent = 1;"):
            judged(tmp_path, stub.url, path)
        (accepted,) = judged(tmp_path, stub.url, path, min_taken_percent=0)
    assert accepted.read_bytes() == b""


def test_parquet_is_refused_by_name(tmp_path):
    with pytest.raises(DataError, match=r"chat\.paths: .*x\.parquet is Parquet"):
        judged(tmp_path, "http://127.0.0.1:9/v1", tmp_path / "x.parquet")


def test_the_files_are_json_lines_that_sft_reads(tmp_path):
    from data_prep.sft_samples import check

    path = write_samples(tmp_path / "chat.jsonl", [sample(0)])
    with Stub(behave) as stub:
        (accepted,) = judged(tmp_path, stub.url, path)
    for line in accepted.read_text().splitlines():
        assert isinstance(check(json.loads(line), None), dict), "else it is the reason for a refusal"
