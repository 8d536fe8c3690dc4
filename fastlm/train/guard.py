"""Spike guard: tells a step that went wrong from ordinary noise, and a broken run from a bad step.

The engine already makes a step with a non-finite gradient a no-op on the device. The guard reads the
step's numbers afterwards and answers two questions:

- is this loss or gradient norm far above the recent ones? "Far" is counted in robust deviations,
  ``(x - median) / (1.4826 * MAD)`` over a sliding window, because a mean and a standard deviation are
  moved by the very spike they should find (the factor makes MAD the deviation of a normal distribution);
- were the last ``patience`` steps all skipped? Then the run is not going to recover by itself.

Non-finite values never enter the window, so one NaN cannot blind it. Finite spikes do enter: the median
shrugs off a few, and if the level has really moved, half a window later the new level is normal.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

__all__ = ["Spike", "SpikeGuard"]

# Below this many values a median says little; early losses fall fast and would only raise false alarms.
_LEAST_HISTORY = 16
# MAD is 0 when most values are equal; then a change of this share of the median still counts as noise.
_NOISE_FLOOR = 1e-3


@dataclass(frozen=True)
class Spike:
    """One value of a series, how far it is above the median of its recent past, in robust deviations."""

    series: str
    step: int
    value: float
    median: float
    deviations: float

    def __str__(self) -> str:
        return (
            f"step {self.step}: {self.series} {self.value:.4g} is {self.deviations:.1f} robust deviations "
            f"above the median {self.median:.4g} of recent steps"
        )


class SpikeGuard:
    """Watches loss and gradient norm.

    Args:
        deviations: how many robust deviations above the median make a spike; 0 turns spikes off.
        patience: how many skipped steps in a row mean that the run is broken; 0 means never.
        window: how many finite values of each series are remembered.
    """

    def __init__(self, deviations: float = 10.0, patience: int = 20, window: int = 128) -> None:
        if window < _LEAST_HISTORY:
            raise ValueError(f"window: got {window}, allowed are {_LEAST_HISTORY} and more")
        self.deviations = deviations
        self.patience = patience
        self.skipped = 0
        self.skipped_in_a_row = 0
        self._recent: dict[str, deque[float]] = {
            name: deque(maxlen=window) for name in ("loss", "gradient norm")
        }

    def observe(self, step: int, loss: float, grad_norm: float, skipped: bool) -> list[Spike]:
        """Takes in the numbers of one step, in order, and returns the spikes in it."""
        if skipped:
            self.skipped += 1
            self.skipped_in_a_row += 1
        else:
            self.skipped_in_a_row = 0
        values = {"loss": loss, "gradient norm": grad_norm}
        return [spike for name, value in values.items() if (spike := self._judge(name, step, value))]

    @property
    def broken(self) -> bool:
        """Whether the last ``patience`` steps were all skipped."""
        return 0 < self.patience <= self.skipped_in_a_row

    def _judge(self, name: str, step: int, value: float) -> Spike | None:
        if not math.isfinite(value):
            return None
        recent = self._recent[name]
        spike = None
        if self.deviations > 0 and len(recent) >= _LEAST_HISTORY:
            middle = median(recent)
            spread = max(1.4826 * median(abs(x - middle) for x in recent), _NOISE_FLOOR * abs(middle))
            if spread > 0 and value - middle > self.deviations * spread:
                spike = Spike(name, step, value, middle, (value - middle) / spread)
        recent.append(value)
        return spike

    def state_dict(self) -> dict[str, Any]:
        """JSON-serialisable; Python's floats survive JSON exactly."""
        return {
            "skipped": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
            "recent": {name: list(values) for name, values in self._recent.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.skipped = int(state["skipped"])
        self.skipped_in_a_row = int(state["skipped_in_a_row"])
        for name, values in self._recent.items():
            values.clear()
            values.extend(float(x) for x in state["recent"][name])
