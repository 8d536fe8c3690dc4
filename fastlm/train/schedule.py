"""The learning rate: linear warm-up, then half a cosine down to a floor. A pure function of the step."""

from __future__ import annotations

import math

__all__ = ["learning_rate"]


def learning_rate(step: int, *, peak: float, minimum: float, warmup: int, steps: int) -> float:
    """The rate of update number ``step`` (0 is the first) in a run of ``steps`` updates.

    The first ``warmup`` updates rise linearly and end on ``peak``: ``peak * (step + 1) / warmup``, so that
    no update is wasted on a rate of 0. The rest fall by ``minimum + (peak - minimum) * (1 + cos(pi t)) / 2``,
    ``t`` going from 0 to 1, and the last update uses exactly ``minimum``. Later steps stay there.

    It has no state, so a resumed run needs only its step (SGDR, Loshchilov & Hutter 2017, without restarts).
    """
    if step < 0:
        raise ValueError(f"step: got {step}, allowed are 0 and more")
    if step < warmup:
        return peak * (step + 1) / warmup
    if step >= steps - 1:
        return minimum
    progress = (step - warmup) / (steps - 1 - warmup)
    return minimum + 0.5 * (peak - minimum) * (1.0 + math.cos(math.pi * progress))
