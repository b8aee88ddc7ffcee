"""Arithmetic, algebra, long chains of thought and instructions, from reasoning-gym's seeded generators with the working written out.

reasoning-gym gives a question and an answer; the steps between are ours, computed from the question's numbers, and the end of the
steps must be reasoning-gym's answer, else the build stops. Importing the package costs 2.5 s (it draws in matplotlib), so only the
modules used are imported, under parents that are never executed. Left out: everything that reads the clock (time_intervals)
or depends on Python's hash seed (polynomial_multiplication).
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_prep.corpus.material import Document
from data_prep.errors import DataError

SEED = 20_260_401
"""Of all generators. Not the recipe's seed: the corpus is the same for every recipe, so that tokenized data can be shared."""
DEFAULT_DOCUMENTS = 20_000
"""Documents per builder when the source has no max_bytes."""

SHELLS = (
    "algebra",
    "algorithmic",
    "arc",
    "arithmetic",
    "code",
    "cognition",
    "games",
    "geometry",
    "graphs",
    "induction",
    "logic",
    "probability",
)
"""Packages of reasoning_gym whose __init__ imports all of their generators; they stand in sys.modules unexecuted."""

Entry = dict[str, Any]


@dataclass(frozen=True)
class Kind:
    """One generator: its module below reasoning_gym, its class, settings, and how its entries become text."""

    module: str
    dataset: str
    write: Callable[[Entry], str]
    settings: dict[str, Any] = field(default_factory=dict)
    config: str | None = None
    """Name of its settings class, where it is not the data set's with Config."""

    @property
    def name(self) -> str:
        return self.module.rpartition(".")[2]


@contextlib.contextmanager
def _modules(names: list[str]) -> Iterator[dict[str, types.ModuleType]]:
    """The named modules of reasoning_gym, its packages' __init__ files not executed; sys.modules is as before afterwards.

    The shells stay in place inside the block, because some generators import more of reasoning_gym when they are first called.
    """
    spec = importlib.util.find_spec("reasoning_gym")
    if spec is None or not spec.submodule_search_locations:
        raise DataError("the built-in corpus needs reasoning-gym, which is not installed here; run `make setup`")
    root = Path(next(iter(spec.submodule_search_locations)))

    def ours() -> dict[str, types.ModuleType]:
        return {name: module for name, module in sys.modules.items() if name.split(".")[0] == "reasoning_gym"}

    before = ours()
    for name in before:
        del sys.modules[name]
    try:
        for package in ["", *SHELLS]:
            name = f"reasoning_gym.{package}".rstrip(".")
            shell = types.ModuleType(name)
            shell.__path__ = [str(root / package)]
            sys.modules[name] = shell
        importlib.import_module(
            "reasoning_gym.coaching"
        )  # before the modules that import reasoning_gym.factory: it breaks their cycle
        yield {name: importlib.import_module(f"reasoning_gym.{name}") for name in names}
    finally:
        for name in ours():
            del sys.modules[name]
        sys.modules.update(before)


def _generate(kinds: tuple[Kind, ...]) -> Iterator[Document]:
    """Documents of the kinds in turn; a text that came before is left out (small problems repeat)."""
    with _modules([kind.module for kind in kinds]) as modules:
        datasets = []
        for kind in kinds:
            module = modules[kind.module]
            config = getattr(module, kind.config or f"{kind.dataset}Config")(seed=SEED, size=DEFAULT_DOCUMENTS, **kind.settings)
            datasets.append(getattr(module, f"{kind.dataset}Dataset")(config))
        for index in range(DEFAULT_DOCUMENTS):
            for kind, dataset in zip(kinds, datasets, strict=True):
                yield Document(f"{kind.name}/{index}", kind.write(dataset[index]))


def _worked(question: str, steps: list[str], result: Any, entry: Entry) -> str:
    """Question, steps and answer as one text; DataError when our steps end elsewhere than reasoning-gym's answer."""
    if str(result) != str(entry["answer"]):
        raise DataError(
            f"worked steps end at {result!r}, reasoning-gym's answer is {entry['answer']!r}, for {question!r}: another version of "
            "reasoning-gym is installed than requirements.lock names; run `make setup`"
        )
    body = "\n".join(steps)
    return f"Problem: {question}\n{body}\nAnswer: {entry['answer']}\n"


def _meta(entry: Entry) -> Entry:
    return entry["metadata"]


def _chain_sum(entry: Entry) -> str:
    expression = _meta(entry)["expression"]
    tokens = expression.split()
    total, steps = int(tokens[0]), []
    for operator, number in zip(tokens[1::2], tokens[2::2], strict=True):
        following = total + int(number) if operator == "+" else total - int(number)
        steps.append(f"{total} {operator} {number} = {following}")
        total = following
    return _worked(f"What is {expression}?", steps, total, entry)


def _products(entry: Entry) -> str:
    expression = _meta(entry)["expression"]
    left, right = (int(part) for part in expression.split(" * "))
    steps, total = [], 0
    for power, digit in enumerate(reversed(str(right))):
        part = left * int(digit) * 10**power
        steps.append(f"{left} * {int(digit) * 10**power} = {part}; {total} + {part} = {total + part}")
        total += part
    return _worked(f"What is {expression}?", steps, total, entry)


