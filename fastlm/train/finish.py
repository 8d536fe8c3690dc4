"""What a finished run leaves behind: the model for others to load, a plot, a text sample, and the numbers."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from fastlm.backends import use_backend
from fastlm.data import Tokenizer
from fastlm.generate import stream, stream_text

from .durable import UNFINISHED, remove_tree, replace_file, sync_directory, sync_file

__all__ = ["publish", "sample_text", "summary", "write_report"]


def publish(directory: Path, export: Callable[[Path], None]) -> None:
    """Makes ``directory`` of what ``export`` writes, whole or not at all, in place of what was there."""
    unfinished = directory.parent / f"{UNFINISHED}{directory.name}-{os.getpid()}"
    unfinished.mkdir()
    export(unfinished)
    for path in unfinished.iterdir():
        sync_file(path)
    sync_directory(unfinished)
    if directory.exists():
        remove_tree(directory)
    os.rename(unfinished, directory)
    sync_directory(directory.parent)


def sample_text(
    model: Any,
    tokenizer: Tokenizer,
    prompt: str,
    tokens: int,
    *,
    seed: int,
    backend: str | None,
) -> str:
    """``prompt`` and what the model makes of it at temperature 0.8 within the 50 likeliest tokens."""
    training = model.training
    model.eval()
    with use_backend(backend):
        ids = tokenizer.encode(prompt) or [tokenizer.separator_id]
        steps = stream(
            model, [ids], tokens, temperature=0.8, top_k=50, generators=[torch.Generator().manual_seed(seed)],
            stop={tokenizer.separator_id}, vocab_size=tokenizer.vocab_size,
        )  # fmt: skip
        text = prompt + "".join(stream_text(tokenizer, (t[0] for t in steps)))
    model.train(training)
    return text


def write_report(path: Path, report: Mapping[str, Any]) -> None:
    """The run's results as JSON, null for what is not finite."""
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in report.items()}
    replace_file(path, (json.dumps(finite, indent=1, allow_nan=False) + "\n").encode())


def summary(report: Mapping[str, Any], metrics: Iterable[str]) -> str:
    """The same in words. metrics: the keys of the task's own."""
    under = report["nats_under_unigram"]
    given = [(name, report[name]) for name in metrics if report[name] is not None]
    compared = f"{under:.3f} nats under" if under >= 0 else f"{-under:.3f} nats OVER"
    lines = [
        f"validation loss  {report['val_loss']:.4f} nats per target over {report['val_tokens']:,} targets",
        f"unigram entropy  {report['unigram_entropy']:.4f} nats per target of the same targets: "
        f"the model is {compared} it",
        *(f"{name.replace('_', ' '):16} {value:.4f}" for name, value in given),
    ]
    lines.append(
        f"trained on       {report['tokens']:,} tokens in {report['steps']} steps, "
        f"{report['training_seconds']:.1f} s of steps, {report['tokens_per_second']:,.0f} tokens/s"
    )
    if report["skipped"]:
        lines.append(f"skipped          {report['skipped']} steps with non-finite gradients")
    return "\n".join(lines)
