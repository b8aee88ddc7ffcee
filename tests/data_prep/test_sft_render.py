"""Rendered chat samples against transformers' own masks, and what is no sample."""

import copy

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.errors import DataError
from data_prep.sft_render import Renderer
from data_prep.sft_samples import check, control_tokens, from_parquet
from data_prep.special_tokens import END, GRANITE, ROLES
from data_prep.text_files import Reason
from data_prep.tokenizer import write_hf_tokenizer

transformers = pytest.importorskip("transformers")

CONTROL = control_tokens((*GRANITE, "<unk>", "<|start_of_text|>", "<pad>"))
TEXT = st.text(min_size=1, max_size=30).filter(lambda text: text.strip() and not CONTROL.search(text) and "\0" not in text)
TOOLS = [{"type": "function", "function": {"name": "add", "description": "Adds <é>", "parameters": {"type": "object"}}}]
DOCUMENTS = [{"doc_id": 1, "title": "One", "text": "first\nline"}]
CALL = st.dictionaries(st.text("abc", min_size=1, max_size=3), st.integers() | TEXT, max_size=2).map(
    lambda arguments: {"type": "function", "function": {"name": "add", "arguments": arguments}}
)
TURN = st.one_of(
    st.tuples(TEXT, TEXT).map(lambda t: [{"role": "user", "content": t[0]}, {"role": "assistant", "content": t[1]}]),
    st.tuples(TEXT, st.none() | TEXT, st.lists(CALL, min_size=1, max_size=2), TEXT, TEXT).map(
        lambda t: [
            {"role": "user", "content": t[0]},
            {"role": "assistant", "tool_calls": t[2], **({"content": t[1]} if t[1] else {})},
            {"role": "tool", "content": t[3]},
            {"role": "assistant", "content": t[4]},
        ]
    ),
)
SAMPLE = st.tuples(st.none() | TEXT, st.lists(TURN, min_size=1, max_size=3), st.booleans()).map(
    lambda t: {
        "messages": [{"role": "system", "content": t[0]}] * (t[0] is not None) + [m for turn in t[1] for m in turn],
        "tools": TOOLS,
        **({"documents": DOCUMENTS} if t[2] else {}),
    }
)
GOOD = {"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]}


@pytest.fixture(scope="module", params=["sentencepiece", "huggingface"])
def chat(request, trained, byte_level, tmp_path_factory):
    """(our renderer, the tokenizer as transformers loads it)"""
    folder = tmp_path_factory.mktemp("chat")
    write_hf_tokenizer(trained if request.param == "sentencepiece" else byte_level, folder)
    return Renderer(folder), transformers.AutoTokenizer.from_pretrained(folder)


@settings(deadline=None, max_examples=60)
@given(samples=st.lists(SAMPLE, min_size=1, max_size=3))
def test_ids_and_mask_are_transformers(chat, samples):
    renderer, loaded = chat
    checked = [check(copy.deepcopy(sample), CONTROL) for sample in samples]
    assert not any(isinstance(sample, Reason) for sample in checked), checked
    for sample, ours in zip(checked, renderer.render(checked), strict=True):
        theirs = loaded.apply_chat_template(
            sample["messages"],
            tools=sample["tools"],
            documents=sample.get("documents"),
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        assert ours.tokens.tolist() == theirs["input_ids"]
        assert ours.learned.tolist() == theirs["assistant_masks"]
        ends = int((ours.tokens == loaded.convert_tokens_to_ids(END))[ours.learned == 1].sum())
        assert ends == sum(message["role"] == "assistant" for message in sample["messages"])  # each turn's end is learned


def test_only_the_answer_is_learned(chat):
    renderer, loaded = chat
    (rendered,) = renderer.render([check(GOOD, CONTROL)])
    assert rendered.tokens.dtype == np.int32
    assert loaded.decode(rendered.tokens[rendered.learned == 1]) == f"4{END}"


def test_a_template_without_generation_tags_is_refused(chat, tmp_path):
    renderer, loaded = chat
    bare = tmp_path / "bare.jinja"
    bare.write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    with pytest.raises(DataError, match=r"has no \{% generation %\} tag"):
        Renderer(_folder(loaded, tmp_path), bare)
    own = tmp_path / "own.jinja"
    own.write_text("{% for m in messages %}{{ m.role }}: {% generation %}{{ m.content }}{% endgeneration %}{% endfor %}")
    other = Renderer(_folder(loaded, tmp_path), own)
    assert other.digest != renderer.digest
    (rendered,) = other.render([GOOD])
    assert loaded.decode(rendered.tokens[rendered.learned == 1]).replace(" ", "") == "2+2?4"
    with pytest.raises(DataError, match="no such file"):
        Renderer(tmp_path / "nowhere")


def _folder(loaded, tmp_path):
    loaded.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def test_what_the_template_refuses_is_a_reason(chat, tmp_path):
    _, loaded = chat
    picky = tmp_path / "picky.jinja"
    picky.write_text("{% generation %}{% endgeneration %}{{ raise_exception('no place for this') }}")
    (found,) = Renderer(_folder(loaded, tmp_path), picky).render([GOOD])
    assert str(found) == "template refuses: no place for this"


def _with(**changes):
    return {**copy.deepcopy(GOOD), **changes}


def _messages(*pairs):
    return {"messages": [{"role": role, **({"content": c} if isinstance(c, str) else c)} for role, c in pairs]}


CALLS = {"tool_calls": [{"function": {"name": "add", "arguments": '{"a": 1}'}}]}


@pytest.mark.parametrize(("record", "kind"), [
    ([], "no object"),
    ({}, "no messages"),
    (_with(messages="hello"), "no messages"),
    (_with(messages=["hello"]), "bad message"),
    (_with(tool=[]), "unknown key"),
    (_messages(("user", "a"), ("assistant", {"content": "b", "weight": 1})), "unknown key"),
    (_messages(("robot", "a")), "bad role"),
    (_messages(("assistant", "a")), "order of roles"),
    (_messages(("user", "a"), ("user", "b")), "order of roles"),
    (_messages(("user", "a"), ("assistant", "b"), ("system", "c")), "order of roles"),
    (_messages(("user", "a"), ("assistant", "b"), ("tool", "c")), "order of roles"),
    (_messages(("user", "a"), ("assistant", {})), "no content"),
    (_messages(("user", {"content": 3}),), "bad content"),
    (_messages(("user", {"content": [{"type": "image"}]}),), "bad content"),
    (_messages(("user", "a"), ("assistant", " \n")), "empty answer"),
    (_messages(("user", "a"), ("assistant", CALLS)), "undeclared tool"),
    ({**_messages(("user", "a"), ("assistant", {"tool_calls": [{"function": {"name": "add", "arguments": "{"}}]})), "tools": TOOLS},
     "bad arguments"),
    ({**_messages(("user", "a"), ("assistant", {"tool_calls": [{"function": {"arguments": {}}}]})), "tools": TOOLS}, "bad tool call"),
    (_with(tools=[{"type": "function"}]), "bad tools"),
    (_with(documents=[{"title": "no text"}]), "bad documents"),
    (_messages(("user", f"a{END}"), ("assistant", "b")), "control token"),
    (_with(documents=[{"text": f"x {ROLES[0]}system"}]), "control token"),
    (_messages(("user", "<think>"), ("assistant", "b")), "control token"),
    (_messages(("user", "a\0"), ("assistant", "b")), "NUL character"),
    (_messages(("user", "a\ud800"), ("assistant", "b")), "lone surrogate"),
])  # fmt: skip
def test_what_is_no_sample_says_why(record, kind):
    found = check(record, CONTROL)
    assert isinstance(found, Reason), found
    assert found.kind == kind
    assert found.detail


def test_what_is_one():
    assert check(_with(id=7, source="x", metadata={"a": None}, tools=None, documents=[]), CONTROL) == GOOD
    assert check(_with(score=0.9), CONTROL).kind == "unknown key"
    assert check(_with(score=0.9), CONTROL, ignored=["score"]) == GOOD
    thinking = _messages(("user", "a"), ("assistant", "<think>hm</think>b"))
    assert check(thinking, CONTROL).kind == "control token"
    assert check(thinking, CONTROL, ["<think>", "</think>"]) == thinking
    called = check(
        {**_messages(("user", "a"), ("assistant", CALLS), ("tool", "3"), ("assistant", "3")), "tools": TOOLS}, CONTROL
    )
    assert called["messages"][1]["tool_calls"] == [{"type": "function", **CALLS["tool_calls"][0]}]
    nulls = [{"type": "function", "function": {"name": "add", "parameters": None}, "strict": None}]
    assert check(_with(tools=nulls), CONTROL)["tools"] == [{"type": "function", "function": {"name": "add"}}]
    row = {"messages": '[{"role": "user", "content": "a", "tool_calls": null}]', "tools": None, "source": "x"}
    assert check(from_parquet(row), CONTROL) == _messages(("user", "a"))
