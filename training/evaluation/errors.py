"""EvaluationError, importable without torch."""

from __future__ import annotations


class EvaluationError(ValueError):
    """An evaluation that cannot be done as asked; the message names what was found, what was expected and the remedy."""
