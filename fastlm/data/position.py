"""The saved position of a loader, checked before it is taken over."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastlm.data.errors import DataError

__all__ = ["position_of"]


def position_of(state: Mapping[str, Any], identity: Mapping[str, Any], *counts: str) -> list[int]:
    """The counts of a saved state by name, integers from 0. identity: what the position must belong to.

    Raises:
        DataError: `state` belongs to something else, or is not of such a loader.
    """
    changed = [
        f"{name} was {state.get(name, 'not saved')!r} and is now {value!r}"
        for name, value in identity.items()
        if state.get(name) != value
    ]
    if changed:
        raise DataError(f"the data position cannot be restored: {'; '.join(changed)}")
    for name in counts:
        value = state.get(name)
        if type(value) is not int or value < 0:
            raise DataError(f"the data position cannot be restored: {name} is {value!r}")
    return [state[name] for name in counts]
