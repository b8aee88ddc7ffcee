"""The one error of data preparation: every refusal of this package is a DataError whose message carries its remedy."""

from __future__ import annotations


class DataError(ValueError):
    """Data that must not be trained on, or cannot be made; the message names file or key, expected, found and remedy."""
