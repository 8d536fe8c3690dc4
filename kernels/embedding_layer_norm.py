"""The sum of embeddings, layer norm and dropout in Triton.

Forward: one program a token. A row of at most _BLOCK columns stays in registers; a wider one is gathered in column
tiles, once for the mean, once for the variance, once to write y.

Backward: a fixed number of programs, a few a multiprocessor, each over every P-th token: the rows are gathered again,
the row's two sums come first, then dx in weight's dtype, and dnorm_weight and dnorm_bias in float32 in one partial row a
program, which a second kernel adds up in order. The rows of dx are then added to the tables' gradients as in embedding.
No atomics: bitwise the same every time.

Dropout: word n of the Philox stream belongs to element n. Where H is a multiple of 4, four columns share a counter.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .common import device_programs, meta
from .embedding import add_rows, add_table_gradients, table_arguments
from .layer_norm import add_partial_rows
from .philox import philox_lanes

__all__ = ["backward", "compile_cases", "forward"]

_BLOCK = 8192  # columns held in registers at once
_BLOCK_BACKWARD = 2048  # fewer, since two rows and two sums are held


@triton.jit
def _drop(b_x, seed, i_t, i, H, threshold, scale, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    """Columns i to i + BLOCK of token i_t, [BLOCK], kept and scaled or 0."""
    i_first = i_t * H + i
    if ALIGNED:
        i_counter = i_first // 4 + tl.arange(0, BLOCK // 4)
        b_words = philox_lanes(tl.load(seed), i_counter, i_counter >> 32, 0, 0)
    else:
        i_n = i_first + tl.arange(0, BLOCK)
        i_counter = i_n >> 2
        b_0, b_1, b_2, b_3 = tl.philox(
            tl.load(seed), i_counter.to(tl.uint32), (i_counter >> 32).to(tl.uint32), tl.to_tensor(0).to(tl.uint32),
            tl.to_tensor(0).to(tl.uint32), n_rounds=10,
        )  # fmt: skip
        i_lane = i_n & 3
        b_words = tl.where(i_lane < 2, tl.where(i_lane == 0, b_0, b_1), tl.where(i_lane == 2, b_2, b_3))
    return tl.where(b_words >= tl.cast(threshold, tl.uint32), b_x * scale, 0.0)


@triton.jit
def _fwd_kernel(ids, weight, positions, position_weight, segments, segment_weight, norm_weight, norm_bias, seed, y,
                mean, rstd, S, V, P, G, H, eps, threshold, scale, HAS_POSITION: tl.constexpr, GIVEN: tl.constexpr,
                HAS_SEGMENT: tl.constexpr, SEGMENTED: tl.constexpr, HAS_WEIGHT: tl.constexpr,
                HAS_BIAS: tl.constexpr, DROP: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
                ONE_TILE: tl.constexpr):  # fmt: skip
    i_t = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    if ONE_TILE:
        b_x = add_rows(ids, weight, positions, position_weight, segments, segment_weight, i_t, cols, i_t >= 0,
                       cols < H, S, V, P, G, H, HAS_POSITION, GIVEN, HAS_SEGMENT, SEGMENTED)  # fmt: skip
        b_mean = tl.sum(tl.where(cols < H, b_x, 0.0), 0) / H
        b_c = tl.where(cols < H, b_x - b_mean, 0.0)
        b_rstd = 1.0 / tl.sqrt(tl.sum(b_c * b_c, 0) / H + eps)
    else:
        b_sum = tl.zeros([BLOCK], tl.float32)
        for i in range(0, H, BLOCK):
            b_x = add_rows(ids, weight, positions, position_weight, segments, segment_weight, i_t, i + cols, i_t >= 0,
                           i + cols < H, S, V, P, G, H, HAS_POSITION, GIVEN, HAS_SEGMENT, SEGMENTED)  # fmt: skip
            b_sum += tl.where(i + cols < H, b_x, 0.0)
        b_mean = tl.sum(b_sum, 0) / H
        b_sum = tl.zeros([BLOCK], tl.float32)
        for i in range(0, H, BLOCK):
            b_x = add_rows(ids, weight, positions, position_weight, segments, segment_weight, i_t, i + cols, i_t >= 0,
                           i + cols < H, S, V, P, G, H, HAS_POSITION, GIVEN, HAS_SEGMENT, SEGMENTED)  # fmt: skip
            b_c = tl.where(i + cols < H, b_x - b_mean, 0.0)
            b_sum += b_c * b_c
        b_rstd = 1.0 / tl.sqrt(tl.sum(b_sum, 0) / H + eps)
    tl.store(mean + i_t, b_mean)
    tl.store(rstd + i_t, b_rstd)
    for i in range(0, BLOCK if ONE_TILE else H, BLOCK):
        m_col = i + cols < H
        if not ONE_TILE:
            b_x = add_rows(ids, weight, positions, position_weight, segments, segment_weight, i_t, i + cols, i_t >= 0,
                           i + cols < H, S, V, P, G, H, HAS_POSITION, GIVEN, HAS_SEGMENT, SEGMENTED)  # fmt: skip
        b_y = (b_x - b_mean) * b_rstd
        if HAS_WEIGHT:
            b_y *= tl.load(norm_weight + i + cols, mask=m_col, other=0.0).to(tl.float32)
        if HAS_BIAS:
            b_y += tl.load(norm_bias + i + cols, mask=m_col, other=0.0).to(tl.float32)
        if DROP:
            b_y = _drop(b_y, seed, i_t, i, H, threshold, scale, ALIGNED, BLOCK)
        tl.store(y + i_t * H + i + cols, b_y.to(y.dtype.element_ty), mask=m_col)


@triton.jit
def _terms(dy, ids, weight, positions, position_weight, segments, segment_weight, norm_weight, seed, b_mean, b_rstd,
           i_t, i, S, V, P, G, H, threshold, scale, HAS_POSITION: tl.constexpr, GIVEN: tl.constexpr,
           HAS_SEGMENT: tl.constexpr, SEGMENTED: tl.constexpr, HAS_WEIGHT: tl.constexpr, DROP: tl.constexpr,
           ALIGNED: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """(dy under the mask, xhat, dy * norm_weight) of a tile of a token's columns; 0 beyond the row."""
    i_col = i + tl.arange(0, BLOCK)
    m_col = i_col < H
    b_x = add_rows(ids, weight, positions, position_weight, segments, segment_weight, i_t, i_col, i_t >= 0, m_col, S, V,
                   P, G, H, HAS_POSITION, GIVEN, HAS_SEGMENT, SEGMENTED)  # fmt: skip
    b_xhat = tl.where(m_col, (b_x - b_mean) * b_rstd, 0.0)
    b_dy = tl.load(dy + i_t * H + i_col, mask=m_col, other=0.0).to(tl.float32)
    if DROP:
        b_dy = _drop(b_dy, seed, i_t, i, H, threshold, scale, ALIGNED, BLOCK)
    b_g = b_dy
    if HAS_WEIGHT:
        b_g = b_dy * tl.load(norm_weight + i_col, mask=m_col, other=0.0).to(tl.float32)
    return b_dy, b_xhat, b_g


