"""Cross-entropy in Triton.

Forward: one program a token. It reads its row of logits once, in column tiles, with a running maximum and,
lane by lane, running sums of exp(x - maximum) that are scaled down when the maximum rises; lanes are added up
at the end. An ignored token reads nothing. Two small kernels then add the tokens' losses, weights and counts:
a fixed share of tokens for each program, then the programs' sums, both in a fixed order, so the loss is
bitwise the same every time.

Backward: one program a tile of a row; reads the logits once and writes the gradient once. All it needs of the
rest of the row is in lse, so tiles are independent. The gradient may overwrite the logits it is made from
(the chunks of linear_cross_entropy); the caller's logits are never written to.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .common import meta, tanh

__all__ = ["backward", "compile_cases", "forward", "reduce_tokens", "token_backward", "token_forward"]

_BLOCK = 4096  # columns of a tile
_PROGRAMS = 256  # at most, in the first kernel of the reduction


@triton.jit
def _load_x(logits, bias, offsets, mask, softcap, HAS_BIAS: tl.constexpr, CAP: tl.constexpr):
    """x of one row in float32; 0 where masked, or softcap * tanh of it."""
    b_x = tl.load(logits + offsets, mask=mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        b_x += tl.load(bias + offsets, mask=mask, other=0.0).to(tl.float32)
    if CAP:
        b_x = softcap * tanh(b_x / softcap)
    return b_x


@triton.jit
def _fwd_kernel(logits, bias, target, weight, weight_sum, statistics, S, ignore_index, V, smoothing, softcap,
                HAS_BIAS: tl.constexpr, HAS_WEIGHT: tl.constexpr, SMOOTH: tl.constexpr, CAP: tl.constexpr,
                BLOCK: tl.constexpr):  # fmt: skip
    i_row = tl.program_id(0).to(tl.int64)
    logits += i_row * V
    i_target = tl.load(target + i_row)
    b_loss = 0.0
    b_lse = 0.0
    b_low = 0.0
    if i_target != ignore_index:
        m_good = (i_target >= 0) & (i_target < V)
        b_xt = _load_x(logits, bias, i_target, m_good, softcap, HAS_BIAS, CAP)
        # Smoothing sums x relative to the target's, so that a large common offset costs no digits.
        b_base = tl.where(tl.abs(b_xt) < float("inf"), b_xt, 0.0)
        cols = tl.arange(0, BLOCK)
        b_max = -float("inf")
        b_sum = tl.zeros([BLOCK], tl.float32)
        b_smooth = tl.zeros([BLOCK], tl.float32)
        for i in range(0, V, BLOCK):
            m_col = i + cols < V
            b_x = _load_x(logits, bias, i + cols, m_col, softcap, HAS_BIAS, CAP)
            if SMOOTH:
                b_d = tl.where(m_col, b_x - b_base, 0.0)
                if HAS_WEIGHT:
                    b_d *= tl.load(weight + i + cols, mask=m_col, other=0.0).to(tl.float32)
                b_smooth += b_d
            b_x = tl.where(m_col, b_x, -float("inf"))
            b_new = tl.maximum(b_max, tl.max(b_x, 0))
            # Nothing but -inf so far: exp(-inf - -inf) would be NaN.
            b_ref = tl.where(b_new == -float("inf"), 0.0, b_new)
            b_sum = b_sum * tl.exp(b_max - b_ref) + tl.exp(b_x - b_ref)
            b_max = b_new
        b_log = tl.log(tl.sum(b_sum, 0))
        b_wt = tl.where(m_good, 1.0, float("nan"))
        if HAS_WEIGHT:
            b_wt *= tl.load(weight + i_target, mask=m_good, other=0.0).to(tl.float32)
        b_loss = (1.0 - smoothing) * b_wt * ((b_max - b_xt) + b_log)
        if SMOOTH:
            b_total = tl.load(weight_sum) if HAS_WEIGHT else V * 1.0
            b_loss += smoothing / V * (b_total * ((b_max - b_base) + b_log) - tl.sum(b_smooth, 0))
        b_lse = b_max + b_log
        b_part = b_lse - b_max
        b_low = (b_max - (b_lse - b_part)) + (b_log - b_part)  # what rounding took from lse (Knuth's two-sum)
    tl.store(statistics + i_row, b_lse)
    tl.store(statistics + S + i_row, b_low)
    tl.store(statistics + 2 * S + i_row, b_loss)


@triton.jit
def _target_weights(target, weight, rows, m_row, ignore_index, V, HAS_WEIGHT: tl.constexpr):
    """(weight of the target, 1 for a token that counts): 0 where ignored, NaN for a target out of range."""
    i_target = tl.load(target + rows, mask=m_row, other=0)
    m_valid = m_row & (i_target != ignore_index)
    m_good = m_valid & (i_target >= 0) & (i_target < V)
    b_w = tl.where(m_good, 1.0, float("nan"))
    if HAS_WEIGHT:
        b_w *= tl.load(weight + i_target, mask=m_good, other=0.0).to(tl.float32)
    return tl.where(m_valid, b_w, 0.0), tl.where(m_valid, 1.0, 0.0)


@triton.jit
def _share_kernel(statistics, target, weight, loss, partial, ignore_index, M, V, z_loss, share,
                  HAS_WEIGHT: tl.constexpr, PER_TOKEN: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """partial[p] = sums over program p's tokens of loss, lse**2, weight and 1; loss[m] if PER_TOKEN."""
    i_program = tl.program_id(0).to(tl.int64)
    b_loss = tl.zeros([BLOCK], tl.float32)
    b_square = tl.zeros([BLOCK], tl.float32)
    b_weight = tl.zeros([BLOCK], tl.float32)
    b_count = tl.zeros([BLOCK], tl.float32)
    for i in range(0, share, BLOCK):
        i_in_share = i + tl.arange(0, BLOCK)
        rows = i_program * share + i_in_share
        m_row = (i_in_share < share) & (rows < M)
        b_w, b_one = _target_weights(target, weight, rows, m_row, ignore_index, V, HAS_WEIGHT)
        b_lse = tl.load(statistics + rows, mask=m_row, other=0.0)
        b_token = tl.load(statistics + M + M + rows, mask=m_row, other=0.0)
        if PER_TOKEN:
            tl.store(loss + rows, b_token + z_loss * b_lse * b_lse, mask=m_row)
        b_loss += b_token
        b_square += b_lse * b_lse
        b_weight += b_w
        b_count += b_one
    tl.store(partial + i_program * 4, tl.sum(b_loss, 0))
    tl.store(partial + i_program * 4 + 1, tl.sum(b_square, 0))
    tl.store(partial + i_program * 4 + 2, tl.sum(b_weight, 0))
    tl.store(partial + i_program * 4 + 3, tl.sum(b_count, 0))


