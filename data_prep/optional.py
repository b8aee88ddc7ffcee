"""Packages of the extra `data`: preparing data needs them, training on prepared data does not."""

from __future__ import annotations

import importlib
from types import ModuleType

from data_prep.errors import DataError


def need(name: str) -> ModuleType:
    """The module `name`, imported when first asked for; DataError with the remedy where it is not installed."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name.partition(".")[0]:
            raise  # it is there, one of its own dependencies is not
        raise DataError(
            f"the package '{name.partition('.')[0]}' is not installed, and preparing data needs it; pip install 'quarry[data]'"
        ) from None
