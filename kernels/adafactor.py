"""Adafactor on one parameter in Triton: norm and decision (kernels/optimizer.py), then moments, size, update.

Moments of a matrix: one program a row sums its squares and those of its weights; programs over tiles of columns and
stripes of rows leave partial sums of the columns, which a program for each tile of columns adds in order. Moments of a
vector: one tile a program. Finish: one program adds what the rows (or tiles) left and decides on mean and weights' size.
Size: a fixed number of programs over tiles of the update. Update: one tile a program, which adds those partial sums
again, so that no launch is needed for it. No atomics. Reads the gradient four times (once less with a norm given, once
more for a matrix, whose columns and rows are summed apart) and the weights twice.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .common import meta
from .optimizer import TILE, clipped, decide, finish, random_words, store

__all__ = ["compile_cases", "forward"]

_STRIPES = 32  # of rows, for the sums of columns
_SIZES = 256  # programs that sum the squares of the update
_ROWS: tl.constexpr = tl.constexpr(16)  # rows at a time of a stripe
_COLUMNS = 64  # columns a program


@triton.jit
def _row_kernel(master, grad, row_var, step, skipped, factors, weights, columns, beta2_decay, TILE: tl.constexpr):
    """A row's moment and the sum of squares of its weights."""
    i_row = tl.program_id(0).to(tl.int64)
    i_lane = tl.arange(0, TILE)
    b_sum = tl.zeros([TILE], tl.float64)
    b_weights = tl.zeros([TILE], tl.float64)
    for i in range(0, columns, TILE):
        m = i + i_lane < columns
        b_g = clipped(grad, i_row * columns + i + i_lane, m, factors, factors, 1, 0).to(tl.float64)
        b_p = tl.load(master + i_row * columns + i + i_lane, mask=m, other=0.0).to(tl.float64)
        b_sum += b_g * b_g
        b_weights += b_p * b_p
    tl.store(weights + i_row, tl.sum(b_weights, 0))
    if tl.load(skipped) == 0.0:
        b_keep = _keep(step, beta2_decay)
        b_new = tl.load(row_var + i_row) * (1.0 - b_keep) + tl.sum(b_sum, 0) / columns * b_keep
        tl.store(row_var + i_row, b_new.to(tl.float32))


@triton.jit
def _keep(step, beta2_decay):
    """t ** beta2_decay in float64, of the step just counted."""
    return tl.exp(tl.log(tl.load(step).to(tl.float64)) * beta2_decay)


@triton.jit
def _stripe_kernel(grad, factors, partial, rows, columns, STRIPES, COLUMNS: tl.constexpr):
    """Partial sums of a tile of columns over every STRIPES-th group of rows."""
    i_column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    b_sum = tl.zeros([_ROWS, COLUMNS], tl.float64)
    for i in range(tl.program_id(1) * _ROWS, rows, STRIPES * _ROWS):
        i_row = i + tl.arange(0, _ROWS)
        m = (i_row < rows)[:, None] & (i_column < columns)[None, :]
        i_g = i_row.to(tl.int64)[:, None] * columns + i_column[None, :]
        b_g = clipped(grad, i_g, m, factors, factors, 1, 0).to(tl.float64)  # [_ROWS, COLUMNS]
        b_sum += b_g * b_g
    i_out = tl.program_id(1).to(tl.int64) * columns + i_column
    tl.store(partial + i_out, tl.sum(b_sum, 0), mask=i_column < columns)


@triton.jit
def _column_kernel(partial, col_var, step, skipped, rows, columns, STRIPES, beta2_decay, COLUMNS: tl.constexpr):
    """Moments of a tile of columns."""
    i_column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    m = i_column < columns
    b_sum = tl.zeros([COLUMNS], tl.float64)
    for i in range(0, STRIPES):
        b_sum += tl.load(partial + i * columns + i_column, mask=m, other=0.0)
    if tl.load(skipped) == 0.0:
        b_keep = _keep(step, beta2_decay)
        b_new = tl.load(col_var + i_column, mask=m, other=0.0) * (1.0 - b_keep) + b_sum / rows * b_keep
        tl.store(col_var + i_column, b_new.to(tl.float32), mask=m)


