"""The two files that a person edits: rules (recipes/curation) and rubrics (recipes/rubric), found by name or path and strictly typed."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from data_prep.errors import DataError
from data_prep.plain_files import digest_of
from recipes.cleaning import Decontamination, NearDuplicates
from recipes.compose import TREE
from recipes.fields import PositiveFloat, PositiveInt, Strict
from recipes.schema import describe

Verdict = Literal["accept", "borderline", "reject"]
VERDICTS: tuple[Verdict, ...] = ("accept", "borderline", "reject")
Word = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$", max_length=40)]
"""A key of the judge's answer."""
WEIGHT_TOLERANCE = 1e-9
"""Weights are decimal fractions: their sum in binary is 1 but for rounding."""
ALTERNATIVES = 9
"""Scores are offered as an enumeration, which every server's schema support knows; a longer scale is no scale for a judge."""

REMOVABLE = ("dimensions", "hard_rejects")
"""Mappings of which a file may take out entries of its base."""


class Dimension(Strict):
    weight: PositiveFloat
    """Share of the weighted score; the weights of a rubric sum to 1."""
    question: str
    """What the judge scores, one sentence."""
    floor: int | None = None
    """A sample below this score in this dimension is never accepted, whatever the sum says; null: no floor."""


class Scale(Strict):
    lowest: int
    highest: int

    @model_validator(mode="after")
    def _ordered(self) -> Scale:
        if not 1 <= self.highest - self.lowest < ALTERNATIVES:
            raise ValueError(f"from {self.lowest} to {self.highest} is no scale of 2 to {ALTERNATIVES} scores")
        return self


class Thresholds(Strict):
    """Of the weighted score: at least `accept` is accepted, at least `borderline` is borderline, below is rejected. Equal: none is
    borderline by its score."""

    accept: PositiveFloat
    borderline: PositiveFloat


