"""Reading, repairs, types and rules, one sample at a time."""

from __future__ import annotations

import gzip
import json
import unicodedata

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.errors import DataError
from data_prep.judge.config import Rubric, load_curation, load_rubric
from data_prep.judge.duplicates import Leakage, NearDuplicateSearch
from data_prep.judge.planning import auto_rubric
from data_prep.judge.rules import RULES, first_finding
from data_prep.judge.samples import Sample, normalise, read_lines, typed
from tests.data_prep.judge.stub import sample

SFT = load_curation("sft")
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "minLength": 1}, "days": {"type": "integer", "maximum": 7}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


def user(text="hello"):
    return {"role": "user", "content": text}


def said(text="hi", **more):
    return {"role": "assistant", "content": text, **more}


def call(arguments, name="weather", id="c1"):
    return {
        "role": "assistant",
        "tool_calls": [{"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}],
    }


def result(text="sunny", id="c1"):
    return {"role": "tool", "content": text, "tool_call_id": id}


def refused(messages, tools=None, curation=SFT):
    """(step, reason), or None for a sample that passes."""
    value, _ = normalise({"messages": messages, "tools": tools}, curation.unicode_form)
    found = typed(value)
    if isinstance(found, str):
        return "schema", found
    finding = first_finding(found, curation)
    return finding and (finding[0], finding[1].reason)


SYSTEM = {"role": "system", "content": "be brief"}


@pytest.mark.parametrize(
    "messages",
    [
        [user(), said()],
        [SYSTEM, user(), said(), user(), said()],
        [user(), call({"city": "Oslo"}), result(), said()],
        [user(), call('{"city": "Oslo", "days": 3}')],  # ends with a call; arguments as text
        [user(), call({"city": "Oslo"}), result(), call({"city": "Bergen"}, id="c2"), result(id="c2"), said()],
    ],
)
def test_good_samples_pass(messages):
    assert refused(messages, [WEATHER]) is None


@pytest.mark.parametrize(
    ("messages", "why"),
    [
        ([], ("turn_order", "turn order")),
        ([SYSTEM], ("turn_order", "turn order")),
        ([user()], ("turn_order", "turn order")),
        ([said()], ("turn_order", "turn order")),
        ([user(), user(), said()], ("turn_order", "turn order")),
        ([user(), said(), SYSTEM, user(), said()], ("turn_order", "turn order")),
        ([user(), result(), said()], ("turn_order", "turn order")),
        ([user(), call({"city": "Oslo"}), said()], ("turn_order", "turn order")),
        ([user(), call({"city": "Oslo"}), result(id="other"), said()], ("turn_order", "turn order")),
        ([user(), {"role": "assistant", "content": None}], ("turn_order", "turn order")),
        ([user(" "), said()], ("lengths", "empty question")),
        ([user(), said("")], ("lengths", "answer too short")),
        ([user(), said("x" * 40_001)], ("lengths", "answer too long")),
        ([user("x" * 60_001), said()], ("lengths", "too long")),
        ([user(), said()] * 65, ("lengths", "too many messages")),
        ([user("a <|end_of_text|> b"), said()], ("control_tokens", "control token")),
        ([user(), said("<tool_call>")], ("control_tokens", "control token")),
        ([user(), call({"city": "Oslo"}, name="whether")], ("tool_calls", "unknown tool")),
        ([user(), call({})], ("tool_calls", "tool arguments")),
        ([user(), call({"city": "Oslo", "days": 8})], ("tool_calls", "tool arguments")),
        ([user(), call({"city": "Oslo", "unit": "K"})], ("tool_calls", "tool arguments")),
    ],
)  # fmt: skip
def test_what_the_rules_refuse(messages, why):
    assert refused(messages, [WEATHER]) == why


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ({}, "messages: Field required"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": "x", "weight": 1}]}, "messages.0.weight: Extra"),
        ({"messages": [user(), call("not json")]}, "messages.1.tool_calls.0.function.arguments"),
        ({"messages": [user(), said()], "tools": [{"function": {}}]}, "tools.0.function.name"),
        ({"messages": [user([{"type": "image_url", "image_url": "x"}]), said()]}, "messages.0.content"),
        ({"messages": [user("\ud800"), said()]}, "surrogate"),
    ],
)
def test_the_schema_names_the_key(value, problem):
    found = typed(normalise(value, "NFC")[0])
    assert isinstance(found, str)
    assert problem in found


@pytest.mark.parametrize(
    "parameters",
    [
        {"type": "objekt"},
        {"type": "string"},
        {"type": "object", "properties": {"city": {"pattern": "("}}},
        {"$ref": "http://127.0.0.1:9/schema.json"},
        {"type": "object", "properties": {"city": {"$ref": "#/nowhere"}}},
        {"$ref": "#"},
        {"type": "object", "properties": {"city": {"type": "string", "pattern": "^(a+)+$"}}},  # minutes, without a limit
    ],
)
def test_hostile_schemas_refuse_the_sample_and_stop_nothing(parameters):
    tool = {"type": "function", "function": {"name": "weather", "parameters": parameters}}
    assert refused([user(), call({"city": "a" * 40 + "!"})], [tool])[0] == "tool_calls"


def test_repairs_are_named_and_make_equal_content_equal():
    rough = {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "cafe\u0301\r\n"}]},
            {"role": "assistant", "content": "ok\x07  ", "tool_calls": []},
            {"role": "user", "content": "go"},
            {"role": "assistant", "tool_calls": [{"name": "weather", "arguments": '{"city":"Oslo"}'}]},
        ],
        "tools": [WEATHER["function"]],
        "documents": ["text"],
    }
    smooth = {
        "messages": [user("caf\u00e9"), said("ok"), user("go"), call({"city": "Oslo"}, id=None)],
        "tools": [WEATHER],
        "documents": [{"text": "text"}],
    }
    value, repairs = normalise(rough, "NFC")
    assert repairs == [
        "arguments", "blank_ends", "control_characters", "empty_calls", "line_ends", "parts", "unicode_form", "wrapped",
    ]  # fmt: skip
    assert typed(value).sha256 == typed(smooth).sha256
    assert rough["messages"][0]["content"][0]["text"] == "cafe\u0301\r\n"  # the given object is not changed


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "content", "function", "x"]), inner, max_size=3)
    ),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None)
