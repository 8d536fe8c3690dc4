"""Layer normalisation in Triton.

The same kernels serve add_layer_norm: with a residual, the rounded sum is stored on the way and then is what is
normalised; backward adds the sum's own gradient to dx.

Forward: one program a row. A row of at most _BLOCK columns stays in registers; a wider one is read in column tiles,
once for the mean, once for the variance, once to write y. Reads x once or three times (from L2), writes y once.

Backward: a fixed number of programs, a few a multiprocessor, each over every P-th row; the row's two sums first, then
dx. Each program adds its rows' dweight and dbias in float32 into one partial row of its own, in the order of rows; a
second kernel sums the P partial rows in order. No atomics, no locks: bitwise the same every time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .common import device_programs, meta

__all__ = ["add_partial_rows", "backward", "compile_cases", "forward", "launch_backward", "launch_forward"]

_BLOCK = 8192  # columns held in registers at once
_BLOCK_BACKWARD = 4096  # fewer, since two rows and two sums are held: more would spill


@triton.jit
def _add_residual(b_x, residual, total, i_col, m_col):
    b_sum = (b_x + tl.load(residual + i_col, mask=m_col, other=0.0).to(tl.float32)).to(total.dtype.element_ty)
    tl.store(total + i_col, b_sum, mask=m_col)
    return b_sum.to(tl.float32)


@triton.jit
def _fwd_kernel(x, residual, weight, bias, y, total, mean, rstd, N, eps, HAS_RESIDUAL: tl.constexpr,
                HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
                BLOCK: tl.constexpr, ONE_TILE: tl.constexpr):  # fmt: skip
    i_row = tl.program_id(0).to(tl.int64)
    x += i_row * N
    y += i_row * N
    if HAS_RESIDUAL:
        residual += i_row * N
        total += i_row * N
    cols = tl.arange(0, BLOCK)
    if ONE_TILE:
        m_col = cols < N
        b_x = tl.load(x + cols, mask=m_col, other=0.0).to(tl.float32)  # [BLOCK]
        if HAS_RESIDUAL:
            b_x = _add_residual(b_x, residual, total, cols, m_col)
        b_mean = tl.sum(b_x, 0) / N
        b_c = tl.where(m_col, b_x - b_mean, 0.0)
        b_rstd = 1.0 / tl.sqrt(tl.sum(b_c * b_c, 0) / N + eps)
    else:
        b_sum = tl.zeros([BLOCK], tl.float32)
        for i in range(0, N, BLOCK):
            b_x = tl.load(x + i + cols, mask=i + cols < N, other=0.0).to(tl.float32)
            if HAS_RESIDUAL:
                b_x = _add_residual(b_x, residual, total, i + cols, i + cols < N)
            b_sum += b_x
        if HAS_RESIDUAL:
            x = total
            tl.debug_barrier()  # other threads read what this one has stored
        b_mean = tl.sum(b_sum, 0) / N
        b_sum = tl.zeros([BLOCK], tl.float32)
        for i in range(0, N, BLOCK):
            b_x = tl.load(x + i + cols, mask=i + cols < N, other=0.0).to(tl.float32)
            b_c = tl.where(i + cols < N, b_x - b_mean, 0.0)
            b_sum += b_c * b_c
        b_rstd = 1.0 / tl.sqrt(tl.sum(b_sum, 0) / N + eps)
    tl.store(mean + i_row, b_mean)
    tl.store(rstd + i_row, b_rstd)
    for i in range(0, BLOCK if ONE_TILE else N, BLOCK):  # one tile: no loop at all
        m_col = i + cols < N
        if not ONE_TILE:
            b_x = tl.load(x + i + cols, mask=m_col, other=0.0).to(tl.float32)
        b_y = (b_x - b_mean) * b_rstd
        if HAS_WEIGHT:
            b_y *= tl.load(weight + i + cols, mask=m_col, other=0.0).to(tl.float32)
        if HAS_BIAS:
            b_y += tl.load(bias + i + cols, mask=m_col, other=0.0).to(tl.float32)
        tl.store(y + i + cols, b_y.to(y.dtype.element_ty), mask=m_col)


@triton.jit
def _bwd_kernel(dy, d_total, x, weight, mean, rstd, dx, p_dweight, p_dbias, M, N, PROGRAMS,
                HAS_D_TOTAL: tl.constexpr, HAS_WEIGHT: tl.constexpr, WANT_DX: tl.constexpr, WANT_DW: tl.constexpr,
                WANT_DB: tl.constexpr, BLOCK: tl.constexpr, ONE_TILE: tl.constexpr):  # fmt: skip
    i_program = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    if WANT_DW:
        p_dweight += i_program * N
    if WANT_DB:
        p_dbias += i_program * N
    b_dw = tl.zeros([BLOCK], tl.float32)
    b_db = tl.zeros([BLOCK], tl.float32)
    for i_row in range(i_program, M, PROGRAMS):
        b_mean = tl.load(mean + i_row)
        b_rstd = tl.load(rstd + i_row)
        b_g_sum = tl.zeros([BLOCK], tl.float32)
        b_g_dot = tl.zeros([BLOCK], tl.float32)
        if WANT_DX:
            for i in range(0, BLOCK if ONE_TILE else N, BLOCK):
                m_col = i + cols < N
                b_x = tl.load(x + i_row * N + i + cols, mask=m_col, other=0.0).to(tl.float32)
                b_g = tl.load(dy + i_row * N + i + cols, mask=m_col, other=0.0).to(tl.float32)
                if HAS_WEIGHT:
                    b_g *= tl.load(weight + i + cols, mask=m_col, other=0.0).to(tl.float32)
                b_g_sum += b_g
                b_g_dot += b_g * (b_x - b_mean) * b_rstd
        b_mean_g = tl.sum(b_g_sum, 0) / N
        b_mean_g_xhat = tl.sum(b_g_dot, 0) / N
        for i in range(0, BLOCK if ONE_TILE else N, BLOCK):
            m_col = i + cols < N
            b_x = tl.load(x + i_row * N + i + cols, mask=m_col, other=0.0).to(tl.float32)
            b_dy = tl.load(dy + i_row * N + i + cols, mask=m_col, other=0.0).to(tl.float32)
            b_xhat = (b_x - b_mean) * b_rstd
            if WANT_DX:
                b_g = b_dy
                if HAS_WEIGHT:
                    b_g = b_dy * tl.load(weight + i + cols, mask=m_col, other=0.0).to(tl.float32)
                # dx = rstd * (g - mean(g) - xhat * mean(g * xhat))
                b_dx = (b_g - b_mean_g - b_xhat * b_mean_g_xhat) * b_rstd
                if HAS_D_TOTAL:
                    b_dx += tl.load(d_total + i_row * N + i + cols, mask=m_col, other=0.0).to(tl.float32)
                tl.store(dx + i_row * N + i + cols, b_dx.to(dx.dtype.element_ty), mask=m_col)
            if ONE_TILE:
                b_dw += b_dy * b_xhat
                b_db += b_dy
            else:  # the partial row is this program's alone; it stays in L2 between rows
                if WANT_DW:
                    b_old = tl.load(p_dweight + i + cols, mask=m_col, other=0.0)
                    tl.store(p_dweight + i + cols, b_old + b_dy * b_xhat, mask=m_col)
                if WANT_DB:
                    b_old = tl.load(p_dbias + i + cols, mask=m_col, other=0.0)
                    tl.store(p_dbias + i + cols, b_old + b_dy, mask=m_col)
    if ONE_TILE:
        if WANT_DW:
            tl.store(p_dweight + cols, b_dw, mask=cols < N)
        if WANT_DB:
            tl.store(p_dbias + cols, b_db, mask=cols < N)


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


def _tile(n: int, most: int, per_warp: int) -> tuple[int, int]:
    """(columns a tile, warps)."""
    block = min(triton.next_power_of_2(n), most)
    return block, max(1, block // per_warp)


def add_partial_rows(partial: torch.Tensor, total: torch.Tensor) -> None:
    """total (N) += partial (P, N).sum(0), summed in float32 in the order of rows."""
    p, n = partial.shape
    _sum_rows_kernel[(triton.cdiv(n, 64),)](partial, total, p, n, BLOCK_P=32, BLOCK_N=64)


def launch_forward(x, residual, weight, bias, eps, y, total, mean, rstd):
    n = x.shape[-1]
    if x.numel() == 0:
        return
    block, warps = _tile(n, _BLOCK, 512)
    _fwd_kernel[(x.numel() // n,)](
        x, residual, weight, bias, y, total, mean, rstd, n, eps, HAS_RESIDUAL=residual is not None,
        HAS_WEIGHT=weight is not None, HAS_BIAS=bias is not None, BLOCK=block, ONE_TILE=n <= block, num_warps=warps,
    )  # fmt: skip


def launch_backward(dy, d_total, x, weight, mean, rstd, dx, dweight, dbias):
    n = x.shape[-1]
    rows = x.numel() // n
    if rows == 0:
        return
    block, warps = _tile(n, _BLOCK_BACKWARD, 256)
    programs = min(rows, device_programs(x.device))
    one_tile = n <= block
    if d_total is not None and not one_tile:
        warps //= 2  # with four inputs and all warps, registers are cut to 64 a thread and spill on sm_100
    make = torch.empty if one_tile else torch.zeros
    partial = [
        make(programs, n, dtype=torch.float32, device=x.device) if d is not None else None
        for d in (dweight, dbias)
    ]
    _bwd_kernel[(programs,)](
        dy, d_total, x, weight, mean, rstd, dx, *partial, rows, n, programs, HAS_D_TOTAL=d_total is not None,
        HAS_WEIGHT=weight is not None, WANT_DX=dx is not None, WANT_DW=dweight is not None, WANT_DB=dbias is not None,
        BLOCK=block, ONE_TILE=one_tile, num_warps=warps,
    )  # fmt: skip
    for p, total in zip(partial, (dweight, dbias), strict=True):
        if p is not None:
            add_partial_rows(p, total)


def forward(x, weight, bias, eps, y, mean, rstd):
    launch_forward(x, None, weight, bias, eps, y, None, mean, rstd)


def backward(dy, x, weight, mean, rstd, eps, dx, dweight, dbias):
    launch_backward(dy, None, x, weight, mean, rstd, dx, dweight, dbias)


def compile_cases():
    """Every tile; parameters of x's dtype, a weight alone, none; a width that no power of two divides."""
    for n in (64, 384, 1600, 4096, 8192, 12288):
        yield {"x": meta(8192, n), "weight": meta(n), "bias": meta(n)}
    yield {"x": meta(8192, 1600), "weight": meta(1600, dtype=torch.float32)}
    yield {"x": meta(8192, 1024)}
    yield {
        "x": meta(8192, 1023),
        "weight": meta(1023, dtype=torch.float32),
        "bias": meta(1023, dtype=torch.float32),
    }
