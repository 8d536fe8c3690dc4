"""What the kernels of attention share: operations on tiles, the order of programs, the choice of tiles."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .common import INTERPRETING
from .philox import philox_lanes

__all__ = [
    "Rows", "Tile", "at", "choose_tile", "dot", "heads_in_l2", "kept", "kept_at", "load_rows", "padded", "place",
    "reads_shared", "row_values", "rows_of", "store_rows", "weights",
]  # fmt: skip

_LOG2E = tl.constexpr(1.4426950408889634)
# Bytes of keys and values read at the same time: an H100 has 50 MiB of L2, an A100 40.
_L2_BYTES = 32 << 20


@triton.jit
def place(i_program, tiles, heads, section):
    """(tile, head) of a program: heads go in sections, in each the last tile of every head comes first."""
    i_section = i_program // (section * tiles)
    rest = i_program - i_section * section * tiles
    here = tl.minimum(section, heads - i_section * section)
    return tiles - 1 - rest // here, i_section * section + rest % here


@triton.jit
def at(x, i_batch, i_head, i_row):
    """Address of a row of `Rows`."""
    return x.ptr + i_batch * x.batch + i_head * x.head + i_row * x.row


@triton.jit
def load_rows(base, i_row, stride, n_rows, width, ALL_ROWS: tl.constexpr, ALL_COLS: tl.constexpr,
              ROWS: tl.constexpr, COLS: tl.constexpr):  # fmt: skip
    """Rows i_row on of a (seq, head_dim) matrix, [ROWS, COLS]; 0 outside. ALL_: none is outside."""
    r, c = tl.arange(0, ROWS)[:, None], tl.arange(0, COLS)[None, :]
    p_tile = base + i_row.to(tl.int64) * stride + r * stride + c
    if ALL_ROWS and ALL_COLS:
        return tl.load(p_tile)
    if ALL_ROWS:
        return tl.load(p_tile, mask=c < width, other=0.0)
    if ALL_COLS:
        return tl.load(p_tile, mask=i_row + r < n_rows, other=0.0)
    return tl.load(p_tile, mask=(i_row + r < n_rows) & (c < width), other=0.0)


@triton.jit
def store_rows(base, i_row, stride, n_rows, width, b_tile, ROWS: tl.constexpr, COLS: tl.constexpr):
    """What load_rows reads, written."""
    r, c = tl.arange(0, ROWS)[:, None], tl.arange(0, COLS)[None, :]
    p_tile = base + i_row.to(tl.int64) * stride + r * stride + c
    tl.store(p_tile, b_tile.to(base.dtype.element_ty), mask=(i_row + r < n_rows) & (c < width))


@triton.jit
def dot(b_a, b_b, b_acc=None):
    """b_a @ b_b + b_acc in float32; float32 operands are not rounded to tf32."""
    if INTERPRETING:
        b_a = b_a.to(tl.float32)
        b_b = b_b.to(tl.float32)
    return tl.dot(b_a, b_b, b_acc, input_precision="ieee")


@triton.jit
def weights(b_s, b_shift, scale, PRECISE: tl.constexpr):
    """exp(scale * b_s - b_shift): one multiply-add and an exp2; for float32 with one rounding less."""
    if PRECISE:
        return tl.exp(b_s * scale - b_shift)
    return tl.exp2(b_s * (scale * _LOG2E) - b_shift * _LOG2E)


@triton.jit
def kept(seed, i_batch, i_head, i_m, i_n, threshold, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Dropout's mask, [BLOCK_M, BLOCK_N], a function of absolute positions: the same whatever the tiles."""
    c_row = i_m + tl.arange(0, BLOCK_M)[:, None] + tl.zeros([1, BLOCK_N // 4], tl.int32)
    c_col = i_n // 4 + tl.arange(0, BLOCK_N // 4)[None, :] + tl.zeros_like(c_row)
    return philox_lanes(seed, c_col, c_row, i_head, i_batch) >= threshold


@triton.jit
def kept_at(seed, i_batch, i_head, i, j, threshold):
    """The same at positions i [M, 1] and j [1, N] that begin anywhere: four times the work, one word in four is used."""
    c_col = j // 4 + tl.zeros_like(i)
    c_row = i + tl.zeros_like(j)
    b_0, b_1, b_2, b_3 = tl.philox(
        seed, c_col.to(tl.uint32), c_row.to(tl.uint32), tl.to_tensor(i_head).to(tl.uint32),
        tl.to_tensor(i_batch).to(tl.uint32), n_rounds=10,
    )  # fmt: skip
    b_word = tl.where(j % 2 == 0, tl.where(j % 4 == 0, b_0, b_2), tl.where(j % 4 == 1, b_1, b_3))
    return b_word >= threshold


class Tile(NamedTuple):
    """Rows that a program owns, rows that a step of its loop reads, pipeline stages, warps."""

    own: int
    step: int
    stages: int
    warps: int


# By kernel and bytes of an element: (largest padded head dim, tile); the first that holds the head dim is
# taken. These are the widest for which the compiler spills no register on sm_90, where products read shared memory.
_TILES = {
    ("fwd", 2): ((64, Tile(128, 64, 3, 4)), (128, Tile(128, 64, 3, 8)), (256, Tile(128, 32, 2, 8))),
    ("dkdv", 2): ((32, Tile(64, 64, 3, 4)), (128, Tile(128, 64, 3, 8)), (256, Tile(64, 16, 3, 8))),
    ("dq", 2): ((32, Tile(64, 64, 3, 4)), (128, Tile(128, 64, 3, 8)), (256, Tile(128, 32, 2, 8))),
    ("fwd", 4): ((64, Tile(64, 16, 2, 8)), (128, Tile(64, 16, 2, 8)), (256, Tile(16, 16, 2, 4))),
    ("dkdv", 4): ((64, Tile(32, 16, 2, 8)), (128, Tile(32, 16, 2, 4)), (256, Tile(32, 16, 2, 8))),
    ("dq", 4): ((64, Tile(64, 32, 2, 8)), (128, Tile(32, 16, 2, 8)), (256, Tile(16, 16, 2, 8))),
}
# On sm_80, sm_89 and gfx942 operands take registers; so do, on sm_100, sums that come out of tensor memory to be shaped.
_NARROW_TILES = _TILES | {
    ("fwd", 2): ((64, Tile(128, 64, 3, 4)), (128, Tile(128, 64, 3, 8)), (256, Tile(64, 32, 2, 8))),
    ("dkdv", 2): ((64, Tile(64, 32, 3, 4)), (128, Tile(64, 64, 3, 8)), (256, Tile(64, 16, 3, 8))),
    ("dq", 2): ((32, Tile(64, 32, 3, 4)), (128, Tile(128, 32, 3, 8)), (256, Tile(64, 32, 2, 8))),
    ("dkdv", 4): ((64, Tile(32, 16, 2, 8)), (128, Tile(16, 16, 2, 4)), (256, Tile(32, 16, 2, 8))),
}
_WIDE_BYTES = 200 << 10  # of shared memory: sm_90 and sm_100 have 227 KiB, sm_80 163, sm_89 99, gfx942 64
_INTERPRETED = Tile(32, 16, 1, 1)


def _shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one program may use."""
    properties = triton.runtime.driver.active.utils.get_device_properties(device.index or 0)
    return int(properties["max_shared_mem"])


def reads_shared(device: torch.device) -> bool:
    """Whether tensor cores read operands from shared memory: sm_90 and sm_100."""
    return _shared_memory(device) >= _WIDE_BYTES


def _tensor_memory() -> bool:
    """Whether tensor cores add up in a memory of their own: sm_100."""
    arch = triton.runtime.driver.active.get_current_target().arch
    return isinstance(arch, int) and arch // 10 == 10


def choose_tile(kernel: str, t: torch.Tensor, width: int, rows: int, extras: int) -> Tile:
    """The tile for a kernel, an input, a padded head dim and a number of rows to own, whatever the batch.

    Stages, then steps, then owned rows are cut until two owned tiles and twice `stages` steps fit the shared
    memory.
    """
    if INTERPRETING.value:
        return _INTERPRETED
    size, room = t.element_size(), _shared_memory(t.device)
    narrow = not reads_shared(t.device) or (extras > 0 and _tensor_memory())
    table = _NARROW_TILES if narrow else _TILES
    own, step, stages, warps = next(tile for limit, tile in table[kernel, size] if width <= limit)
    if extras:  # dropout, biases, a soft cap, segments, padded head dims: they take registers
        # The transposed scores of dK and dV, beside their two sums, leave the fewest; on sm_100 none for a pipeline.
        fewest = kernel == "dkdv" and extras > (1 if width > 64 else 2)
        if fewest:
            stages = 1 if _tensor_memory() else stages if width > 64 else 2
        step = max(16, step // (4 if (fewest and stages > 1) or extras > 4 else 2))
        own = min(own, 64) if narrow or (fewest and extras > 3) else own
        own = min(own, 32) if kernel == "dkdv" and width > 128 else own
        warps = 8
    own = min(own, max(16, triton.next_power_of_2(rows)))

    def needed() -> int:
        statistics, mask = 8 * stages * step, own * step * min(extras, 2)
        return 2 * (own + stages * step) * width * size + statistics + mask

    while needed() > room and (stages, step, own) != (1, 16, 16):
        if stages > 1:
            stages -= 1
        elif step > 16:
            step //= 2
        else:
            own //= 2
    return Tile(own, step, stages, warps)


def heads_in_l2(rows: int, width: int, element_size: int, heads: int) -> int:
    """How many of `heads` heads of so many rows the L2 cache holds, at least 1."""
    return max(1, min(_L2_BYTES // max(1, rows * width * element_size), heads))


class Rows(NamedTuple):
    """A (batch, heads, seq, width) tensor or, packed, (total, heads, width), or one number a row: where rows are."""

    ptr: torch.Tensor | None
    batch: int
    head: int
    row: int


def rows_of(t: torch.Tensor | None) -> Rows:
    """Rows of a tensor with a contiguous last dimension; of nothing for None."""
    if t is None:
        return Rows(None, 0, 0, 0)
    return Rows(t, *t.stride()[:3]) if t.dim() == 4 else Rows(t, 0, t.stride(1), t.stride(0))


def row_values(t: torch.Tensor | None) -> Rows:
    """The same of one number a row: (batch, heads, seq) or, packed, (heads, total)."""
    if t is None:
        return Rows(None, 0, 0, 0)
    return Rows(t, *t.stride()) if t.dim() == 3 else Rows(t, 0, *t.stride())


def padded(width: int) -> int:
    """The power of two that holds a head dim; products need 16."""
    return max(16, triton.next_power_of_2(width))
