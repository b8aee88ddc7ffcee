"""Steps of a fine-tuning stage, which no recipe counts."""

import json
from pathlib import Path

from launchers.hang import _steps_of_phase
from launchers.stage_job import StageJob
from launchers.steps import sft_steps


def test_they_follow_from_the_packed_data(tmp_path: Path) -> None:
    folder = tmp_path / "data" / "sft" / "chat"
    folder.mkdir(parents=True)
    assert sft_steps(tmp_path / "data", "chat", epochs=3, batch_sequences=8) is None
    (folder / "manifest.json").write_text(json.dumps({"training": {"sequences": 9}}))
    assert sft_steps(tmp_path / "data", "chat", epochs=3, batch_sequences=8) == 4
    (folder / "manifest.json").write_text("{")
    assert sft_steps(tmp_path / "data", "chat", epochs=3, batch_sequences=8) is None


def test_a_job_is_watched_by_them(tmp_path: Path) -> None:
    folder = tmp_path / "data" / "sft" / "chat"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(json.dumps({"training": {"sequences": 9}}))
    sft = {"chat": {"epochs": 2, "global_batch_sequences": 4}}
    recipe = {"phase": {"a": {"steps": 7}}, "sft": sft, "data": {"root": str(tmp_path / "data")}}
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    found = {}
    for stage in ("a", "chat", "export"):
        job = StageJob(run="r", stage=stage, run_dir=str(tmp_path), stage_dir=str(tmp_path), command=[], environment={})
        found[stage] = _steps_of_phase(job)
    assert found == {"a": 7, "chat": 5, "export": None}
