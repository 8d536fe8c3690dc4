"""Distillation loss in Triton; the formulas stand in fastlm/ops/distillation_loss.py.

Forward: one program a token. It reads its two rows of logits in column tiles twice: for both log-sum-exps, with a
running maximum and, lane by lane, running sums that are scaled down when the maximum rises; then, from L2, for the two
sums of the divergence. A token of weight 0 reads nothing. One more program adds the tokens up in a fixed order.

Backward: one program a tile of a row; reads both logits once and writes the gradients that are wanted once. All it
needs of the rest of the row is in the statistics. A gradient may overwrite the logits it is made from (the chunks of
linear_distillation_loss).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .common import meta

__all__ = ["backward", "batch_size", "compile_cases", "forward", "reduce_tokens", "token_backward", "token_forward"]

_BLOCK = 4096  # columns of a tile
# Launches set enable_fp_fusion off under a temperature: a fused x * inverse - lse would not see the rounded logit that
# lse was made from.
_KINDS = {"forward_kl": 0, "reverse_kl": 1, "js": 2}


@triton.jit
def _log_sum_exp(x, V, inverse, BLOCK: tl.constexpr):
    """Log-sum-exp of a row times `inverse`, in two parts."""
    cols = tl.arange(0, BLOCK)
    b_max = -float("inf")
    b_sum = tl.zeros([BLOCK], tl.float32)
    for i in range(0, V, BLOCK):
        b_x = tl.load(x + i + cols, mask=i + cols < V, other=-float("inf")).to(tl.float32) * inverse
        b_new = tl.maximum(b_max, tl.max(b_x, 0))
        b_ref = tl.where(b_new == -float("inf"), 0.0, b_new)  # exp(-inf - -inf) would be NaN
        b_sum = b_sum * tl.exp(b_max - b_ref) + tl.exp(b_x - b_ref)
        b_max = b_new
    b_log = tl.log(tl.sum(b_sum, 0))
    b_lse = b_max + b_log
    b_part = b_lse - b_max
    return b_lse, (b_max - (b_lse - b_part)) + (b_log - b_part)  # Knuth's two-sum


@triton.jit
def _terms(student, teacher, i_col, V, inverse, b_u, b_u_low, b_v, b_v_low, beta, KIND: tl.constexpr):
    """p, q, b, a of a tile of columns; 0 beyond the row and where a class has probability 0."""
    m_col = i_col < V
    b_q = tl.load(student + i_col, mask=m_col, other=-float("inf")).to(tl.float32) * inverse
    b_p = tl.load(teacher + i_col, mask=m_col, other=-float("inf")).to(tl.float32) * inverse
    b_q = (b_q - b_u) - b_u_low
    b_p = (b_p - b_v) - b_v_low
    b_d = b_q - b_p  # of the logarithms
    b_p = tl.exp(b_p)
    b_q = tl.exp(b_q)
    b_b = tl.zeros_like(b_d)
    b_a = tl.zeros_like(b_d)
    if KIND == 0:
        b_b = tl.where(b_p > 0.0, -b_d, 0.0)
    elif KIND == 1:
        b_a = tl.where(b_q > 0.0, b_d, 0.0)
    else:
        # log p - log m = -log(1 + (1 - beta) (e^d - 1)), and so from the other side: the one that cannot overflow
        m_less = b_d <= 0.0
        b_r = -tl.log(1.0 + tl.where(m_less, 1.0 - beta, beta) * (tl.exp(-tl.abs(b_d)) - 1.0))
        b_b = tl.where(b_p > 0.0, beta * tl.where(m_less, b_r, b_r - b_d), 0.0)
        b_a = tl.where(b_q > 0.0, (1.0 - beta) * tl.where(m_less, b_r + b_d, b_r), 0.0)
    return b_p, b_q, b_b, b_a


@triton.jit
def _fwd_kernel(student, teacher, weight, statistics, S, V, inverse, beta, KIND: tl.constexpr, WEIGHTED: tl.constexpr,
                BLOCK: tl.constexpr):  # fmt: skip
    i_row = tl.program_id(0).to(tl.int64)
    student += i_row * V
    teacher += i_row * V
    b_w = 1.0
    if WEIGHTED:
        b_w = tl.load(weight + i_row)
    b_u = 0.0
    b_u_low = 0.0
    b_v = 0.0
    b_v_low = 0.0
    b_mean_b = 0.0
    b_mean_a = 0.0
    if b_w != 0.0:
        b_u, b_u_low = _log_sum_exp(student, V, inverse, BLOCK)
        b_v, b_v_low = _log_sum_exp(teacher, V, inverse, BLOCK)
        b_sum_b = tl.zeros([BLOCK], tl.float32)
        b_sum_a = tl.zeros([BLOCK], tl.float32)
        for i in range(0, V, BLOCK):
            b_p, b_q, b_b, b_a = _terms(student, teacher, i + tl.arange(0, BLOCK), V, inverse, b_u, b_u_low, b_v,
                                        b_v_low, beta, KIND)  # fmt: skip
            b_sum_b += b_p * b_b
            b_sum_a += b_q * b_a
        b_mean_b = tl.sum(b_sum_b, 0)
        b_mean_a = tl.sum(b_sum_a, 0)
    tl.store(statistics + i_row, b_u)
    tl.store(statistics + S + i_row, b_u_low)
    tl.store(statistics + 2 * S + i_row, b_v)
    tl.store(statistics + 3 * S + i_row, b_v_low)
    tl.store(statistics + 4 * S + i_row, b_mean_b)
    tl.store(statistics + 5 * S + i_row, b_mean_a)


@triton.jit
def _reduce_kernel(statistics, weight, loss, denominator, M, scale, divisor, MEAN: tl.constexpr,
                   WEIGHTED: tl.constexpr, PER_TOKEN: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    b_total = tl.zeros([BLOCK], tl.float32)
    b_weights = tl.zeros([BLOCK], tl.float32)
    for i in range(0, M, BLOCK):
        rows = i + tl.arange(0, BLOCK)
        m_row = rows < M
        b_w = tl.where(m_row, 1.0, 0.0)
        if WEIGHTED:
            b_w = tl.load(weight + rows, mask=m_row, other=0.0)
        b_loss = tl.load(statistics + 4 * M + rows, mask=m_row, other=0.0)
        b_loss += tl.load(statistics + 5 * M + rows, mask=m_row, other=0.0)
        b_loss *= scale * b_w
        if PER_TOKEN:
            tl.store(loss + rows, b_loss, mask=m_row)
        b_total += b_loss
        b_weights += b_w
    b_divisor = tl.sum(b_weights, 0) if MEAN else divisor
    tl.store(denominator, b_divisor)
    if not PER_TOKEN:
        tl.store(loss, tl.sum(b_total, 0) / tl.where(b_divisor == 0.0, float("inf"), b_divisor))


@triton.jit
def _bwd_kernel(d_loss, student, teacher, weight, statistics, S, denominator, d_student, d_teacher, V, TILES, inverse,
                beta, scale, KIND: tl.constexpr, WEIGHTED: tl.constexpr, PER_TOKEN: tl.constexpr,
                WANT_STUDENT: tl.constexpr, WANT_TEACHER: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    i_row = (tl.program_id(0) // TILES).to(tl.int64)
    cols = tl.program_id(0) % TILES * BLOCK + tl.arange(0, BLOCK)
    m_col = cols < V
    b_g = tl.load(d_loss + i_row * PER_TOKEN).to(tl.float32) * (scale * inverse)
    b_divisor = tl.load(denominator)
    b_g /= tl.where(b_divisor == 0.0, float("inf"), b_divisor)
    b_w = 1.0
    if WEIGHTED:
        b_w = tl.load(weight + i_row)
    b_du = tl.zeros([BLOCK], tl.float32)
    b_dv = tl.zeros([BLOCK], tl.float32)
    if b_w != 0.0:
        b_g *= b_w
        b_p, b_q, b_b, b_a = _terms(
            student + i_row * V, teacher + i_row * V, cols, V, inverse, tl.load(statistics + i_row),
            tl.load(statistics + S + i_row), tl.load(statistics + 2 * S + i_row),
            tl.load(statistics + 3 * S + i_row), beta, KIND,
        )  # fmt: skip
        if KIND == 0:
            b_du = b_g * (b_q - b_p)
        else:
            b_du = b_g * (b_q * (b_a - tl.load(statistics + 5 * S + i_row)))
        if KIND == 1:
            b_dv = b_g * (b_p - b_q)
        else:
            b_dv = b_g * (b_p * (b_b - tl.load(statistics + 4 * S + i_row)))
    if WANT_STUDENT:
        tl.store(d_student + i_row * V + cols, b_du.to(d_student.dtype.element_ty), mask=m_col)
    if WANT_TEACHER:
        tl.store(d_teacher + i_row * V + cols, b_dv.to(d_teacher.dtype.element_ty), mask=m_col)


def _tile(classes: int, most: int) -> tuple[int, int]:
    """(columns a tile, warps)."""
    block = min(triton.next_power_of_2(classes), most)
    return block, max(1, min(8, block // 256))


def token_forward(student, teacher, token_weight, divergence, beta, temperature, statistics):
    """Logits (M, V) -> statistics (6, M), whose rows may lie apart."""
    classes, tokens = student.shape[-1], student.numel() // student.shape[-1]
    if tokens == 0:
        return
    block, warps = _tile(classes, _BLOCK)
    _fwd_kernel[(tokens,)](
        student, teacher, token_weight, statistics, statistics.stride(0), classes, 1.0 / temperature, beta,
        KIND=_KINDS[divergence], WEIGHTED=token_weight is not None, BLOCK=block, num_warps=warps,
        enable_fp_fusion=temperature == 1.0,
    )  # fmt: skip


def reduce_tokens(statistics, token_weight, scale, reduction, batch, loss, denominator):
    """statistics (6, M) -> loss () or (M), denominator (1)."""
    _reduce_kernel[(1,)](
        statistics, token_weight, loss, denominator, statistics.shape[1], scale,
        float(batch) if reduction == "batchmean" else 1.0, MEAN=reduction == "mean",
        WEIGHTED=token_weight is not None, PER_TOKEN=reduction == "none", BLOCK=2048, num_warps=8,
    )  # fmt: skip


def token_backward(
    d_loss, student, teacher, token_weight, statistics, denominator, divergence, beta, temperature, scale, reduction,
    d_student, d_teacher,
):  # fmt: skip
    """The gradients of logits (M, V), which may be the logits themselves, from d_loss () or, for "none", (M)."""
    classes = student.shape[-1]
    if student.numel() == 0:
        return
    block, warps = _tile(classes, _BLOCK // 2)
    tiles = triton.cdiv(classes, block)
    _bwd_kernel[(student.numel() // classes * tiles,)](
        d_loss, student, teacher, token_weight, statistics, statistics.stride(0), denominator, d_student, d_teacher,
        classes, tiles, 1.0 / temperature, beta, scale, KIND=_KINDS[divergence], WEIGHTED=token_weight is not None,
        PER_TOKEN=reduction == "none", WANT_STUDENT=d_student is not None, WANT_TEACHER=d_teacher is not None,
        BLOCK=block, num_warps=warps, enable_fp_fusion=temperature == 1.0,
    )  # fmt: skip


def batch_size(x):
    """The size of the first dimension beside the last, 1 if there is none."""
    return x.shape[0] if x.dim() > 1 else 1


def forward(
    student, teacher, token_weight, divergence, beta, temperature, scale, reduction, loss, statistics, denominator
):  # fmt: skip
    tokens = statistics.view(6, student.numel() // student.shape[-1])
    token_forward(student, teacher, token_weight, divergence, beta, temperature, tokens)
    reduce_tokens(tokens, token_weight, scale, reduction, batch_size(student), loss, denominator)


def backward(
    d_loss, student, teacher, token_weight, statistics, denominator, divergence, beta, temperature, scale, reduction,
    d_student, d_teacher,
):  # fmt: skip
    if d_student is not None or d_teacher is not None:
        token_backward(
            d_loss, student, teacher, token_weight, statistics.view(6, student.numel() // student.shape[-1]),
            denominator, divergence, beta, temperature, scale, reduction, d_student, d_teacher,
        )  # fmt: skip


def compile_cases():
    """Each divergence with weights, at GPT-2's vocabulary and few classes; float32."""
    for divergence in _KINDS:
        for classes in (1000, 50257):
            yield {
                "student": meta(4096, classes), "teacher": meta(4096, classes), "divergence": divergence,
                "token_weight": meta(4096, dtype=torch.float32), "temperature": 2.0,
            }  # fmt: skip
    wide = meta(4096, 50257, dtype=torch.float32)
    yield {"student": wide, "teacher": wide, "divergence": "js", "reduction": "none"}
