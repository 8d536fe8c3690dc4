"""Attention in Triton, backward: dK and dV by tiles of keys, dQ by tiles of queries.

First delta = rowsum(dout * out). Then one program a tile of BLOCK_N keys sums dK and dV over all queries of
the group of heads that reads it, and one program a tile of BLOCK_M queries sums dQ over its keys; both
compute P again from lse. Seven products where a fused kernel has five, but no atomics: every sum has one
owner and one order, so that the result is bitwise the same every time. Loops over interior and boundary, and
the grid, as in attention.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..philox import drop_threshold
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
from .common import INTERPRETING

__all__ = ["backward"]


@triton.jit
def _delta_kernel(dout, out, delta, H, Sq, DV, stride_gb, stride_gh, stride_gs, stride_ob, stride_oh,
                  stride_os, BLOCK_M: tl.constexpr, BLOCK_DV: tl.constexpr):  # fmt: skip
    """delta = rowsum(dout * out), (batch, heads, queries) in float32."""
    tiles = tl.cdiv(Sq, BLOCK_M)
    i_bh = (tl.program_id(0) // tiles).to(tl.int64)
    i_m = tl.program_id(0) % tiles * BLOCK_M
    dout += i_bh // H * stride_gb + i_bh % H * stride_gh
    out += i_bh // H * stride_ob + i_bh % H * stride_oh
    b_g = load_rows(dout, i_m, stride_gs, Sq, DV, False, False, BLOCK_M, BLOCK_DV).to(tl.float32)
    b_o = load_rows(out, i_m, stride_os, Sq, DV, False, False, BLOCK_M, BLOCK_DV).to(tl.float32)
    rows = i_m + tl.arange(0, BLOCK_M)
    tl.store(delta + i_bh * Sq + rows, tl.sum(b_g * b_o, 1), mask=rows < Sq)


@triton.jit
def _dkdv_step(b_dk, b_dv, b_k, b_v, q, dout, lse, delta, i_m, i_n, Sq, Sk, shift, scale, D, DV, stride_qs,
               stride_gs, seed, i_batch, i_head, threshold, keep_scale, MASKED: tl.constexpr,
               DROPOUT: tl.constexpr, WANT_DK: tl.constexpr, WANT_DV: tl.constexpr, EVEN_D: tl.constexpr,
               EVEN_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
               BLOCK_DV: tl.constexpr):  # fmt: skip
    """One tile of queries: dV += (P * M')^T dO, dK += dS^T Q, with the scores transposed."""
    i_m = tl.multiple_of(tl.to_tensor(i_m), BLOCK_M)
    rows = i_m + tl.arange(0, BLOCK_M)
    b_q = load_rows(q, i_m, stride_qs, Sq, D, False, EVEN_D, BLOCK_M, BLOCK_D)
    b_lse = tl.load(lse + rows, mask=rows < Sq, other=float("inf"))  # so that P = 0 beyond the queries
    b_p = weights(
        dot(b_k, tl.trans(b_q)), b_lse[None, :], scale, b_k.dtype == tl.float32
    )  # [BLOCK_N, BLOCK_M]
    if MASKED:
        b_p = tl.where(tl.trans(seen(i_m, i_n, Sk, shift, True, BLOCK_M, BLOCK_N)), b_p, 0.0)
    if DROPOUT:
        m_kept = tl.trans(kept(seed, i_batch, i_head, i_m, i_n, threshold, BLOCK_M, BLOCK_N))
    b_g = load_rows(dout, i_m, stride_gs, Sq, DV, False, EVEN_DV, BLOCK_M, BLOCK_DV)
    if WANT_DV:
        b_pm = tl.where(m_kept, b_p * keep_scale, 0.0) if DROPOUT else b_p
        b_dv = dot(b_pm.to(b_g.dtype), b_g, b_dv)
    if WANT_DK:
        b_dp = dot(b_v, tl.trans(b_g))  # [BLOCK_N, BLOCK_M]
        if DROPOUT:
            b_dp = tl.where(m_kept, b_dp * keep_scale, 0.0)
        b_delta = tl.load(delta + rows, mask=rows < Sq, other=0.0)
        b_ds = b_p * (b_dp - b_delta[None, :])
        b_dk = dot(b_ds.to(b_q.dtype), b_q, b_dk)
    return b_dk, b_dv


@triton.jit
def _dkdv_kernel(q, k, v, key_lengths, dropout_seed, dout, lse, delta, dk, dv, scale, threshold, keep_scale,
                 B, Hk, GROUP, Sq, Sk, D, DV, section, stride_qb, stride_qh, stride_qs, stride_kb, stride_kh,
                 stride_ks, stride_vb, stride_vh, stride_vs, stride_gb, stride_gh, stride_gs, stride_dkb,
                 stride_dkh, stride_dks, stride_dvb, stride_dvh, stride_dvs, CAUSAL: tl.constexpr,
                 HAS_LENGTHS: tl.constexpr, DROPOUT: tl.constexpr, WANT_DK: tl.constexpr,
                 WANT_DV: tl.constexpr, EVEN_D: tl.constexpr, EVEN_DV: tl.constexpr, BLOCK_M: tl.constexpr,
                 BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr):  # fmt: skip
    # Programs go from the last tile on, and here the first keys, which the most queries see, are to go first.
    tiles = tl.cdiv(Sk, BLOCK_N)
    i_tile, i_bh = place(tl.program_id(0), tiles, B * Hk, section)
    i_n = (tiles - 1 - i_tile) * BLOCK_N
    i_batch = (i_bh // Hk).to(tl.int64)
    i_hk = (i_bh % Hk).to(tl.int64)
    seed = tl.load(dropout_seed) if DROPOUT else 0
    n_keys = key_count(key_lengths, i_batch, Sk, HAS_LENGTHS)
    k += i_batch * stride_kb + i_hk * stride_kh
    v += i_batch * stride_vb + i_hk * stride_vh
    b_k = load_rows(k, i_n, stride_ks, n_keys, D, False, EVEN_D, BLOCK_N, BLOCK_D)
    b_v = load_rows(v, i_n, stride_vs, n_keys, DV, False, EVEN_DV, BLOCK_N, BLOCK_DV)

    shift = Sk - Sq
    i_some, i_all, i_end = 0, 0, Sq  # queries from which on some key of the tile is seen, and every key is
    if CAUSAL:
        i_some = tl.maximum(i_n - shift, 0) // BLOCK_M * BLOCK_M
        i_all = tl.minimum(tl.cdiv(tl.maximum(i_n + BLOCK_N - 1 - shift, 0), BLOCK_M) * BLOCK_M, Sq)
    if HAS_LENGTHS:
        i_end = tl.where(i_n < n_keys, Sq, 0)
        i_all = tl.minimum(i_all, i_end)

    # A key beyond n_keys has a row of its own in dk and dv: what is summed there is thrown away at the end.
    b_dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    b_dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    for i_group in range(GROUP):
        i_head = i_hk * GROUP + i_group
        p_q = q + i_batch * stride_qb + i_head * stride_qh
        p_g = dout + i_batch * stride_gb + i_head * stride_gh
        i_stat = (i_batch * Hk * GROUP + i_head) * Sq
        for interior in tl.static_range(0 if CAUSAL else 1, 2):
            for i_m in range(i_all if interior else i_some, i_end if interior else i_all, BLOCK_M):
                b_dk, b_dv = _dkdv_step(
                    b_dk, b_dv, b_k, b_v, p_q, p_g, lse + i_stat, delta + i_stat, i_m, i_n, Sq, Sk, shift,
                    scale, D, DV, stride_qs, stride_gs, seed, i_batch, i_head, threshold, keep_scale,
                    interior == 0, DROPOUT, WANT_DK, WANT_DV, EVEN_D, EVEN_DV, BLOCK_M, BLOCK_N, BLOCK_D,
                    BLOCK_DV,
                )  # fmt: skip

    m_key = (i_n + tl.arange(0, BLOCK_N) < n_keys)[:, None]
    if WANT_DK:
        dk += i_batch * stride_dkb + i_hk * stride_dkh
        store_rows(dk, i_n, stride_dks, Sk, D, tl.where(m_key, b_dk * scale, 0.0), BLOCK_N, BLOCK_D)
    if WANT_DV:
        dv += i_batch * stride_dvb + i_hk * stride_dvh
        store_rows(dv, i_n, stride_dvs, Sk, DV, tl.where(m_key, b_dv, 0.0), BLOCK_N, BLOCK_DV)


@triton.jit
def _dq_step(b_dq, b_q, b_g, b_lse, b_delta, k, v, i_m, i_n, n_keys, shift, scale, D, DV, stride_ks,
             stride_vs, seed, i_batch, i_head, threshold, keep_scale, MASKED: tl.constexpr,
             CAUSAL: tl.constexpr, DROPOUT: tl.constexpr, EVEN_D: tl.constexpr, EVEN_DV: tl.constexpr,
             BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
             BLOCK_DV: tl.constexpr):  # fmt: skip
    """One tile of keys: dQ += dS K."""
    i_n = tl.multiple_of(tl.to_tensor(i_n), BLOCK_N)
    b_k = load_rows(k, i_n, stride_ks, n_keys, D, not MASKED, EVEN_D, BLOCK_N, BLOCK_D)
    b_p = weights(
        dot(b_q, tl.trans(b_k)), b_lse[:, None], scale, b_k.dtype == tl.float32
    )  # [BLOCK_M, BLOCK_N]
    if MASKED:  # P and not S: exp of a score that lse does not count may overflow
        b_p = tl.where(seen(i_m, i_n, n_keys, shift, CAUSAL, BLOCK_M, BLOCK_N), b_p, 0.0)
    b_v = load_rows(v, i_n, stride_vs, n_keys, DV, not MASKED, EVEN_DV, BLOCK_N, BLOCK_DV)
    b_dp = dot(b_g, tl.trans(b_v))  # [BLOCK_M, BLOCK_N]
    if DROPOUT:
        m_kept = kept(seed, i_batch, i_head, i_m, i_n, threshold, BLOCK_M, BLOCK_N)
        b_dp = tl.where(m_kept, b_dp * keep_scale, 0.0)
    b_ds = b_p * (b_dp - b_delta[:, None])
    return dot(b_ds.to(b_k.dtype), b_k, b_dq)


@triton.jit
def _dq_kernel(q, k, v, key_lengths, dropout_seed, dout, lse, delta, dq, scale, threshold, keep_scale, B, H,
               GROUP, Sq, Sk, D, DV, section, stride_qb, stride_qh, stride_qs, stride_kb, stride_kh,
               stride_ks, stride_vb, stride_vh, stride_vs, stride_gb, stride_gh, stride_gs, stride_dqb,
               stride_dqh, stride_dqs, CAUSAL: tl.constexpr, HAS_LENGTHS: tl.constexpr, DROPOUT: tl.constexpr,
               EVEN_D: tl.constexpr, EVEN_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
               BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr):  # fmt: skip
    i_tile, i_bh = place(tl.program_id(0), tl.cdiv(Sq, BLOCK_M), B * H, section)
    i_m = i_tile * BLOCK_M
    i_batch = (i_bh // H).to(tl.int64)
    i_head = (i_bh % H).to(tl.int64)
    q += i_batch * stride_qb + i_head * stride_qh
    k += i_batch * stride_kb + i_head // GROUP * stride_kh
    v += i_batch * stride_vb + i_head // GROUP * stride_vh
    dout += i_batch * stride_gb + i_head * stride_gh
    seed = tl.load(dropout_seed) if DROPOUT else 0
    shift = Sk - Sq
    n_keys = key_count(key_lengths, i_batch, Sk, HAS_LENGTHS)
    n_all, n_some = seen_range(i_m, n_keys, shift, CAUSAL, BLOCK_M, BLOCK_N)

    b_q = load_rows(q, i_m, stride_qs, Sq, D, False, EVEN_D, BLOCK_M, BLOCK_D)
    b_g = load_rows(dout, i_m, stride_gs, Sq, DV, False, EVEN_DV, BLOCK_M, BLOCK_DV)
    rows = i_m + tl.arange(0, BLOCK_M)
    i_stat = (i_batch * H + i_head) * Sq
    b_lse = tl.load(lse + i_stat + rows, mask=rows < Sq, other=float("inf"))
    b_delta = tl.load(delta + i_stat + rows, mask=rows < Sq, other=0.0)
    b_dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for boundary in tl.static_range(2):
        for i_n in range(n_all if boundary else 0, n_some if boundary else n_all, BLOCK_N):
            b_dq = _dq_step(
                b_dq, b_q, b_g, b_lse, b_delta, k, v, i_m, i_n, n_keys, shift, scale, D, DV, stride_ks,
                stride_vs, seed, i_batch, i_head, threshold, keep_scale, boundary == 1, CAUSAL, DROPOUT,
                EVEN_D, EVEN_DV, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV,
            )  # fmt: skip
    dq += i_batch * stride_dqb + i_head * stride_dqh
    store_rows(dq, i_m, stride_dqs, Sq, D, b_dq * scale, BLOCK_M, BLOCK_D)


def backward(dout, q, k, v, key_lengths, dropout_seed, out, lse, causal, scale, dropout_p, dq, dk, dv):
    batch, heads, queries, d = q.shape
    key_heads, keys, d_v = k.shape[1], k.shape[2], v.shape[3]
    dropout, group, block_d, block_dv = dropout_seed is not None, heads // key_heads, padded(d), padded(d_v)
    width = max(block_d, block_dv)
    delta = lse  # a stand-in that dV alone does not read
    if lse.numel() and (dq is not None or dk is not None):
        delta = torch.empty_like(lse)
        rows = 16 if INTERPRETING.value else 64
        _delta_kernel[(triton.cdiv(queries, rows) * batch * heads,)](
            dout, out, delta, heads, queries, d_v, *strides(dout, out), BLOCK_M=rows, BLOCK_DV=block_dv
        )  # fmt: skip
    inputs = (q, k, v, key_lengths, dropout_seed, dout, lse, delta)
    numbers = (scale, drop_threshold(dropout_p), 1.0 / (1.0 - dropout_p))
    switches = {
        "CAUSAL": causal, "HAS_LENGTHS": key_lengths is not None, "DROPOUT": dropout, "EVEN_D": d == block_d,
        "EVEN_DV": d_v == block_dv, "BLOCK_D": block_d, "BLOCK_DV": block_dv,
    }  # fmt: skip
    if (dk is not None or dv is not None) and batch * keys:
        own, step, stages, warps = choose_tile(
            "dkdv", k, width, keys, dropout or (d, d_v) != (block_d, block_dv)
        )
        grads = (k if dk is None else dk, v if dv is None else dv)
        _dkdv_kernel[(triton.cdiv(keys, own) * batch * key_heads,)](
            *inputs, *grads, *numbers, batch, key_heads, group, queries, keys, d, d_v,
            max(1, heads_in_l2(q, dout) // group), *strides(q, k, v, dout, *grads), WANT_DK=dk is not None,
            WANT_DV=dv is not None, BLOCK_M=step, BLOCK_N=own, num_stages=stages, num_warps=warps, **switches,
        )  # fmt: skip
    if dq is not None and lse.numel():
        own, step, stages, warps = choose_tile("dq", q, width, queries, dropout)
        _dq_kernel[(triton.cdiv(queries, own) * batch * heads,)](
            *inputs, dq, *numbers, batch, heads, group, queries, keys, d, d_v, group * heads_in_l2(k, v),
            *strides(q, k, v, dout, dq), BLOCK_M=own, BLOCK_N=step, num_stages=stages, num_warps=warps,
            **switches,
        )  # fmt: skip
