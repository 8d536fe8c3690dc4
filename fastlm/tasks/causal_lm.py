"""Causal language modelling: predict each token from those before it.

The loss is the mean of -ln p(target) over the targets that are not ignored, in nats per token. That depends
on the tokenizer, so it is also given per byte of text: bits per byte = (sum of nats / ln 2) / (sum of the
targets' bytes), where a separator costs nats and stands for no byte. Models with different tokenizers compare
in bits per byte.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from fastlm.data import IGNORED

__all__ = ["CausalLM", "Evaluation", "Metrics", "unigram_entropy"]

_COUNTED_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class CausalLM:
    """The objective for one vocabulary.

    Args:
        vocab_size: ids are in [0, vocab_size).
        bytes_per_token: (vocab_size,) integers, the bytes of text that each id stands for
            (`Tokenizer.bytes_per_token`); None where that is not known, and then there are no bits per byte.
    """

    vocab_size: int
    bytes_per_token: np.ndarray | None = field(default=None, compare=False, repr=False)

    keys = ("input_ids", "targets")
    outputs = False
    """Whether its metrics read more of the model than the loss."""

    def __post_init__(self) -> None:
        if self.vocab_size < 1:
            raise ValueError(f"vocab_size must be at least 1, got {self.vocab_size}")
        table = self.bytes_per_token
        if table is not None and table.shape != (self.vocab_size,):
            raise ValueError(f"bytes_per_token must have shape ({self.vocab_size},), got {table.shape}")

    def empty(
        self, batch_size: int, seq_len: int, device: torch.device | str = "cpu", pin_memory: bool = False
    ) -> dict[str, torch.Tensor]:
        """Buffers for a batch: int64 (batch_size, seq_len) under each of `keys`, contents undefined."""
        shape = batch_size, seq_len
        return {
            key: torch.empty(shape, dtype=torch.int64, device=device, pin_memory=pin_memory)
            for key in self.keys
        }

    def random(self, batch_size: int, seq_len: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """A batch that `check` accepts, with ignored targets, for audits."""
        batch = {
            key: torch.randint(self.vocab_size, (batch_size, seq_len), generator=generator) for key in self.keys
        }
        batch["targets"][:, -1] = IGNORED
        return batch

    def check(self, batch: Mapping[str, torch.Tensor]) -> None:
        """Hold a batch to what a model may rely on. Waits for the device where the batch is on one.

        Raises:
            ValueError, TypeError: a missing key; tensors that are not int64 (batch, seq) of one shape and
            device; an
                input outside [0, vocab_size); a target outside it that is not -100.
        """
        for key in self.keys:
            if key not in batch:
                raise ValueError(f"a batch must hold {' and '.join(self.keys)}, got {sorted(batch)}")
            tensor = batch[key]
            if tensor.dtype != torch.int64:
                raise TypeError(f"{key} must be int64, got {tensor.dtype}")
            if tensor.ndim != 2 or 0 in tensor.shape:
                raise ValueError(f"{key} must be (batch, seq) and not empty, got shape {tuple(tensor.shape)}")
        inputs, targets = (batch[key] for key in self.keys)
        if inputs.shape != targets.shape or inputs.device != targets.device:
            raise ValueError(
                "input_ids and targets must have one shape and device, got "
                f"{tuple(inputs.shape)} on {inputs.device} and {tuple(targets.shape)} on {targets.device}"
            )
        self._check_range("input_ids", inputs, inputs >= 0, "")
        self._check_range("targets", targets, (targets >= 0) | (targets == IGNORED), f" or {IGNORED}")

    def _check_range(self, key: str, ids: torch.Tensor, low_enough: torch.Tensor, more: str) -> None:
        wrong = ~low_enough | (ids >= self.vocab_size)
        if wrong.any():
            row, column = wrong.nonzero()[0].tolist()
            got = int(ids[row, column])
            raise ValueError(f"{key} must be in [0, {self.vocab_size}){more}, got {got} at [{row}, {column}]")

    def evaluation(self) -> Evaluation:
        """Joins the results of batches."""
        return Evaluation(self)

    def baseline(self, batches: Sequence[Mapping[str, torch.Tensor]]) -> tuple[int, float]:
        """How many targets these batches have, and their entropy: the loss of the best model without context."""
        targets = np.concatenate([batch["targets"].numpy().reshape(-1) for batch in batches])
        targets = targets[targets != IGNORED]
        return len(targets), unigram_entropy(targets)

    def count(self, targets: torch.Tensor) -> tuple[int, int | None]:
        """How many targets count, and how many bytes of text they stand for."""
        counted = targets[targets != IGNORED].cpu().numpy()
        if self.bytes_per_token is None:
            return counted.size, None
        return counted.size, int(self.bytes_per_token[counted].sum())


@dataclass(frozen=True)
class Metrics:
    """A measured loss: nats per token, e**loss, bits per byte of text, and over how much it was taken."""

    loss: float
    perplexity: float
    bits_per_byte: float | None
    tokens: int
    bytes: int | None

    @property
    def score(self) -> float:
        """What the best of several models has least of."""
        return self.loss

    def record(self) -> dict[str, float | None]:
        """For a line of records."""
        return {"val_loss": self.loss, "val_bits_per_byte": self.bits_per_byte}

    def text(self) -> str:
        """For people."""
        bits = "" if self.bits_per_byte is None else f", {self.bits_per_byte:.4f} bits per byte"
        return f"validation loss {self.loss:.4f}{bits}"


class Evaluation:
    """Joins the losses of batches, each weighted by the targets that count in it, in float64."""

    def __init__(self, task: CausalLM) -> None:
        self._task = task
        self._nats = 0.0
        self._tokens = 0
        self._bytes = 0

    def add(self, loss: float | torch.Tensor, targets: torch.Tensor) -> None:
        """Add the mean loss, in nats per token, of a batch with these targets; without any, there is none."""
        tokens, size = self._task.count(targets)
        if tokens:
            self._nats += float(loss) * tokens
            self._tokens += tokens
            self._bytes += size or 0

    def add_batch(
        self, sums: Sequence[float], counts: Sequence[int], batch: Mapping[str, torch.Tensor],
        outputs: Mapping[str, torch.Tensor],
    ) -> None:  # fmt: skip
        """Add a batch whose loss, summed, is sums[0] nats over counts[0] targets."""
        self.add(sums[0] / max(1, counts[0]), batch["targets"])

    def result(self) -> Metrics:
        """What was added so far. A NaN stays NaN.

        Raises:
            ValueError: no target was counted.
        """
        if not self._tokens:
            raise ValueError("no loss to report: every target was ignored")
        loss = self._nats / self._tokens
        bits = self._nats / math.log(2) / self._bytes if self._bytes else None
        known = None if self._task.bytes_per_token is None else self._bytes
        # exp overflows at 709.8; a loss that high is a diverged run, not an error of arithmetic.
        return Metrics(loss, math.inf if loss > 709 else math.exp(loss), bits, self._tokens, known)


def unigram_entropy(tokens: np.ndarray | torch.Tensor) -> float:
    """Entropy of the frequencies of tokens, in nats: the least loss of a model that ignores context.

    Args:
        tokens: integers >= 0 of any shape, mapped or not; read in bounded memory.

    Raises:
        ValueError: no tokens.
    """
    flat = (tokens.cpu().numpy() if isinstance(tokens, torch.Tensor) else tokens).reshape(-1)
    if not len(flat):
        raise ValueError("the entropy of no tokens is undefined")
    counts = np.zeros(0, dtype=np.int64)
    for start in range(0, len(flat), _COUNTED_AT_ONCE):
        found = np.bincount(flat[start : start + _COUNTED_AT_ONCE], minlength=len(counts))
        found[: len(counts)] += counts
        counts = found
    p = counts[counts > 0] / len(flat)
    return float(-(p * np.log(p)).sum())