def _euclid(a: int, b: int) -> tuple[list[str], int]:
    steps = []
    while b:
        steps.append(f"{a} = {a // b} * {b} + {a % b}")
        a, b = b, a % b
    return steps, a


def _gcd(entry: Entry) -> str:
    a, b = sorted(_meta(entry)["numbers"], reverse=True)
    steps, result = _euclid(a, b)
    return _worked(
        f"What is the greatest common divisor of {a} and {b}?", [*steps, f"The last divisor is {result}."], result, entry
    )


def _lcm(entry: Entry) -> str:
    a, b = sorted(_meta(entry)["numbers"], reverse=True)
    steps, divisor = _euclid(a, b)
    result = a * b // divisor
    steps.append(f"gcd = {divisor}; {a} * {b} / {divisor} = {a * b} / {divisor} = {result}")
    return _worked(f"What is the least common multiple of {a} and {b}?", steps, result, entry)


def _fraction(entry: Entry) -> str:
    meta = _meta(entry)
    a, b = meta["numerator"], meta["denominator"]
    steps, divisor = _euclid(max(a, b), min(a, b))
    steps.append(f"gcd = {divisor}; {a} / {divisor} = {a // divisor}; {b} / {divisor} = {b // divisor}")
    return _worked(f"Simplify {a}/{b}.", steps, f"{a // divisor}/{b // divisor}", entry)


def _prime_factors(entry: Entry) -> str:
    number = rest = _meta(entry)["number"]
    factors, steps, candidate = [], [], 2
    while rest > 1:
        if candidate * candidate > rest:
            candidate = rest
        if rest % candidate == 0:
            steps.append(f"{rest} = {candidate} * {rest // candidate}")
            factors.append(candidate)
            rest //= candidate
        else:
            candidate += 1
    return _worked(f"Factor {number} into primes.", steps, " × ".join(map(str, factors)), entry)


def _equation(entry: Entry) -> str:
    meta = _meta(entry)
    equation, variable, answer = meta["equation"], meta["variable"], entry["answer"]
    left, _, right = equation.partition(" = ")
    check = f"Put {variable} = {answer} in: {left.replace(f'*{variable}', f'*({answer})')} = {right}"
    return f"Problem: Solve {equation} for {variable}.\n{check}\nAnswer: {variable} = {answer}\n"


def _complex(entry: Entry) -> str:
    meta = _meta(entry)
    (a, b), (c, d), sign = meta["num1"], meta["num2"], meta["operation"]
    if sign in "+-":
        parts = [f"real part: {a} {sign} {c} = {meta['result'][0]}", f"imaginary part: {b} {sign} {d} = {meta['result'][1]}"]
    elif sign == "*":
        parts = [
            f"real part: {a} * {c} - {b} * {d} = {a * c - b * d}",
            f"imaginary part: {a} * {d} + {b} * {c} = {a * d + b * c}",
        ]
    else:
        parts = [f"multiply by the conjugate; the new denominator is {c} * {c} + {d} * {d} = {c * c + d * d}"]
    return f"Problem: {entry['question']}\n" + "\n".join(parts) + f"\nAnswer: {entry['answer']}\n"


def _story(entry: Entry) -> str:
    question = entry["question"].partition(" Give the result")[0]
    return f"Problem: {question}\n{_meta(entry)['answer_cot']}\nAnswer: {entry['answer']}\n"


DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"


def _base(entry: Entry) -> str:
    meta = _meta(entry)
    source, target, digits = meta["source_base"], meta["target_base"], meta["source_repr"]
    steps, value = [f"First base {source} to base ten, digit by digit."], 0
    for digit in digits:
        following = value * source + DIGITS.index(digit.lower())
        steps.append(f"{value} * {source} + {DIGITS.index(digit.lower())} = {following}")
        value = following
    steps.append(f"Now base ten to base {target}, by division with remainder.")
    result = "" if value else "0"
    while value:
        steps.append(f"{value} = {value // target} * {target} + {value % target}, digit {DIGITS[value % target]}")
        result, value = DIGITS[value % target] + result, value // target
    return _worked(f"Write the base {source} number {digits} in base {target}.", steps, result, entry)


def _caesar(entry: Entry) -> str:
    meta = _meta(entry)
    shift, steps, plain = meta["rotation"], [f"Every letter goes back by {meta['rotation']}."], []
    for word in meta["cipher_text"].split():
        letters = "".join(chr((ord(c) - 65 - shift) % 26 + 65) if c.isalpha() else c for c in word)
        steps.append(", ".join(f"{c} -> {p}" for c, p in zip(word, letters, strict=True)) + f": {letters}")
        plain.append(letters)
    return _worked(f"Decrypt the Caesar cipher {meta['cipher_text']} (key {shift}).", steps, " ".join(plain), entry)


def _rewriting(entry: Entry) -> str:
    meta = _meta(entry)
    rules = "\n".join(f"{i}. {rule}" for i, rule in enumerate(meta["selected_rules"], 1))
    steps = [f"Step {i}: {state}" for i, state in enumerate(meta["states"])]
    question = f"Apply the first rule that fits, again and again, to the string {meta['string']}.\n{rules}"
    return _worked(question, steps, meta["solution"], entry)


