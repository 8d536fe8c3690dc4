"""Attention in Triton: the recurrence of FlashAttention-2, forward and backward.

Forward: one program a tile of BLOCK_M queries of one head. Two loops over key tiles: the interior, where every query
sees every key, without a mask; then the tiles at the diagonal and at the end of the keys, with one. Tiles that no query
sees are skipped. Running maximum, sum and output in float32; scale * log2(e) is folded into exp2, q and k stay as given.

Backward: delta = rowsum(dout * out) first; one program a tile of keys for dK and dV, over all queries of the group of
heads that reads it; one program a tile of queries for dQ. Each recomputes P from lse. Seven products where a fused
kernel has five, but no atomics: every sum has one owner and one order, so the result is bitwise the same every time.

Programs are a 1-D grid, in sections of heads whose keys and values fit the L2 cache together, longest tile first.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..philox import drop_threshold
from .common import INTERPRETING
from .philox import philox_lanes

__all__ = ["backward", "forward"]

_LOG2E = tl.constexpr(1.4426950408889634)
_L2_BYTES = (
    32 << 20
)  # of keys and values that are read at the same time; an H100 has 50 MiB of L2, an A100 40


@triton.jit
def _dot(b_a, b_b, b_acc=None):
    """b_a @ b_b + b_acc in float32; float32 operands are not rounded to tf32."""
    if INTERPRETING:
        b_a = b_a.to(tl.float32)
        b_b = b_b.to(tl.float32)
    return tl.dot(b_a, b_b, b_acc, input_precision="ieee")


@triton.jit
def _weights(b_s, b_shift, scale, PRECISE: tl.constexpr):
    """exp(scale * b_s - b_shift): one multiply-add and an exp2, or with one rounding less for float32."""
    if PRECISE:
        return tl.exp(b_s * scale - b_shift)
    return tl.exp2(b_s * (scale * _LOG2E) - b_shift * _LOG2E)


@triton.jit
def _load(p_tile, m_row, m_col, ROWS: tl.constexpr, COLS: tl.constexpr):
    """A tile; rows are checked if ROWS, columns if COLS, and what is outside is 0."""
    if ROWS and COLS:
        return tl.load(p_tile, mask=m_row & m_col, other=0.0)
    if ROWS:
        return tl.load(p_tile, mask=m_row, other=0.0)
    if COLS:
        return tl.load(p_tile, mask=m_col, other=0.0)
    return tl.load(p_tile)


@triton.jit
def _place(i_program, tiles, heads, section):
    """(tile counted from the last, head) of a program: sections of heads, in each the last tiles of all heads first."""
    i_section = i_program // (section * tiles)
    rest = i_program - i_section * section * tiles
    here = min(section, heads - i_section * section)
    return tiles - 1 - rest // here, i_section * section + rest % here


@triton.jit
def _key_count(key_lengths, i_batch, Sk, HAS_LENGTHS: tl.constexpr):
    if HAS_LENGTHS:
        return tl.minimum(tl.maximum(tl.load(key_lengths + i_batch), 0), Sk).to(tl.int32)
    return Sk


@triton.jit
def _kept(seed, i_batch, i_head, rows, i_col, threshold, BLOCK_N: tl.constexpr):
    """Dropout's mask [BLOCK_M, BLOCK_N] of the columns from i_col on."""
    c_row = rows[:, None] + tl.zeros([1, BLOCK_N // 4], tl.int32)
    c_col = i_col // 4 + tl.arange(0, BLOCK_N // 4)[None, :] + tl.zeros_like(c_row)
    return philox_lanes(seed, c_col, c_row, i_head, i_batch) >= threshold


@triton.jit
def _fwd_step(b_q, b_acc, b_sum, b_max, k, v, i_n, rows, n_keys, shift, scale, D, DV, stride_ks, stride_vs,
              seed, i_batch, i_head, threshold, MASKED: tl.constexpr, CAUSAL: tl.constexpr, NEGATIVE: tl.constexpr,
              DROPOUT: tl.constexpr, EVEN_D: tl.constexpr, EVEN_DV: tl.constexpr,
              BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr):  # fmt: skip
    """One tile of keys: the new output, sum and maximum of scale * S."""
    i_n = tl.multiple_of(tl.to_tensor(i_n), BLOCK_N)
    cols, d, dv = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    m_key = i_n + cols < n_keys
    p_k = k + i_n.to(tl.int64) * stride_ks + cols[None, :] * stride_ks + d[:, None]
    b_k = _load(p_k, d[:, None] < D, m_key[None, :], not EVEN_D, MASKED)  # [BLOCK_D, BLOCK_N]
    b_s = _dot(b_q, b_k)  # [BLOCK_M, BLOCK_N]
    if NEGATIVE:
        b_s = -b_s
    if MASKED:
        m_seen = m_key[None, :]
        if CAUSAL:
            m_seen = m_seen & (i_n + cols[None, :] <= rows[:, None] + shift)
        b_s = tl.where(m_seen, b_s, float("-inf"))
    b_new = tl.maximum(b_max, tl.max(b_s, 1) * scale)
    # A row that has seen no key yet: 0 for its maximum, since -inf - -inf would be NaN.
    b_safe = tl.where(b_new == float("-inf"), 0.0, b_new) if MASKED else b_new
    b_p = _weights(b_s, b_safe[:, None], scale, b_k.dtype == tl.float32)
    b_alpha = tl.exp(b_max - b_safe)
    b_sum = b_sum * b_alpha + tl.sum(b_p, 1)
    if DROPOUT:
        b_p = tl.where(_kept(seed, i_batch, i_head, rows, i_n, threshold, BLOCK_N), b_p, 0.0)
    p_v = v + i_n.to(tl.int64) * stride_vs + cols[:, None] * stride_vs + dv[None, :]
    b_v = _load(p_v, m_key[:, None], dv[None, :] < DV, MASKED, not EVEN_DV)  # [BLOCK_N, BLOCK_DV]
    b_acc = _dot(b_p.to(b_v.dtype), b_v, b_acc * b_alpha[:, None])
    return b_acc, b_sum, b_new


@triton.jit
def _fwd_kernel(q, k, v, key_lengths, dropout_seed, out, lse, scale, threshold, keep_scale,
                B, H, GROUP, Sq, Sk, D, DV, section,
                stride_qb, stride_qh, stride_qs, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
                stride_ob, stride_oh, stride_os, CAUSAL: tl.constexpr, HAS_LENGTHS: tl.constexpr,
                NEGATIVE: tl.constexpr, DROPOUT: tl.constexpr, EVEN_D: tl.constexpr, EVEN_DV: tl.constexpr,
                BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr):  # fmt: skip
    i_tile, i_bh = _place(tl.program_id(0), tl.cdiv(Sq, BLOCK_M), B * H, section)
    i_batch = (i_bh // H).to(tl.int64)
    i_head = (i_bh % H).to(tl.int64)
    i_m = i_tile * BLOCK_M
    rows, d, dv = i_m + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    k += i_batch * stride_kb + i_head // GROUP * stride_kh
    v += i_batch * stride_vb + i_head // GROUP * stride_vh
    m_row = rows[:, None] < Sq
    p_q = q + i_batch * stride_qb + i_head * stride_qh + rows[:, None].to(tl.int64) * stride_qs + d[None, :]
    b_q = _load(p_q, m_row, d[None, :] < D, True, not EVEN_D)  # [BLOCK_M, BLOCK_D]
    seed = tl.load(dropout_seed) if DROPOUT else 0

    n_keys = _key_count(key_lengths, i_batch, Sk, HAS_LENGTHS)
    shift = Sk - Sq
    n_seen, n_all = n_keys, n_keys  # keys that some query of the tile sees, that every one sees
    if CAUSAL:
        n_seen = tl.minimum(n_keys, tl.maximum(i_m + BLOCK_M + shift, 0))
        n_all = tl.minimum(n_keys, tl.maximum(i_m + 1 + shift, 0))
    n_all = n_all // BLOCK_N * BLOCK_N

    b_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_M], tl.float32)
    b_acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    for i_n in range(0, n_all, BLOCK_N):
        b_acc, b_sum, b_max = _fwd_step(
            b_q, b_acc, b_sum, b_max, k, v, i_n, rows, n_keys, shift, scale, D, DV, stride_ks, stride_vs, seed,
            i_batch, i_head, threshold, False, CAUSAL, NEGATIVE, DROPOUT, EVEN_D, EVEN_DV, BLOCK_N, BLOCK_D, BLOCK_DV,
        )  # fmt: skip
    for i_n in range(n_all, n_seen, BLOCK_N):
        b_acc, b_sum, b_max = _fwd_step(
            b_q, b_acc, b_sum, b_max, k, v, i_n, rows, n_keys, shift, scale, D, DV, stride_ks, stride_vs, seed,
            i_batch, i_head, threshold, True, CAUSAL, NEGATIVE, DROPOUT, EVEN_D, EVEN_DV, BLOCK_N, BLOCK_D, BLOCK_DV,
        )  # fmt: skip

    # A query that sees no key has sum 0: its output is 0, and its lse +inf, so that P = 0 in backward.
    m_blind = b_sum == 0.0
    b_sum = tl.where(m_blind, 1.0, b_sum)
    b_acc = b_acc * (keep_scale / b_sum)[:, None]
    b_lse = tl.where(m_blind, float("inf"), b_max + tl.log(b_sum))
    p_out = (
        out + i_batch * stride_ob + i_head * stride_oh + rows[:, None].to(tl.int64) * stride_os + dv[None, :]
    )
    tl.store(p_out, b_acc.to(out.dtype.element_ty), mask=m_row & (dv[None, :] < DV))
    tl.store(lse + (i_batch * H + i_head) * Sq + rows, b_lse, mask=rows < Sq)


@triton.jit
def _delta_kernel(dout, out, delta, B, H, Sq, DV, stride_gb, stride_gh, stride_gs, stride_ob, stride_oh, stride_os,
                  BLOCK_M: tl.constexpr, BLOCK_DV: tl.constexpr):  # fmt: skip
    """delta = rowsum(dout * out), (B, H, Sq) float32."""
    tiles = tl.cdiv(Sq, BLOCK_M)
    i_bh = tl.program_id(0) // tiles
    i_batch = (i_bh // H).to(tl.int64)
    i_head = (i_bh % H).to(tl.int64)
    rows = tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    dv = tl.arange(0, BLOCK_DV)
    m = (rows[:, None] < Sq) & (dv[None, :] < DV)
    p_g = (
        dout + i_batch * stride_gb + i_head * stride_gh + rows[:, None].to(tl.int64) * stride_gs + dv[None, :]
    )
    p_o = (
        out + i_batch * stride_ob + i_head * stride_oh + rows[:, None].to(tl.int64) * stride_os + dv[None, :]
    )
    b_g = tl.load(p_g, mask=m, other=0.0).to(tl.float32)
    b_o = tl.load(p_o, mask=m, other=0.0).to(tl.float32)
    tl.store(delta + (i_batch * H + i_head) * Sq + rows, tl.sum(b_g * b_o, 1), mask=rows < Sq)


@triton.jit
def _dkdv_step(b_dk, b_dv, b_k, b_v, q, dout, lse, delta, i_m, cols, Sq, shift, scale, D, DV, stride_qs, stride_gs,
               seed, i_batch, i_head, i_n, threshold, keep_scale, MASKED: tl.constexpr, DROPOUT: tl.constexpr,
               WANT_DK: tl.constexpr, WANT_DV: tl.constexpr, EVEN_D: tl.constexpr, EVEN_DV: tl.constexpr,
               BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr):  # fmt: skip
    """One tile of queries, everything transposed: dV += (P * M')^T dO, dK += dS^T Q."""
    i_m = tl.multiple_of(tl.to_tensor(i_m), BLOCK_M)
    rows, d, dv = i_m + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    r = tl.arange(0, BLOCK_M)
    m_row = rows < Sq
    p_q = q + i_m.to(tl.int64) * stride_qs + r[:, None] * stride_qs + d[None, :]
    b_q = _load(p_q, m_row[:, None], d[None, :] < D, True, not EVEN_D)  # [BLOCK_M, BLOCK_D]
    b_lse = tl.load(lse + rows, mask=m_row, other=float("inf"))  # beyond Sq: P = 0
    b_s = _dot(b_k, tl.trans(b_q))  # [BLOCK_N, BLOCK_M]
    b_p = _weights(b_s, b_lse[None, :], scale, b_k.dtype == tl.float32)
    if MASKED:
        b_p = tl.where(cols[:, None] <= rows[None, :] + shift, b_p, 0.0)
    p_g = dout + i_m.to(tl.int64) * stride_gs + r[:, None] * stride_gs + dv[None, :]
    b_g = _load(p_g, m_row[:, None], dv[None, :] < DV, True, not EVEN_DV)  # [BLOCK_M, BLOCK_DV]
    if DROPOUT:
        m_kept = tl.trans(_kept(seed, i_batch, i_head, rows, i_n, threshold, BLOCK_N))
    if WANT_DV:
        b_pm = tl.where(m_kept, b_p * keep_scale, 0.0) if DROPOUT else b_p
        b_dv = _dot(b_pm.to(b_g.dtype), b_g, b_dv)
    if WANT_DK:
        b_dp = _dot(b_v, tl.trans(b_g))  # [BLOCK_N, BLOCK_M]
        if DROPOUT:
            b_dp = tl.where(m_kept, b_dp * keep_scale, 0.0)
        b_delta = tl.load(delta + rows, mask=m_row, other=0.0)
        b_ds = b_p * (b_dp - b_delta[None, :])
        b_dk = _dot(b_ds.to(b_q.dtype), b_q, b_dk)
    return b_dk, b_dv


@triton.jit
def _dkdv_kernel(q, k, v, key_lengths, dropout_seed, dout, lse, delta, dk, dv, scale, threshold, keep_scale,
                 B, Hk, GROUP, Sq, Sk, D, DV, section,
                 stride_qb, stride_qh, stride_qs, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
                 stride_gb, stride_gh, stride_gs, stride_dkb, stride_dkh, stride_dks, stride_dvb, stride_dvh, stride_dvs,
                 CAUSAL: tl.constexpr, HAS_LENGTHS: tl.constexpr, DROPOUT: tl.constexpr, WANT_DK: tl.constexpr,
                 WANT_DV: tl.constexpr, EVEN_D: tl.constexpr, EVEN_DV: tl.constexpr, BLOCK_M: tl.constexpr,
                 BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr):  # fmt: skip
    # The first tile of keys is seen by the most queries, and programs go from the last: count from the first instead.
    tiles = tl.cdiv(Sk, BLOCK_N)
    i_tile, i_bh = _place(tl.program_id(0), tiles, B * Hk, section)
    i_n = (tiles - 1 - i_tile) * BLOCK_N
    i_batch = (i_bh // Hk).to(tl.int64)
    i_hk = (i_bh % Hk).to(tl.int64)
    cols, c_d, c_dv = i_n + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    n_keys = _key_count(key_lengths, i_batch, Sk, HAS_LENGTHS)
    m_key = cols[:, None] < n_keys
    wide_cols = cols[:, None].to(tl.int64)
    p_k = k + i_batch * stride_kb + i_hk * stride_kh + wide_cols * stride_ks + c_d[None, :]
    p_v = v + i_batch * stride_vb + i_hk * stride_vh + wide_cols * stride_vs + c_dv[None, :]
    b_k = _load(p_k, m_key, c_d[None, :] < D, True, not EVEN_D)  # [BLOCK_N, BLOCK_D]
    b_v = _load(p_v, m_key, c_dv[None, :] < DV, True, not EVEN_DV)  # [BLOCK_N, BLOCK_DV]
    seed = tl.load(dropout_seed) if DROPOUT else 0

    shift = Sk - Sq
    i_first, i_all, i_end = 0, 0, Sq  # queries from which on some key of the tile is seen, every key is seen
    if CAUSAL:
        i_first = tl.maximum(i_n - shift, 0) // BLOCK_M * BLOCK_M
        i_all = tl.minimum(tl.cdiv(tl.maximum(i_n + BLOCK_N - 1 - shift, 0), BLOCK_M) * BLOCK_M, Sq)
    if HAS_LENGTHS:
        i_end = tl.where(i_n < n_keys, Sq, 0)

    # A key beyond n_keys has a row of its own in dk and dv: whatever is summed there is not stored.
    b_dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    b_dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    for i_group in range(GROUP):
        i_head = i_hk * GROUP + i_group
        p_q = q + i_batch * stride_qb + i_head * stride_qh
        p_g = dout + i_batch * stride_gb + i_head * stride_gh
        i_stat = (i_batch * Hk * GROUP + i_head) * Sq
        if CAUSAL:
            for i_m in range(i_first, tl.minimum(i_all, i_end), BLOCK_M):
                b_dk, b_dv = _dkdv_step(
                    b_dk, b_dv, b_k, b_v, p_q, p_g, lse + i_stat, delta + i_stat, i_m, cols, Sq, shift, scale, D, DV,
                    stride_qs, stride_gs, seed, i_batch, i_head, i_n, threshold, keep_scale, True, DROPOUT, WANT_DK,
                    WANT_DV, EVEN_D, EVEN_DV, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV,
                )  # fmt: skip
        for i_m in range(i_all, i_end, BLOCK_M):
            b_dk, b_dv = _dkdv_step(
                b_dk, b_dv, b_k, b_v, p_q, p_g, lse + i_stat, delta + i_stat, i_m, cols, Sq, shift, scale, D, DV,
                stride_qs, stride_gs, seed, i_batch, i_head, i_n, threshold, keep_scale, False, DROPOUT, WANT_DK,
                WANT_DV, EVEN_D, EVEN_DV, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV,
            )  # fmt: skip

    m_col = cols[:, None] < Sk
    if WANT_DK:
        p_dk = dk + i_batch * stride_dkb + i_hk * stride_dkh + wide_cols * stride_dks + c_d[None, :]
        b_dk = tl.where(m_key, b_dk * scale, 0.0)
        tl.store(p_dk, b_dk.to(dk.dtype.element_ty), mask=m_col & (c_d[None, :] < D))
    if WANT_DV:
        p_dv = dv + i_batch * stride_dvb + i_hk * stride_dvh + wide_cols * stride_dvs + c_dv[None, :]
        b_dv = tl.where(m_key, b_dv, 0.0)
        tl.store(p_dv, b_dv.to(dv.dtype.element_ty), mask=m_col & (c_dv[None, :] < DV))


@triton.jit
def _dq_step(b_dq, b_q, b_g, b_lse, b_delta, k, v, i_n, rows, n_keys, shift, scale, D, DV, stride_ks, stride_vs,
             seed, i_batch, i_head, threshold, keep_scale, MASKED: tl.constexpr, CAUSAL: tl.constexpr,
             DROPOUT: tl.constexpr, EVEN_D: tl.constexpr, EVEN_DV: tl.constexpr, BLOCK_N: tl.constexpr,
             BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr):  # fmt: skip
    """One tile of keys: dQ += dS K."""
    i_n = tl.multiple_of(tl.to_tensor(i_n), BLOCK_N)
    cols, d, dv = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    m_key = i_n + cols < n_keys
    p_k = k + i_n.to(tl.int64) * stride_ks + cols[:, None] * stride_ks + d[None, :]
    b_k = _load(p_k, m_key[:, None], d[None, :] < D, MASKED, not EVEN_D)  # [BLOCK_N, BLOCK_D]
    b_s = _dot(b_q, tl.trans(b_k))  # [BLOCK_M, BLOCK_N]
    b_p = _weights(b_s, b_lse[:, None], scale, b_k.dtype == tl.float32)
    if MASKED:
        m_seen = m_key[None, :]
        if CAUSAL:
            m_seen = m_seen & (i_n + cols[None, :] <= rows[:, None] + shift)
        b_p = tl.where(m_seen, b_p, 0.0)
    p_v = v + i_n.to(tl.int64) * stride_vs + cols[:, None] * stride_vs + dv[None, :]
    b_v = _load(p_v, m_key[:, None], dv[None, :] < DV, MASKED, not EVEN_DV)  # [BLOCK_N, BLOCK_DV]
    b_dp = _dot(b_g, tl.trans(b_v))  # [BLOCK_M, BLOCK_N]
    if DROPOUT:
        b_dp = tl.where(_kept(seed, i_batch, i_head, rows, i_n, threshold, BLOCK_N), b_dp * keep_scale, 0.0)
    b_ds = b_p * (b_dp - b_delta[:, None])
    return _dot(b_ds.to(b_k.dtype), b_k, b_dq)


@triton.jit
def _dq_kernel(q, k, v, key_lengths, dropout_seed, dout, lse, delta, dq, scale, threshold, keep_scale,
               B, H, GROUP, Sq, Sk, D, DV, section,
               stride_qb, stride_qh, stride_qs, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
               stride_gb, stride_gh, stride_gs, stride_dqb, stride_dqh, stride_dqs,
               CAUSAL: tl.constexpr, HAS_LENGTHS: tl.constexpr, DROPOUT: tl.constexpr, EVEN_D: tl.constexpr,
               EVEN_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
               BLOCK_DV: tl.constexpr):  # fmt: skip
    i_tile, i_bh = _place(tl.program_id(0), tl.cdiv(Sq, BLOCK_M), B * H, section)
    i_batch = (i_bh // H).to(tl.int64)
    i_head = (i_bh % H).to(tl.int64)
    i_m = i_tile * BLOCK_M
    rows, d, dv = i_m + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    k += i_batch * stride_kb + i_head // GROUP * stride_kh
    v += i_batch * stride_vb + i_head // GROUP * stride_vh
    m_row, wide_rows = rows[:, None] < Sq, rows[:, None].to(tl.int64)
    p_q = q + i_batch * stride_qb + i_head * stride_qh + wide_rows * stride_qs + d[None, :]
    p_g = dout + i_batch * stride_gb + i_head * stride_gh + wide_rows * stride_gs + dv[None, :]
    b_q = _load(p_q, m_row, d[None, :] < D, True, not EVEN_D)  # [BLOCK_M, BLOCK_D]
    b_g = _load(p_g, m_row, dv[None, :] < DV, True, not EVEN_DV)  # [BLOCK_M, BLOCK_DV]
    i_stat = (i_batch * H + i_head) * Sq
    b_lse = tl.load(lse + i_stat + rows, mask=rows < Sq, other=float("inf"))
    b_delta = tl.load(delta + i_stat + rows, mask=rows < Sq, other=0.0)
    seed = tl.load(dropout_seed) if DROPOUT else 0

    n_keys = _key_count(key_lengths, i_batch, Sk, HAS_LENGTHS)
    shift = Sk - Sq
    n_seen, n_all = n_keys, n_keys
    if CAUSAL:
        n_seen = tl.minimum(n_keys, tl.maximum(i_m + BLOCK_M + shift, 0))
        n_all = tl.minimum(n_keys, tl.maximum(i_m + 1 + shift, 0))
    n_all = n_all // BLOCK_N * BLOCK_N

    b_dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for i_n in range(0, n_all, BLOCK_N):
        b_dq = _dq_step(
            b_dq, b_q, b_g, b_lse, b_delta, k, v, i_n, rows, n_keys, shift, scale, D, DV, stride_ks, stride_vs, seed,
            i_batch, i_head, threshold, keep_scale, False, CAUSAL, DROPOUT, EVEN_D, EVEN_DV, BLOCK_N, BLOCK_D, BLOCK_DV,
        )  # fmt: skip
    for i_n in range(n_all, n_seen, BLOCK_N):
        b_dq = _dq_step(
            b_dq, b_q, b_g, b_lse, b_delta, k, v, i_n, rows, n_keys, shift, scale, D, DV, stride_ks, stride_vs, seed,
            i_batch, i_head, threshold, keep_scale, True, CAUSAL, DROPOUT, EVEN_D, EVEN_DV, BLOCK_N, BLOCK_D, BLOCK_DV,
        )  # fmt: skip
    p_dq = dq + i_batch * stride_dqb + i_head * stride_dqh + wide_rows * stride_dqs + d[None, :]
    tl.store(p_dq, (b_dq * scale).to(dq.dtype.element_ty), mask=m_row & (d[None, :] < D))


# --- launchers


class Tile(NamedTuple):
    """Rows that a program owns, rows a step of its loop reads, pipeline stages, warps."""

    own: int
    step: int
    stages: int
    warps: int


# By kernel and element size: (largest padded head dim, tile), the first that holds the head dim. Chosen by what the
# compiler reports for sm_80, sm_90, sm_100 and gfx942: the widest that spills no register.
_TILES = {
    ("fwd", 2): ((64, Tile(128, 64, 3, 4)), (128, Tile(128, 64, 3, 8)), (256, Tile(128, 32, 2, 8))),
    ("dkdv", 2): ((32, Tile(64, 64, 3, 4)), (128, Tile(128, 64, 3, 8)), (256, Tile(64, 16, 3, 8))),
    ("dq", 2): ((32, Tile(64, 64, 3, 4)), (128, Tile(128, 64, 3, 8)), (256, Tile(128, 32, 2, 8))),
    ("fwd", 4): ((64, Tile(64, 32, 2, 8)), (128, Tile(64, 16, 2, 8)), (256, Tile(32, 16, 2, 8))),
    ("dkdv", 4): ((64, Tile(32, 32, 2, 8)), (128, Tile(64, 16, 2, 8)), (256, Tile(32, 16, 2, 8))),
    ("dq", 4): ((64, Tile(64, 32, 2, 8)), (128, Tile(64, 16, 2, 8)), (256, Tile(16, 16, 2, 8))),
}
_INTERPRETED = Tile(32, 16, 1, 1)


def _shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one program may use."""
    properties = triton.runtime.driver.active.utils.get_device_properties(device.index or 0)
    return int(properties["max_shared_mem"])


def _tile(kernel: str, t: torch.Tensor, width: int, rows: int, dropout: bool) -> Tile:
    """The tile for a kernel, an input and a padded head dim. It does not depend on the batch.

    Stages, then steps, are cut until the owned tiles and `stages` stepped ones fit the shared memory.
    """
    if INTERPRETING.value:
        return _INTERPRETED
    size = t.element_size()
    own, step, stages, warps = next(tile for limit, tile in _TILES[kernel, size] if width <= limit)
    own = min(own, max(16, triton.next_power_of_2(rows)))
    if dropout:  # the mask takes registers
        step = max(16, step // 2)
    room = _shared_memory(t.device)
    while 2 * (own + stages * step) * width * size + 8 * stages * step + own * step * dropout > room:
        if stages > 1:
            stages -= 1
        elif step > 16:
            step //= 2
        elif own > 16:
            own //= 2
        else:
            break
    return Tile(own, step, stages, warps)


def _section(k: torch.Tensor, v: torch.Tensor, group: int) -> int:
    """Query heads whose keys and values fit the L2 cache together, whole groups of them."""
    head_bytes = max(1, k.shape[2] * (k.shape[3] + v.shape[3]) * k.element_size())
    return group * max(1, _L2_BYTES // head_bytes)


def _strides(*tensors: torch.Tensor) -> tuple[int, ...]:
    """Of batch, heads and seq; head_dim is contiguous."""
    return tuple(s for t in tensors for s in t.stride()[:3])


def _block(width: int) -> int:
    return max(16, triton.next_power_of_2(width))


def forward(q, k, v, key_lengths, dropout_seed, causal, scale, dropout_p, out, lse):
    batch, heads, queries, d = q.shape
    if lse.numel() == 0:
        return
    dv, group = v.shape[3], heads // k.shape[1]
    block_d, block_dv = _block(d), _block(dv)
    # A masked score is -inf, and 0 * -inf would be NaN; the weights are those of scale 0.
    magnitude = abs(scale) or 1e-30
    tile = _tile("fwd", q, max(block_d, block_dv), queries, dropout_seed is not None)
    _fwd_kernel[(triton.cdiv(queries, tile.own) * batch * heads,)](
        q, k, v, key_lengths, dropout_seed, out, lse, magnitude, drop_threshold(dropout_p), 1.0 / (1.0 - dropout_p), batch, heads, group, queries, k.shape[2], d, dv, _section(k, v, group),
        *_strides(q, k, v, out), CAUSAL=causal, HAS_LENGTHS=key_lengths is not None, NEGATIVE=scale < 0.0,
        DROPOUT=dropout_seed is not None, EVEN_D=d == block_d, EVEN_DV=dv == block_dv, BLOCK_M=tile.own,
        BLOCK_N=tile.step, BLOCK_D=block_d, BLOCK_DV=block_dv, num_stages=tile.stages, num_warps=tile.warps,
    )  # fmt: skip


def backward(dout, q, k, v, key_lengths, dropout_seed, out, lse, causal, scale, dropout_p, dq, dk, dv):
    batch, heads, queries, d = q.shape
    key_heads, keys, d_v = k.shape[1], k.shape[2], v.shape[3]
    block_d, block_dv, group = _block(d), _block(d_v), heads // key_heads
    delta = lse  # a stand-in that nobody reads
    if lse.numel() and (dq is not None or dk is not None):
        delta = torch.empty_like(lse)
        rows = 16 if INTERPRETING.value else 64
        _delta_kernel[(triton.cdiv(queries, rows) * batch * heads,)](
            dout,
            out,
            delta,
            batch,
            heads,
            queries,
            d_v,
            *_strides(dout, out),
            BLOCK_M=rows,
            BLOCK_DV=block_dv,
        )
    numbers = (scale, drop_threshold(dropout_p), 1.0 / (1.0 - dropout_p))
    common = {
        "CAUSAL": causal, "HAS_LENGTHS": key_lengths is not None, "DROPOUT": dropout_seed is not None,
        "EVEN_D": d == block_d, "EVEN_DV": d_v == block_dv, "BLOCK_D": block_d, "BLOCK_DV": block_dv,
    }  # fmt: skip
    inputs = (q, k, v, key_lengths, dropout_seed, dout, lse, delta)
    if (dk is not None or dv is not None) and batch * keys:
        tile = _tile("dkdv", k, max(block_d, block_dv), keys, dropout_seed is not None)
        grads = (k if dk is None else dk, v if dv is None else dv)
        _dkdv_kernel[(triton.cdiv(keys, tile.own) * batch * key_heads,)](
            *inputs, *grads, *numbers, batch, key_heads, group, queries, keys, d, d_v,
            max(1, _section(q, dout, 1) // group), *_strides(q, k, v, dout, *grads), WANT_DK=dk is not None,
            WANT_DV=dv is not None, BLOCK_M=tile.step, BLOCK_N=tile.own, num_stages=tile.stages, num_warps=tile.warps,
            **common,
        )  # fmt: skip
    if dq is not None and lse.numel():
        tile = _tile("dq", q, max(block_d, block_dv), queries, dropout_seed is not None)
        _dq_kernel[(triton.cdiv(queries, tile.own) * batch * heads,)](
            *inputs, dq, *numbers, batch, heads, group, queries, keys, d, d_v, _section(k, v, group),
            *_strides(q, k, v, dout, dq), BLOCK_M=tile.own, BLOCK_N=tile.step, num_stages=tile.stages,
            num_warps=tile.warps, **common,
        )  # fmt: skip