@triton.jit
def _vector_kernel(master, grad, variance, step, skipped, factors, weights, n, beta2_decay, TILE: tl.constexpr):
    """Moments of a tile of a vector and the sum of squares of its weights."""
    i = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    m = i < n
    b_p = tl.load(master + i, mask=m, other=0.0).to(tl.float64)
    tl.store(weights + tl.program_id(0), tl.sum(b_p * b_p, 0))
    if tl.load(skipped) == 0.0:
        b_g = clipped(grad, i, m, factors, factors, 1, 0).to(tl.float64)
        b_keep = _keep(step, beta2_decay)
        b_new = tl.load(variance + i, mask=m, other=0.0) * (1.0 - b_keep) + b_g * b_g * b_keep
        tl.store(variance + i, b_new.to(tl.float32), mask=m)


@triton.jit
def _finish_kernel(row_var, weights, lr, step, scalars, rows, PARTS, n, eps1, eps2, MATRIX: tl.constexpr,
                   TILE: tl.constexpr):  # fmt: skip
    """Scalars: max(mean(row_var), eps1) and alpha."""
    i_lane = tl.arange(0, TILE)
    b_mean = tl.zeros([TILE], tl.float64)
    b_weights = tl.zeros([TILE], tl.float64)
    for i in range(0, PARTS, TILE):
        b_weights += tl.load(weights + i + i_lane, mask=i + i_lane < PARTS, other=0.0)
        if MATRIX:
            b_mean += tl.load(row_var + i + i_lane, mask=i + i_lane < rows, other=0.0).to(tl.float64)
    b_t = tl.load(step).to(tl.float64)
    b_pace = tl.minimum(tl.load(lr).to(tl.float64), 1.0 / tl.sqrt(b_t))
    tl.store(scalars, tl.maximum(tl.sum(b_mean, 0) / rows, eps1).to(tl.float32))
    tl.store(scalars + 1, (tl.maximum(tl.sqrt(tl.sum(b_weights, 0) / n), eps2) * b_pace).to(tl.float32))


