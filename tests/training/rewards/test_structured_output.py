"""Strict JSON against a schema."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.training.rewards.helpers import quick
from training.rewards import RewardError, Sample
from training.rewards.structured_output import StructuredOptions, StructuredOutput, same_json, strict_json

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer", "minimum": 0}},
    "required": ["name"],
    "additionalProperties": False,
}
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


def score(completion, reference=SCHEMA, **options):
    return StructuredOutput(StructuredOptions(**options)).score(Sample(completion=completion, reference=reference))


@pytest.mark.parametrize(
    ("completion", "value", "reason"),
    [
        ('{"name": "Ada", "age": 36}', 1, "fits"),
        (' \n{"name": "Ada"}\n', 1, "fits"),
        ('{"name": "Ada", "age": -1}', 0, "age: -1 is less than"),
        ('{"name": "Ada", "x": 1}', 0, "(root): Additional"),
        ('{"name": 1}', 0, "name: 1 is not of type"),
        ('{"name": "Ada"} trailing', 0, "not JSON: Extra data"),
        ('{"name": "Ada", "name": "Bob"}', 0, "'name' twice"),
        ('{"name": "Ada", "age": NaN}', 0, "NaN is not JSON"),
        ('{"name": "Ada", "age": 1' + "0" * 5000 + "}", 0, "not JSON"),
        ("\ufeff{}", 0, "not JSON"),
        ("[" * 100_000, 0, "not JSON"),
        ("", 0, "not JSON"),
        ("{'name': 'Ada'}", 0, "not JSON"),
    ],
)
def test_completions(completion, value, reason):
    result = score(completion)
    assert (result.value, result.failed) == (value, False)
    assert reason in result.reason


def test_code_fences_are_a_policy():
    fenced, bare = '```json\n{"name": "Ada"}\n```', '{"name": "Ada"}'
    values = {
        policy: (score(fenced, code_fence=policy).value, score(bare, code_fence=policy).value)
        for policy in ("forbid", "allow", "require")
    }
    assert values == {"forbid": (0, 1), "allow": (1, 1), "require": (1, 0)}
    assert score("Here:\n" + fenced, code_fence="allow").value == 0


def test_an_expected_value_is_compared():
    reference = {"schema": SCHEMA, "expected": {"age": 36, "name": "Ada"}}
    assert score('{"name": "Ada", "age": 36.0}', reference).value == 1
    assert score('{"name": "Ada", "age": 37}', reference, parsed_value=0.25).value == 0.25


def test_a_schema_of_the_plan_serves_every_sample():
    assert score('{"name": "Ada"}', None, json_schema=SCHEMA).value == 1
    reward = StructuredOutput(StructuredOptions(json_schema={"type": "strange"}))
    with pytest.raises(RewardError, match="not a valid schema at"):
        reward.prepare()


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        (None, "no schema: reference must be a JSON schema, found None"),
        ([], "no schema"),
        ({"schema": 1}, "no schema"),
        ({"type": "strange"}, "not a valid schema"),
    ],
)
def test_a_bad_reference_is_the_datas_failure(reference, message):
    for act in (
        lambda reward: reward.check_reference(reference),
        lambda reward: reward.score(Sample(completion="{}", reference=reference)),
    ):
        with pytest.raises(RewardError, match=message):
            act(StructuredOutput(StructuredOptions()))


def test_a_schema_elsewhere_is_not_downloaded():
    with pytest.raises(Exception, match="Unresolvable.*192.0.2.1"):  # the worker makes a failure score of it
        score("{}", {"$ref": "http://192.0.2.1/schema.json"})


@quick
@given(values)
def test_json_that_python_writes_is_read_and_equal_to_itself(value):
    assert same_json(strict_json(json.dumps(value)), value)
    assert score(json.dumps(value), {"schema": {}, "expected": value}).value == 1


@quick
@given(values, values)
def test_equality_is_symmetric_and_finer_than_pythons(left, right):
    assert same_json(left, right) == same_json(right, left)
    if same_json(left, right):
        assert left == right
