"""Validation: the loss on the same held-out tokens each time, and the bar that a model must get under."""

from __future__ import annotations

import numpy as np
import torch

from fastlm.data import IGNORED, ValidationLoader
from fastlm.engine import Engine
from fastlm.tasks import CausalLM, Evaluation, Metrics, unigram_entropy

__all__ = ["Validation"]


class Validation:
    """A fixed set of batches.

    ``tokens`` is how many targets they hold, ``unigram_entropy`` the entropy of those very targets in nats:
    what the best model without context would lose on them.
    """

    def __init__(self, task: CausalLM, loader: ValidationLoader, device: torch.device) -> None:
        self._task = task
        self._batches = [dict(batch) for batch in loader]
        self._device = device
        targets = np.concatenate([batch["targets"].numpy().reshape(-1) for batch in self._batches])
        targets = targets[targets != IGNORED]
        self.tokens = len(targets)
        self.unigram_entropy = unigram_entropy(targets)

    def __call__(self, engine: Engine) -> Metrics:
        """Loss in nats per token and bits per byte, without dropout; the engine's state is untouched."""
        evaluation = Evaluation(self._task)
        for batch in self._batches:
            there = {name: tensor.to(self._device) for name, tensor in batch.items()}
            nats, count = engine.evaluate(there)
            evaluation.add(nats.item() / max(1.0, count.item()), batch["targets"])
        return evaluation.result()