@triton.jit
def _mean(b_total, b_count):
    """A mean over nothing is 0."""
    return b_total / tl.where(b_count == 0.0, float("inf"), b_count)


@triton.jit
def _total_kernel(partial, loss, denominators, P, z_loss, MEAN: tl.constexpr, WANT_LOSS: tl.constexpr,
                  BLOCK: tl.constexpr):  # fmt: skip
    i_p = tl.arange(0, BLOCK)
    b_weight = tl.sum(tl.load(partial + i_p * 4 + 2, mask=i_p < P, other=0.0), 0)
    b_count = tl.sum(tl.load(partial + i_p * 4 + 3, mask=i_p < P, other=0.0), 0)
    tl.store(denominators, b_weight)
    tl.store(denominators + 1, b_count)
    if WANT_LOSS:
        b_loss = tl.sum(tl.load(partial + i_p * 4, mask=i_p < P, other=0.0), 0)
        b_z = z_loss * tl.sum(tl.load(partial + i_p * 4 + 1, mask=i_p < P, other=0.0), 0)
        if MEAN:
            b_loss = _mean(b_loss, b_weight)
            b_z = _mean(b_z, b_count)
        tl.store(loss, b_loss + b_z)


@triton.jit
def _bwd_kernel(d_loss, logits, bias, target, weight, weight_sum, statistics, S, denominators, d_logits,
                ignore_index, V, TILES, smoothing, z_loss, softcap, HAS_BIAS: tl.constexpr,
                HAS_WEIGHT: tl.constexpr, SMOOTH: tl.constexpr, CAP: tl.constexpr, MEAN: tl.constexpr,
                PER_TOKEN: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    i_row = (tl.program_id(0) // TILES).to(tl.int64)
    cols = tl.program_id(0) % TILES * BLOCK + tl.arange(0, BLOCK)
    m_col = cols < V
    logits += i_row * V
    d_logits += i_row * V
    i_target = tl.load(target + i_row)
    b_dx = tl.zeros([BLOCK], tl.float32)
    if i_target != ignore_index:
        m_good = (i_target >= 0) & (i_target < V)
        b_g = tl.load(d_loss + i_row * PER_TOKEN).to(tl.float32)
        b_h = b_g
        if MEAN:
            b_g = _mean(b_g, tl.load(denominators))
            b_h = _mean(b_h, tl.load(denominators + 1))
        b_lse = tl.load(statistics + i_row)
        b_wt = tl.where(m_good, 1.0, float("nan"))
        if HAS_WEIGHT:
            b_wt *= tl.load(weight + i_target, mask=m_good, other=0.0).to(tl.float32)
        b_a = b_g * (1.0 - smoothing) * b_wt
        b_d = b_h * 2.0 * z_loss * b_lse
        b_x = _load_x(logits, bias, cols, m_col, softcap, HAS_BIAS, CAP)
        b_p = tl.exp((b_x - b_lse) - tl.load(statistics + S + i_row))
        # d x_c = A * (p_c - [c = t]) + B * (W * p_c - w_c) + D * p_c
        b_dx = b_a * (b_p - tl.where(cols == i_target, 1.0, 0.0)) + b_d * b_p
        if SMOOTH:
            b_b = b_g * (smoothing / V)
            if HAS_WEIGHT:
                b_w = tl.load(weight + cols, mask=m_col, other=0.0).to(tl.float32)
                b_dx += b_b * (tl.load(weight_sum) * b_p - b_w)
            else:
                b_dx += b_b * (V * b_p - 1.0)
        if CAP:
            b_t = b_x / softcap
            b_dx *= 1.0 - b_t * b_t
    tl.store(d_logits + cols, b_dx.to(d_logits.dtype.element_ty), mask=m_col)


def _tile(classes: int, most: int = _BLOCK) -> tuple[int, int]:
    """(columns a tile, warps)."""
    block = min(triton.next_power_of_2(classes), most)
    return block, max(1, min(8, block // 512))


# Launches set enable_fp_fusion off under a soft cap: a fused softcap * tanh - lse would not see the rounded x
# that lse was made from.


def _weight_sum(weight, label_smoothing):
    return None if weight is None or not label_smoothing else weight.sum(dtype=torch.float32)


def token_forward(logits, bias, target, weight, ignore_index, label_smoothing, softcap, statistics):
    """logits (M, V) [+ bias (V)] -> statistics (3, M), whose rows may lie apart."""
    classes = logits.shape[-1]
    if target.numel() == 0:
        return
    # tanh takes registers: with as many warps as for _BLOCK columns, they would be cut to 64 a thread and spill on sm_90.
    block, warps = _tile(classes, _BLOCK if softcap is None else _BLOCK // 2)
    _fwd_kernel[(target.numel(),)](
        logits, bias, target, weight, _weight_sum(weight, label_smoothing), statistics, statistics.stride(0),
        ignore_index, classes, label_smoothing, 1.0 if softcap is None else softcap,
        HAS_BIAS=bias is not None, HAS_WEIGHT=weight is not None, SMOOTH=label_smoothing != 0.0,
        CAP=softcap is not None, BLOCK=block, num_warps=warps, enable_fp_fusion=softcap is None,
    )  # fmt: skip


def reduce_tokens(statistics, target, weight, ignore_index, z_loss, reduction, classes, loss, denominators):
    """statistics (3, M) -> loss () or (M), denominators (2)."""
    rows = target.numel()
    share = max(triton.cdiv(rows, _PROGRAMS), 1024)
    programs = max(triton.cdiv(rows, share), 1)
    partial = torch.empty(programs, 4, dtype=torch.float32, device=target.device)
    _share_kernel[(programs,)](
        statistics, target, weight, loss, partial, ignore_index, rows, classes, z_loss, share,
        HAS_WEIGHT=weight is not None, PER_TOKEN=reduction == "none", BLOCK=1024, num_warps=8,
    )  # fmt: skip
    _total_kernel[(1,)](
        partial, loss, denominators, programs, z_loss, MEAN=reduction == "mean",
        WANT_LOSS=reduction != "none", BLOCK=_PROGRAMS,
    )  # fmt: skip


def token_backward(
    d_loss, logits, bias, target, weight, statistics, denominators, ignore_index, label_smoothing, z_loss,
    softcap, reduction, d_logits,
):  # fmt: skip
    """d_logits (M, V), which may be logits itself, from d_loss () or, for "none", (M)."""
    classes = logits.shape[-1]
    if target.numel() == 0:
        return
    block, warps = _tile(classes)
    tiles = triton.cdiv(classes, block)
    _bwd_kernel[(target.numel() * tiles,)](
        d_loss, logits, bias, target, weight, _weight_sum(weight, label_smoothing), statistics,
        statistics.stride(0), denominators, d_logits, ignore_index, classes, tiles, label_smoothing, z_loss,
        1.0 if softcap is None else softcap, HAS_BIAS=bias is not None, HAS_WEIGHT=weight is not None,
        SMOOTH=label_smoothing != 0.0, CAP=softcap is not None, MEAN=reduction == "mean",
        PER_TOKEN=reduction == "none", BLOCK=block, num_warps=warps, enable_fp_fusion=softcap is None,
    )  # fmt: skip


def forward(
    logits, target, weight, ignore_index, label_smoothing, z_loss, softcap, reduction, loss, statistics,
    denominators,
):  # fmt: skip
    tokens = statistics.view(3, target.numel())
    token_forward(logits, None, target, weight, ignore_index, label_smoothing, softcap, tokens)
    reduce_tokens(
        tokens, target, weight, ignore_index, z_loss, reduction, logits.shape[-1], loss, denominators
    )


def backward(
    d_loss, logits, target, weight, statistics, denominators, ignore_index, label_smoothing, z_loss, softcap,
    reduction, d_logits,
):  # fmt: skip
    if d_logits is not None:
        token_backward(
            d_loss, logits, None, target, weight, statistics.view(3, target.numel()), denominators,
            ignore_index, label_smoothing, z_loss, softcap, reduction, d_logits,
        )  # fmt: skip


def compile_cases():
    """Each option of the loss alone and all together; tiles for few classes; a vocabulary as GPT-2's."""
    target = meta(8192, dtype=torch.int64)
    weight = {"weight": meta(50257, dtype=torch.float32)}
    options = (
        {}, weight, {"label_smoothing": 0.1}, {"softcap": 30.0}, {"reduction": "none"}, {"reduction": "sum"},
        weight | {"label_smoothing": 0.1, "softcap": 30.0, "z_loss": 1e-4, "reduction": "none"},
    )  # fmt: skip
    for given in options:
        yield {"logits": meta(8192, 50257), "target": target} | given
    yield {"logits": meta(8192, 50257, dtype=torch.float32), "target": target} | options[-1]
    for classes in (2, 1000, 2048):
        yield {"logits": meta(8192, classes, dtype=torch.float32), "target": target}
