"""python -m training.rewards: the list, a check, and a file of samples scored."""

import json
import re
from pathlib import Path

import pytest
import yaml

from training.rewards import RewardPlan
from training.rewards.__main__ import main
from training.rewards.code_execution import TESTS
from training.rewards.registry import REWARDS


def run(capsys, *arguments):
    code = main([str(a) for a in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_list_names_every_reward_and_explains_every_option(capsys):
    code, out, _ = run(capsys, "--list")
    assert code == 0
    lines = out.splitlines()
    assert [line.partition(":")[0] for line in lines if not line.startswith(" ")] == list(REWARDS)
    unexplained = [line for line in lines if line.startswith(" ") and line.rstrip().endswith("):")]
    assert not unexplained


def test_a_file_is_scored(capsys, tmp_path):
    samples = tmp_path / "samples.jsonl"
    samples.write_text(
        '{"completion": "{}", "reference": {"type": "object"}}\n\n{"completion": "[]", "reference": {"type": "object"}}\n'
    )
    plan = tmp_path / "plan.yaml"
    plan.write_text("domains:\n  '*':\n    parts: [{reward: json_schema}]\nworkers: 1\n")
    output = tmp_path / "scores.jsonl"
    code, out, err = run(capsys, "--plan", plan, "--input", samples, "--output", output)
    assert (code, out) == (0, "")
    assert [json.loads(line)["value"] for line in output.read_text().splitlines()] == [1.0, 0.0]
    assert json.loads(err)["default"]["mean"] == 0.5
    assert run(capsys, "--plan", plan, "--check", "--input", samples) == (0, "every reward of the plan can work here\n", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--reward", "maths"], "no reward is called 'maths'"),
        (["--reward", "math", "--options", "{"], "--options: not JSON"),
        (["--reward", "math", "--options", "[]"], "--options: must be a JSON object"),
        (["--plan", "no_such_file.yaml"], "no_such_file.yaml: cannot be read"),
        (["--reward", "format", "--workers", "0"], "workers: Input should be greater than 0"),
    ],
)
def test_mistakes_are_one_message(capsys, tmp_path, arguments, message):
    samples = tmp_path / "samples.jsonl"
    samples.write_text("")
    code, out, err = run(capsys, *arguments, "--input", samples)
    assert (code, out) == (2, "")
    assert message in err


def test_a_bad_line_leaves_no_half_output(capsys, tmp_path):
    samples = tmp_path / "samples.jsonl"
    samples.write_text('{"completion": "{}"}\n{"completion": 3}\n')
    output = tmp_path / "scores.jsonl"
    code, _, err = run(capsys, "--reward", "format", "--workers", 1, "--input", samples, "--output", output)
    assert code == 2
    assert f"{samples}, line 2: completion: Input should be a valid string" in err
    assert list(tmp_path.iterdir()) == [samples]


def test_the_documents_examples_are_valid():
    text = (Path(__file__).parents[3] / "docs" / "rewards.md").read_text()
    plan = RewardPlan.parse(yaml.safe_load(re.search(r"```yaml\n(.*?)```", text, re.DOTALL).group(1)))
    assert set(plan.domains) == {"math", "code", "chat", "*"}
    assert len(TESTS.validate_json(re.search(r"```json\n(.*?)```", text, re.DOTALL).group(1))) == 3
