"""Composed recipes that many tests look at, made once; and a way to change one value of them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest

from recipes.compose import compose
from recipes.schema import Recipe


@pytest.fixture(scope="session")
def five_phase() -> Recipe:
    return compose([])


@pytest.fixture(scope="session")
def granite_4_1() -> Recipe:
    return compose(["curriculum=granite_4_1"])


@pytest.fixture(scope="session")
def smoke() -> Recipe:
    return compose(["curriculum=smoke"])


@pytest.fixture(scope="session")
def changed() -> Callable[..., Recipe]:
    """changed(recipe, **{"phase.foundation.tokens": 5}) -> a copy of the recipe with those values; Ellipsis removes a key."""

    def change(recipe: Recipe, **values: Any) -> Recipe:
        raw = copy.deepcopy(recipe.model_dump())
        for key, value in values.items():
            *path, last = key.split(".")
            node = raw
            for part in path:
                node = node[part]
            if value is ...:
                del node[last]
            else:
                node[last] = value
        return Recipe.model_validate(raw)

    return change
