"""Composed recipes that many tests look at, made once; and a way to change one value of them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest

from recipes.compose import compose
from recipes.lint import check, lint
from recipes.schema import Recipe, RecipeError


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
def fp8() -> Recipe:
    return compose(["precision=fp8_tensorwise"])


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


Rule = tuple[str, dict[str, Any], str, str, str, str]
"""Fixture of a good recipe, values that break it, and parts of the refusal: key (whole), value, rule, remedy."""


@pytest.fixture
def refused(changed: Callable[..., Recipe], request: pytest.FixtureRequest) -> Callable[[Rule], None]:
    """Asserts that the good recipe passes and that the broken one is refused in the words of the rule."""

    def assert_refused(case: Rule) -> None:
        recipe, values, key, value, rule, remedy = case
        good = request.getfixturevalue(recipe)
        assert lint(good) == []
        bad = changed(good, **values)
        problems = lint(bad)
        said = [p for p in problems if p.key == key and rule in p.rule]
        assert said, problems
        assert any(value in str(p.value) and remedy in p.remedy for p in said), said
        with pytest.raises(RecipeError) as caught:
            check(bad)
        assert f"{key} = " in str(caught.value)
        assert remedy in str(caught.value)

    return assert_refused
