"""Prompt files: what is read, what is refused and how, and the order."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.tokenizer import load_tokenizer
from training.rl.demo import write_tokenizer
from training.rl.prompts import PromptError, PromptOrder, read_prompts

TEMPLATE = "{% for m in messages %}{{ m['content'] + '>' }}{% endfor %}"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return load_tokenizer(folder)


def write(path, *lines):
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def test_everything_of_a_line_arrives(tokenizer, tmp_path):
    line = {"prompt": "12>", "reference": {"any": [1]}, "domain": "math", "metadata": {"tolerance": 2}}
    path = write(tmp_path / "a.jsonl", line, "", {"prompt": "3"})
    prompts = read_prompts([path], tokenizer, max_prompt_tokens=3)
    first, second = prompts.items
    assert tokenizer.decode(first.ids) == "12>"
    assert (first.turns, first.reference, first.domain, first.metadata) == (
        (("user", "12>"),),
        {"any": [1]},
        "math",
        {"tolerance": 2},
    )
    assert (second.domain, second.reference, second.metadata) == ("default", None, {})
    same = read_prompts([write(tmp_path / "b.jsonl", line, "", {"prompt": "3"})], tokenizer, max_prompt_tokens=3)
    other = read_prompts([write(tmp_path / "c.jsonl", line, {"prompt": "4"})], tokenizer, max_prompt_tokens=3)
    assert prompts.digest == same.digest != other.digest


def test_conversations_go_through_the_chat_template(tmp_path):
    write_tokenizer(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": TEMPLATE}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    chat = load_tokenizer(tmp_path)
    line = {"messages": [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]}
    (prompt,) = read_prompts([write(tmp_path / "a.jsonl", line)], chat, max_prompt_tokens=9).items
    assert chat.decode(prompt.ids) == "1>2>"
    assert prompt.turns == (("user", "1"), ("assistant", "2"))
    line["messages"][0]["content"] = "1<|end_of_text|>2"
    with pytest.raises(PromptError, match=r"a\.jsonl, line 1: a message holds the control token <\|end_of_text\|>"):
        read_prompts([write(tmp_path / "a.jsonl", line)], chat, max_prompt_tokens=9)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{not json", "line 2: not JSON"),
        ("[]", "either 'prompt' or 'messages'"),
        ({"prompt": "1", "messages": []}, "either 'prompt' or 'messages'"),
        ({"prompt": 1}, "'prompt' is a int, must be a str"),
        ({"prompt": "1", "answer": "2"}, "unknown key 'answer'; known: domain"),
        ({"messages": [{"role": "user"}]}, "each message needs 'role' and 'content'"),
        ({"messages": [{"role": "user", "content": "1"}]}, "line 2: .* has no chat template"),
        ({"prompt": "12345"}, "the prompt has 5 tokens; between 1 and 4 fit"),
        ({"prompt": ""}, "the prompt has 0 tokens"),
    ],
)
def test_bad_lines_are_refused_by_place(tokenizer, tmp_path, line, message):
    path = write(tmp_path / "a.jsonl", {"prompt": "1"}, line)
    with pytest.raises(PromptError, match=message) as caught:
        read_prompts([path], tokenizer, max_prompt_tokens=4)
    assert f"{path}, line 2" in str(caught.value)


def test_missing_and_empty_files(tokenizer, tmp_path):
    with pytest.raises(PromptError, match="No such file or directory; prepare them"):
        read_prompts([tmp_path / "none.jsonl"], tokenizer, max_prompt_tokens=4)
    with pytest.raises(PromptError, match="no prompts in"):
        read_prompts([write(tmp_path / "a.jsonl")], tokenizer, max_prompt_tokens=4)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 40), st.integers(0, 1000), st.integers(0, 3))
def test_every_epoch_holds_every_prompt_once(count, seed, epoch):
    order = PromptOrder(count, seed)
    one = [order[epoch * count + i] for i in range(count)]
    assert sorted(one) == list(range(count))
    # the order does not depend on where one begins to ask
    assert [PromptOrder(count, seed)[epoch * count + i] for i in range(count)] == one
    if count > 10:
        assert one != [order[(epoch + 1) * count + i] for i in range(count)]


def test_conversations_with_a_sentencepiece_model(tmp_path):
    """The smoke curriculum's kind of tokenizer: roles are single tokens, and the assistant's turn is open at the end."""
    from data_prep.corpus import build
    from data_prep.tokenizer_training import train

    model = tmp_path / "tokenizer.model"
    train([document.text for document in build("package_code", 200_000)], "sentencepiece", 1024, model)
    tokenizer = load_tokenizer(model)
    line = {"messages": [{"role": "user", "content": "ai and iq"}]}
    (prompt,) = read_prompts([write(tmp_path / "a.jsonl", line)], tokenizer, max_prompt_tokens=64).items
    special = tokenizer.special_ids
    start, end = special["<|start_of_role|>"], special["<|end_of_role|>"]
    assert prompt.ids[0] == start
    assert prompt.ids.count(start) == 2
    assert prompt.ids[-1] == end
    inside = prompt.ids[prompt.ids.index(end) + 1 : prompt.ids.index(tokenizer.eod_id)]
    assert list(inside) == tokenizer.encode("ai and iq")
