"""What the linter says: one reason why a recipe cannot be trained as it stands, with a value that would pass."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One refusal of the linter."""

    key: str
    """Key of the recipe, as an override names it."""
    value: object
    """What the recipe has there."""
    rule: str
    """The rule that it breaks."""
    remedy: str
    """What would pass."""

    def __str__(self) -> str:
        return f"{self.key} = {self.value}: {self.rule}; {self.remedy}"
