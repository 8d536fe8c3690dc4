"""Root-mean-square normalisation in Triton.

Forward: one program a row. A row of at most _BLOCK columns stays in registers; a wider one is read in column tiles, once
for the sum of squares, once to write y.

Backward: a fixed number of programs, a few a multiprocessor, each over every P-th row: the row's sum first, then dx. Each
program adds its rows' dweight in float32 into one partial row of its own, in the order of rows; the partial rows are then
summed in order. No atomics, no locks: bitwise the same every time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .common import device_programs, meta
from .layer_norm import add_partial_rows

__all__ = ["backward", "compile_cases", "forward"]

_BLOCK = 8192  # columns held in registers at once
_BLOCK_BACKWARD = 4096  # fewer, since two rows and a sum are held


@triton.jit
def _fwd_kernel(
    x, weight, y, rstd, N, eps, HAS_WEIGHT: tl.constexpr, BLOCK: tl.constexpr, ONE_TILE: tl.constexpr
):
    i_row = tl.program_id(0).to(tl.int64)
    x += i_row * N
    y += i_row * N
    cols = tl.arange(0, BLOCK)
    if ONE_TILE:
        b_x = tl.load(x + cols, mask=cols < N, other=0.0).to(tl.float32)  # [BLOCK]
        b_sum = b_x * b_x
    else:
        b_sum = tl.zeros([BLOCK], tl.float32)
        for i in range(0, N, BLOCK):
            b_x = tl.load(x + i + cols, mask=i + cols < N, other=0.0).to(tl.float32)
            b_sum += b_x * b_x
    b_rstd = 1.0 / tl.sqrt(tl.sum(b_sum, 0) / N + eps)
    tl.store(rstd + i_row, b_rstd)
    for i in range(0, BLOCK if ONE_TILE else N, BLOCK):  # one tile: no loop at all
        m_col = i + cols < N
        if not ONE_TILE:
            b_x = tl.load(x + i + cols, mask=m_col, other=0.0).to(tl.float32)
        b_y = b_x * b_rstd
        if HAS_WEIGHT:
            b_y *= tl.load(weight + i + cols, mask=m_col, other=0.0).to(tl.float32)
        tl.store(y + i + cols, b_y.to(y.dtype.element_ty), mask=m_col)


@triton.jit
def _bwd_kernel(dy, x, weight, rstd, dx, p_dweight, M, N, PROGRAMS, HAS_WEIGHT: tl.constexpr, WANT_DX: tl.constexpr,
                WANT_DW: tl.constexpr, BLOCK: tl.constexpr, ONE_TILE: tl.constexpr):  # fmt: skip
    i_program = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    if WANT_DW:
        p_dweight += i_program * N
    b_dw = tl.zeros([BLOCK], tl.float32)
    for i_row in range(i_program, M, PROGRAMS):
        b_rstd = tl.load(rstd + i_row)
        b_dot = tl.zeros([BLOCK], tl.float32)
        if WANT_DX:
            for i in range(0, BLOCK if ONE_TILE else N, BLOCK):
                m_col = i + cols < N
                b_xhat = tl.load(x + i_row * N + i + cols, mask=m_col, other=0.0).to(tl.float32) * b_rstd
                b_g = tl.load(dy + i_row * N + i + cols, mask=m_col, other=0.0).to(tl.float32)
                if HAS_WEIGHT:
                    b_g *= tl.load(weight + i + cols, mask=m_col, other=0.0).to(tl.float32)
                b_dot += b_g * b_xhat
        b_mean_g_xhat = tl.sum(b_dot, 0) / N
        for i in range(0, BLOCK if ONE_TILE else N, BLOCK):
            m_col = i + cols < N
            b_xhat = tl.load(x + i_row * N + i + cols, mask=m_col, other=0.0).to(tl.float32) * b_rstd
            b_dy = tl.load(dy + i_row * N + i + cols, mask=m_col, other=0.0).to(tl.float32)
            if WANT_DX:
                b_g = b_dy
                if HAS_WEIGHT:
                    b_g = b_dy * tl.load(weight + i + cols, mask=m_col, other=0.0).to(tl.float32)
                # dx = rstd * (g - xhat * mean(g * xhat))
                b_dx = (b_g - b_xhat * b_mean_g_xhat) * b_rstd
                tl.store(dx + i_row * N + i + cols, b_dx.to(dx.dtype.element_ty), mask=m_col)
            if WANT_DW:
                if ONE_TILE:
                    b_dw += b_dy * b_xhat
                else:  # the partial row is this program's alone; it stays in L2 between rows
                    b_old = tl.load(p_dweight + i + cols, mask=m_col, other=0.0)
                    tl.store(p_dweight + i + cols, b_old + b_dy * b_xhat, mask=m_col)
    if WANT_DW and ONE_TILE:
        tl.store(p_dweight + cols, b_dw, mask=cols < N)


def _tile(n: int, most: int, per_warp: int) -> tuple[int, int]:
    """(columns a tile, warps)."""
    block = min(triton.next_power_of_2(n), most)
    return block, max(1, block // per_warp)


def forward(x, weight, eps, y, rstd):
    n = x.shape[-1]
    if x.numel() == 0:
        return
    block, warps = _tile(n, _BLOCK, 512)
    _fwd_kernel[(x.numel() // n,)](
        x, weight, y, rstd, n, eps, HAS_WEIGHT=weight is not None, BLOCK=block, ONE_TILE=n <= block, num_warps=warps,
    )  # fmt: skip


def backward(dy, x, weight, rstd, eps, dx, dweight):
    n = x.shape[-1]
    rows = x.numel() // n
    if rows == 0:
        return
    block, warps = _tile(n, _BLOCK_BACKWARD, 256)
    if x.dtype == torch.float32 and n <= block == _BLOCK_BACKWARD:
        warps //= 2  # with all warps, registers are cut to 64 a thread and spill on sm_90
    programs = min(rows, device_programs(x.device))
    partial = None
    if dweight is not None:
        make = torch.empty if n <= block else torch.zeros
        partial = make(programs, n, dtype=torch.float32, device=x.device)
    _bwd_kernel[(programs,)](
        dy, x, weight, rstd, dx, partial, rows, n, programs, HAS_WEIGHT=weight is not None, WANT_DX=dx is not None,
        WANT_DW=dweight is not None, BLOCK=block, ONE_TILE=n <= block, num_warps=warps,
    )  # fmt: skip
    if partial is not None:
        add_partial_rows(partial, dweight)


def compile_cases():
    """Narrow tiles, no weight, one of x's dtype, and a width that no power of two divides."""
    yield {"x": meta(8192, 128), "weight": meta(128)}
    yield {"x": meta(8192, 1600), "weight": meta(1600, dtype=torch.float32)}
    yield {"x": meta(8192, 4096)}
    yield {"x": meta(8192, 1023), "weight": meta(1023)}
