"""The shape of a task: what its batches are, how they are checked, and how their losses become metrics.

A task has

    keys                                  the tensors of a batch, which are also the arguments of the model's forward
    empty(rows, width)                    buffers for a batch
    random(rows, width, generator)        a batch that a model may be audited on
    check(batch)                          raises where a model could not rely on it
    evaluation()                          joins batches' results: ``add_batch(sums, counts, batch, outputs)``, ``result()``
    baseline(batches)                     how many targets these have, and the loss of the best model without inputs
    outputs                               whether metrics read what the model gives out beside the loss

and samples that a loader draws from (`fastlm.data.Samples`), which know how a row of a batch is written. The loop, the
feed and the validation of ``fastlm.train`` know no more of a task than this.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np
import torch

from fastlm.data import IGNORED, Draws

__all__ = ["EncoderTask", "Evaluator", "Examples", "Limit", "MeanLoss", "Result", "RowTask", "Scores", "Task", "entropy"]

Batch = Mapping[str, torch.Tensor]


class Result(Protocol):
    """What was measured on a fixed set of batches."""

    @property
    def loss(self) -> float: ...

    @property
    def score(self) -> float: ...

    def record(self) -> dict[str, float | None]: ...

    def text(self) -> str: ...


class Evaluator(Protocol):
    """Joins the results of batches."""

    def add_batch(
        self, sums: Sequence[float], counts: Sequence[int], batch: Batch, outputs: Batch
    ) -> None: ...

    def result(self) -> Result: ...


class Task(Protocol):
    """What the loop, the feed and the validation know of an objective."""

    @property
    def outputs(self) -> bool: ...

    def empty(
        self, rows: int, width: int, /, device: torch.device | str = "cpu", pin_memory: bool = False
    ) -> dict[str, torch.Tensor]: ...

    def random(self, rows: int, width: int, /, generator: torch.Generator) -> dict[str, torch.Tensor]: ...

    def evaluation(self) -> Evaluator: ...

    def baseline(self, batches: Sequence[Batch]) -> tuple[int, float]: ...


class Limit(NamedTuple):
    """Shape of a tensor of a batch, the range of its values, and whether `IGNORED` is allowed too."""

    shape: tuple[int, ...]
    low: int
    high: int  # exclusive
    ignored: bool = False

    def check(self, key: str, tensor: torch.Tensor) -> None:
        """Raises ValueError or TypeError where the tensor `key` is not so, or not int64."""
        if tensor.dtype != torch.int64:
            raise TypeError(f"{key} must be int64, got {tensor.dtype}")
        if tuple(tensor.shape) != self.shape:
            raise ValueError(f"{key} must have shape {self.shape}, got {tuple(tensor.shape)}")
        wrong = (tensor < self.low) | (tensor >= self.high)
        if self.ignored:
            wrong &= tensor != IGNORED
        if wrong.any():
            place = wrong.nonzero()[0].tolist()
            more = f" or {IGNORED}" if self.ignored else ""
            raise ValueError(f"{key} must be in [{self.low}, {self.high}){more}, got {int(tensor[tuple(place)])} at {place}")


@dataclass(frozen=True)
class Scores:
    """A measured loss (nats; of several terms their sum), the task's own metrics, and how many targets they were taken on.

    chosen_by: the metric by which the best of several models is chosen, the one with most of it; "": by the loss.
    """

    loss: float
    values: Mapping[str, float | None]
    targets: int
    chosen_by: str = ""

    @property
    def score(self) -> float:
        """What the best of several models has least of; NaN if it could not be measured."""
        if not self.chosen_by:
            return self.loss
        value = self.values[self.chosen_by]
        return math.nan if value is None else -value

    def record(self) -> dict[str, float | None]:
        """For a line of records."""
        return {"val_loss": self.loss} | {f"val_{name}": value for name, value in self.values.items()}

    def text(self) -> str:
        """For people."""
        more = [f"{name.replace('_', ' ')} {value:.4f}" for name, value in self.values.items() if value is not None]
        return ", ".join([f"validation loss {self.loss:.4f}", *more])


class MeanLoss:
    """Joins the losses of batches: each term's sum over all of them by its count, in float64, and the terms added up."""

    names: tuple[str, ...] = ()
    """A metric for each term, where there are several."""
    chosen_by = ""
    """See `Scores`."""

    def __init__(self) -> None:
        self._sums: list[float] = []
        self._counts: list[int] = []

    def add_batch(
        self, sums: Sequence[float], counts: Sequence[int], batch: Batch, outputs: Mapping[str, torch.Tensor]
    ) -> None:
        """Add a batch: its loss summed and counted for each term, and what the model gave out beside the loss."""
        self._sums = [a + b for a, b in zip(self._sums or [0.0] * len(sums), sums, strict=True)]
        self._counts = [a + b for a, b in zip(self._counts or [0] * len(counts), counts, strict=True)]

    def result(self) -> Scores:
        """What was added so far. A NaN stays NaN.

        Raises:
            ValueError: no target was counted.
        """
        if not any(self._counts):
            raise ValueError("no loss to report: every target was ignored")
        terms = [total / count if count else 0.0 for total, count in zip(self._sums, self._counts, strict=True)]
        named = dict(zip(self.names, terms, strict=True)) if self.names else {}
        return Scores(math.fsum(terms), named | self.values(), self._counts[0], self.chosen_by)

    def values(self) -> dict[str, float | None]:
        """The task's own metrics."""
        return {}


