"""The scorers of reasoning-gym, for those of its tasks whose scorer can be trusted with a model's text."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, JsonValue

from training.rewards.answers import Place, final_answer
from training.rewards.base import Options, Reward, RewardError, Sample, Score, need, shorten

# fmt: off
ALLOWED = frozenset({
    "ab", "acre", "aiw", "arc_1d", "base_conversion", "basic_arithmetic", "bf", "binary_alternation", "caesar_cipher",
    "chain_sum", "circuit_logic", "count_bits", "count_primes", "course_schedule", "decimal_chain_sum", "dice",
    "family_relationships", "gcd", "isomorphic_strings", "largest_island", "lcm", "leg_counting", "letter_counting",
    "list_functions", "mahjong_puzzle", "maze", "modulo_grid", "needle_haystack", "number_filtering",
    "number_format", "number_sequence", "products", "ransom_note", "rotate_matrix", "rotten_oranges", "self_reference",
    "shortest_path", "simple_equations", "simple_geometry", "spell_backward", "string_manipulation", "string_splitting",
    "string_synthesis", "syllogism", "tower_of_hanoi", "word_ladder", "word_sequence_reversal", "word_sorting",
    "zebra_puzzles",
})
# fmt: on
"""Tasks that pass, after a round trip through JSON: the worked answer scores 1, junk less than 1, None 0, nothing raises, and their
scorer evaluates no text (a test repeats all of it with the installed version). Why others are not here, seen in 0.1.25:
game_of_life_halting, coin_flip, gsm_symbolic, kakurasu, knights_knaves, polynomial_equations, sokoban and survo gave 1.0 to some junk;
prime_factorization, game_of_life and boxnet raise on junk; countdown, puzzle24, simple_integration, polynomial_multiplication and others
have modules that evaluate text (eval, or sympy's parse_expr, which is eval); arc_agi and rearc do not survive JSON; boxnet, graph_color,
rubiks_cube and rush_hour have no worked answer; letter_jumble pays for the answer said twice."""


class ReasoningGymOptions(Options):
    """Options of `reasoning_gym`; `reference` is {"task": name, "entry": {"question", "answer", "metadata"}}, the entry as generated."""

    answer_in: Place = "tag"
    """Where the answer stands. The scorers give partial credit for gold inside of prose, so it must be cut out."""
    threshold: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Scores below it are 0."""
    binary: bool = True
    """Scores from the threshold on are 1; otherwise they stay as the scorer gave them."""


class ReasoningGym(Reward):
    """The task's own score of the final answer."""

    options_type = ReasoningGymOptions
    options: ReasoningGymOptions

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self._scorers: dict[str, Any] = {}

    def prepare(self) -> None:
        need("reasoning_gym", "reasoning_gym", "reasoning-gym")

    def score(self, sample: Sample) -> Score:
        task, entry = _read(sample.reference)
        answer = final_answer(sample.completion, self.options.answer_in)
        if answer is None:
            return Score(value=0.0, reason=f"no answer (looked for: {self.options.answer_in})")
        raw = self.raw(task, entry, answer)
        value = 0.0 if raw < self.options.threshold else 1.0 if self.options.binary else raw
        return Score(value=value, reason=f"{task} gives {raw:g}", details={"raw": raw})

    def check_reference(self, reference: JsonValue) -> None:
        _read(reference)

    def raw(self, task: str, entry: dict[str, JsonValue], answer: str | None) -> float:
        """The scorer's own number, in [0, 1]; RewardError for a task that is not allowed."""
        _allow(task)
        if task not in self._scorers:
            dataset_type, config_type = need("reasoning_gym.factory", "reasoning_gym").DATASETS[task]
            self._scorers[task] = dataset_type(config=config_type()).score_answer
        value = float(self._scorers[task](answer, entry))
        if not 0 <= value <= 1:
            raise RewardError(f"reward 'reasoning_gym': the scorer of {task} gave {value}")
        return value


def _allow(task: str) -> None:
    if task not in ALLOWED:
        raise RewardError(
            f"reward 'reasoning_gym': task '{task}' is not among those whose scorer is trusted (procedural.ALLOWED)"
        )


def _read(reference: JsonValue) -> tuple[str, dict[str, JsonValue]]:
    if isinstance(reference, dict) and set(reference) == {"task", "entry"}:
        task, entry = reference["task"], reference["entry"]
        if isinstance(task, str) and isinstance(entry, dict):
            _allow(task)
            return task, entry
    raise RewardError('reference must be {"task": name, "entry": {...}}, found ' + shorten(repr(reference), 80))
