"""Layer normalisation in Triton, and the kernels of all four norms: rms_norm is the same without a mean.

With a residual (add_layer_norm, add_rms_norm) the rounded sum residual + dropout(x + x_bias) is stored on the way and
then is what is normalised; backward adds the sum's own gradient and draws the mask again.

Forward: one program a row, or a tile of narrow rows. A row of at most _BLOCK columns stays in registers; a
wider one is read in column tiles, once for the mean, once for the variance, once to write y. Reads x once or three times
(from L2), writes y once.

Backward: a fixed number of programs, a few a multiprocessor, each over every P-th tile of rows; the rows' sums first,
then dx. Each program adds its rows' dweight, dbias and dx_bias in float32 into one partial row of its own, in the order
of rows; a second kernel sums the P partial rows in order. No atomics, no locks: bitwise the same every time.

A thread moves 16 bytes at once where every row starts on a multiple of them. Triton sees that from N = UNITS * UNIT with
the constant UNIT, which a mask of cols < N alone would hide from it.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from .common import device_programs, meta
from .philox import keep_tile

__all__ = ["add_partial_rows", "backward", "compile_cases", "forward", "launch_backward", "launch_forward"]

_BLOCK = 8192  # columns held in registers at once
_BLOCK_BACKWARD = 4096  # fewer, since two rows and two sums are held: more would spill


@triton.jit
def _places(rows, N, i_col, ROWS: tl.constexpr):
    """Offsets of a tile's elements from its first row's start."""
    return i_col if ROWS == 1 else rows * N + i_col


@triton.jit
def _both(m_row, m_col, ROWS: tl.constexpr):
    """The mask of a tile; a single row of a launched program is there, and testing that costs a register too many."""
    return m_col if ROWS == 1 else m_row & m_col


@triton.jit
def _residual_sum(b_x, x_bias, residual, total, seed, i_row, N, i_col, i_at, m_col, m, most_dropped, scale,
                  UNIT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """residual + dropout(b_x + x_bias) as stored in total [ROWS, BLOCK]."""
    if x_bias is not None:
        b_x += tl.load(x_bias + i_col + tl.arange(0, BLOCK)[None, :], mask=m_col, other=0.0).to(tl.float32)
    if seed is not None:
        b_keep = keep_tile(seed, i_row, N, i_col, most_dropped, UNIT % 4 == 0, ROWS, BLOCK)
        b_x = tl.where(b_keep, b_x * scale, 0.0)
    b_sum = (b_x + tl.load(residual + i_at, mask=m, other=0.0).to(tl.float32)).to(total.dtype.element_ty)
    tl.store(total + i_at, b_sum, mask=m)
    return b_sum.to(tl.float32)


@triton.jit
def _load_weight(weight, offset, i_col, m_col):
    b_weight = tl.load(weight + i_col, mask=m_col, other=0.0).to(tl.float32)
    if offset is not None:
        b_weight += offset
    return b_weight


@triton.jit
def _fwd_kernel(x, x_bias, residual, seed, weight, bias, y, total, mean, rstd, M, UNITS, eps, offset, most_dropped, scale,
                CENTRE: tl.constexpr, LLAMA: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
                ONE_TILE: tl.constexpr):  # fmt: skip
    N = UNITS * UNIT
    i_row = tl.program_id(0).to(tl.int64) * ROWS
    x += i_row * N
    y += i_row * N
    if residual is not None:
        residual += i_row * N
        total += i_row * N
    rows = tl.arange(0, ROWS)[:, None]
    cols = tl.arange(0, BLOCK)[None, :]
    m_row = i_row + rows < M
    if ONE_TILE:
        i_at, m = _places(rows, N, cols, ROWS), _both(m_row, cols < N, ROWS)
        b_x = tl.load(x + i_at, mask=m, other=0.0).to(tl.float32)  # [ROWS, BLOCK]
        if residual is not None:
            b_x = _residual_sum(b_x, x_bias, residual, total, seed, i_row, N, 0, i_at, cols < N, m, most_dropped, scale,
                                UNIT, ROWS, BLOCK)  # fmt: skip
        b_mean = tl.zeros([ROWS, 1], tl.float32)
        b_c = b_x
        if CENTRE:
            b_mean = tl.sum(b_x, 1, keep_dims=True) / N
            b_c = tl.where(m, b_x - b_mean, 0.0)
        b_rstd = 1.0 / tl.sqrt(tl.sum(b_c * b_c, 1, keep_dims=True) / N + eps)  # [ROWS, 1]
    else:
        b_sum = tl.zeros([ROWS, BLOCK], tl.float32)
        b_squares = tl.zeros([ROWS, BLOCK], tl.float32)
        for i in range(0, N, BLOCK):
            i_at, m = _places(rows, N, i + cols, ROWS), _both(m_row, i + cols < N, ROWS)
            b_x = tl.load(x + i_at, mask=m, other=0.0).to(tl.float32)
            if residual is not None:
                b_x = _residual_sum(b_x, x_bias, residual, total, seed, i_row, N, i, i_at, i + cols < N, m, most_dropped,
                                    scale, UNIT, ROWS, BLOCK)  # fmt: skip
            if CENTRE:
                b_sum += b_x
            else:
                b_squares += b_x * b_x
        if residual is not None:
            x = total
            tl.debug_barrier()  # other threads read what this one has stored
        b_mean = tl.zeros([ROWS, 1], tl.float32)
        if CENTRE:
            b_mean = tl.sum(b_sum, 1, keep_dims=True) / N
            for i in range(0, N, BLOCK):
                i_at, m = _places(rows, N, i + cols, ROWS), _both(m_row, i + cols < N, ROWS)
                b_c = tl.where(m, tl.load(x + i_at, mask=m, other=0.0).to(tl.float32) - b_mean, 0.0)
                b_squares += b_c * b_c
        b_rstd = 1.0 / tl.sqrt(tl.sum(b_squares, 1, keep_dims=True) / N + eps)
    for i in range(0, BLOCK if ONE_TILE else N, BLOCK):  # one tile: no loop at all
        m_col = i + cols < N
        i_at, m = _places(rows, N, i + cols, ROWS), _both(m_row, m_col, ROWS)
        if not ONE_TILE:
            b_x = tl.load(x + i_at, mask=m, other=0.0).to(tl.float32)
        b_y = (b_x - b_mean if CENTRE else b_x) * b_rstd
        if LLAMA:
            b_y = b_y.to(y.dtype.element_ty).to(tl.float32)
        if weight is not None:
            b_y *= _load_weight(weight, offset, i + cols, m_col)
        if bias is not None:
            b_y += tl.load(bias + i + cols, mask=m_col, other=0.0).to(tl.float32)
        tl.store(y + i_at, b_y.to(y.dtype.element_ty), mask=m)
    if CENTRE:
        tl.store(mean + i_row + rows, b_mean, mask=m_row)
    tl.store(rstd + i_row + rows, b_rstd, mask=m_row)


@triton.jit
def _bwd_kernel(dy, d_total, x, seed, weight, mean, rstd, dx, d_residual, p_dweight, p_dbias, p_dx_bias, M, UNITS, PROGRAMS,
                offset, most_dropped, scale, WANT_D: tl.constexpr, CENTRE: tl.constexpr, LLAMA: tl.constexpr,
                UNIT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, ONE_TILE: tl.constexpr):  # fmt: skip
    N = UNITS * UNIT
    i_program = tl.program_id(0).to(tl.int64)
    rows = tl.arange(0, ROWS)[:, None]
    cols = tl.arange(0, BLOCK)[None, :]
    i_partial = i_program * N
    b_dw = tl.zeros([ROWS, BLOCK], tl.float32)
    b_db = tl.zeros([ROWS, BLOCK], tl.float32)
    b_dx_sum = tl.zeros([ROWS, BLOCK], tl.float32)
    for i_tile in range(i_program, tl.cdiv(M, ROWS), PROGRAMS):
        i_row = i_tile * ROWS
        i_start = i_row * N
        m_row = i_row + rows < M
        b_mean = tl.zeros([ROWS, 1], tl.float32)
        b_rstd = tl.zeros([ROWS, 1], tl.float32)
        b_mean_g = tl.zeros([ROWS, 1], tl.float32)
        b_mean_g_xhat = tl.zeros([ROWS, 1], tl.float32)
        if dy is not None:
            if CENTRE:
                b_mean = tl.load(mean + i_row + rows, mask=m_row, other=0.0)  # [ROWS, 1]
            b_rstd = tl.load(rstd + i_row + rows, mask=m_row, other=0.0)
            if WANT_D:
                b_g_sum = tl.zeros([ROWS, BLOCK], tl.float32)
                b_g_dot = tl.zeros([ROWS, BLOCK], tl.float32)
                for i in range(0, BLOCK if ONE_TILE else N, BLOCK):
                    m_col = i + cols < N
                    i_at, m = _places(rows, N, i + cols, ROWS), _both(m_row, m_col, ROWS)
                    b_x = tl.load(x + i_start + i_at, mask=m, other=0.0).to(tl.float32)
                    b_g = tl.load(dy + i_start + i_at, mask=m, other=0.0).to(tl.float32)
                    if weight is not None:
                        b_g *= _load_weight(weight, offset, i + cols, m_col)
                    if CENTRE:
                        b_x -= b_mean
                        b_g_sum += b_g
                    b_g_dot += b_g * b_x * b_rstd
                if CENTRE:
                    b_mean_g = tl.sum(b_g_sum, 1, keep_dims=True) / N
                b_mean_g_xhat = tl.sum(b_g_dot, 1, keep_dims=True) / N
        for i in range(0, BLOCK if ONE_TILE else N, BLOCK):
            m_col = i + cols < N
            i_at, m = _places(rows, N, i + cols, ROWS), _both(m_row, m_col, ROWS)
            b_d = tl.zeros([ROWS, BLOCK], tl.float32)
            if dy is not None:
                b_dy = tl.load(dy + i_start + i_at, mask=m, other=0.0).to(tl.float32)
                b_xhat = tl.load(x + i_start + i_at, mask=m, other=0.0).to(tl.float32)
                if CENTRE:
                    b_xhat -= b_mean
                b_xhat *= b_rstd
                if WANT_D:
                    b_g = b_dy
                    if weight is not None:
                        b_g *= _load_weight(weight, offset, i + cols, m_col)
                    # dx = rstd * (g - mean(g) - xhat * mean(g * xhat)), without mean(g) for rms_norm
                    if CENTRE:
                        b_g -= b_mean_g
                    b_d = (b_g - b_xhat * b_mean_g_xhat) * b_rstd
            if WANT_D:
                if d_total is not None:
                    b_d += tl.load(d_total + i_start + i_at, mask=m, other=0.0).to(tl.float32)
                if d_residual is not None:
                    tl.store(d_residual + i_start + i_at, b_d.to(d_residual.dtype.element_ty), mask=m)
                if seed is not None:
                    b_keep = keep_tile(seed, i_row, N, i, most_dropped, UNIT % 4 == 0, ROWS, BLOCK)
                    b_d = tl.where(b_keep, b_d * scale, 0.0)
                b_dx_sum = _add_to_row(b_dx_sum, p_dx_bias, b_d, i_partial + i + cols, m, ONE_TILE)
                if dx is not None:
                    tl.store(dx + i_start + i_at, b_d.to(dx.dtype.element_ty), mask=m)
            if dy is not None:
                b_rounded = b_xhat.to(x.dtype.element_ty).to(tl.float32) if LLAMA else b_xhat
                b_dw = _add_to_row(b_dw, p_dweight, b_dy * b_rounded, i_partial + i + cols, m, ONE_TILE)
                b_db = _add_to_row(b_db, p_dbias, b_dy, i_partial + i + cols, m, ONE_TILE)
    if ONE_TILE:
        _store_row(p_dweight, b_dw, i_partial, N, BLOCK)
        _store_row(p_dbias, b_db, i_partial, N, BLOCK)
        _store_row(p_dx_bias, b_dx_sum, i_partial, N, BLOCK)


@triton.jit
def _add_to_row(b_sum, partial, b_more, i_col, m, ONE_TILE: tl.constexpr):
    """b_sum + b_more if the row is one tile, else the same in memory; nothing if the sum is not wanted."""
    if partial is not None:
        if ONE_TILE:
            b_sum += b_more
        else:  # the partial row is this program's alone; it stays in L2 between rows
            tl.store(partial + i_col, tl.load(partial + i_col, mask=m, other=0.0) + b_more, mask=m)
    return b_sum


@triton.jit
def _store_row(partial, b_sum, i_partial, N, BLOCK: tl.constexpr):
    if partial is not None:
        cols = tl.arange(0, BLOCK)
        tl.store(partial + i_partial + cols, tl.sum(b_sum, 0), mask=cols < N)


@triton.jit
def _sum_rows_kernel(partial, total, P, N, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr):
    """total[n] += sum over p of partial[p, n], in the order of p."""
    cols = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    b_sum = tl.zeros([BLOCK_P, BLOCK_N], tl.float32)
    for i in range(0, P, BLOCK_P):
        rows = i + tl.arange(0, BLOCK_P)
        m = (rows[:, None] < P) & (cols[None, :] < N)
        b_sum += tl.load(partial + rows[:, None].to(tl.int64) * N + cols[None, :], mask=m, other=0.0)
    m_col = cols < N
    b_total = tl.load(total + cols, mask=m_col, other=0.0).to(tl.float32)
    tl.store(total + cols, (b_total + tl.sum(b_sum, 0)).to(total.dtype.element_ty), mask=m_col)


def add_partial_rows(partial: torch.Tensor, total: torch.Tensor) -> None:
    """total (N) += partial (P, N).sum(0), summed in float32 in the order of rows."""
    p, n = partial.shape
    _sum_rows_kernel[(triton.cdiv(n, 64),)](partial, total, p, n, BLOCK_P=32, BLOCK_N=64)


def _tile(n: int, most: int, per_warp: int) -> tuple[dict[str, Any], int]:
    """(constants of a tile for rows of n columns, warps)."""
    block = min(triton.next_power_of_2(n), most)
    rows = max(1, 2 * per_warp // block)  # narrow rows share a program of two warps
    unit = next(u for u in (8, 4, 1) if n % u == 0)
    return {"UNIT": unit, "ROWS": rows, "BLOCK": block, "ONE_TILE": n <= block}, max(1, rows * block // per_warp)


def _dropout(seed: torch.Tensor | None, p: float) -> tuple[torch.Tensor | None, int, float]:
    """(the seed if anything is dropped, the largest word of a dropped element, the factor of the others)."""
    threshold = int(p * 2.0**32)
    return (seed, threshold - 1, 1.0 / (1.0 - p) if p < 1.0 else 0.0) if threshold else (None, 0, 1.0)


def launch_forward(x, weight, bias, eps, y, mean, rstd, *, residual=None, x_bias=None, seed=None, dropout_p=0.0,
                   total=None, offset=0.0, llama=False):  # fmt: skip
    """y = norm(x), or with a residual of total = residual + dropout(x + x_bias). mean None: an rms_norm."""
    n = x.shape[-1]
    m = x.numel() // n
    if m == 0:
        return
    # Wide rows in smaller tiles of as many warps: else registers are cut to 64 a thread and spill on sm_100.
    tile, warps = _tile(n, _BLOCK, 512) if n <= _BLOCK else _tile(n, _BLOCK // 2, 256)
    _fwd_kernel[(triton.cdiv(m, tile["ROWS"]),)](
        x, x_bias, residual, *_dropout(seed, dropout_p)[:1], weight, bias, y, total, mean, rstd, m, n // tile["UNIT"], eps,
        offset or None, *_dropout(seed, dropout_p)[1:], CENTRE=mean is not None, LLAMA=llama, **tile, num_warps=warps,
    )  # fmt: skip


def launch_backward(dy, x, weight, mean, rstd, dx, dweight, dbias=None, *, d_total=None, d_residual=None, dx_bias=None,
                    seed=None, dropout_p=0.0, offset=0.0, llama=False):  # fmt: skip
    """x: what was normalised; d_total: what reaches it other than through the norm. dx is that of the sum's first term,
    d_residual that of its second where the two differ. mean None: an rms_norm."""
    n = x.shape[-1]
    m = x.numel() // n
    if m == 0:
        return
    # Else registers are cut to 64 a thread and spill: wide rows in smaller tiles or, with dropout, by fewer warps.
    if n <= _BLOCK_BACKWARD:
        tile, warps = _tile(n, _BLOCK_BACKWARD, 256)
    else:
        tile, warps = _tile(n, _BLOCK_BACKWARD // 2, 256) if seed is None else _tile(n, _BLOCK_BACKWARD, 512)
    if dx_bias is not None and seed is None and tile["ONE_TILE"]:
        warps = max(1, warps // 2)  # with all warps, registers are cut to 56 a thread and spill on sm_80
    programs = min(triton.cdiv(m, tile["ROWS"]), device_programs(x.device))
    make = torch.empty if tile["ONE_TILE"] else torch.zeros
    wanted = (dweight if dy is not None else None, dbias if dy is not None else None, dx_bias)
    partial = [
        make(programs, n, dtype=torch.float32, device=x.device) if d is not None else None for d in wanted
    ]
    want_d = dx is not None or d_residual is not None or dx_bias is not None
    if not want_d and partial[0] is partial[1] is None:
        return
    seed, most_dropped, scale = _dropout(seed, dropout_p)
    _bwd_kernel[(programs,)](
        dy, d_total, x, seed, weight, mean, rstd, dx, d_residual, *partial, m, n // tile["UNIT"], programs,
        offset or None, most_dropped, scale, WANT_D=want_d, CENTRE=mean is not None, LLAMA=llama, **tile, num_warps=warps,
    )  # fmt: skip
    for p, total in zip(partial, wanted, strict=True):
        if p is not None:
            add_partial_rows(p, total)


def forward(x, weight, bias, eps, y, mean, rstd):
    launch_forward(x, weight, bias, eps, y, mean, rstd)


def backward(dy, x, weight, mean, rstd, eps, dx, dweight, dbias):
    launch_backward(dy, x, weight, mean, rstd, dx, dweight, dbias)


def compile_cases():
    """Every tile; parameters of x's dtype, a weight alone, none; widths that 16, 8, 4 and nothing divides."""
    for n in (64, 384, 1600, 4096, 8192, 12288):
        yield {"x": meta(8192, n), "weight": meta(n), "bias": meta(n)}
    yield {"x": meta(8192, 1600), "weight": meta(1600, dtype=torch.float32)}
    yield {"x": meta(8192, 1024)}
    for n in (1000, 1023):
        parameter = meta(n, dtype=torch.float32)
        yield {"x": meta(8192, n), "weight": parameter, "bias": parameter}
    yield {"x": meta(8192, 1500, dtype=torch.float32), "weight": meta(1500, dtype=torch.float32)}