def entropy(targets: Iterable[torch.Tensor]) -> tuple[int, float]:
    """(targets that count, entropy of their frequencies in nats: the loss of the best model that sees no input)."""
    flat = torch.cat([t.reshape(-1) for t in targets])
    flat = flat[flat != IGNORED]
    if not len(flat):
        return 0, 0.0
    share = torch.unique(flat, return_counts=True)[1].double() / len(flat)
    return len(flat), float(-(share * share.log()).sum())


class RowTask:
    """What tasks have in common whose batches are rows of tokens: every tensor of a batch has a `Limit`."""

    seq_len: int
    pad_id: int

    def limits(self, rows: int, width: int) -> dict[str, Limit]:
        """Every tensor of a batch; input_ids (rows, width) and lengths (rows,) are among them."""
        raise NotImplementedError

    @property
    def keys(self) -> tuple[str, ...]:
        """The tensors of a batch."""
        return tuple(self.limits(1, self.seq_len))

    def empty(
        self, rows: int, width: int, device: torch.device | str = "cpu", pin_memory: bool = False
    ) -> dict[str, torch.Tensor]:
        """Buffers for a batch, contents undefined."""
        return {
            key: torch.empty(limit.shape, dtype=torch.int64, device=device, pin_memory=pin_memory)
            for key, limit in self.limits(rows, width).items()
        }

    def check(self, batch: Batch) -> None:
        """Hold a batch to what a model may rely on. Waits for the device where the batch is on one.

        Raises:
            ValueError, TypeError: a missing key, a tensor of another dtype or shape, a value out of range.
        """
        for key in self.keys:
            if key not in batch:
                raise ValueError(f"a batch must hold {', '.join(self.keys)}, got {sorted(batch)}")
        ids = batch["input_ids"]
        if ids.ndim != 2 or not 1 <= ids.shape[1] <= self.seq_len:
            raise ValueError(f"input_ids must be (rows, width <= {self.seq_len}), got shape {tuple(ids.shape)}")
        for key, limit in self.limits(*ids.shape).items():
            limit.check(key, batch[key])

    def random(self, rows: int, width: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """A batch that `check` accepts, with padding and ignored targets, for audits."""
        batch = {}
        for key, limit in self.limits(rows, width).items():
            batch[key] = torch.randint(limit.low, limit.high, limit.shape, generator=generator)
            if limit.ignored and batch[key].numel() > 1:
                batch[key].view(-1)[-1] = IGNORED
        batch["lengths"][0] = width
        return batch

    def blank(self, batch: Batch, row: int) -> None:
        """Write a row whose targets are all ignored."""
        width = batch["input_ids"].shape[1]
        for key, limit in self.limits(1, width).items():
            batch[key][row] = IGNORED if limit.ignored else limit.low
        batch["input_ids"][row] = self.pad_id


@dataclass(frozen=True)
class EncoderTask(RowTask):
    """What the tasks of an encoder have in common.

    A batch has input_ids and token_type_ids (rows, width), lengths (rows,), and targets; all int64. Row r is a text of
    lengths[r] tokens, or a pair of segments 0 and 1, with [CLS] and [SEP], and padding after it.

    Args:
        vocab_size: ids are in [0, vocab_size).
        seq_len: the longest row.
        cls_id, sep_id, pad_id: BERT's special tokens.
    """

    vocab_size: int
    seq_len: int
    cls_id: int
    sep_id: int
    pad_id: int

    name: ClassVar[str]
    outputs: ClassVar[bool] = True
    least: ClassVar[int] = 4  # of seq_len

    def __post_init__(self) -> None:
        if self.vocab_size < 1:
            raise ValueError(f"vocab_size must be at least 1, got {self.vocab_size}")
        if self.seq_len < self.least:
            raise ValueError(f"seq_len must be at least {self.least}, got {self.seq_len}")
        for key in ("cls_id", "sep_id", "pad_id"):
            if not 0 <= getattr(self, key) < self.vocab_size:
                raise ValueError(f"{key} must be in [0, {self.vocab_size}), got {getattr(self, key)}")

    def targets(self, rows: int, width: int) -> dict[str, Limit]:
        """What a batch holds beside its inputs."""
        raise NotImplementedError

    def limits(self, rows: int, width: int) -> dict[str, Limit]:
        return {
            "input_ids": Limit((rows, width), 0, self.vocab_size),
            "token_type_ids": Limit((rows, width), 0, 2),
            "lengths": Limit((rows,), 1, width + 1),
            **self.targets(rows, width),
        }

    def write(self, batch: Batch, row: int, ids: np.ndarray, second: int) -> None:
        """Write the inputs of a row: ids (n,), of which those from `second` on are segment 1."""
        width, n = batch["input_ids"].shape[1], len(ids)
        inputs, types = batch["input_ids"][row].numpy(), batch["token_type_ids"][row].numpy()
        inputs[:n], inputs[n:] = ids, self.pad_id
        types[:second], types[second:n], types[n:] = 0, 1, 0
        batch["lengths"][row] = n
        assert n <= width

    def join(self, first: Sequence[int], other: Sequence[int] | None = None) -> tuple[list[int], int]:
        """[CLS] first [SEP], or [CLS] first [SEP] other [SEP]: (ids, where segment 1 begins).

        What is too long for seq_len is cut at the end, of two the longer one first.
        """
        room = self.seq_len - (2 if other is None else 3)
        a, b = len(first), len(other or ())
        while a + b > room:
            a, b = (a - 1, b) if a >= b else (a, b - 1)
        ids = [self.cls_id, *first[:a], self.sep_id]
        second = len(ids)
        return (ids, second) if other is None else ([*ids, *other[:b], self.sep_id], second)

    def write_target(self, batch: Batch, row: int, target: Any) -> None:
        """Write the target of a row."""
        raise NotImplementedError

    def evaluation(self) -> Evaluator:
        """Joins the results of batches."""
        raise NotImplementedError

    def baseline(self, batches: Sequence[Batch]) -> tuple[int, float]:
        """How many targets these batches have, and the loss of the best model that sees no input."""
        return entropy(batch["targets"] for batch in batches)


@dataclass(eq=False)
class Examples:
    """Labelled rows, ready to be drawn; `fastlm.data.Samples`.

    rows: (ids, where segment 1 begins, target) of each.
    """

    task: EncoderTask
    rows: list[tuple[list[int], int, Any]]
    lengths: np.ndarray | None = field(init=False)

    def __post_init__(self) -> None:
        if not self.rows:
            raise ValueError("rows: got none; allowed: one or more")
        self.count, self.seq_len = len(self.rows), self.task.seq_len
        self.lengths = np.array([len(ids) for ids, _, _ in self.rows])
        digest = hashlib.sha256()
        for row in self.rows:
            digest.update(repr(row).encode())
        self._sha256 = digest.hexdigest()

    @property
    def nbytes(self) -> int:
        """About what they take: each id and target is a Python object."""
        counts = [len(ids) + (len(target) if isinstance(target, (list, tuple)) else 1) for ids, _, target in self.rows]
        return sum(40 * count + 200 for count in counts)

    def identity(self) -> dict[str, Any]:
        return {
            "task": self.task.name,
            "seq_len": self.seq_len,
            "examples": self.count,
            "examples_sha256": self._sha256,
        }

    def empty(self, rows: int, width: int) -> dict[str, torch.Tensor]:
        return self.task.empty(rows, width)

    def blank(self, batch: Batch, row: int) -> None:
        self.task.blank(batch, row)

    def fill(self, batch: Batch, row: int, sample: int, draws: Draws) -> int:
        ids, second, target = self.rows[sample]
        self.task.write(batch, row, np.array(ids), second)
        self.task.write_target(batch, row, target)
        return len(ids)
