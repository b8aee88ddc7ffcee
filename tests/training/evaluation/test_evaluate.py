"""`quarry eval` from a Megatron checkpoint to its three files; what was measured is not measured again; bad input is refused by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from launchers import cli
from model.errors import ModelError
from tests.training.evaluation.conftest import CONTEXT_TOKENS, StandIn, World
from training.evaluation import __main__ as program
from training.evaluation import evaluate, heldout, scoring
from training.evaluation.errors import EvaluationError
from training.evaluation.progress import Progress
from training.evaluation.request import Request

NEEDLE = {"samples": 1, "depths_percent": [0, 100], "choices": 4, "keys": 2}


def request(world: World, output: Path, **values: Any) -> Request:
    return Request.make(
        **{"model": world.hf, "output": output, "heldout_data": world.data, "device": "cpu", "needle": NEEDLE, **values}
    )


def test_from_a_checkpoint_to_results(
    world: World, stand_in: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    # Megatron's own measurement is tested in test_heldout.
    monkeypatch.setattr(heldout, "from_megatron", lambda found, root, samples, device, dtype: {"code": 1.0, "web": 2.0})
    asked = request(
        world, output, model=world.megatron, tasks=["heldout", "needle", "smoke"], lm_eval=stand_in.python, heldout_samples=2
    )
    text = asked.model_dump_json()
    assert program.main(["--request", text]) == program.DISAGREE
    said = capsys.readouterr()
    assert "the export is not the model that Megatron has" in said.err
    assert "DO NOT AGREE" in said.out
    results = json.loads((output / "results.json").read_bytes())
    assert results["model"]["kind"] == "megatron"
    assert len(results["model"]["sha256"]) == 64
    assert set(results["heldout"]["transformers"]) == {"code", "web"}
    assert [c["length_tokens"] for c in results["needle"]["by_length"]] == [CONTEXT_TOKENS // 2, CONTEXT_TOKENS]
    assert all(s["tokens"] == c["length_tokens"] for c in results["needle"]["cells"] for s in c["samples"])
    (row,) = results["benchmarks"]
    assert row["ours_percent"] == pytest.approx(100 * 11 / 24)
    markdown = (output / "results.md").read_text()
    assert "| smoke_choice | 45.83 ± 10.39 |" in markdown
    assert results["model"]["sha256"] in markdown
    # The export is a model like any other, and the checkpoint is not exported again.
    assert (output / "hf" / "tokenizer.json").is_file()
    written = (output / "hf" / "model.safetensors").stat().st_mtime_ns

    def never(*args: Any) -> Any:
        raise AssertionError("measured twice")

    monkeypatch.setattr(scoring, "load", never)
    monkeypatch.setattr(heldout, "from_megatron", never)
    assert program.main(["--request", text]) == program.DISAGREE
    assert len(stand_in.calls()) == 1
    assert (output / "hf" / "model.safetensors").stat().st_mtime_ns == written
    assert "measured before" in capsys.readouterr().out


def test_a_failure_in_a_late_part_keeps_the_early_ones_and_writes_no_results(
    world: World, stand_in: StandIn, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    asked = request(world, output, tasks=["needle", "smoke"], lm_eval=stand_in.python)
    known = {"quarry_smoke_choice": {"known": True, "tasks": ["quarry_smoke_choice"], "unsafe_code": False}}
    stand_in.orders(tasks=known, exit={"quarry_smoke_choice": 9})
    with pytest.raises(EvaluationError, match="exit code 9"):
        evaluate.evaluate(asked, Progress())
    assert not (output / "results.json").exists()
    assert sorted(p.name for p in (output / "parts").iterdir()) == [
        "needle.160.0.json",
        "needle.160.100.json",
        "needle.320.0.json",
        "needle.320.100.json",
    ]
    stand_in.orders(tasks=known)
    said: list[str] = []
    evaluate.evaluate(asked, Progress(said.append))
    assert sum(line.startswith("needle.") and "measured before" in line for line in said) == 4
    # Other questions are other measurements.
    again: list[str] = []
    evaluate.evaluate(asked.model_copy(update={"needle": asked.needle.model_copy(update={"seed": 5})}), Progress(again.append))
    assert not any(line.startswith("needle.") for line in again)
    # A skipped benchmark has its row, without a number.
    results = evaluate.evaluate(asked.model_copy(update={"skip": ["smoke_choice"]}), Progress(again.append))
    (row,) = results["benchmarks"]
    assert (row["ours_percent"], row["note"]) == (None, "not measured: --skip")


def test_refusals_name_what_is_wrong(world: World, tmp_path: Path, stand_in: StandIn) -> None:
    def refused(match: str, error: type[Exception] = EvaluationError, **values: Any) -> None:
        with pytest.raises(error, match=match):
            evaluate.evaluate(request(world, **{"output": tmp_path / "out", **values}), Progress())

    refused("no such folder", model=tmp_path / "nothing")
    refused("no checkpoint here", ModelError, model=tmp_path)
    refused("is the model's own folder", output=world.hf)
    refused("--lm-eval is missing", tasks=["smoke"])
    refused("no such task", tasks=["gsm9k"], lm_eval=stand_in.python)
    refused("no chat template; it is for instruct models", tasks=["granite_4_1_instruct"], lm_eval=stand_in.python)
    refused("--skip mmlu: no benchmark of these tasks; there are smoke_choice", tasks=["smoke"], skip=["mmlu"])
    refused("is no name", tasks=["a,b"])
    refused("named twice", tasks=["needle", "needle"])
    refused("--tasks is empty", tasks=[])
    refused("beyond the model's 320 tokens", needle=NEEDLE | {"lengths_tokens": [321]})
    refused("give --heldout-data", heldout_data=None)
    pickled = Path(shutil.copytree(world.hf, tmp_path / "pickled"))
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    refused("pickles can run code", ModelError, model=pickled)
    bare = Path(shutil.copytree(world.hf, tmp_path / "bare"))
    for path in bare.glob("tokenizer*"):
        path.unlink()
    refused("has no tokenizer", model=bare, tasks=["needle"])
    other = tmp_path / "other"
    other.mkdir()
    (other / "results.json").write_text(json.dumps({"model": {"sha256": "0" * 64}}))
    refused("results.json is of another model", output=other)
    with pytest.raises(EvaluationError, match=r"needle.samples.*limit|limit.*needle.samples"):
        request(world, tmp_path, limit=0, needle={"samples": 0})


def test_the_command_line_says_what_is_given(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from launchers import eval_command

    seen: list[list[str]] = []

    class Done:
        returncode = 78

    monkeypatch.setattr(eval_command.subprocess, "run", lambda command, check: seen.append(command) or Done())
    words = [
        "eval",
        str(tmp_path / "m"),
        "--tasks",
        "needle",
        "smoke",
        "--needle-lengths",
        "100",
        "200",
        "--needle-depths",
        "0",
        "12.5",
    ]
    assert cli.main([*words, "--seed", "3", "--lm-eval", "x/python", "--limit", "4"]) == 78
    asked = Request.read(seen[0][-1])
    assert asked.output == tmp_path / "m-eval"
    assert asked.tasks == ["needle", "smoke"]
    assert (asked.needle.lengths_tokens, asked.needle.depths_percent, asked.needle.seed) == ([100, 200], [0, 12.5], 3)
    assert (asked.lm_eval, asked.limit, asked.batch_size) == (Path("x/python"), 4, 4)
    assert cli.main(["eval", str(tmp_path)]) == 78
    assert Request.read(seen[1][-1]).tasks == ["heldout", "needle"]


def test_an_interrupt_says_how_to_go_on(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*args: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(scoring, "score", interrupt)
    asked = request(world, tmp_path / "out", tasks=["needle"])
    assert program.main(["--request", asked.model_dump_json()]) == program.INTERRUPTED
    assert "run the same command to go on" in capsys.readouterr().err
    assert not (tmp_path / "out" / "results.json").exists()


def test_progress_says_how_long_it_takes() -> None:
    said: list[str] = []
    with Progress(said.append, every_seconds=0).part("needle", 10) as done:
        done(5)
        done(5)
    assert said[0] == "needle: 50 %, about 0:00 left"
    assert said[-1].startswith("needle: done in ")
