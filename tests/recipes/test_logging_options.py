"""The option for Weights & Biases: off unless asked for, offline only, refused where its package is missing."""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

import pytest
from pydantic import ValidationError

from recipes.compose import compose
from recipes.logging_options import Logging, missing_package


def test_a_recipe_has_it_off_and_an_override_turns_it_on() -> None:
    assert compose(["curriculum=smoke"]).logging == Logging()
    chosen = compose(["curriculum=smoke", "logging.wandb=offline", "logging.wandb_project=mine"]).logging
    assert (chosen.wandb, chosen.wandb_project) == ("offline", "mine")


@pytest.mark.parametrize("value", ["online", "off", True])
def test_there_is_no_other_mode(value: Any) -> None:
    with pytest.raises(ValidationError, match="offline"):
        Logging(wandb=value)


def test_only_the_chosen_package_is_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert missing_package(Logging()) is None
    problem = missing_package(Logging(wandb="offline"))
    assert problem is not None
    assert sys.executable in problem
    assert "logging.wandb=null" in problem
