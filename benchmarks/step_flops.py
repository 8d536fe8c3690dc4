"""Model FLOPs of a training step, counted alike for all contenders, whatever each of them really does.

A matrix of P elements that n rows are multiplied by costs 2 P n forward and 4 P n backward. Attention's two products cost
4 A for every pair of a query and a key that it sees, A being the width of all heads together, twice that backward; where a
token sees only those before it, half of the pairs count. Embedding lookups, norms, biases, activations, the optimizer and
what is computed again count for nothing, and neither does padding, nor BERT's head at positions that are not predicted.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from benchmarks.step_task import Task
from fastlm.tasks import MaskedLM

__all__ = ["Work", "flop_per_step", "flop_per_token", "formula", "matmul_parameters", "work"]


class Work(NamedTuple):
    """Of one micro-batch: {what: (elements of its matrices, rows)}, and pairs of query and key times their heads' width."""

    matrices: dict[str, tuple[int, int]]
    pairs: int


def work(task: Task) -> Work:
    """What a family's model multiplies."""
    return {"gpt": _gpt, "lstm": _lstm, "bert": _bert, "encoder-decoder": _encoder_decoder}[task.family](task.config, task)


def _gpt(c: dict[str, Any], task: Task) -> Work:
    width, inner, rows = c["n_embd"], c["n_inner"] or 4 * c["n_embd"], task.batch_size * task.seq_len
    block = 4 * width * width + 2 * width * inner
    matrices = {"blocks": (c["n_layer"] * block, rows), "head": (c["vocab_size"] * width, rows)}
    return Work(matrices, c["n_layer"] * width * rows * task.seq_len // 2)


def _lstm(c: dict[str, Any], task: Task) -> Work:
    gates, width = {"lstm": 4, "gru": 3, "rnn": 1}[c["cell"]], c["n_hidden"] or c["n_embd"]
    inputs, rows = c["n_embd"] + (c["n_layer"] - 1) * width, task.batch_size * task.seq_len
    layers = gates * width * (inputs + c["n_layer"] * width)
    return Work({"layers": (layers, rows), "head": (c["vocab_size"] * c["n_embd"], rows)}, 0)


def _bert(c: dict[str, Any], task: Task) -> Work:
    width, rows = c["hidden_size"], task.batch_size * task.seq_len
    inner = c["intermediate_size"] or 4 * width
    masked = task.batch_size * max(1, round(MaskedLM.mask_rate * task.seq_len))
    matrices = {
        "blocks": (c["num_hidden_layers"] * (4 * width * width + 2 * width * inner), rows),
        "head": (width * width + c["vocab_size"] * width, masked),
        "next sentence": (width * width + 2 * width, task.batch_size),
    }
    return Work(matrices, c["num_hidden_layers"] * width * rows * task.seq_len)


def _encoder_decoder(c: dict[str, Any], task: Task) -> Work:
    width, heads = c["n_embd"], c["n_head"] * (c["head_dim"] or c["n_embd"] // c["n_head"])
    inner = c["n_inner"] or 4 * width
    mlp = (3 if c["activation"].endswith(("glu", "glu_tanh")) else 2) * width * inner
    layers, decoder_layers = c["n_layer"], c["n_decoder_layer"] or c["n_layer"]
    source, target = task.lengths
    matrices = {
        "encoder": (layers * (4 * width * heads + mlp), sum(source)),
        "decoder": (decoder_layers * (6 * width * heads + mlp), sum(target)),
        "memory": (decoder_layers * 2 * width * heads, sum(source)),
        "head": (c["vocab_size"] * width, sum(target)),
    }
    own = layers * sum(s * s for s in source) + decoder_layers * sum(t * t for t in target) / 2
    across = decoder_layers * sum(s * t for s, t in zip(source, target, strict=True))
    return Work(matrices, round(heads * (own + across)))


def matmul_parameters(task: Task) -> int:
    """Elements of the matrices that rows are multiplied by, a tied head's included."""
    return sum(elements for elements, _ in work(task).matrices.values())


def flop_per_step(task: Task) -> int:
    """Forward and backward, all micro-batches."""
    matrices, pairs = work(task)
    return task.accumulate * (6 * sum(elements * rows for elements, rows in matrices.values()) + 12 * pairs)


def flop_per_token(task: Task) -> float:
    """Over the step's tokens, of both sides of an encoder-decoder."""
    return flop_per_step(task) / task.tokens


def formula(task: Task) -> str:
    """The count in words."""
    parts = {
        "gpt": "6 N + 6 L C T", "lstm": "6 N", "bert": "6 (blocks + head at masked positions + next sentence) + 12 L C T",
        "encoder-decoder": "6 (each matrix by its rows) + 12 (pairs of tokens seen) a layer and C",
    }  # fmt: skip
    return (
        f"{parts[task.family]} = {flop_per_token(task) / 1e6:.1f} MFLOP a token, "
        f"N = {matmul_parameters(task) / 1e6:.2f}M"
    )
