"""Linear distillation loss in Triton: a loop over chunks of tokens, products around the kernels of distillation_loss.

    forward   both logits; statistics
    backward  both logits again; the student's dlogits; d_hidden = dlogits @ weight;
              d_weight += dlogits.T @ hidden; d_bias += column sums of dlogits

Logits are float32 and dlogits of hidden's dtype (in the same memory for float32), all in one workspace that is made
once a call.
"""

from __future__ import annotations

import torch

from .common import meta
from .distillation_loss import batch_size, reduce_tokens, token_backward, token_forward
from .linear_cross_entropy import add_column_sums, matmul

__all__ = ["backward", "compile_cases", "forward"]

_BYTES = 2**28  # of the workspace, where nobody says


def _chunks(tokens, classes, dtype, workspace_bytes):
    """(tokens a chunk, the chunks); a multiple of 16 tokens if it is that many, so that one compiled kernel serves all."""
    row = classes * (8 if dtype == torch.float32 else 8 + dtype.itemsize)
    step = (workspace_bytes or max(_BYTES, 128 * row)) // row
    step = max(1, min(tokens, step - step % 16 if step > 16 else step))
    return step, [slice(i, min(i + step, tokens)) for i in range(0, tokens, step)]


def _flat(x):
    return x.view(x.shape[:-1].numel(), x.shape[-1])


def _logits(hidden, weight, bias, out):
    matmul(hidden, weight.T, out)
    if bias is not None:
        out.add_(bias)


def forward(
    student_hidden, student_weight, teacher_hidden, teacher_weight, student_bias, teacher_bias, token_weight, divergence,
    beta, temperature, scale, reduction, workspace_bytes, loss, statistics, denominator,
):  # fmt: skip
    classes, tokens = student_weight.shape[0], statistics[0].numel()
    s, t, rows_of = _flat(student_hidden), _flat(teacher_hidden), statistics.view(6, tokens)
    w = None if token_weight is None else token_weight.view(-1)
    step, chunks = _chunks(tokens, classes, s.dtype, workspace_bytes)
    logits = torch.empty(2, step, classes, dtype=torch.float32, device=s.device)
    for rows in chunks:
        u, v = logits[:, : rows.stop - rows.start]
        _logits(s[rows], student_weight, student_bias, u)
        _logits(t[rows], teacher_weight, teacher_bias, v)
        token_forward(u, v, None if w is None else w[rows], divergence, beta, temperature, rows_of[:, rows])
    reduce_tokens(rows_of, w, scale, reduction, batch_size(student_hidden), loss, denominator)


def backward(
    d_loss, student_hidden, student_weight, teacher_hidden, teacher_weight, student_bias, teacher_bias, token_weight,
    statistics, denominator, divergence, beta, temperature, scale, reduction, workspace_bytes, d_hidden, d_weight, d_bias,
):  # fmt: skip
    classes, tokens = student_weight.shape[0], statistics[0].numel()
    if tokens == 0:
        return
    s, t, rows_of = _flat(student_hidden), _flat(teacher_hidden), statistics.view(6, tokens)
    d_flat = None if d_hidden is None else _flat(d_hidden)
    w = None if token_weight is None else token_weight.view(-1)
    upstream = d_loss.view(-1)
    step, chunks = _chunks(tokens, classes, s.dtype, workspace_bytes)
    logits = torch.empty(2, step, classes, dtype=torch.float32, device=s.device)
    narrow = logits[0] if s.dtype == torch.float32 else torch.empty_like(logits[0], dtype=s.dtype)
    for rows in chunks:
        u, v = logits[:, : rows.stop - rows.start]
        d = narrow[: rows.stop - rows.start]
        _logits(s[rows], student_weight, student_bias, u)
        _logits(t[rows], teacher_weight, teacher_bias, v)
        token_backward(
            upstream[rows] if reduction == "none" else d_loss, u, v, None if w is None else w[rows], rows_of[:, rows],
            denominator, divergence, beta, temperature, scale, reduction, d, None,
        )  # fmt: skip
        if d_flat is not None:
            matmul(d, student_weight, d_flat[rows])
        if d_weight is not None:
            matmul(d.T, s[rows], d_weight, add=True)
        if d_bias is not None:
            add_column_sums(d, d_bias)


def compile_cases():
    """A vocabulary that no power of two divides, with biases and weights, in both dtypes."""
    tokens, classes = 4096, 50257
    for dtype in (torch.bfloat16, torch.float32):
        yield {
            "student_hidden": meta(tokens, 768, dtype=dtype), "student_weight": meta(classes, 768, dtype=dtype),
            "teacher_hidden": meta(tokens, 1024, dtype=dtype), "teacher_weight": meta(classes, 1024, dtype=dtype),
            "student_bias": meta(classes, dtype=dtype), "token_weight": meta(tokens, dtype=torch.float32),
            "divergence": "js",
        }  # fmt: skip
