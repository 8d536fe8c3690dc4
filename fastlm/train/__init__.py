"""The training run: options, schedule, loop, checkpoints, guard, records.

``train`` and what it needs of torch load on first use; the options alone are light.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .config import OptionError, TrainConfig
from .presets import PRESETS

if TYPE_CHECKING:
    from .loop import train

__all__ = ["PRESETS", "OptionError", "TrainConfig", "train"]


def __getattr__(name: str) -> Any:
    if name == "train":
        from .loop import train

        return train
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
