"""The chat template against a rendering written without Jinja, its assistant masks, and its prompts."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.chat_template import DOCUMENTS_TEXT, TOOLS_TEXT
from data_prep.special_tokens import END, GRANITE, ROLES
from data_prep.tokenizer import write_hf_tokenizer

transformers = pytest.importorskip("transformers")

CONTROL = (*GRANITE, "<unk>", "<|start_of_text|>", "<pad>")
TEXT = st.text(max_size=30).filter(lambda text: not any(token in text for token in CONTROL))
ARGUMENTS = st.dictionaries(st.text("abc", min_size=1, max_size=3), st.integers() | TEXT, max_size=2)
CALL = st.tuples(st.sampled_from(["look_up", "add"]), ARGUMENTS)
ASSISTANT = st.tuples(TEXT, st.lists(CALL, max_size=2)).map(
    lambda pair: {
        "role": "assistant",
        "content": pair[0],
        **(
            {"tool_calls": [{"type": "function", "function": {"name": n, "arguments": a}} for n, a in pair[1]]}
            if pair[1]
            else {}
        ),
    }
)
OTHER = st.tuples(st.sampled_from(["user", "tool"]), TEXT).map(lambda pair: {"role": pair[0], "content": pair[1]})
SYSTEM = st.lists(TEXT.map(lambda text: {"role": "system", "content": text}), max_size=1)
MESSAGES = st.tuples(SYSTEM, st.lists(OTHER | ASSISTANT, min_size=1, max_size=6)).map(lambda pair: pair[0] + pair[1])
TOOLS = [
    {
        "type": "function",
        "function": {"name": "add", "description": "Adds <é>", "parameters": {"type": "object", "properties": {}}},
    }
]
DOCUMENTS = [{"doc_id": 1, "title": "One", "text": "first\nline"}, {"doc_id": 2, "title": "Two", "text": "'second'"}]


@pytest.fixture(scope="module", params=["sentencepiece", "huggingface"])
def chat(request, trained, byte_level, tmp_path_factory):
    """(our tokenizer, the exported one as transformers loads it)"""
    ours = trained if request.param == "sentencepiece" else byte_level
    folder = tmp_path_factory.mktemp("chat")
    write_hf_tokenizer(ours, folder)
    return ours, transformers.AutoTokenizer.from_pretrained(folder)


def parts(messages, tools=None, documents=None, prompt=False):
    """[(text, whether the assistant wrote it)] of a conversation."""
    out = []

    def message(role, text, learned=False):
        out.append((f"{ROLES[0]}{role}{ROLES[1]}", False))
        out.append((f"{text}{END}", learned))
        out.append(("\n", False))

    system = [m["content"] for m in messages[:1] if m["role"] == "system"]
    rest = messages[len(system) :]
    for wording, values in ((TOOLS_TEXT, tools), (DOCUMENTS_TEXT, documents)):
        if values:
            system.append("\n".join([wording[0], *(json.dumps(value, ensure_ascii=False) for value in values)]) + wording[1])
    if system:
        message("system", "\n\n".join(system))
    results = []
    for place, m in enumerate(rest):
        if m["role"] == "tool":
            results.append(f"\n<tool_response>\n{m['content']}\n</tool_response>")
            if place + 1 == len(rest) or rest[place + 1]["role"] != "tool":
                message("user", "".join(results))
                results = []
        elif m["role"] == "assistant":
            calls = [json.dumps(call["function"], ensure_ascii=False) for call in m.get("tool_calls", [])]
            text = [m["content"]] * bool(m["content"]) + [f"<tool_call>\n{call}\n</tool_call>" for call in calls]
            message("assistant", "\n".join(text), learned=True)
        else:
            message(m["role"], m["content"])
    if prompt:
        out.append((f"{ROLES[0]}assistant{ROLES[1]}", False))
    return out


@settings(deadline=None, max_examples=150)
@given(messages=MESSAGES, tools=st.booleans(), documents=st.booleans(), prompt=st.booleans())
def test_a_conversation_is_rendered_exactly(chat, messages, tools, documents, prompt):
    _, loaded = chat
    given = {"tools": TOOLS if tools else None, "documents": DOCUMENTS if documents else None}
    rendered = loaded.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt, **given)
    assert rendered == "".join(text for text, _ in parts(messages, **given, prompt=prompt))


def plain_ids(ours, text):
    """Ids of a rendered part: control tokens by their ids, the rest encoded as text."""
    ids, rest = [], text
    while rest:
        found = min(((rest.find(name), -len(name), name) for name in ours.special_ids if name in rest), default=None)
        before = rest if found is None else rest[: found[0]]
        ids += ours.encode(before) if before else []
        if found is None:
            break
        ids.append(ours.special_ids[found[2]])
        rest = rest[found[0] + len(found[2]) :]
    return ids


@settings(deadline=None, max_examples=100)
@given(messages=MESSAGES)
def test_ids_are_ours_and_the_mask_marks_what_the_assistant_wrote(chat, messages):
    ours, loaded = chat
    encoded = loaded.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    text = "".join(part for part, _ in parts(messages))
    assert encoded["input_ids"] == plain_ids(ours, text)
    learned = [number for number, mark in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if mark]
    expected = [number for part, mark in parts(messages) if mark for number in plain_ids(ours, part)]
    assert learned == expected


@settings(deadline=None, max_examples=50)
@given(messages=MESSAGES, answer=TEXT)
def test_a_prompt_is_a_prefix_of_the_conversation_and_the_mask_begins_at_its_end(chat, messages, answer):
    _, loaded = chat
    question = [*messages, {"role": "user", "content": "?"}]
    prompt = loaded.apply_chat_template(question, add_generation_prompt=True, return_dict=True)["input_ids"]
    whole = loaded.apply_chat_template(
        [*question, {"role": "assistant", "content": answer}], return_dict=True, return_assistant_tokens_mask=True
    )
    assert whole["input_ids"][: len(prompt)] == prompt
    assert whole["assistant_masks"][len(prompt) :] == [1] * (len(whole["input_ids"]) - len(prompt) - 1) + [0]
    assert whole["assistant_masks"][len(prompt) - 1] == 0


def test_text_parts_are_joined_and_pictures_refused(chat):
    _, loaded = chat
    two = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    assert loaded.apply_chat_template(two, tokenize=False) == f"{ROLES[0]}user{ROLES[1]}ab{END}\n"
    with pytest.raises(Exception, match="text only, not image"):
        loaded.apply_chat_template([{"role": "user", "content": [{"type": "image"}]}], tokenize=False)
