"""Names of rewards, and options checked against their types. A reward's module is imported when it is asked for by name."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from training.rewards.base import Options, Reward, RewardError

REWARDS = {
    "math": ("training.rewards.math_answer:MathAnswer", "final answer equal to the reference, as mathematics"),
    "json_schema": ("training.rewards.structured_output:StructuredOutput", "the completion is JSON that fits a schema"),
    "instructions": (
        "training.rewards.constraints:Instructions",
        "checkable instructions (lengths, keywords, format, case ...)",
    ),
    "code": ("training.rewards.code_execution:CodeExecution", "the program passes its tests, run in a sandbox"),
    "reasoning_gym": ("training.rewards.procedural:ReasoningGym", "the task's own scorer of reasoning-gym, binary by default"),
    "format": ("training.rewards.formats:Format", "a regular expression and tags that the completion must show"),
    "judge": ("training.rewards.judge:Judge", "a judge model's score, OpenAI-compatible chat with a JSON schema"),
    "reward_model": ("training.rewards.judge:RewardModel", "a reward model's score over HTTP (/score of vLLM)"),
}
"""Name -> (module:class, one line). Another class is named by its own `module:Class`, without an entry here."""


def reward_class(name: str) -> type[Reward]:
    """The class behind a name; RewardError with the near names where there is none."""
    place = REWARDS[name][0] if name in REWARDS else name
    module_name, colon, class_name = place.partition(":")
    if not colon:
        near = difflib.get_close_matches(name, REWARDS, n=2)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise RewardError(f"no reward is called '{name}'; {hint}known: {', '.join(REWARDS)}; another one is named module:Class")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise RewardError(f"reward '{name}': module {error.name} cannot be imported; is it on PYTHONPATH?") from error
    found = getattr(module, class_name, None)
    if not (isinstance(found, type) and issubclass(found, Reward)):
        raise RewardError(f"reward '{name}': {module_name} has no class {class_name} that derives from training.rewards.Reward")
    return found


def check_options(name: str, options: Mapping[str, Any]) -> Options:
    """The options of a reward, typed; RewardError names every wrong key and what is allowed."""
    options_type = reward_class(name).options_type
    try:
        return options_type.model_validate(dict(options))
    except ValidationError as error:
        lines = []
        for problem in error.errors(include_url=False):
            key = ".".join(str(p) for p in problem["loc"]) or "(options)"
            if problem["type"] == "extra_forbidden":
                near = difflib.get_close_matches(key, options_type.model_fields, n=1)
                hint = f"did you mean {near[0]}? " if near else ""
                lines.append(f"{key}: no such option; {hint}known: {', '.join(options_type.model_fields)}")
            else:
                shown = "" if problem["type"] == "missing" else f", found {problem['input']!r}"
                lines.append(f"{key}: {problem['msg']}{shown}")
        raise RewardError(f"reward '{name}', options: " + "; ".join(lines)) from None


def build(name: str, options: Mapping[str, Any]) -> Reward:
    """A reward ready to be prepared; RewardError for an unknown name or bad options."""
    return reward_class(name)(check_options(name, options))


def describe() -> str:
    """All registered rewards with their options, types, defaults and docstrings."""
    lines = []
    for name, (place, summary) in REWARDS.items():
        lines.append(f"{name}: {summary}")
        try:
            options_type = reward_class(name).options_type
        except ImportError as error:
            lines.append(f"    ({place} cannot be imported: {error})")
            continue
        for key, field in options_type.model_fields.items():
            kind = getattr(field.annotation, "__name__", None) if not hasattr(field.annotation, "__args__") else None
            kind = kind or str(field.annotation).replace("typing.", "")
            default = "required" if field.is_required() else f"default {field.get_default(call_default_factory=True)!r}"
            lines.append(f"    {key} ({kind}, {default}): {' '.join((field.description or '').split())}")
    return "\n".join(lines)