@given(st.fixed_dictionaries({"messages": JSON, "tools": JSON, "documents": JSON}))
def test_nothing_that_is_json_breaks_normalisation_schema_or_rules(value):
    normal, _ = normalise(value, "NFC")
    found = typed(normal)
    if isinstance(found, Sample):
        first_finding(found, SFT)


@settings(max_examples=100, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
def test_normalising_twice_is_normalising_once(text):
    once, _ = normalise({"messages": [user(text)]}, "NFC")
    again, repairs = normalise(once, "NFC")
    assert (again, repairs) == (once, [])
    assert unicodedata.is_normalized("NFC", once["messages"][0]["content"])


def test_rules_do_not_change_the_sample():
    found = typed(sample(1, tools=[WEATHER]))
    before = found.model_copy(deep=True)
    for rule in RULES.values():
        rule(found, SFT)
    assert found == before


def test_files_are_read_packed_or_not_and_to_where_they_break_off(tmp_path):
    text = (json.dumps(sample(1)) + "\n\n" + json.dumps(sample(2)) + "\n").encode()
    (tmp_path / "a.jsonl").write_bytes(text)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(text))
    (tmp_path / "c.jsonl.zst").write_bytes(zstandard.compress(text))
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(text)[:-12])
    found = list(read_lines(sorted(tmp_path.iterdir())))
    assert [line.number for line in found] == list(range(1, len(found) + 1))
    assert [(line.id, line.line) for line in found[:6]] == [("s1", 1), ("s2", 3)] * 3
    assert found[-1].bad is not None
    assert "truncated" in found[-1].bad
    big = 2**70 + 1
    (tmp_path / "e.jsonl").write_text(json.dumps({"id": big}))
    assert next(read_lines([tmp_path / "e.jsonl"])).value == {"id": big}