@triton.jit
def _bwd_kernel(dy, ids, weight, positions, position_weight, segments, segment_weight, norm_weight, seed, mean, rstd,
                dx, p_weight, p_bias, T, PROGRAMS, S, V, P, G, H, threshold, scale, HAS_POSITION: tl.constexpr,
                GIVEN: tl.constexpr, HAS_SEGMENT: tl.constexpr, SEGMENTED: tl.constexpr, HAS_WEIGHT: tl.constexpr,
                DROP: tl.constexpr, ALIGNED: tl.constexpr, WANT_DX: tl.constexpr, WANT_DW: tl.constexpr,
                WANT_DB: tl.constexpr, BLOCK: tl.constexpr, ONE_TILE: tl.constexpr):  # fmt: skip
    i_program = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    if WANT_DW:
        p_weight += i_program * H
    if WANT_DB:
        p_bias += i_program * H
    b_dw = tl.zeros([BLOCK], tl.float32)
    b_db = tl.zeros([BLOCK], tl.float32)
    for i_t in range(i_program, T, PROGRAMS):
        b_mean = tl.load(mean + i_t)
        b_rstd = tl.load(rstd + i_t)
        if ONE_TILE:
            b_dy, b_xhat, b_g = _terms(
                dy, ids, weight, positions, position_weight, segments, segment_weight, norm_weight, seed, b_mean,
                b_rstd, i_t, 0, S, V, P, G, H, threshold, scale, HAS_POSITION, GIVEN, HAS_SEGMENT, SEGMENTED,
                HAS_WEIGHT, DROP, ALIGNED, BLOCK,
            )  # fmt: skip
            b_mean_g = tl.sum(b_g, 0) / H
            b_mean_g_xhat = tl.sum(b_g * b_xhat, 0) / H
        else:
            b_sum = tl.zeros([BLOCK], tl.float32)
            b_dot = tl.zeros([BLOCK], tl.float32)
            for i in range(0, H, BLOCK):
                b_dy, b_xhat, b_g = _terms(
                    dy, ids, weight, positions, position_weight, segments, segment_weight, norm_weight, seed, b_mean,
                    b_rstd, i_t, i, S, V, P, G, H, threshold, scale, HAS_POSITION, GIVEN, HAS_SEGMENT, SEGMENTED,
                    HAS_WEIGHT, DROP, ALIGNED, BLOCK,
                )  # fmt: skip
                b_sum += b_g
                b_dot += b_g * b_xhat
            b_mean_g = tl.sum(b_sum, 0) / H
            b_mean_g_xhat = tl.sum(b_dot, 0) / H
        for i in range(0, BLOCK if ONE_TILE else H, BLOCK):
            m_col = i + cols < H
            if not ONE_TILE:
                b_dy, b_xhat, b_g = _terms(
                    dy, ids, weight, positions, position_weight, segments, segment_weight, norm_weight, seed, b_mean,
                    b_rstd, i_t, i, S, V, P, G, H, threshold, scale, HAS_POSITION, GIVEN, HAS_SEGMENT, SEGMENTED,
                    HAS_WEIGHT, DROP, ALIGNED, BLOCK,
                )  # fmt: skip
            if WANT_DX:
                # dx = rstd * (g - mean(g) - xhat * mean(g * xhat))
                b_dx = (b_g - b_mean_g - b_xhat * b_mean_g_xhat) * b_rstd
                tl.store(dx + i_t * H + i + cols, b_dx.to(dx.dtype.element_ty), mask=m_col)
            if ONE_TILE:
                b_dw += b_dy * b_xhat
                b_db += b_dy
            else:  # the partial row is this program's alone
                if WANT_DW:
                    b_old = tl.load(p_weight + i + cols, mask=m_col, other=0.0)
                    tl.store(p_weight + i + cols, b_old + b_dy * b_xhat, mask=m_col)
                if WANT_DB:
                    b_old = tl.load(p_bias + i + cols, mask=m_col, other=0.0)
                    tl.store(p_bias + i + cols, b_old + b_dy, mask=m_col)
    if ONE_TILE:
        if WANT_DW:
            tl.store(p_weight + cols, b_dw, mask=cols < H)
        if WANT_DB:
            tl.store(p_bias + cols, b_db, mask=cols < H)