class Rubric(Strict):
    name: str
    title: str
    dimensions: dict[Word, Dimension]
    scale: Scale
    thresholds: Thresholds
    hard_rejects: dict[Word, str]
    """Flag -> what it means. A raised flag rejects regardless of the scores."""
    prompt: str
    """What the judge is told about its task; the questions, the flags and the rules about the sample's fence follow by themselves."""
    reason_max_characters: PositiveInt | None
    """Longest explanation that the answer's schema allows; null: not said, for servers that refuse maxLength."""
    answer_tokens: PositiveInt
    """Of a usual answer; for the estimate before anything is measured."""

    @model_validator(mode="after")
    def _adds_up(self) -> Rubric:
        if not self.dimensions:
            raise ValueError("dimensions: none; a rubric scores at least one")
        total = sum(d.weight for d in self.dimensions.values())
        if abs(total - 1) > WEIGHT_TOLERANCE:
            raise ValueError(f"dimensions: the weights sum to {total:.6g}, not to 1; divide each by {total:.6g}")
        low, high = self.scale.lowest, self.scale.highest
        if not low <= self.thresholds.borderline <= self.thresholds.accept <= high:
            raise ValueError(
                f"thresholds: borderline {self.thresholds.borderline} and accept {self.thresholds.accept} must ascend within the scale "
                f"{low} to {high}"
            )
        for name, dimension in self.dimensions.items():
            if dimension.floor is not None and not low <= dimension.floor <= high:
                raise ValueError(f"dimensions.{name}.floor: {dimension.floor} is outside the scale {low} to {high}")
        if both := set(self.dimensions) & set(self.hard_rejects):
            raise ValueError(f"hard_rejects: {', '.join(sorted(both))} is a dimension too; rename one")
        return self

    @cached_property
    def asked(self) -> str:
        """SHA-256 of all that the judge is told. Weights, floors and thresholds are not in it: they can be changed without asking again."""
        return digest_of(
            {
                "questions": {name: d.question for name, d in self.dimensions.items()},
                "order": [*self.dimensions, *self.hard_rejects],
                "scale": [self.scale.lowest, self.scale.highest],
                "hard_rejects": self.hard_rejects,
                "prompt": self.prompt,
                "reason_max_characters": self.reason_max_characters,
            }
        )

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of everything in the rubric."""
        return digest_of(self.model_dump(mode="json"))


class Curation(Strict):
    """What is done to samples, and asked of them, before any judge sees them."""

    name: str
    unicode_form: Literal["NFC", "NFKC"] | None
    """Text is brought into this Unicode normal form; null: left as it is."""
    max_messages: PositiveInt
    max_characters: PositiveInt
    """Of all messages, documents and tools of a sample together; longer ones would be cut off in training."""
    min_answer_characters: PositiveInt
    """Of each assistant turn without a tool call."""
    max_answer_characters: PositiveInt
    control_tokens: bool
    """Refuse samples whose text spells control tokens of chat templates, which training would read as tokens."""
    decontamination: Decontamination | None
    """Leakage: samples that share a run of words with an item of a benchmark."""
    exact_duplicates: bool
    near_duplicates: NearDuplicates | None
    """`exempt` has no meaning here and must be empty."""

    @field_validator("near_duplicates")
    @classmethod
    def _no_exempt(cls, value: NearDuplicates | None) -> NearDuplicates | None:
        if value is not None and value.exempt:
            raise ValueError("exempt: samples have no categories; leave it {}")
        return value

    @cached_property
    def sha256(self) -> str:
        return digest_of(self.model_dump(mode="json"))


def load_rubric(name: str) -> Rubric:
    """The rubric of this name (recipes/rubric) or path; DataError with what is wrong in it."""
    return _load("rubric", name, Rubric)


def load_curation(name: str) -> Curation:
    """The rules of this name (recipes/curation) or path; DataError with what is wrong in it."""
    return _load("curation", name, Curation)


def known(group: str) -> list[str]:
    return sorted(path.stem for path in (TREE / group).glob("*.yaml") if not path.stem.startswith("_"))


def _load[Model: BaseModel](group: str, name: str, model: type[Model]) -> Model:
    path = _find(group, name)
    try:
        return model.model_validate(_read(group, path, ()))
    except ValidationError as error:
        raise DataError(f"{path}: {describe(error)}; correct the file") from None


def _find(group: str, name: str, beside: Path | None = None) -> Path:
    candidates = [TREE / group / f"{name}.yaml"] if "/" not in name and not name.endswith(".yaml") else [Path(name)]
    if beside is not None:
        candidates.insert(0, beside / (name if name.endswith(".yaml") else f"{name}.yaml"))
    for path in candidates:
        if path.is_file():
            return path
    raise DataError(f"--{'rules' if group == 'curation' else group} {name}: no such file and none of {', '.join(known(group))}")


def _read(group: str, path: Path, below: tuple[Path, ...]) -> dict[str, Any]:
    """The file's mapping over that of its `base`, which is a name of the group or a file beside it."""
    path = path.resolve()
    if path in below:
        raise DataError(f"{path}: is its own base ({' -> '.join(p.name for p in (*below, path))}); remove one `base:`")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise DataError(f"{path}: cannot be read as YAML: {error}") from None
    if not isinstance(content, dict):
        raise DataError(f"{path}: holds no mapping; see {TREE / group} for examples")
    base = content.pop("base", None)
    if base is None:
        return content
    if not isinstance(base, str):
        raise DataError(f"{path}: base is {base!r}; give the name of another file of this kind")
    return _merged(_read(group, _find(group, base, path.parent), (*below, path)), content)


def _merged(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Mappings key by key, everything else replaced; a null in place of an entry of REMOVABLE takes the entry out."""
    result = dict(under)
    for key, value in over.items():
        if isinstance(value, dict) and isinstance(result.get(key), dict):
            inner = _merged(result[key], value)
            result[key] = {k: v for k, v in inner.items() if v is not None} if key in REMOVABLE else inner
        else:
            result[key] = value
    return result
