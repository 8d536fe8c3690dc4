"""Validation: the loss on the same held-out batches each time, and the bar that a model must get under."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from fastlm.engine import Engine
from fastlm.tasks import Result, Task

__all__ = ["Validation"]


class Validation:
    """A fixed set of batches.

    ``tokens`` is how many targets they hold, ``unigram_entropy`` the entropy of those very targets in nats:
    what the best model without context would lose on them.
    """

    def __init__(self, task: Task, batches: Iterable[Mapping[str, torch.Tensor]], device: torch.device) -> None:
        self._task = task
        self._batches = [dict(batch) for batch in batches]
        self._device = device
        self.tokens, self.unigram_entropy = task.baseline(self._batches)

    def __call__(self, engine: Engine) -> Result:
        """The task's metrics, without dropout; the engine's state is untouched."""
        evaluation = self._task.evaluation()
        for batch in self._batches:
            there = {name: tensor.to(self._device) for name, tensor in batch.items()}
            outputs: dict[str, torch.Tensor] | None = {} if self._task.outputs else None
            sums, counts = (found.reshape(-1).tolist() for found in engine.evaluate(there, outputs))
            evaluation.add_batch(sums, [int(count) for count in counts], batch, outputs or {})
        return evaluation.result()