def _dropout(seed, p, h):
    """(threshold, scale, flags) of the kernels; the caller has dealt with p = 1."""
    flags = {"DROP": seed is not None, "ALIGNED": h % 4 == 0}
    return (0, 1.0, flags) if seed is None else (int(p * 2.0**32), 1.0 / (1.0 - p), flags)


def _drops_all(seed, p):
    return seed is not None and int(p * 2.0**32) == 2**32


def forward(
    ids, weight, positions, position_weight, segments, segment_weight, norm_weight, norm_bias, seed, padding_idx, eps,
    dropout_p, y, mean, rstd,
):  # fmt: skip
    if y.numel() == 0:
        return
    h = weight.shape[1]
    drops_all = _drops_all(seed, dropout_p)
    block = max(min(triton.next_power_of_2(h), _BLOCK), 4)
    tensors, sizes, flags = table_arguments(
        ids, weight, positions, position_weight, segments, segment_weight
    )
    threshold, scale, drop = _dropout(None if drops_all else seed, dropout_p, h)
    _fwd_kernel[(ids.numel(),)](
        *tensors, norm_weight, norm_bias, seed, y, mean, rstd, *sizes, eps, threshold, scale, **flags, **drop,
        HAS_WEIGHT=norm_weight is not None, HAS_BIAS=norm_bias is not None, BLOCK=block, ONE_TILE=h <= block,
        num_warps=max(1, block // 512),
    )  # fmt: skip
    if drops_all:
        y.zero_()


def backward(
    dy, ids, weight, positions, position_weight, segments, segment_weight, norm_weight, seed, mean, rstd, padding_idx,
    eps, dropout_p, dweight, dposition, dsegment, d_norm_weight, d_norm_bias,
):  # fmt: skip
    if dy.numel() == 0 or _drops_all(seed, dropout_p):
        return
    h, tokens = weight.shape[1], ids.numel()
    block = max(min(triton.next_power_of_2(h), _BLOCK_BACKWARD), 4)
    one_tile, programs = h <= block, min(tokens, device_programs(dy.device))
    wanted = any(d is not None for d in (dweight, dposition, dsegment))
    dx = torch.empty_like(dy) if wanted else None
    make = torch.empty if one_tile else torch.zeros
    partial = [
        None if d is None else make(programs, h, dtype=torch.float32, device=dy.device)
        for d in (d_norm_weight, d_norm_bias)
    ]
    tensors, sizes, flags = table_arguments(
        ids, weight, positions, position_weight, segments, segment_weight
    )
    threshold, scale, drop = _dropout(seed, dropout_p, h)
    _bwd_kernel[(programs,)](
        dy, *tensors, norm_weight, seed, mean, rstd, dx, *partial, tokens, programs, *sizes, threshold, scale, **flags,
        **drop, HAS_WEIGHT=norm_weight is not None, WANT_DX=wanted, WANT_DW=d_norm_weight is not None,
        WANT_DB=d_norm_bias is not None, BLOCK=block, ONE_TILE=one_tile, num_warps=max(1, block // 256),
    )  # fmt: skip
    for p, total in zip(partial, (d_norm_weight, d_norm_bias), strict=True):
        if p is not None:
            add_partial_rows(p, total)
    if wanted:
        add_table_gradients(dx, ids, positions, segments, padding_idx, dweight, dposition, dsegment)


def compile_cases():
    """BERT base and large; tokens alone; a width that no power of two divides, places given; a wide row."""
    ids = meta(8, 512, dtype=torch.int64)
    for h in (768, 1024, 1023, 12288):
        yield {
            "ids": ids, "weight": meta(30522, h), "positions": ids if h == 1023 else None, "position_weight": meta(512, h),
            "segments": ids, "segment_weight": meta(2, h), "norm_weight": meta(h, dtype=torch.float32),
            "norm_bias": meta(h, dtype=torch.float32), "dropout_p": 0.1, "seed": meta(1, dtype=torch.int64),
        }  # fmt: skip
    yield {"ids": ids, "weight": meta(30522, 384)}