def test_leakage_names_benchmark_and_item():
    leakage = Leakage(load_curation("smoke"))
    question = "A train leaves at 7:15 and needs two hours and fifty minutes for its way. When does it arrive?"
    leaked = typed({"messages": [user("x"), said(f"They ask: {question}")]})
    assert [f and f.detail.split(":")[0] for f in leakage.find([typed(sample(1)), leaked])] == [None, "smoke, arithmetic-3"]


def test_near_duplicates_keep_the_first():
    search = NearDuplicateSearch(load_curation("sft_near").near_duplicates)
    words = [f"{a}{b}" for a in "bcdfghklm" for b in ("ale", "ore", "in", "um", "ast", "ick")]
    for number, text in [(3, words), (5, words[::-1]), (6, [*words, "more"]), (9, words[:-1])]:
        search.add(number, typed({"messages": [user("q"), said(" ".join(text))]}))
    assert search.duplicates() == {6: 3, 9: 3}


def test_rubric_by_the_shape_of_a_sample():
    one = sample(1)
    turns = {"messages": [user(), said(), user(), said()]}
    for value, name in [
        (one, "general"),
        (turns, "multi_turn"),
        ({**one, "documents": ["d"]}, "rag"),
        ({**one, "documents": ["d"], "tools": [WEATHER]}, "tool_calling"),
        ({**one, "language": "de"}, "multilingual"),
        ({**turns, "language": "en-GB"}, "multi_turn"),
    ]:
        assert auto_rubric(typed(normalise(value, None)[0]), value) == name


# --- the files a person edits ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("base: general\nname: x\ndimensions: {correctness: {weight: 0.5}}\n", "weights sum to 1.2"),
        ("base: general\nname: x\nthresholds: {accept: 2.0}\n", "must ascend"),
        ("base: general\nname: x\nscale: {highest: 100}\n", "no scale"),
        ("base: general\nname: x\nextra: 1\n", "extra: Extra inputs"),
        ("base: general\nname: x\ndimensions: {Bad Name: {weight: 0.1, question: x}}\n", "Bad Name"),
        ("base: nowhere\n", "no such file and none of general"),
        ("base: x.yaml\n", "its own base"),
        ("- 1\n", "no mapping"),
        ("a: [\n", "as YAML"),
    ],
)
def test_wrong_rubrics_are_refused_with_the_file_and_the_reason(tmp_path, text, problem):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(DataError, match=problem):
        load_rubric(str(tmp_path / "x.yaml"))


def test_a_rubric_of_ones_own_changes_takes_out_and_adds(tmp_path):
    (tmp_path / "mine.yaml").write_text(
        'base: general\nname: mine\ndimensions:\n  calibration: null\n  safety: {weight: 0.15, question: "Is it safe?"}\n'
        "  correctness: {floor: null}\nhard_rejects: {false_premise: null}\nreason_max_characters: null\n"
    )
    mine, general = load_rubric(str(tmp_path / "mine.yaml")), load_rubric("general")
    assert set(mine.dimensions) == {*general.dimensions, "safety"} - {"calibration"}
    assert mine.dimensions["correctness"].floor is None
    assert set(mine.hard_rejects) == {"hallucination", "incorrect_computation"}
    assert mine.asked != general.asked
    dearer = Rubric.model_validate({**general.model_dump(), "thresholds": {"accept": 4.5, "borderline": 3.5}})
    assert (dearer.asked, dearer.sha256 != general.sha256) == (general.asked, True)
