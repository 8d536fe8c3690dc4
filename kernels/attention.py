"""Attention in Triton, forward: the recurrence of FlashAttention-2. Backward is in attention_backward.py.

One program a tile of BLOCK_M queries of one head. Two loops over tiles of keys: the interior, where every
query sees every key, without a mask; then the tiles at the diagonal and at the end of the keys, with one.
Tiles that no query sees are skipped. Maximum, sum and output run in float32; scale * log2(e) is folded into
exp2, q and k stay as given.

Programs are a 1-D grid, in sections of heads whose keys and values fit the L2 cache together, longest tile
first. Reads q once and writes out and lse once; keys and values are read once a tile of queries, mostly from
L2.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..philox import drop_threshold
from .attention_backward import backward
from .attention_tiles import (
    choose_tile,
    dot,
    heads_in_l2,
    kept,
    key_count,
    load_rows,
    padded,
    place,
    seen,
    seen_range,
    store_rows,
    strides,
    weights,
)  # fmt: skip

__all__ = ["backward", "forward"]


@triton.jit
def _fwd_step(b_q, b_acc, b_sum, b_max, k, v, i_m, i_n, n_keys, shift, scale, D, DV, stride_ks, stride_vs,
              seed, i_batch, i_head, threshold, MASKED: tl.constexpr, CAUSAL: tl.constexpr,
              NEGATIVE: tl.constexpr, DROPOUT: tl.constexpr, EVEN_D: tl.constexpr, EVEN_DV: tl.constexpr,
              BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
              BLOCK_DV: tl.constexpr):  # fmt: skip
    """One tile of keys: the new output, sum and maximum of scale * S."""
    i_n = tl.multiple_of(tl.to_tensor(i_n), BLOCK_N)
    b_k = load_rows(k, i_n, stride_ks, n_keys, D, not MASKED, EVEN_D, BLOCK_N, BLOCK_D)
    b_s = dot(b_q, tl.trans(b_k))  # [BLOCK_M, BLOCK_N]
    if NEGATIVE:
        b_s = -b_s
    if MASKED:
        b_s = tl.where(seen(i_m, i_n, n_keys, shift, CAUSAL, BLOCK_M, BLOCK_N), b_s, float("-inf"))
    b_new = tl.maximum(b_max, tl.max(b_s, 1) * scale)
    # A row that has seen no key yet: 0 for its maximum, since -inf - -inf would be NaN.
    b_shift = tl.where(b_new == float("-inf"), 0.0, b_new) if MASKED else b_new
    b_p = weights(b_s, b_shift[:, None], scale, b_k.dtype == tl.float32)
    b_alpha = tl.exp(b_max - b_shift)
    b_sum = b_sum * b_alpha + tl.sum(b_p, 1)
    if DROPOUT:
        b_p = tl.where(kept(seed, i_batch, i_head, i_m, i_n, threshold, BLOCK_M, BLOCK_N), b_p, 0.0)
    b_v = load_rows(v, i_n, stride_vs, n_keys, DV, not MASKED, EVEN_DV, BLOCK_N, BLOCK_DV)
    b_acc = dot(b_p.to(b_v.dtype), b_v, b_acc * b_alpha[:, None])
    return b_acc, b_sum, b_new


@triton.jit
def _fwd_kernel(q, k, v, key_lengths, dropout_seed, out, lse, scale, threshold, keep_scale, B, H, GROUP, Sq,
                Sk, D, DV, section, stride_qb, stride_qh, stride_qs, stride_kb, stride_kh, stride_ks,
                stride_vb, stride_vh, stride_vs, stride_ob, stride_oh, stride_os, CAUSAL: tl.constexpr,
                HAS_LENGTHS: tl.constexpr, NEGATIVE: tl.constexpr, DROPOUT: tl.constexpr,
                EVEN_D: tl.constexpr, EVEN_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr):  # fmt: skip
    i_tile, i_bh = place(tl.program_id(0), tl.cdiv(Sq, BLOCK_M), B * H, section)
    i_m = i_tile * BLOCK_M
    i_batch = (i_bh // H).to(tl.int64)
    i_head = (i_bh % H).to(tl.int64)
    q += i_batch * stride_qb + i_head * stride_qh
    k += i_batch * stride_kb + i_head // GROUP * stride_kh
    v += i_batch * stride_vb + i_head // GROUP * stride_vh
    seed = tl.load(dropout_seed) if DROPOUT else 0
    shift = Sk - Sq
    n_keys = key_count(key_lengths, i_batch, Sk, HAS_LENGTHS)
    n_all, n_some = seen_range(i_m, n_keys, shift, CAUSAL, BLOCK_M, BLOCK_N)

    b_q = load_rows(q, i_m, stride_qs, Sq, D, False, EVEN_D, BLOCK_M, BLOCK_D)
    b_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_M], tl.float32)
    b_acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    for boundary in tl.static_range(2):
        for i_n in range(n_all if boundary else 0, n_some if boundary else n_all, BLOCK_N):
            b_acc, b_sum, b_max = _fwd_step(
                b_q, b_acc, b_sum, b_max, k, v, i_m, i_n, n_keys, shift, scale, D, DV, stride_ks, stride_vs,
                seed, i_batch, i_head, threshold, boundary == 1, CAUSAL, NEGATIVE, DROPOUT, EVEN_D, EVEN_DV,
                BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV,
            )  # fmt: skip

    # A query that sees no key has sum 0: its output is 0, and its lse +inf, so that P = 0 in backward.
    m_blind = b_sum == 0.0
    b_sum = tl.where(m_blind, 1.0, b_sum)
    b_acc = b_acc * (keep_scale / b_sum)[:, None]
    b_lse = tl.where(m_blind, float("inf"), b_max + tl.log(b_sum))
    rows = i_m + tl.arange(0, BLOCK_M)
    tl.store(lse + (i_batch * H + i_head) * Sq + rows, b_lse, mask=rows < Sq)
    out += i_batch * stride_ob + i_head * stride_oh
    store_rows(out, i_m, stride_os, Sq, DV, b_acc, BLOCK_M, BLOCK_DV)


def forward(q, k, v, key_lengths, dropout_seed, causal, scale, dropout_p, out, lse):
    batch, heads, queries, d = q.shape
    if lse.numel() == 0:
        return
    dropout, dv, group = dropout_seed is not None, v.shape[3], heads // k.shape[1]
    block_d, block_dv = padded(d), padded(dv)
    own, step, stages, warps = choose_tile("fwd", q, max(block_d, block_dv), queries, dropout)
    # A masked score is -inf, and 0 * -inf would be NaN: so small a scale gives the very weights of scale 0.
    magnitude = abs(scale) or 1e-30
    _fwd_kernel[(triton.cdiv(queries, own) * batch * heads,)](
        q, k, v, key_lengths, dropout_seed, out, lse, magnitude, drop_threshold(dropout_p),
        1.0 / (1.0 - dropout_p), batch, heads, group, queries, k.shape[2], d, dv, group * heads_in_l2(k, v),
        *strides(q, k, v, out), CAUSAL=causal, HAS_LENGTHS=key_lengths is not None, NEGATIVE=scale < 0.0,
        DROPOUT=dropout, EVEN_D=d == block_d, EVEN_DV=dv == block_dv, BLOCK_M=own, BLOCK_N=step,
        BLOCK_D=block_d, BLOCK_DV=block_dv, num_stages=stages, num_warps=warps,
    )  # fmt: skip
