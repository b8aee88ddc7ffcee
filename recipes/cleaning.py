"""What is filtered, deduplicated, masked and decontaminated before tokenizing; part of a resolved recipe (data.cleaning)."""

from __future__ import annotations

from recipes.fields import Strict


class Cleaning(Strict):
    """The cleaning of all sources of a data set."""

    name: str
