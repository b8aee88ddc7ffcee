"""LaunchError: what a user can mend about a launch, said in one message (its own module, so that nothing heavy is imported to raise it)."""

from __future__ import annotations


class LaunchError(ValueError):
    """A launch, status or report that cannot go on; the message names what was found, what was expected and the remedy."""
