"""reasoning-gym's scorers: each allowed task is asked with the worked answer, junk and nothing."""

import ast
import inspect
import json

import pytest

from training.rewards import RewardError, Sample
from training.rewards.answers import tagged
from training.rewards.procedural import ALLOWED, ReasoningGym, ReasoningGymOptions

reasoning_gym = pytest.importorskip("reasoning_gym")

JUNK = ("junk", "", "-7", "[]", "{}", "None", "[[", "(1,2)", "True", "\x00", "1" * 500)
EVALUATES = {"eval", "exec", "parse_expr", "sympify", "import_module", "__import__"}


@pytest.fixture(scope="module")
def reward():
    reward = ReasoningGym(ReasoningGymOptions())
    reward.prepare()
    return reward


@pytest.mark.parametrize("task", sorted(ALLOWED))
def test_gold_is_one_junk_is_less_nothing_is_zero(reward, task):
    # 21 is not the default seed of anything; entries go through JSON, as they do on their way into a prompt file.
    data = reasoning_gym.create_dataset(task, size=2, seed=21)
    for entry in (json.loads(json.dumps(data[i])) for i in range(2)):
        gold = entry["answer"]
        assert isinstance(gold, str)
        assert reward.raw(task, entry, gold) == 1
        assert reward.raw(task, entry, None) == 0
        for junk in (*JUNK, f"I think it is {gold} or not", f"{gold} {gold}"):
            if junk != gold:
                assert 0 <= reward.raw(task, entry, junk) < 1, junk
        reference = {"task": task, "entry": entry}
        assert reward.score(Sample(completion=f"Hm. <answer>{gold}</answer>", reference=reference)).value == 1
        assert reward.score(Sample(completion=gold, reference=reference)).value == 0  # no tag
        assert tagged(f"<answer>{gold}</answer>") == [gold.strip()]


@pytest.mark.parametrize("task", sorted(ALLOWED))
def test_no_scorer_evaluates_text(task):
    dataset = reasoning_gym.factory.DATASETS[task][0]
    # The base class's scorer compares strings; of a task with its own, nothing in the module may evaluate.
    tree = ast.parse(inspect.getsource(inspect.getmodule(inspect.unwrap(dataset.score_answer))))
    called = {
        node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
    }
    assert not called & EVALUATES


@pytest.mark.parametrize("task", ["game_of_life_halting", "prime_factorization", "countdown", "no_such_task"])
def test_other_tasks_are_refused(reward, task):
    with pytest.raises(RewardError, match=f"'{task}' is not among those whose scorer is trusted"):
        reward.raw(task, {"question": "", "answer": "1", "metadata": {}}, "1")


def test_partial_credit_is_an_option():
    entry = {"question": "", "answer": "b a", "metadata": {"sorted_words": ["a", "b"]}}
    sample = Sample(completion="<answer>a, c</answer>", reference={"task": "word_sorting", "entry": entry})
    assert ReasoningGym(ReasoningGymOptions()).score(sample).value == 0
    assert ReasoningGym(ReasoningGymOptions(threshold=0.5)).score(sample).value == 1
    assert ReasoningGym(ReasoningGymOptions(threshold=0.5, binary=False)).score(sample).value == 0.5


@pytest.mark.parametrize("reference", [None, "gcd", {"task": "gcd"}, {"task": "gcd", "entry": "x"}])
def test_a_bad_reference_is_the_datas_failure(reward, reference):
    with pytest.raises(RewardError, match="^reference must be"):
        reward.score(Sample(completion="<answer>1</answer>", reference=reference))
