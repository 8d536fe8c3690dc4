"""What is raised where data cannot be used."""

from __future__ import annotations

__all__ = ["DataError"]


class DataError(ValueError):
    """Input that cannot be used; the message names it and says what is wrong with it."""
