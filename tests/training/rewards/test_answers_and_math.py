"""Where the final answer is, and when it is equal to the reference."""

import time
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.training.rewards.helpers import quick
from training.rewards import RewardError, RewardPlan, Rewards, Sample
from training.rewards.answers import boxed, final_answer
from training.rewards.math_answer import MathAnswer, MathOptions


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (r"\boxed{1}", ["1"]),
        (r"\boxed{\frac{1}{2}} and \boxed { x }", [r"\frac{1}{2}", "x"]),
        (r"\boxed{\{1, 2\}}", [r"\{1, 2\}"]),
        (r"\boxed{a \boxed{b}}", [r"a \boxed{b}"]),
        (r"\boxed{cut off", []),
        (r"\boxed{never closed ... so \boxed{5}", ["5"]),
        (r"\fbox{7}", ["7"]),
        ("boxed{1}", []),
        (r"\\boxed{1} \\\boxed{2} \\{ \boxed{3}", ["1", "2", "3"]),
        (r"} \boxed{1} { \boxed{2}", ["1", "2"]),
    ],
)
def test_boxed(text, found):
    assert boxed(text) == found


@pytest.mark.parametrize(
    ("text", "place", "found"),
    [
        (r"\boxed{6} no wait \boxed{5}", "boxed", "5"),
        ("<answer>1</answer> or <answer> 2 </answer>", "tag", "2"),
        ("<answer>hm, <ANSWER>2</Answer></answer>", "tag", "2"),
        (r"<answer>1</answer> so \boxed{2}", "boxed_or_tag", "2"),
        (r"\boxed{2} so <answer>1</answer>", "boxed_or_tag", "1"),
        (r"<answer>it is \boxed{3}.</answer>", "boxed_or_tag", "3"),
        ("<answer>never closed", "boxed_or_tag", None),
        ("the answer is 42.", "boxed_or_tag", None),
        ("the answer is 42.", "any", "the answer is 42."),
        ("  ", "any", None),
    ],
)
def test_final_answer(text, place, found):
    assert final_answer(text, place) == found


@quick
@given(st.text(alphabet="\\{}b oxed<answer>/1", max_size=60), st.sampled_from(["boxed", "tag", "boxed_or_tag", "any"]))
def test_final_answer_is_part_of_the_text(text, place):
    found = final_answer(text, place)
    assert found is None or found in text


@quick
@given(
    st.recursive(
        st.sampled_from(["x", "1", r"\{", " "]), lambda inner: inner.map(lambda t: "{" + t + "}") | st.lists(inner).map("".join)
    )
)
def test_balanced_text_comes_out_of_its_box_whole(text):
    assert boxed(rf"a \boxed{{{text}}} b") == [text.strip()]


@pytest.mark.parametrize("unit", [r"\boxed{", "<answer>", "{", "}", "\\", "</answer>", r"\boxed{x}", "<answer>x</answer>"])
def test_repetition_costs_no_more_than_its_length(unit):
    begun = time.process_time()
    final_answer(unit * 20_000, "any")
    assert time.process_time() - begun < 1


@pytest.fixture(scope="module")
def math():
    reward = MathAnswer(MathOptions())
    reward.prepare()
    return reward


@pytest.mark.parametrize(
    ("answer", "reference", "equal"),
    [
        ("1/2", 0.5, True),
        (r"\{2,1\}", r"\{1,2\}", True),
        ("1+x", "x+1", True),
        ("1,000", 1000, True),
        (r"10\%", "0.1", True),
        ("10%", "0.1", True),
        ("x=5", "5", True),
        (r"\frac{1}{2}x^2+C", "x^2/2+C", True),
        (r"5 \text{ cm}", "5", True),
        ("(2,1)", "(1,2)", False),
        ("0.3333", "1/3", False),
        ("", "1", False),
        # Several guesses in one answer are none.
        ("5 or 6", "5", False),
        ("5 or 6", "6", False),
        ("5,6", "6", False),
        ("1/0", "2", False),
        (r"\{5,6\}", "5", False),
        (r"5\pm1", "6", False),
    ],
)
def test_equality(math, answer, reference, equal):
    score = math.score(Sample(completion=rf"So it is $\boxed{{{answer}}}$.", reference=reference))
    assert (score.value, score.failed) == (float(equal), False), score


def test_the_last_of_several_boxes_counts_or_none_does(math):
    sample = Sample(completion=r"\boxed{6} no wait \boxed{5}", reference="5")
    assert math.score(sample).value == 1
    strict = MathAnswer(MathOptions(several_boxed="refuse"))
    assert strict.score(sample).reason == r"2 different \boxed answers"
    assert strict.score(sample.model_copy(update={"completion": r"\boxed{5}, that is \boxed{5}"})).value == 1


def test_bare_answers_only_where_they_are_allowed(math):
    sample = Sample(completion="the answer is 42.", reference="42")
    assert math.score(sample).value == 0
    assert MathAnswer(MathOptions(answer_in="any")).score(sample).value == 1


@pytest.mark.parametrize("reference", [None, "", True, ["5"], "!?", "3:00"])
def test_a_bad_reference_is_the_datas_failure(math, reference):
    with pytest.raises(RewardError, match="^reference "):
        math.score(Sample(completion=r"\boxed{5}", reference=reference))


def test_a_long_answer_is_not_even_read(math):
    score = math.score(Sample(completion=r"\boxed{" + "1+" * 100_000 + "1}", reference="5"))
    assert (score.value, score.failed) == (0.0, False)


fractions = st.builds(Fraction, st.integers(-50, 50), st.integers(1, 12))


@quick
@given(fractions, fractions, st.booleans())
def test_fractions_are_equal_exactly_when_python_says_so(math, gold, said, latex):
    form = rf"\frac{{{said.numerator}}}{{{said.denominator}}}" if latex else f"{said.numerator}/{said.denominator}"
    score = math.score(Sample(completion=rf"\boxed{{{form}}}", reference=f"{gold.numerator}/{gold.denominator}"))
    assert score.value == float(gold == said)


def test_a_tower_of_powers_ends():
    plan = RewardPlan.parse(
        {"domains": {"*": {"parts": [{"reward": "math", "options": {"time_limit_seconds": 2}}]}}, "workers": 1}
    )
    samples = [Sample(completion=rf"\boxed{{{a}}}", reference="5") for a in ("9^{9^{9^{9}}}", "9^(9^(9^9))", "5")]
    with Rewards(plan) as rewards:
        scores = rewards.score(samples)
    assert [s.value for s in scores] == [0.0, 0.0, 1.0]
    assert scores[0].failed
    assert "time-out after 2 s" in scores[0].reason
