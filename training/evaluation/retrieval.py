"""Runs the needle test of training.evaluation.needle over lengths and depths and sums it up."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from training.evaluation.errors import EvaluationError
from training.evaluation.needle import Case, Encode, Filler, make_case, make_filler
from training.evaluation.request import NeedleOptions

Score = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]
"""(prompt [s], candidates [choices, n]) -> (log-probabilities [choices], greedy tokens [n]); training.evaluation.scoring.score."""

Keep = Callable[[int, float, Callable[[], dict[str, Any]]], dict[str, Any]]


def lengths_for(options: NeedleOptions, max_position_tokens: int) -> list[int]:
    """The lengths to test; EvaluationError for one that the model was not trained on."""
    lengths = options.lengths_tokens or [max_position_tokens // 2, max_position_tokens]
    beyond = [n for n in lengths if n > max_position_tokens]
    if beyond:
        raise EvaluationError(
            f"needle: --needle-lengths {beyond[0]} is beyond the model's {max_position_tokens} tokens (max_position_embeddings); "
            f"use at most {max_position_tokens}"
        )
    return sorted(lengths)


def run(
    options: NeedleOptions,
    max_position_tokens: int,
    documents: Callable[[], Iterable[str]],
    encode: Encode,
    score: Score,
    done: Callable[[int], None] = lambda tokens: None,
    keep: Keep = lambda length, percent, measure: measure(),
) -> dict[str, Any]:
    """One result per length and depth, and per length; `done` is told the tokens of each text as it is scored.

    `keep(length, depth, measure)` returns what `measure` does, or what it did before.
    """
    lengths = lengths_for(options, max_position_tokens)
    fillers: dict[int, Filler] = {}

    def measure(length: int, percent: float) -> dict[str, Any]:
        if length not in fillers:
            fillers.clear()
            fillers[length] = make_filler(documents(), encode, length)
        filler, outcomes = fillers[length], []
        for sample in range(options.samples):
            case = make_case(options, filler, encode, length, percent, sample)
            outcomes.append(_outcome(case, *score(case.prompt, case.candidates)))
            done(length)
        return {
            "length_tokens": length,
            "depth_percent": percent,
            **_summary(outcomes),
            "filler_sha256": filler.sha256,
            "samples": outcomes,
        }

    cells = [keep(n, p, functools.partial(measure, n, p)) for n in lengths for p in options.depths_percent]
    return {
        "options": options.model_dump(mode="json") | {"lengths_tokens": lengths},
        "chance_ranked_first": 1 / options.choices,
        "cells": cells,
        "by_length": [
            {"length_tokens": n, **_summary([s for c in cells if c["length_tokens"] == n for s in c["samples"]])}
            for n in lengths
        ],
    }


def total_tokens(options: NeedleOptions, max_position_tokens: int) -> int:
    """Tokens that a run scores, for a progress display."""
    return sum(lengths_for(options, max_position_tokens)) * len(options.depths_percent) * options.samples


def _outcome(case: Case, logprobs: np.ndarray, greedy: np.ndarray) -> dict[str, Any]:
    if not np.isfinite(logprobs).all():
        raise EvaluationError(f"needle: log-probabilities are {logprobs.tolist()}; the model's weights are damaged")
    others = np.delete(logprobs, case.answer)
    return {
        "tokens": len(case.prompt) + case.candidates.shape[1],
        "depth_percent": round(case.depth_percent, 3),
        # A tie is no retrieval: a model that gives all candidates the same probability must not look perfect.
        "ranked_first": bool(logprobs[case.answer] > others.max()),
        "margin_nats": float(logprobs[case.answer] - others.max()),
        "generated": bool(np.array_equal(greedy, case.candidates[case.answer])),
    }


def _summary(outcomes: Sequence[dict[str, Any]]) -> dict[str, Any]:
    n = len(outcomes)
    ranked = sum(o["ranked_first"] for o in outcomes) / n
    return {
        "count": n,
        "ranked_first": ranked,
        "ranked_first_stderr": math.sqrt(ranked * (1 - ranked) / n),
        "generated": sum(o["generated"] for o in outcomes) / n,
        "margin_nats": sum(o["margin_nats"] for o in outcomes) / n,
    }
