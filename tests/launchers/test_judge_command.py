"""`quarry judge`: help, what it prints, labels, exit codes, refusals."""

from __future__ import annotations

import json

import pytest

from launchers import cli, judge_command
from tests.data_prep.judge.stub import Stub, answer, read, sample, says, status, write_samples


def quarry(*words):
    return cli.main(["judge", *map(str, words)])


@pytest.fixture
def samples(tmp_path):
    return write_samples(tmp_path / "samples.jsonl", [sample(mark) for mark in range(12)])


def behave(mark, *_):
    return says(answer() if mark % 3 else answer(flags={"hallucination": True}, correctness=2))


def test_help_has_examples(capsys):
    with pytest.raises(SystemExit):
        quarry("--help")
    out = capsys.readouterr().out
    assert "quarry judge --input" in out
    assert judge_command.KEY_VARIABLE in out


def test_it_judges_prints_counts_and_agreement(tmp_path, samples, capsys):
    labels = tmp_path / "labels.jsonl"
    labels.write_text(
        "".join(json.dumps({"id": f"s{m}", "verdict": "accept" if m % 3 else "borderline"}) + "\n" for m in range(9))
    )
    out = tmp_path / "out"
    with Stub(behave) as server:
        words = ["--input", samples, "--endpoint", server.url, "--model", "m", "--rubric", "auto", "--output", out]
        assert quarry(*words, "--labels", labels) == 0
        printed = capsys.readouterr().out
        assert "12 samples" in printed
        assert "to ask: 12 samples" in printed
        assert "agreement with 9 labels: 0.667" in printed
        assert len(read(out / "accepted.jsonl")) == 8
        record = json.loads((out / "record.json").read_text())
        assert record["calibration"]["confusion"]["borderline"] == {"accept": 0, "borderline": 0, "reject": 3}
        assert "not known" in record["judge"]["proves"]
        asked = sum(server.asked.values())
        assert quarry(*words) == 0
        assert sum(server.asked.values()) == asked == 12
        assert "(12 more are judged already)" in capsys.readouterr().out


def test_estimate_needs_no_endpoint_that_answers(tmp_path, samples, capsys):
    words = [
        "--input",
        samples,
        "--endpoint",
        "http://127.0.0.1:9/v1",
        "--model",
        "m",
        "--rubric",
        "general",
        "--output",
        tmp_path / "o",
    ]
    assert quarry(*words, "--estimate", "--price-input", "1", "--price-output", "2", "--requests-per-minute", "6") == 0
    printed = capsys.readouterr().out
    assert "12 samples" in printed
    assert "cost 0.0" in printed
    assert "about 2:00 min (from the rate limits" in printed
    assert not (tmp_path / "o" / "record.json").exists()
    assert quarry(*words[:2], "--endpoint", "local", *words[4:], "--estimate") == 0


def test_unjudged_samples_are_an_exit_code_unless_allowed(tmp_path, samples, capsys):
    with Stub(lambda mark, *_: status(422) if mark == 5 else says(answer())) as server:
        words = [
            "--input",
            samples,
            "--endpoint",
            server.url,
            "--model",
            "m",
            "--rubric",
            "general",
            "--output",
            tmp_path / "out",
        ]
        assert quarry(*words) == judge_command.EXIT_UNJUDGED
        assert "1 samples are unjudged; run the command again" in capsys.readouterr().out
        assert quarry(*words, "--max-unjudged-percent", "10") == 0


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"--input": "nowhere*.jsonl"}, "nothing matches"),
        ({"--endpoint": "host:1"}, "--endpoint host:1"),
        ({"--rubric": "unheard"}, "none of general"),
        ({"--rules": "unheard"}, "--rules unheard"),
        ({"--labels": "/nowhere"}, "--labels"),
        ({"--concurrency": "0"}, "--concurrency is 0"),
        ({"--temperature": "9"}, "--temperature 9"),
        ({"--price-input": "1"}, "give both or none"),
        ({"--max-cost": "1"}, "--max-cost"),
        ({"--max-unjudged-percent": "101"}, "--max-unjudged-percent"),
        ({"--model": None}, "--model: is missing"),
    ],
)
def test_refusals_say_what_and_how_to_mend(tmp_path, samples, capsys, changes, problem):
    options = {
        "--input": samples,
        "--endpoint": "http://127.0.0.1:9/v1",
        "--model": "m",
        "--rubric": "general",
        "--output": tmp_path / "o",
    }
    options |= changes
    assert quarry(*(word for pair in options.items() if pair[1] is not None for word in pair)) == 2
    assert problem in capsys.readouterr().err
    assert not (tmp_path / "o" / "audit.jsonl").exists()


def test_two_samples_of_one_id_cannot_be_labelled(tmp_path, capsys):
    path = write_samples(tmp_path / "s.jsonl", [sample(1), {**sample(2), "id": "s1"}])
    (tmp_path / "labels.jsonl").write_text('{"id": "s1", "verdict": "accept"}\n')
    words = [
        "--input",
        path,
        "--endpoint",
        "http://127.0.0.1:9/v1",
        "--model",
        "m",
        "--rubric",
        "general",
        "--output",
        tmp_path / "o",
    ]
    assert quarry(*words, "--labels", tmp_path / "labels.jsonl") == 2
    assert "two samples have the id s1" in capsys.readouterr().err
