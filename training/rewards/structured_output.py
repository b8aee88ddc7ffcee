"""Structured output: the completion is one JSON value, strictly read, that fits a JSON schema."""

from __future__ import annotations

import json
from typing import Any, Literal

from pydantic import Field, JsonValue

from training.rewards.base import Options, Reward, RewardError, Sample, Score, need, shorten


class StructuredOptions(Options):
    """Options of `json_schema`; `reference` is the schema, or {"schema": ..., "expected": value} where the value is known too."""

    json_schema: dict[str, JsonValue] | None = None
    """The schema of every sample; None: each sample's reference has its own."""
    code_fence: Literal["forbid", "allow", "require"] = "forbid"
    """Whether the whole completion may, or must, be one ```json fence. Text outside of the JSON is never accepted."""
    parsed_value: float = Field(default=0.0, ge=0, lt=1)
    """Score of JSON that parses and does not fit the schema; 0 makes the reward binary."""


class StructuredOutput(Reward):
    """1 if the completion is JSON that fits the schema (and equals `expected` where given)."""

    options_type = StructuredOptions
    options: StructuredOptions

    def prepare(self) -> None:
        need("jsonschema", "json_schema")
        need("referencing", "json_schema")
        if self.options.json_schema is not None:
            self._validator(self.options.json_schema)

    def score(self, sample: Sample) -> Score:
        schema, expected = self._read(sample.reference)
        validator = self._validator(schema)
        text = sample.completion
        fenced = unfence(text)
        if fenced is not None and self.options.code_fence == "forbid":
            return Score(value=0.0, reason="a code fence, which this task forbids")
        if fenced is None and self.options.code_fence == "require":
            return Score(value=0.0, reason="no code fence around the whole answer")
        try:
            value = strict_json(text if fenced is None else fenced)
        except (ValueError, RecursionError) as error:
            return Score(value=0.0, reason=shorten(f"not JSON: {error}", 200))
        first = next(iter(sorted(validator.iter_errors(value), key=lambda e: [str(p) for p in e.absolute_path])), None)
        if first is not None:
            place = "/".join(str(p) for p in first.absolute_path) or "(root)"
            return Score(value=self.options.parsed_value, reason=shorten(f"{place}: {first.message}", 200))
        if expected and not same_json(value, expected[0]):
            return Score(value=self.options.parsed_value, reason="fits the schema, is not the expected value")
        return Score(value=1.0, reason="fits the schema")

    def check_reference(self, reference: JsonValue) -> None:
        self._validator(self._read(reference)[0])

    def _read(self, reference: JsonValue) -> tuple[dict[str, Any], list[JsonValue]]:
        """The schema, and the expected value in a list where there is one."""
        schema: Any = self.options.json_schema
        expected: list[JsonValue] = []
        if isinstance(reference, dict) and set(reference) <= {"schema", "expected"} and reference:
            schema = reference.get("schema", schema)
            expected = [reference["expected"]] if "expected" in reference else []
        elif schema is None:
            schema = reference
        if not isinstance(schema, dict):
            raise RewardError(f"no schema: reference must be a JSON schema, found {shorten(repr(reference), 80)}")
        return schema, expected

    @staticmethod
    def _validator(schema: dict[str, Any]) -> Any:
        jsonschema = need("jsonschema", "json_schema")
        kind = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
        try:
            kind.check_schema(schema)
        except jsonschema.SchemaError as error:
            raise RewardError(f"reward 'json_schema': not a valid schema at {error.json_path}: {error.message}") from None
        # An empty registry: a $ref to an address is an error instead of a download.
        return kind(schema, registry=need("referencing", "json_schema").Registry(), format_checker=kind.FORMAT_CHECKER)


def unfence(text: str) -> str | None:
    """What stands inside of the one ``` or ```json fence that all of the text is, or None."""
    text = text.strip()
    if len(text) < 6 or not (text.startswith("```") and text.endswith("```")):
        return None
    language, _, inside = text[3:-3].partition("\n")
    return inside if language.strip().lower() in ("", "json") else None


def strict_json(text: str) -> Any:
    """One JSON value; ValueError for what Python's reader lets through: NaN, Infinity, a key twice, a byte-order mark."""

    def no_constant(name: str) -> Any:
        raise ValueError(f"{name} is not JSON")

    def no_double(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        if len(set(keys)) != len(keys):
            raise ValueError(f"key {next(k for k in keys if keys.count(k) > 1)!r} twice in one object")
        return dict(pairs)

    return json.loads(text, parse_constant=no_constant, object_pairs_hook=no_double)


def same_json(left: Any, right: Any) -> bool:
    """Equality of JSON values: True is not 1, 1 is 1.0, the order of keys does not matter."""
    if isinstance(left, bool) or isinstance(right, bool):
        return left is right
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(same_json(v, right[k]) for k, v in left.items())
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(same_json(a, b) for a, b in zip(left, right, strict=True))
    if isinstance(left, int | float) and isinstance(right, int | float):
        return left == right
    return type(left) is type(right) and left == right
