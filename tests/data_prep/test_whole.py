"""What a whole curriculum reads: missing files of later stages are named before hours of work, and can be left for later."""

from __future__ import annotations

import pytest

from data_prep.errors import DataError
from data_prep.whole import check_files
from recipes.compose import compose


def test_every_missing_file_of_post_training_is_named_at_once_with_what_else_can_be_done(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = compose([])
    with pytest.raises(DataError) as refused:
        check_files(recipe)
    lines = str(refused.value).splitlines()
    named = [line.split(":")[0] for line in lines[:-1]]
    assert named == [
        "sft.sft.sources.conversations.paths",
        *(f"grpo.{s}.prompts" for s in ("multi_domain", "rlhf", "identity", "math")),
    ]
    assert lines[-1].endswith("--to final_annealing")


def test_only_what_is_asked_for_now_is_looked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = compose([])
    check_files(recipe, "final_annealing")
    (tmp_path / "data" / "posttrain" / "sft").mkdir(parents=True)
    (tmp_path / "data" / "posttrain" / "sft" / "chat.jsonl").write_text("{}\n")
    check_files(recipe, "sft")
    with pytest.raises(DataError, match="grpo.multi_domain.prompts"):
        check_files(recipe, "multi_domain")


def test_the_smoke_curriculum_needs_no_file():
    check_files(compose(["curriculum=smoke"]))
