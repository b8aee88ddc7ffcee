"""The language identifier: py3langid, whose model is in its wheel."""

from __future__ import annotations

from functools import cache
from typing import Any


@cache
def identifier() -> Any:
    """With probabilities that are comparable between texts of different length."""
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
