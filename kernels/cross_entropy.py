"""Cross-entropy in Triton.

Forward: one program a token. It reads its row of logits once, in column tiles, with a running maximum and,
lane by lane, running sums of exp(x - maximum) that are scaled down when the maximum rises; lanes are added up
at the end. An ignored token reads nothing. Two small kernels then add the tokens' losses, weights and counts:
a fixed share of tokens for each program, then the programs' sums, both in a fixed order, so the loss is
bitwise the same every time.

Backward: one program a tile of a row; reads the logits once and writes the gradient once. All it needs of the
rest of the row is in the statistics, so tiles are independent. The gradient may overwrite the logits it is made from
(the chunks of linear_cross_entropy); the caller's logits are never written to.

Probabilities (SOFT) are read tile by tile beside the logits. The extras (EXTRAS) are kept lane by lane too: the sum of
exp(x - maximum) * (x - maximum), and the first place of the lane's largest logit. What is not asked for is not compiled.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .common import meta, tanh

__all__ = ["backward", "compile_cases", "forward", "reduce_tokens", "token_backward", "token_forward", "upstream"]

_BLOCK = 4096  # columns of a tile
_NO_CLASS = tl.constexpr(torch.iinfo(torch.int64).min)  # a target that is none of the classes
_PROGRAMS = 256  # at most, in the first kernel of the reduction


@triton.jit
def _load_logits(logits, bias, offsets, mask, HAS_BIAS: tl.constexpr):
    """Logits of one row in float32; 0 where masked."""
    b_x = tl.load(logits + offsets, mask=mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        b_x += tl.load(bias + offsets, mask=mask, other=0.0).to(tl.float32)
    return b_x


@triton.jit
def _transform(b_x, scale, softcap, SCALE: tl.constexpr, CAP: tl.constexpr):
    if SCALE:
        b_x *= scale
    if CAP:
        b_x = softcap * tanh(b_x / softcap)
    return b_x


@triton.jit
def _class_weight(weight, i_target, m_good, HAS_WEIGHT: tl.constexpr):
    """w_t: 0 for a target of no class, NaN for one out of range."""
    b_w = tl.where(m_good, 1.0, tl.where(i_target == _NO_CLASS, 0.0, float("nan")))
    if HAS_WEIGHT:
        b_w *= tl.load(weight + i_target, mask=m_good, other=1.0).to(tl.float32)
    return b_w


@triton.jit
def _first_of_largest(b_best, b_place, V):
    """The place of the largest of all lanes, the first of equal ones."""
    return tl.min(tl.where(b_best == tl.max(b_best, 0), b_place, V), 0)


@triton.jit
def _fwd_kernel(logits, bias, target, weight, weight_sum, statistics, lse, correct, confidence, entropy, S,
                ignore_index, V, smoothing, scale, softcap, HAS_BIAS: tl.constexpr, HAS_WEIGHT: tl.constexpr,
                SMOOTH: tl.constexpr, SCALE: tl.constexpr, CAP: tl.constexpr, SOFT: tl.constexpr,
                EXTRAS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    i_row = tl.program_id(0).to(tl.int64)
    logits += i_row * V
    if SOFT:
        target += i_row * V
        i_target = tl.full([], 0, tl.int64)
        m_counts = i_row >= 0
    else:
        i_target = tl.load(target + i_row)
        m_counts = i_target != ignore_index
    b_loss = 0.0
    b_lse = 0.0
    b_low = 0.0
    b_total_q = 0.0
    b_confidence = 0.0
    b_entropy = 0.0
    m_correct = i_row < 0
    if m_counts:
        m_good = (i_target >= 0) & (i_target < V)
        b_xt = _load_logits(logits, bias, i_target, m_good, HAS_BIAS)
        b_xt = _transform(b_xt, scale, softcap, SCALE, CAP)
        # Sums of x are relative to the target's (or the first), so that a large common offset costs no digits.
        b_base = tl.where(tl.abs(b_xt) < float("inf"), b_xt, 0.0)
        cols = tl.arange(0, BLOCK)
        b_max = -float("inf")
        b_sum = tl.zeros([BLOCK], tl.float32)
        b_smooth = tl.zeros([BLOCK], tl.float32)
        b_hit = tl.zeros([BLOCK], tl.float32)
        b_mass = tl.zeros([BLOCK], tl.float32)
        b_far = tl.zeros([BLOCK], tl.float32)
        b_best = tl.full([BLOCK], -float("inf"), tl.float32)
        b_place = cols
        b_best_q = tl.full([BLOCK], -float("inf"), tl.float32)
        b_place_q = cols
        for i in range(0, V, BLOCK):
            m_col = i + cols < V
            b_x = _load_logits(logits, bias, i + cols, m_col, HAS_BIAS)
            if EXTRAS:
                m_better = m_col & (b_x > b_best)
                b_best = tl.where(m_better, b_x, b_best)
                b_place = tl.where(m_better, i + cols, b_place)
            b_x = _transform(b_x, scale, softcap, SCALE, CAP)
            if SMOOTH:
                b_d = tl.where(m_col, b_x - b_base, 0.0)
                if HAS_WEIGHT:
                    b_d *= tl.load(weight + i + cols, mask=m_col, other=0.0).to(tl.float32)
                b_smooth += b_d
            if SOFT:
                b_q = tl.load(target + i + cols, mask=m_col, other=0.0).to(tl.float32)
                if EXTRAS:
                    m_better = m_col & (b_q > b_best_q)
                    b_best_q = tl.where(m_better, b_q, b_best_q)
                    b_place_q = tl.where(m_better, i + cols, b_place_q)
                if HAS_WEIGHT:
                    b_q *= tl.load(weight + i + cols, mask=m_col, other=0.0).to(tl.float32)
                # A class of probability 0 counts for nothing, also if its logit is -inf.
                b_hit += tl.where(b_q == 0.0, 0.0, b_q * (b_x - b_base))
                b_mass += b_q
            b_x = tl.where(m_col, b_x, -float("inf"))
            b_new = tl.maximum(b_max, tl.max(b_x, 0))
            # Nothing but -inf so far: exp(-inf - -inf) would be NaN.
            b_ref = tl.where(b_new == -float("inf"), 0.0, b_new)
            b_fall = tl.exp(b_max - b_ref)
            b_e = tl.exp(b_x - b_ref)
            if EXTRAS:  # -1e30 for -inf, whose product with 0 would be NaN
                b_far = (b_far + b_sum * tl.maximum(b_max - b_ref, -1e30)) * b_fall
                b_far += b_e * tl.maximum(b_x - b_ref, -1e30)
            b_sum = b_sum * b_fall + b_e
            b_max = b_new
        b_total = tl.sum(b_sum, 0)
        b_log = tl.log(b_total)
        if SOFT:
            b_total_q = tl.sum(b_mass, 0)
            b_loss = (1.0 - smoothing) * (b_total_q * ((b_max - b_base) + b_log) - tl.sum(b_hit, 0))
        else:
            b_wt = _class_weight(weight, i_target, m_good, HAS_WEIGHT)
            b_loss = (1.0 - smoothing) * b_wt * ((b_max - b_xt) + b_log)
        if SMOOTH:
            b_all = tl.load(weight_sum) if HAS_WEIGHT else V * 1.0
            b_loss += smoothing / V * (b_all * ((b_max - b_base) + b_log) - tl.sum(b_smooth, 0))
        b_lse = b_max + b_log
        b_part = b_lse - b_max
        b_low = (b_max - (b_lse - b_part)) + (b_log - b_part)  # what rounding took from lse (Knuth's two-sum)
        if EXTRAS:
            i_hit = i_target
            if SOFT:
                i_hit = _first_of_largest(b_best_q, b_place_q, V).to(tl.int64)
            m_correct = (b_lse == b_lse) & (_first_of_largest(b_best, b_place, V) == i_hit)
            b_confidence = 1.0 / b_total
            b_entropy = b_log - tl.sum(b_far, 0) / b_total
    tl.store(statistics + i_row, b_lse)
    tl.store(statistics + S + i_row, b_low)
    tl.store(statistics + 2 * S + i_row, b_loss)
    if SOFT:
        tl.store(statistics + 3 * S + i_row, b_total_q)
    if EXTRAS:
        tl.store(lse + i_row, b_lse)
        tl.store(correct + i_row, m_correct)
        tl.store(confidence + i_row, b_confidence)
        tl.store(entropy + i_row, b_entropy)


@triton.jit
def _target_weights(target, weight, token_weight, rows, m_row, ignore_index, V, HAS_WEIGHT: tl.constexpr,
                    HAS_TOKEN: tl.constexpr, SOFT: tl.constexpr):  # fmt: skip
    """(u * w_t, u): 0 where ignored, the first NaN for a target out of range."""
    m_valid = m_row
    b_w = tl.where(m_row, 1.0, 0.0)
    if not SOFT:
        i_target = tl.load(target + rows, mask=m_row, other=0)
        m_valid = m_row & (i_target != ignore_index)
        m_good = m_valid & (i_target >= 0) & (i_target < V)
        b_w = tl.where(m_valid, _class_weight(weight, i_target, m_good, HAS_WEIGHT), 0.0)
    b_u = tl.where(m_valid, 1.0, 0.0)
    if HAS_TOKEN:
        b_u = tl.load(token_weight + rows, mask=m_valid, other=0.0).to(tl.float32)
        b_w *= b_u
    return b_w, b_u


@triton.jit
def _share_kernel(statistics, target, weight, token_weight, loss, z, partial, ignore_index, M, V, z_loss, share,
                  HAS_WEIGHT: tl.constexpr, HAS_TOKEN: tl.constexpr, SOFT: tl.constexpr, EXTRAS: tl.constexpr,
                  PER_TOKEN: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """partial[p] = sums over program p's tokens of u * loss, u * lse**2, u * w_t and u; loss[m], z[m] if PER_TOKEN."""
    i_program = tl.program_id(0).to(tl.int64)
    b_loss = tl.zeros([BLOCK], tl.float32)
    b_square = tl.zeros([BLOCK], tl.float32)
    b_weight = tl.zeros([BLOCK], tl.float32)
    b_count = tl.zeros([BLOCK], tl.float32)
    first = i_program * share
    count = tl.minimum(M - first, share).to(tl.int32)
    statistics += first
    if not SOFT:
        target += first
    if HAS_TOKEN:
        token_weight += first
    if PER_TOKEN:
        loss += first
        if EXTRAS:
            z += first
    for i in range(0, share, BLOCK):
        rows = i + tl.arange(0, BLOCK)
        m_row = rows < count
        b_w, b_u = _target_weights(
            target, weight, token_weight, rows, m_row, ignore_index, V, HAS_WEIGHT, HAS_TOKEN, SOFT
        )
        b_lse = tl.load(statistics + rows, mask=m_row, other=0.0)
        b_token = tl.load(statistics + M + M + rows, mask=m_row, other=0.0)
        b_s = b_lse * b_lse
        if HAS_TOKEN:
            b_token *= b_u
            b_s *= b_u
        if PER_TOKEN:
            tl.store(loss + rows, b_token + z_loss * b_s, mask=m_row)
            if EXTRAS:
                tl.store(z + rows, z_loss * b_s, mask=m_row)
        b_loss += b_token
        b_square += b_s
        b_weight += b_w
        b_count += b_u
    tl.store(partial + i_program * 4, tl.sum(b_loss, 0))
    tl.store(partial + i_program * 4 + 1, tl.sum(b_square, 0))
    tl.store(partial + i_program * 4 + 2, tl.sum(b_weight, 0))
    tl.store(partial + i_program * 4 + 3, tl.sum(b_count, 0))