def _legs(entry: Entry) -> str:
    question = entry["question"].partition("Now, ")[2].strip()
    return (
        f"Problem: {question.capitalize()}\n"
        + "Count the legs of each kind and add them up.\n"
        + f"Answer: {entry['answer']}\n"
    )


def _backward(entry: Entry) -> str:
    word = _meta(entry)["word"]
    steps = ["Letters in order: " + " ".join(word), "Letters from the end: " + " ".join(reversed(word))]
    return _worked(f"Spell {word} backward.", steps, word[::-1], entry)


def _hanoi(entry: Entry) -> str:
    meta = _meta(entry)
    question = (
        f"Move {meta['num_disks']} disks from peg {meta['start_peg']} to peg {meta['target_peg']}; there are {meta['num_pegs']} pegs, "
        "and no disk may lie on a smaller one."
    )
    return f"Problem: {question}\n{entry['answer']}\nAnswer: {meta['solution_length']} moves\n"


def _letters(entry: Entry) -> str:
    meta = _meta(entry)
    letter, total, steps = meta["target_letter"], 0, []
    for word in meta["span"]:
        count = word.lower().count(letter.lower())
        total += count
        steps.append(f"{word}: {count}, together {total}")
    question = f'How many times does the letter {letter} appear in "{" ".join(meta["span"])}"?'
    return _worked(question, steps, total, entry)


def _instruction(entry: Entry) -> str:
    return f"### Instruction\n{entry['question'].strip()}\n\n### Response\n{entry['answer']}\n"


MATH = (
    Kind("arithmetic.chain_sum", "ChainSum", _chain_sum, {"max_terms": 5, "max_digits": 3}),
    Kind("arithmetic.products", "Products", _products, {"max_digits": 4}),
    Kind("arithmetic.gcd", "GCD", _gcd),
    Kind("arithmetic.lcm", "LCM", _lcm),
    Kind("arithmetic.fraction_simplification", "FractionSimplification", _fraction, {"styles": ("plain",)}),
    Kind("arithmetic.prime_factorization", "PrimeFactorization", _prime_factors, {"max_value": 5000}),
    Kind("algebra.simple_equations", "SimpleEquations", _equation),
    Kind("algebra.complex_arithmetic", "ComplexArithmetic", _complex),
)  # fmt: skip
THOUGHT = (
    Kind("arithmetic.gsm_symbolic.gsm_symbolic", "GSMSymbolic", _story, config="GSMSymbolicDatasetConfig"),
    Kind("algorithmic.base_conversion", "BaseConversion", _base, {"min_value": 1}),  # its answer for 0 is an empty text
    Kind("algorithmic.caesar_cipher", "CaesarCipher", _caesar, {"max_words": 8}),
    Kind("algorithmic.string_manipulation", "StringManipulation", _rewriting),
    Kind("algorithmic.spell_backward", "SpellBackward", _backward),
    Kind("algorithmic.letter_counting", "LetterCounting", _letters),
    Kind("games.tower_of_hanoi", "Hanoi", _hanoi, {"max_disks": 5}),
)
INSTRUCTIONS = (
    Kind("algorithmic.word_sorting", "WordSorting", _instruction),
    Kind("algorithmic.number_sorting", "NumberSorting", _instruction),
    Kind("algorithmic.number_filtering", "NumberFiltering", _instruction),
    Kind("algorithmic.word_sequence_reversal", "WordSequenceReversal", _instruction),
    Kind("algorithmic.sentence_reordering", "SentenceReordering", _instruction),
    Kind("arithmetic.calendar_arithmetic", "CalendarArithmetic", _instruction),
    Kind("arithmetic.number_format", "NumberFormat", _instruction),
    Kind("graphs.family_relationships", "FamilyRelationships", _instruction),
    Kind("logic.syllogisms", "Syllogism", _instruction),
    Kind("logic.aiw", "AliceInWonderland", _instruction),
)
SYNTHETIC = (
    Kind("arithmetic.leg_counting", "LegCounting", _legs),
    Kind("logic.knights_knaves", "KnightsKnaves", _instruction),
    Kind("graphs.course_schedule", "CourseSchedule", _instruction),
    Kind("graphs.shortest_path", "ShortestPath", _instruction),
    Kind("probability.coin_flip", "CoinFlip", _instruction),
)


def math_worked() -> Iterator[Document]:
    """Sums, products, divisors, fractions, factors, equations and complex numbers with their working."""
    return _generate(MATH)


def cot_worked() -> Iterator[Document]:
    """Longer chains: word problems, base conversion, ciphers, rewriting systems, spelling, the Tower of Hanoi."""
    return _generate(THOUGHT)


def instruct_qa() -> Iterator[Document]:
    """Instructions in words with their answers."""
    return _generate(INSTRUCTIONS)


def synthetic_tasks() -> Iterator[Document]:
    """Small generated puzzles of other kinds."""
    return _generate(SYNTHETIC)
