"""What a run has to know of the kind of model that it trains: the one interface to it, listed in families.py.

Reading data, building, planning and auditing ask a `Family`; nothing else in fastlm.train knows one model from another.
To add a family: a module like decoder.py or encoder.py, a line in families.py, and what its options may be in
presets.py and validate.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fastlm.data import (
    Codec,
    Loader,
    PackLoader,
    SampleLoader,
    Samples,
    SampleValidation,
    Tokenizer,
    WordPiece,
)
from fastlm.registry import Spec
from fastlm.tasks import Task

from .config import RunOptions, TrainConfig
from .device import choose_device
from .feed import Feed, SampleFeed

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["AUDIT_ROWS", "Data", "Facts", "Family", "prefetched", "sample_data"]

AUDIT_ROWS = 2


@dataclass(frozen=True)
class Facts:
    """What a run takes from its data beside the options; JSON values, and with the options enough to plan it.

    vocab_size: of the tokenizer. labels: the classes of labelled data. width: tokens of the widest batch, None for
    --seq-len. held: bytes that the data takes on the host while the run lasts, parts of files that it maps among them.
    end_id: what ends a text. start_id: what a decoder begins with, and what stands where no text is.
    """

    vocab_size: int
    labels: tuple[str, ...] = ()
    width: int | None = None
    held: int = 0
    end_id: int = 0
    start_id: int = 0


@dataclass(frozen=True)
class Data:
    """What a run learns from, and is measured on. Batches are on the CPU.

    audit_batches: the micro-batches of an audit, of data to learn. sample: a text that shows what the model can do at the
    end of a run, where it does not continue a prompt.
    """

    tokenizer: Tokenizer | WordPiece | Codec
    task: Task
    facts: Facts
    loader: Loader | SampleLoader | PackLoader
    feed: Feed | SampleFeed
    held_out: Iterable[Mapping[str, torch.Tensor]]
    audit_batches: Sequence[Mapping[str, torch.Tensor]]
    sample: Callable[[Any, RunOptions], str] | None = None


class Family:
    """One kind of model. It keeps nothing: every method is a function of the options and of what is known of the data."""

    def read(self, config: TrainConfig, console: Console) -> Data:
        """Reads the data, and says what there is.

        Raises:
            DataError: the data or the tokenizer cannot be used.
            OptionError: an option does not fit them.
        """
        raise NotImplementedError

    def task(self, config: TrainConfig, facts: Facts) -> Task:
        """The objective as far as its batches go; what else a tokenizer says is made up."""
        raise NotImplementedError

    def model(self, config: TrainConfig, facts: Facts) -> nn.Module:
        """The model that the options describe, with fresh weights."""
        raise NotImplementedError

    def started(self, config: TrainConfig, facts: Facts) -> nn.Module:
        """The same with the weights that a run begins with."""
        return self.model(config, facts)

    def longest(self, config: TrainConfig) -> int | None:
        """The largest --seq-len; None: any."""
        return None

    def batch(self, config: TrainConfig, facts: Facts, rows: int) -> dict[str, Spec]:
        """The tensors of the widest micro-batch of so many rows."""
        width = min(facts.width or config.data.seq_len, config.data.seq_len)
        batch = self.task(config, facts).empty(rows, width, "meta")
        return {name: Spec(tuple(t.shape), t.dtype) for name, t in batch.items()}

    def audit_batches(self, config: TrainConfig, facts: Facts) -> list[dict[str, Spec]]:
        """The tensors of `Data.audit_batches`, at their widest."""
        return [self.batch(config, facts, 1)] * AUDIT_ROWS


def prefetched(config: TrainConfig) -> int:
    """Batches that a thread makes ready in advance."""
    return 2 * config.optimizer.grad_accum if choose_device(config.run.device)[0].type == "cuda" else 0


def sample_data(
    config: TrainConfig, tokenizer: Tokenizer | WordPiece | Codec, task: Task, facts: Facts, training: Samples,
    held_out: Samples,
) -> Data:  # fmt: skip
    """Data of rows that differ in length, each drawn by its number."""
    run, optimizer = config.run, config.optimizer
    loader = SampleLoader(training, optimizer.batch_size, run.seed, prefetch=prefetched(config))
    return Data(
        tokenizer,
        task,
        facts,
        loader,
        SampleFeed(loader, optimizer.grad_accum, choose_device(run.device)[0]),
        SampleValidation(held_out, optimizer.batch_size, run.eval_batches * optimizer.batch_size or None),
        list(SampleValidation(training, 1, AUDIT_ROWS)),
    )