@triton.jit
def _mean(b_total, b_count):
    """A mean over nothing is 0."""
    return b_total / tl.where(b_count == 0.0, float("inf"), b_count)


@triton.jit
def _total_kernel(partial, loss, z, denominators, P, z_loss, MEAN: tl.constexpr, WANT_LOSS: tl.constexpr,
                  EXTRAS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
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
        if EXTRAS:
            tl.store(z, b_z)


@triton.jit
def _bwd_kernel(d_loss, d_z, d_lse, logits, bias, target, weight, weight_sum, token_weight, statistics, S,
                denominators, d_logits, ignore_index, V, TILES, smoothing, z_loss, scale, softcap,
                HAS_BIAS: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_TOKEN: tl.constexpr, SMOOTH: tl.constexpr,
                SCALE: tl.constexpr, CAP: tl.constexpr, SOFT: tl.constexpr, EXTRAS: tl.constexpr,
                MEAN: tl.constexpr, PER_TOKEN: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    i_row = (tl.program_id(0) // TILES).to(tl.int64)
    cols = tl.program_id(0) % TILES * BLOCK + tl.arange(0, BLOCK)
    m_col = cols < V
    logits += i_row * V
    d_logits += i_row * V
    if SOFT:
        target += i_row * V
        i_target = tl.full([], 0, tl.int64)
        m_counts = i_row >= 0
    else:
        i_target = tl.load(target + i_row)
        m_counts = i_target != ignore_index
    b_dx = tl.zeros([BLOCK], tl.float32)
    if m_counts:
        b_g = tl.load(d_loss + i_row * PER_TOKEN).to(tl.float32)
        b_h = b_g
        if EXTRAS:
            b_h += tl.load(d_z + i_row * PER_TOKEN).to(tl.float32)
        if HAS_TOKEN:
            b_u = tl.load(token_weight + i_row).to(tl.float32)
            b_g *= b_u
            b_h *= b_u
        if MEAN:
            b_g = _mean(b_g, tl.load(denominators))
            b_h = _mean(b_h, tl.load(denominators + 1))
        b_lse = tl.load(statistics + i_row)
        b_a = b_g * (1.0 - smoothing)
        b_d = b_h * 2.0 * z_loss * b_lse
        if EXTRAS:
            b_d += tl.load(d_lse + i_row).to(tl.float32)
        b_x = _load_logits(logits, bias, cols, m_col, HAS_BIAS)
        b_x = _transform(b_x, scale, softcap, SCALE, CAP)
        b_p = tl.exp((b_x - b_lse) - tl.load(statistics + S + i_row))
        if HAS_WEIGHT and (SMOOTH or SOFT):
            b_w = tl.load(weight + cols, mask=m_col, other=0.0).to(tl.float32)
        # d x_c = A * (Q * p_c - q_c) + B * (W * p_c - w_c) + D * p_c
        if SOFT:
            b_q = tl.load(target + cols, mask=m_col, other=0.0).to(tl.float32)
            if HAS_WEIGHT:
                b_q *= b_w
            b_dx = b_a * (tl.load(statistics + 3 * S + i_row) * b_p - b_q) + b_d * b_p
        else:
            m_good = (i_target >= 0) & (i_target < V)
            b_wt = _class_weight(weight, i_target, m_good, HAS_WEIGHT)
            b_dx = b_a * b_wt * (b_p - tl.where(cols == i_target, 1.0, 0.0)) + b_d * b_p
        if SMOOTH:
            b_b = b_g * (smoothing / V)
            if HAS_WEIGHT:
                b_dx += b_b * (tl.load(weight_sum) * b_p - b_w)
            else:
                b_dx += b_b * (V * b_p - 1.0)
        if CAP:
            b_t = b_x / softcap
            b_dx *= 1.0 - b_t * b_t
        if SCALE:
            b_dx *= scale
    tl.store(d_logits + cols, b_dx.to(d_logits.dtype.element_ty), mask=m_col)


def _tile(classes: int, most: int = _BLOCK, a_thread: int = 16) -> tuple[int, int]:
    """(columns a tile, warps): at most so many columns, and so many for a thread."""
    block = min(triton.next_power_of_2(classes), most)
    return block, max(1, min(8, block // (32 * a_thread)))


# Launches set enable_fp_fusion off where x is not the logits: a fused softcap * tanh - lse would not see the rounded x
# that lse was made from.


def _weight_sum(weight, label_smoothing):
    return None if weight is None or not label_smoothing else weight.sum(dtype=torch.float32)


def token_forward(logits, bias, target, weight, label_smoothing, ignore_index, softcap, logit_scale, statistics, marks):
    """logits (M, V) [+ bias (V)] -> statistics (3 or 4, M), whose rows may lie apart; marks: lse, correct, confidence
    and entropy (M), or None for no extras."""
    tokens, classes = logits.shape
    if tokens == 0:
        return
    soft, extras = target.is_floating_point(), marks is not None
    # tanh takes registers: with as many warps as for _BLOCK columns, they would be cut to 64 a thread and spill on sm_90.
    # Sums beyond the first two take one for each column of a thread.
    more = soft or extras
    block, warps = _tile(classes, _BLOCK if softcap is None and not more else _BLOCK // 2, 8 if more else 16)
    plain = softcap is None and logit_scale == 1.0
    _fwd_kernel[(tokens,)](
        logits, bias, target, weight, _weight_sum(weight, label_smoothing), statistics,
        *(marks if extras else (None,) * 4), statistics.stride(0), ignore_index, classes, label_smoothing, logit_scale,
        1.0 if softcap is None else softcap, HAS_BIAS=bias is not None, HAS_WEIGHT=weight is not None,
        SMOOTH=label_smoothing != 0.0, SCALE=logit_scale != 1.0, CAP=softcap is not None, SOFT=soft, EXTRAS=extras,
        BLOCK=block, num_warps=warps, enable_fp_fusion=plain,
    )  # fmt: skip


def reduce_tokens(
    statistics, target, weight, token_weight, ignore_index, z_loss, reduction, extras, classes, loss, z, denominators
):
    """statistics (3 or 4, M) -> loss and, with extras, z () or (M), denominators (2)."""
    rows = statistics.shape[1]
    share = max(triton.cdiv(rows, _PROGRAMS), 1024)
    programs = max(triton.cdiv(rows, share), 1)
    partial = torch.empty(programs, 4, dtype=torch.float32, device=target.device)
    _share_kernel[(programs,)](
        statistics, target, weight, token_weight, loss, z, partial, ignore_index, rows, classes, z_loss, share,
        HAS_WEIGHT=weight is not None, HAS_TOKEN=token_weight is not None, SOFT=target.is_floating_point(),
        EXTRAS=extras, PER_TOKEN=reduction == "none", BLOCK=1024, num_warps=4,
    )  # fmt: skip
    _total_kernel[(1,)](
        partial, loss, z, denominators, programs, z_loss, MEAN=reduction == "mean",
        WANT_LOSS=reduction != "none", EXTRAS=extras, BLOCK=_PROGRAMS,
    )  # fmt: skip


def upstream(d_loss, d_z, d_lse, tokens, reduction, extras, device):
    """The gradients of the results, flat, with zeros for those there are none of: (d_loss, d_z, d_lse), the last two
    None without extras."""

    def filled(d, size):
        return torch.zeros(size, dtype=torch.float32, device=device) if d is None else d.reshape(size)

    size = tokens if reduction == "none" else 1
    d_loss = filled(d_loss, size)
    return (d_loss, filled(d_z, size), filled(d_lse, tokens)) if extras else (d_loss, None, None)


def token_backward(
    up, logits, bias, target, weight, token_weight, statistics, denominators, ignore_index, label_smoothing, z_loss,
    softcap, logit_scale, reduction, extras, d_logits,
):  # fmt: skip
    """d_logits (M, V), which may be logits itself, from what `upstream` gave of these tokens."""
    tokens, classes = logits.shape
    if tokens == 0:
        return
    block, warps = _tile(classes)
    tiles = triton.cdiv(classes, block)
    plain = softcap is None and logit_scale == 1.0
    _bwd_kernel[(tokens * tiles,)](
        *up, logits, bias, target, weight, _weight_sum(weight, label_smoothing), token_weight, statistics,
        statistics.stride(0), denominators, d_logits, ignore_index, classes, tiles, label_smoothing, z_loss,
        logit_scale, 1.0 if softcap is None else softcap, HAS_BIAS=bias is not None, HAS_WEIGHT=weight is not None,
        HAS_TOKEN=token_weight is not None, SMOOTH=label_smoothing != 0.0, SCALE=logit_scale != 1.0,
        CAP=softcap is not None, SOFT=target.is_floating_point(), EXTRAS=extras, MEAN=reduction == "mean",
        PER_TOKEN=reduction == "none", BLOCK=block, num_warps=warps, enable_fp_fusion=plain,
    )  # fmt: skip


def forward(
    logits, target, weight, token_weight, ignore_index, label_smoothing, z_loss, softcap, logit_scale, reduction,
    extras, loss, z, lse, correct, confidence, entropy, statistics, denominators,
):  # fmt: skip
    classes = logits.shape[-1]
    flat = logits.view(logits.numel() // classes, classes)
    tokens = statistics.view(len(statistics), len(flat))
    marks = (lse, correct, confidence, entropy) if extras else None
    token_forward(flat, None, target, weight, label_smoothing, ignore_index, softcap, logit_scale, tokens, marks)
    reduce_tokens(
        tokens, target, weight, token_weight, ignore_index, z_loss, reduction, extras, classes, loss, z, denominators
    )


def backward(
    d_loss, d_z, d_lse, logits, target, weight, token_weight, statistics, denominators, ignore_index,
    label_smoothing, z_loss, softcap, logit_scale, reduction, extras, d_logits,
):  # fmt: skip
    if d_logits is None:
        return
    classes = logits.shape[-1]
    flat = logits.view(logits.numel() // classes, classes)
    token_backward(
        upstream(d_loss, d_z, d_lse, len(flat), reduction, extras, flat.device), flat, None, target, weight,
        token_weight, statistics.view(len(statistics), len(flat)), denominators, ignore_index, label_smoothing, z_loss,
        softcap, logit_scale, reduction, extras, d_logits,
    )  # fmt: skip


def compile_cases():
    """Each option of the loss alone and all together; tiles for few classes; a vocabulary as GPT-2's."""
    target = meta(8192, dtype=torch.int64)
    weight = {"weight": meta(50257, dtype=torch.float32)}
    token = {"token_weight": meta(8192, dtype=torch.float32)}
    every = weight | token | {"label_smoothing": 0.1, "softcap": 30.0, "logit_scale": 0.5, "z_loss": 1e-4}
    soft = {"target": meta(8192, 50257)}
    options = (
        {}, weight, token, {"label_smoothing": 0.1}, {"softcap": 30.0}, {"logit_scale": 0.5}, {"reduction": "none"},
        {"reduction": "sum"}, {"extras": True}, every | {"reduction": "none"}, every | {"extras": True}, soft,
        every | {"extras": True, "reduction": "none"} | soft,
    )  # fmt: skip
    for given in options:
        yield {"logits": meta(8192, 50257), "target": target} | given
    for given in (every | {"reduction": "none"}, every | {"extras": True}):
        yield {"logits": meta(8192, 50257, dtype=torch.float32), "target": target} | given
    aligned = every | {"weight": meta(50304, dtype=torch.float32), "target": meta(8192, 50304), "extras": True}
    yield {"logits": meta(8192, 50304)} | aligned
    for classes in (2, 1000, 2048):
        yield {"logits": meta(8192, classes, dtype=torch.float32), "target": target}
