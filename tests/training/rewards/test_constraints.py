"""Checkable instructions: each kind by example and by property, strict and loose, and beside lm-eval's where that is installed."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from tests.training.rewards.helpers import quick
from training.rewards import RewardError, Sample
from training.rewards.constraint_kinds import CONSTRAINTS, KINDS, sentences
from training.rewards.constraints import InstructionOptions, Instructions, variants


def constraint(kind, **arguments):
    return CONSTRAINTS.validate_python([{"kind": kind, **arguments}])[0]


def names():
    return {kind.model_fields["kind"].annotation.__args__[0] for kind in KINDS}


# kind, arguments, texts that follow, texts that do not
EXAMPLES = [
    ("keywords", {"words": ["sea", "blue whale"]}, ["The SEA has a blue whale."], ["The seaside blue whale", "sea, blue  cow"]),
    ("forbidden_words", {"words": ["no"]}, ["I know nothing", "nop"], ["No.", "oh no!"]),
    ("keyword_count", {"word": "a", "at_least": 2}, ["a cat, a dog"], ["a cat and an ape"]),
    ("letter_count", {"letter": "E", "at_most": 2}, ["Eve"], ["eerie"]),
    ("words", {"at_least": 3, "at_most": 4}, ["one don't three", "1 2 3 4"], ["one two", "1 2 3 4 5"]),
    ("characters", {"at_most": 5}, [" hello "], ["hello!"]),
    ("sentences", {"at_least": 2, "at_most": 2}, ["Dr. Who came. He left!", "One? Two"], ["Just one.", "A b. C d. E f."]),
    ("paragraphs", {"at_least": 2, "at_most": 2}, ["a\n\nb", "a\n \n\nb\n\n"], ["a\nb", "a\n\nb\n\nc"]),
    ("paragraphs", {"separator": "stars", "at_least": 2}, ["a\n***\nb"], ["a\n\nb", "***"]),
    (
        "paragraph_start",
        {"paragraphs": 2, "number": 2, "word": "But"},
        ["So.\n\nbut no."],
        ["So.\n\nAnd no.", "But.", "a\n\nb\n\nBut"],
    ),
    ("placeholders", {"at_least": 2}, ["[name], [street no]"], ["[name] [ [", "[]"]),
    ("postscript", {}, ["Text.\nP.S. more", "p. s. more"], ["Text", "P.S.", "see P.S. more"]),
    ("postscript", {"marker": "P.P.S"}, ["Text.\nP. P. S more"], ["P.S. more"]),
    (
        "bullets",
        {"at_least": 2, "at_most": 2},
        ["* a\n* b", "- a\n  - b"],
        ["* a", "**a**\n**b**", "---\n---", "* a\n* b\n* c"],
    ),
    ("numbered_items", {"at_least": 2}, ["1. a\n2. b", "1) a\n2) b\n3) c"], ["1. a\n3. b", "2023. a\n2024. b"]),
    ("highlights", {"at_least": 2}, ["*a* and **b**"], ["*a*", "** **", "* a\n* b", "2 * 3"]),
    (
        "sections",
        {"at_least": 2},
        ["Section 1\na\nSection 2\nb"],
        ["Section 1", "section 1 section 2", "Subsection 1 Subsection 2"],
    ),
    ("title", {}, ["<<Ode>>\ntext"], ["<Ode>", "<<>>", "<< >>"]),
    ("json", {}, ['{"a": 1}', '```json\n{"a": 1}\n```'], ["{'a': 1}", '{"a": 1} so', "NaN"]),
    (
        "one_of",
        {"answers": ["My answer is yes.", "My answer is no."]},
        ["My answer is yes.", "My answer is no"],
        ["yes", "My answer is yes. My answer is no."],
    ),
    ("two_responses", {}, ["a\n******\nb"], ["a", "a******a", "a******b******c", "a******"]),
    ("repeat_prompt", {"text": "Say it."}, ["say it. It."], ["It.", "Say it.", "I say it. It"]),
    ("starts_with", {"text": "Dear"}, [" dear Sir"], ["Oh dear"]),
    ("ends_with", {"text": "The end."}, ['so "the end."'], ["The end. Or not?"]),
    ("quoted", {}, ['"all of it"'], ['"part" of it', '"']),
    ("upper_case", {}, ["LOUD, 1!"], ["LOUd", "123"]),
    ("lower_case", {}, ["quiet, 1!"], ["Quiet", "123"]),
    ("capital_words", {"at_least": 1, "at_most": 2}, ["NASA went up", "A B c"], ["none", "A B C"]),
    ("no_comma", {}, ["a; b"], ["a, b", "一，二"]),
    ("no_digits", {}, ["one"], ["1", "٣"]),
    ("line_length", {"at_most": 3}, ["abc\nab"], ["abc\nabcd"]),
    (
        "language",
        {"code": "de", "among": ["de", "en", "fr"]},
        ["Das ist ein ganz normaler deutscher Satz."],
        ["This is an ordinary sentence.", "123"],
    ),
]


def test_every_kind_has_an_example():
    assert {kind for kind, *_ in EXAMPLES} == names()
    assert len(names()) >= 25


@pytest.mark.parametrize(("kind", "arguments", "follow", "do_not"), EXAMPLES, ids=lambda v: v if isinstance(v, str) else "")
def test_examples(kind, arguments, follow, do_not):
    one = constraint(kind, **arguments)
    assert [(text, one.met(text)) for text in follow + do_not] == [(t, True) for t in follow] + [(t, False) for t in do_not]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "shout"}, "does not match any of the expected tags"),
        ({"kind": "words"}, "give at_least, at_most or both"),
        ({"kind": "words", "at_least": 3, "at_most": 2}, "at_least 3 is above at_most 2"),
        ({"kind": "words", "at_least": -1}, "greater than or equal to 0"),
        ({"kind": "words", "atleast": 1}, "Extra inputs"),
        ({"kind": "keywords", "words": []}, "at least 1 item"),
        ({"kind": "letter_count", "letter": "ab", "at_least": 1}, "at most 1 character"),
        ({"kind": "paragraph_start", "paragraphs": 1, "number": 2, "word": "a"}, "number 2 is above paragraphs 1"),
        ({"kind": "language", "code": "German"}, "should match pattern"),
        ({"kind": "language", "code": "de", "among": ["en"]}, "'de' is not among en"),
    ],
)
def test_bad_arguments_are_refused_by_name(arguments, message):
    with pytest.raises(ValidationError, match=message):
        CONSTRAINTS.validate_python([arguments])
    with pytest.raises(RewardError, match="^reference, 0"):
        Instructions(InstructionOptions()).score(Sample(completion="x", reference=[arguments]))


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("", 0), ("...", 0), ("No end", 1), ("One. Two. Three.", 3), ("Wait... what?!", 2), ("It is 3.14 m.", 1), ("Mr. J. S. Bach ate.", 1),
        ("He said \"stop.\" She did.", 2), ("今日は雨です。明日は晴れ。", 2), ("So do I. And you?", 2),
    ],
)  # fmt: skip
def test_sentences(text, count):
    assert sentences(text) == count


def score(text, constraints, **options):
    return Instructions(InstructionOptions(**options)).score(Sample(completion=text, reference=constraints)).value


def test_all_or_share():
    two = [{"kind": "no_comma"}, {"kind": "upper_case"}]
    assert score("A, B", two) == 0
    assert score("A, B", two, aggregate="share") == 0.5
    assert score("A B", two) == 1


def test_loose_forgives_an_introduction_a_farewell_and_stars():
    starts = [{"kind": "starts_with", "text": "Roses"}]
    for text in ("Sure, here is it:\nRoses are red", "**Roses** are red"):
        assert (score(text, starts), score(text, starts, mode="loose")) == (0, 1)
    assert score("Here:\n\nRoses", starts, mode="loose") == 1
    assert variants("a\n*b*\nc")[::2] == ["a\n*b*\nc", "*b*\nc", "a\n*b*", "*b*"]


def test_nothing_said_follows_nothing():
    for mode in ("strict", "loose"):
        assert score("  \n", [{"kind": "no_comma"}, {"kind": "words", "at_most": 5}], mode=mode, aggregate="share") == 0


texts = st.text(alphabet=" \n.,!?*-[]<>#\"{}1aAbB'é字", max_size=40) | st.text(max_size=30)


@quick
@given(texts)
def test_every_kind_answers_yes_or_no_to_any_text_and_loose_forgives_only(text):
    strict, loose = Instructions(InstructionOptions()), Instructions(InstructionOptions(mode="loose"))
    for kind, arguments, *_ in EXAMPLES:
        one = constraint(kind, **arguments)
        assert one.met(text) in (True, False)
        assert loose.follows(one, text) or not strict.follows(one, text)


@quick
@given(texts, st.permutations([{"kind": kind, **arguments} for kind, arguments, *_ in EXAMPLES][:12]))
def test_the_order_of_instructions_does_not_matter(text, order):
    value = score(text, order, aggregate="share")
    assert 0 <= value <= 1
    assert value == score(text, sorted(order, key=repr), aggregate="share")


@quick
@given(st.integers(0, 8), st.integers(0, 8))
def test_bounds(count, bound):
    text = " ".join(["w"] * count)
    assert constraint("words", at_least=bound).met(text) == (count >= bound)
    assert constraint("words", at_most=bound).met(text) == (count <= bound)


@pytest.mark.parametrize(
    "unit", ["\n", " ", "*", "**a", "* a ", "Mr. ", "[", "<<", "```json ", "1. ", "- ", "P.S.", "\n \t", "Section 1", '"', "."]
)
def test_repetition_costs_no_more_than_its_length(unit):
    # What a model writes in a loop; squared, any of these would take minutes.
    text = unit * (20_000 // len(unit)) + "x"
    for kind, arguments, *_ in EXAMPLES:
        begun = time.process_time()
        constraint(kind, **arguments).met(text)
        assert time.process_time() - begun < 1, kind


# lm-eval's name, its arguments, ours. "less than n" there is "at most n - 1" here.
LM_EVAL = [
    ("keywords:existence", {"keywords": ["sea", "whale"]}, constraint("keywords", words=["sea", "whale"])),
    ("keywords:forbidden_words", {"forbidden_words": ["no"]}, constraint("forbidden_words", words=["no"])),
    ("keywords:letter_frequency", {"letter": "e", "let_frequency": 3, "let_relation": "at least"},
     constraint("letter_count", letter="e", at_least=3)),
    ("length_constraints:number_words", {"num_words": 3, "relation": "less than"}, constraint("words", at_most=2)),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, constraint("paragraphs", separator="stars", at_least=2, at_most=2)),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, constraint("placeholders", at_least=2)),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, constraint("bullets", at_least=2, at_most=2)),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, constraint("highlights", at_least=2)),
    ("detectable_format:title", {}, constraint("title")),
    ("detectable_format:json_format", {}, constraint("json")),
    ("combination:two_responses", {}, constraint("two_responses")),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Say it."}, constraint("repeat_prompt", text="Say it.")),
    ("startend:end_checker", {"end_phrase": "The end."}, constraint("ends_with", text="The end.")),
    ("startend:quotation", {}, constraint("quoted")),
    ("punctuation:no_comma", {}, constraint("no_comma")),
]  # fmt: skip
DIFFER = {
    ("keywords:existence", "The seaside blue whale"),  # theirs finds the keyword inside of another word
    ("detectable_format:number_bullet_lists", "---\n---"),  # theirs counts rules as bullets
    ("combination:repeat_prompt", "Say it."),  # theirs is content with the request alone
    ("punctuation:no_comma", "一，二"),  # theirs knows one comma
    ("detectable_format:json_format", "NaN"),  # theirs reads what Python reads
}
"""Where ours differs on purpose; the test holds that it does."""


@pytest.mark.parametrize(("name", "arguments", "ours"), LM_EVAL, ids=[row[0] for row in LM_EVAL])
def test_agrees_with_lm_eval(name, arguments, ours):
    registry = pytest.importorskip("lm_eval.tasks.ifeval.instructions_registry", reason="lm-eval[ifeval] is not installed")
    theirs = registry.INSTRUCTION_DICT[name](name)
    theirs.build_description(**arguments)
    for text in {text for _, _, follow, do_not in EXAMPLES for text in follow + do_not}:
        same = ours.met(text) == bool(theirs.check_following(text))
        assert same == ((name, text) not in DIFFER), text