@triton.jit
def _update(grad, row_var, col_var, variance, factors, scalars, i, m, columns, least, MATRIX: tl.constexpr):
    """u [TILE]."""
    b_g = clipped(grad, i, m, factors, factors, 1, 0)
    if MATRIX:
        b_v = tl.load(row_var + i // columns, mask=m, other=1.0) / tl.load(scalars)
        b_v *= tl.load(col_var + i % columns, mask=m, other=1.0)
    else:
        b_v = tl.load(variance + i, mask=m, other=1.0)
    return b_g / tl.sqrt(tl.maximum(b_v, least))


@triton.jit
def _size_kernel(grad, row_var, col_var, variance, factors, scalars, sizes, n, columns, PROGRAMS, least,
                 MATRIX: tl.constexpr, TILE: tl.constexpr):  # fmt: skip
    i_lane = tl.arange(0, TILE)
    b_sum = tl.zeros([TILE], tl.float64)
    for start in range(tl.program_id(0).to(tl.int64) * TILE, n, PROGRAMS * TILE):
        i = start + i_lane
        b_u = _update(grad, row_var, col_var, variance, factors, scalars, i, i < n, columns, least, MATRIX)
        b_sum += tl.where(i < n, b_u.to(tl.float64) * b_u, 0.0)
    tl.store(sizes + tl.program_id(0), tl.sum(b_sum, 0))


@triton.jit
def _sweep_kernel(master, grad, row_var, col_var, variance, param, seed, step, skipped, factors, scalars, sizes, n,
                  columns, PROGRAMS, least, d, MATRIX: tl.constexpr, HAS_PARAM: tl.constexpr,
                  STOCHASTIC: tl.constexpr, ZERO_GRAD: tl.constexpr, SIZES: tl.constexpr,
                  TILE: tl.constexpr):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    m = i < n
    if tl.load(skipped) == 0.0:
        i_size = tl.arange(0, SIZES)
        b_rms = tl.sqrt(tl.sum(tl.load(sizes + i_size, mask=i_size < PROGRAMS, other=0.0), 0) / n)
        b_pace = (tl.load(scalars + 1) / tl.maximum(b_rms / d, 1.0)).to(tl.float32)
        b_u = _update(grad, row_var, col_var, variance, factors, scalars, i, m, columns, least, MATRIX)
        b_p = tl.load(master + i, mask=m, other=0.0).to(tl.float32)
        b_p -= tl.load(factors) * b_p
        b_p -= b_pace * b_u
        b_words = i
        if STOCHASTIC:
            b_words = random_words(seed, step, 1 if MATRIX else 0, TILE)
        store(master, i, m, b_p, b_words, STOCHASTIC, UPPER=not MATRIX)
        if HAS_PARAM:
            store(param, i, m, b_p, b_words, False)
    finish(grad, i, m, ZERO_GRAD)


def forward(master, grad, row_var, col_var, variance, step, param, seed, norm, lr, beta2_decay, eps1, eps2, d,
            weight_decay, max_norm, zero_grad, grad_norm, skipped):  # fmt: skip
    n, matrix, device = master.numel(), master.dim() == 2, master.device
    shared = decide(
        grad, step, param, None, seed, norm, None, lr, weight_decay, max_norm, zero_grad, grad_norm, skipped
    )
    if not n:
        return
    factors = shared["factors"]
    rows, columns = master.shape if matrix else (1, n)
    tiles = triton.cdiv(n, TILE)
    parts, programs, least = rows if matrix else tiles, min(tiles, _SIZES), eps1 * eps1
    weights = torch.empty(parts, dtype=torch.float64, device=device)
    sizes = torch.empty(programs, dtype=torch.float64, device=device)
    scalars = torch.empty(2, dtype=torch.float32, device=device)
    if matrix:
        stripes, blocks = min(triton.cdiv(rows, _ROWS.value), _STRIPES), triton.cdiv(columns, _COLUMNS)
        partial = torch.empty(stripes * columns, dtype=torch.float64, device=device)
        _row_kernel[(rows,)](
            master, grad, row_var, step, skipped, factors, weights, columns, beta2_decay, TILE=TILE, num_warps=4
        )
        _stripe_kernel[(blocks, stripes)](grad, factors, partial, rows, columns, stripes, COLUMNS=_COLUMNS, num_warps=4)
        _column_kernel[(blocks,)](
            partial, col_var, step, skipped, rows, columns, stripes, beta2_decay, COLUMNS=_COLUMNS, num_warps=2
        )
    else:
        _vector_kernel[(tiles,)](
            master, grad, variance, step, skipped, factors, weights, n, beta2_decay, TILE=TILE, num_warps=4
        )
    _finish_kernel[(1,)](
        row_var, weights, lr, step, scalars, rows, parts, n, eps1, eps2, MATRIX=matrix, TILE=TILE, num_warps=4
    )
    _size_kernel[(programs,)](
        grad, row_var, col_var, variance, factors, scalars, sizes, n, columns, programs, least, MATRIX=matrix,
        TILE=TILE, num_warps=4,
    )  # fmt: skip
    _sweep_kernel[(tiles,)](
        master, grad, row_var, col_var, variance, param, seed, step, skipped, factors, scalars, sizes, n, columns,
        programs, least, d, MATRIX=matrix, HAS_PARAM=param is not None, STOCHASTIC=seed is not None,
        ZERO_GRAD=zero_grad, SIZES=_SIZES, TILE=TILE, num_warps=4,
    )  # fmt: skip


def compile_cases():
    """GPT-2's embedding with a bfloat16 copy, in float32 and in bfloat16; a vector of each."""
    f32 = torch.float32
    for shape in ((50304, 768), (3072,)):
        moments = dict.fromkeys(("row_var", "col_var", "variance"))
        if len(shape) == 2:
            moments |= {"row_var": meta(shape[0], dtype=f32), "col_var": meta(shape[1], dtype=f32)}
        else:
            moments["variance"] = meta(*shape, dtype=f32)
        scalars = {"step": meta(dtype=f32), "lr": meta(dtype=f32)}
        wide = {k: meta(*shape, dtype=f32) for k in ("master", "grad")} | moments | scalars
        narrow = {k: meta(*shape) for k in ("master", "grad")} | moments | scalars
        yield wide | {"param": meta(*shape), "max_norm": 1.0, "zero_grad": True}
        yield wide
        yield narrow | {"seed": meta(1, dtype=torch.int64), "zero_grad": True}
